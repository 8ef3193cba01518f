"""A file is the old one or the new one, whole, and nothing else is left."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from capcur_jax import files
from capcur_jax.errors import InputError


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def happened(monkeypatch):
    """What was done to files, in order: flushed (how many bytes there were) and renamed."""
    happened, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda at: (fsync(at), happened.append(("flushed", os.fstat(at).st_size))))
    monkeypatch.setattr(os, "replace", lambda *paths: (replace(*paths), happened.append("renamed")))
    return happened


def test_a_file_and_its_folders_are_made(tmp_path, happened):
    files.write_atomically(tmp_path / "new" / "folder" / "a.txt", b"12345")
    assert (tmp_path / "new" / "folder" / "a.txt").read_bytes() == b"12345"
    assert happened == [("flushed", 5), "renamed"]
    files.write_atomically(tmp_path / "new" / "folder" / "a.txt", b"678", sync=False)
    assert (tmp_path / "new" / "folder" / "a.txt").read_bytes() == b"678"
    assert happened[2:] == ["renamed"] and names(tmp_path / "new" / "folder") == ["a.txt"]


def test_a_work_directory_is_no_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--workdir=s3://bucket/run: a bucket's address"):
        files.prepare_workdir("s3://bucket/run", "staged")
    assert files.prepare_workdir("run", "staged").is_dir() and names(tmp_path) == ["run"]


def test_a_streamed_file_is_flushed_whole_before_it_takes_the_place(tmp_path, happened):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.replacing(path) as temporary:
        with temporary.open("w") as file:
            for number in range(1000):
                file.write(f"{number}\n")
        assert path.read_text() == "old" and temporary.parent == path.parent
    assert path.read_text() == "".join(f"{number}\n" for number in range(1000)) and names(tmp_path) == ["a.txt"]
    assert happened == [("flushed", path.stat().st_size), "renamed"]


@pytest.mark.parametrize("failing", ["the block", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
@pytest.mark.parametrize("old", [b"old", None])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing, error, old):
    path = tmp_path / "a.txt"
    if old:
        path.write_bytes(old)

    def fail(*_):
        raise error

    if failing != "the block":
        monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)), files.replacing(path) as temporary:
        temporary.write_bytes(b"half of the ne")
        if failing == "the block":
            fail()
    assert names(tmp_path) == (["a.txt"] if old else []) and (not old or path.read_bytes() == old)


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    code = (
        "import os, sys, pathlib; from capcur_jax import files\n"
        "with files.replacing(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_readers_see_whole_files_while_several_write(tmp_path):
    path, contents = tmp_path / "a.bin", [bytes([number]) * 100_000 for number in range(4)]
    files.write_atomically(path, contents[0])

    def write(content):
        for _ in range(20):
            files.write_atomically(path, content, sync=False)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    seen = [path.read_bytes()]
    while any(thread.is_alive() for thread in threads):
        seen.append(path.read_bytes())
    assert set(seen) <= set(contents) and names(tmp_path) == ["a.bin"]


def test_a_folder_s_names_can_be_synced(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda at: (fsync(at), synced.append(os.fstat(at).st_ino)))
    files.sync_to_disk(tmp_path)
    assert synced == [tmp_path.stat().st_ino]
