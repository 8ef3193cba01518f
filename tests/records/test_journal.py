"""The journal: what was added is there after a kill, what was torn is not, and other settings are refused."""

import json

import pytest

from capcur_jax.errors import InputError
from capcur_jax.records.journal import Journal, key_of

SETTINGS = {"model": "writer", "temperature": 0.0, "words": ["a", "b"]}


def test_records_come_back_and_the_last_of_a_key_counts(tmp_path):
    path = tmp_path / "new folder" / "j.jsonl"
    with Journal(path, SETTINGS) as journal:
        assert journal.done == {}
        journal.add("a", {"text": "né\ud800\n"})  # half of a surrogate pair, as a model may send it
        journal.add("b", [1])
        journal.add("b", [1, 2])
        assert journal.done["b"] == [1, 2]
    with Journal(path, SETTINGS) as journal:
        assert journal.done == {"a": {"text": "né\ud800\n"}, "b": [1, 2]}


def test_each_record_is_on_disk_before_add_returns(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", SETTINGS)
    journal.add("a", 1)
    assert (tmp_path / "j.jsonl").read_text().endswith('{"key": "a", "record": 1}\n')
    journal.close()


def test_it_goes_on_from_every_byte_at_which_a_kill_may_have_cut_it(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, SETTINGS) as journal:
        for i in range(3):
            journal.add(f"row {i}", {"text": "x" * i})
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with Journal(path, SETTINGS) as journal:
            assert len(journal.done) == max(0, whole[:length].count(b"\n") - 1)
            journal.add("more", 1)
        with Journal(path, SETTINGS) as journal:
            assert journal.done["more"] == 1
        assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_spoilt_line_in_the_middle_is_not_done(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.add("a", 1)
    with path.open("ab") as file:
        file.write(b"\0\0\0\n[1]\n" + b"[" * 100_000 + b'\n{"key": 3, "record": 4}\n{"key": "b", "record": 5}\n')
    with Journal(path, SETTINGS) as journal:
        assert journal.done == {"a": 1, "b": 5}


def test_other_settings_are_named_with_the_remedy(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.add("a", 1)
    with pytest.raises(InputError) as error:
        Journal(path, {"model": "another", "temperature": 0.0, "words": ["a", "b"], "seed": 1})
    said = str(error.value)
    assert str(path) in said and 'model "writer", now "another"' in said and "seed (not set), now 1" in said
    assert "temperature" not in said and "delete this file" in said


def test_settings_without_an_answer_bind_nobody(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, SETTINGS).close()
    with Journal(path, {"model": "another"}) as journal:
        journal.add("a", 1)
    with Journal(path, {"model": "another"}) as journal:
        assert journal.done == {"a": 1} and path.read_bytes().count(b"settings") == 1


@pytest.mark.parametrize("content", [b'{"id": "a", "problem": "q"}\n', b"text\n", b"no line end", b"[]\n", b"\xff\n"])
def test_another_file_is_left_alone(tmp_path, content):
    path = tmp_path / "j.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="another file"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == content


def test_one_process_at_a_time(tmp_path):
    with Journal(tmp_path / "j.jsonl", SETTINGS), pytest.raises(InputError, match="another process"):
        Journal(tmp_path / "j.jsonl", SETTINGS)
    Journal(tmp_path / "j.jsonl", SETTINGS).close()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        Journal(tmp_path / "file" / "j.jsonl", SETTINGS)


def test_keys_depend_on_all_of_a_row():
    assert key_of("a", "x", "y") == key_of("a", "x", "y")
    assert len({key_of("a", "x", "y"), key_of("a", "xy"), key_of("b", "x", "y"), key_of("a", "x", "z")}) == 4
