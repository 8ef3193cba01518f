"""Kinds of files: what is read, and the one line that says what to do with the others."""

import gzip
import json

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from capcur_jax.data.problem import Drop
from capcur_jax.data.rows import read_problems, read_rows
from capcur_jax.errors import InputError
from tests.data.tables import table, written

ROWS = [{"problem": f"What is {i} + 2?", "answer": str(i + 2)} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def arrow(path, rows=ROWS, stream=True):
    """As Hugging Face's datasets writes it, or as a random access file."""
    data = pyarrow.Table.from_pylist(rows)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as file, new(file, data.schema) as writer:
        writer.write_table(data, max_chunksize=2)
    return path


def saved(folder):
    """As `Dataset.save_to_disk` leaves it: two parts, in the order that state.json says."""
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, rows in zip(names, (ROWS[:3], ROWS[3:]), strict=True):
        arrow(folder / name, rows)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def made(path):
    """The rows in a file of the kind that its name says."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name.endswith(".arrow"):
        arrow(path)
    elif "." not in name:
        saved(path)
    else:
        content = json.dumps(ROWS, indent=1).encode() if ".json." in f"{name}." else LINES
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", [
    "rows.jsonl", "rows.JSONL", "rows.txt", "rows.json", "rows.jsonl.gz", "rows.json.gz", "rows.gz", "rows.parquet",
    "rows.PARQUET", "rows.arrow", "rows",
])  # fmt: skip
def test_every_kind_gives_the_same_rows(tmp_path, name):
    problems, drops = read_problems(made(tmp_path / name))
    assert not drops and [p.problem for p in problems] == [row["problem"] for row in ROWS]
    assert [p.id for p in problems] == [f"rows-{n}" for n in range(1, 6)]


def test_the_docs_name_every_kind():
    text = " ".join(cell for row in table("name ends in (any case)") for cell in row)
    for name in (".jsonl", ".json a list", ".jsonl.gz", ".json.gz", ".parquet", ".arrow", "save_to_disk", ".csv"):
        assert name in text


def test_an_arrow_file_that_is_no_stream_is_read(tmp_path):
    assert len(read_problems(arrow(tmp_path / "rows.arrow", stream=False))[0]) == 5


def test_json_lines_in_a_json_file_are_read(tmp_path):
    (tmp_path / "rows.json").write_bytes(LINES)
    assert len(read_problems(tmp_path / "rows.json")[0]) == 5


@pytest.mark.parametrize(("name", "content", "words"), [
    ("rows.csv", b"problem,answer\n", "write its rows as .jsonl or .parquet"),
    ("rows.zip", b"PK", "unpack it"),
    ("rows.parquet.gz", b"", "unpack it first"),
    ("rows.json", b'{"data": [{"problem": "p"}]}', "give a list of rows"),
    ("rows.json", b'{\n "data": [\n {"problem": "p"}]}', "give a list of rows"),
    ("rows.json", b'"text"', "not a JSON list"),
    ("rows.jsonl.gz", LINES, "no whole gzip file"),
    ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "no whole gzip file"),
    ("rows.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)[:-20], "no whole gzip file"),
    ("rows.json.gz", gzip.compress(json.dumps(ROWS * 9000).encode(), mtime=0)[:-20], "no whole gzip file"),
    ("rows.arrow", b"no arrow at all", "no readable Arrow file"),
    ("rows.parquet", b"", "no readable Parquet file"),
])  # fmt: skip
def test_other_files_say_what_to_do(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_rows(tmp_path / name))
    assert words in str(caught.value) and str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_several_splits_names_them(tmp_path):
    for split in ("train", "test"):
        saved(tmp_path / "set" / split)
    with pytest.raises(InputError, match=r"it holds test, train; give one of them"):
        list(read_rows(tmp_path / "set"))
    assert len(read_problems(tmp_path / "set" / "train")[0]) == 5


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.arrow", "rows.json", "rows.jsonl.gz"])
def test_a_git_lfs_pointer_says_what_it_is(tmp_path, name):
    file = written(tmp_path / name, "version https://git-lfs.github.com/spec/v1", "oid sha256:abc", "size 1")
    (drop,) = read_rows(file)
    assert drop.reason == "Git LFS pointer" and "git lfs pull" in drop.detail and str(file) in drop.where
    with pytest.raises(InputError, match="git lfs pull"):
        read_problems(file)


def columns(path, **more):
    """Two rows with these columns besides."""
    kept = {"problem": pyarrow.array(["1 + 1?", "2 + 2?"]), "answer": pyarrow.array(["2", "4"])}
    data = pyarrow.table(kept | more)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(data, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, data.schema) as writer:
            writer.write_table(data)
    return path


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_column_that_is_there_twice_is_named(tmp_path, name):
    data = pyarrow.table([["p"], ["1"], ["2"]], names=["problem", "answer", "answer"])
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(data, tmp_path / name)
    else:
        with pyarrow.OSFile(str(tmp_path / name), "wb") as file, pyarrow.ipc.new_stream(file, data.schema) as writer:
            writer.write_table(data)
    with pytest.raises(InputError, match=r"rows\.\w+: more than one column is called 'answer'; "):
        list(read_rows(tmp_path / name))


ODD = pyarrow.array([1, 2], pyarrow.timestamp("ns"))  # nanoseconds, which Python's times have not
MARS = pyarrow.array([1, 2], pyarrow.timestamp("us", tz="Mars/Base"))
OFFSETS = pyarrow.array([0, 1, 2], pyarrow.int32())


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
@pytest.mark.parametrize(("column", "value"), [
    (pyarrow.StructArray.from_arrays([ODD], ["at"]), {"at": "1970-01-01 00:00:00.000000001"}),
    (pyarrow.ListArray.from_arrays(OFFSETS, ODD), ["1970-01-01 00:00:00.000000001"]),
    (pyarrow.MapArray.from_arrays(OFFSETS, pyarrow.array(["a", "b"]), ODD), [["a", "1970-01-01 00:00:00.000000001"]]),
    (MARS, "1970-01-01 00:00:00.000001Z"),
    (pyarrow.StructArray.from_arrays([MARS], ["at"]), {"at": "1970-01-01 00:00:00.000001Z"}),
])  # fmt: skip
def test_times_that_python_has_not_are_texts(tmp_path, name, column, value):
    problems, drops = read_problems(columns(tmp_path / name, made=column))
    assert not drops and len(problems) == 2 and problems[0].metadata == {"made": value}
    assert not problems[0].repaired


def test_an_interval_in_another_column_costs_nothing(tmp_path):
    interval = pyarrow.array([pyarrow.MonthDayNano([1, 2, 3])] * 2)
    problems, drops = read_problems(columns(tmp_path / "rows.arrow", span=interval))
    assert not drops and len(problems) == 2 and problems[0].metadata["span"]


def no_text():
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"\xff", b"fine"]).buffers())


@pytest.mark.parametrize("key", ["note", "metadata"])
def test_another_value_that_cannot_be_read_is_left_out_and_counted(tmp_path, key):
    more = {"note": no_text()} if key == "note" else {"metadata": pyarrow.StructArray.from_arrays([no_text()], ["a"])}
    problems, drops = read_problems(columns(tmp_path / "rows.parquet", **more))
    assert not drops and [p.answer for p in problems] == ["2", "4"] and problems[0].metadata == {}
    assert problems[0].repaired == (f"{key!r} can't be read and is left out",) and not problems[1].repaired
    assert problems[1].metadata == ({"note": "fine"} if key == "note" else {"a": "fine"})


@pytest.mark.parametrize("key", ["answers", "source", "img"])
def test_a_needed_value_that_cannot_be_read_costs_its_row(tmp_path, key):
    value = pyarrow.ListArray.from_arrays(OFFSETS, no_text()) if key == "answers" else no_text()
    drops = [row for row in read_rows(columns(tmp_path / "rows.parquet", **{key: value})) if isinstance(row, Drop)]
    assert drops[0].reason == "unreadable row" and f"`{key}`" in drops[0].detail
