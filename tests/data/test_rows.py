"""Problem files: what is read, what is skipped with which words, and that what is written comes back equal."""

import dataclasses
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from capcur_jax.answers.kinds import answer_type_of
from capcur_jax.data import problem as problem_lib
from capcur_jax.data import rows as rows_lib
from capcur_jax.data.built import build_set
from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import Tally, read_problems, read_rows, write_rows
from capcur_jax.errors import InputError


def _write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_published_row_is_read_as_it_is(tmp_path):
    row = {"problem": "<image>How many?", "answer": "A", "images": ["images/a.jpg"], "pass_rate": 0.5}
    row |= {"predictions": ["A", None], "correctness": [1, 0], "split": "train", "box": {"x": [1, 2.5]}}
    problems, skipped = read_problems(_write(tmp_path / "perception.jsonl", row), capability="perception")
    (problem,), image = problems, str(tmp_path / "images" / "a.jpg")
    expected = Problem(
        "perception-1", "<image>How many?", "A", (image,), "perception", answer_type="letter", pass_rate=0.5,
        predictions=("A", ""), correctness=(1.0, 0.0), metadata={"split": "train", "box": {"x": [1, 2.5]}},
    )  # fmt: skip
    assert problem == expected and skipped == []


def _png(tmp_path, color="red"):
    path = tmp_path / f"{color}.png"
    Image.new("RGB", (4, 4), color).save(path)
    return path


def test_parquet_of_easyr1_is_read_and_its_images_are_unpacked_once(tmp_path):
    """The schema of hiyouga/geometry3k: images as Hugging Face's writers store them."""
    image, folder = _png(tmp_path).read_bytes(), tmp_path / "unpacked"
    rows = [
        {"images": [{"bytes": image, "path": None}], "problem": "<image>Find x.", "answer": "3"},
        {"images": [], "problem": "Find y.", "answer": "y = 2"},
        {"images": [{"bytes": None, "path": "red.png"}], "problem": "Find z.", "answer": "top left"},
        {"images": [{"bytes": image, "path": "a.png"}], "problem": "<image><image>Find.", "answer": "1"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    problems, skipped = read_problems(tmp_path / "train.parquet", "visual", images=folder)
    assert [p.id for p in problems] == ["train-1", "train-2", "train-3"]
    assert [p.answer_type for p in problems] == ["number", "expression", "word"]
    (unpacked,) = folder.iterdir()
    assert problems[0].images == (str(unpacked),) and unpacked.read_bytes() == image
    assert problems[2].images == (str(tmp_path / "red.png"),)
    assert skipped[0].where.endswith("train.parquet, row 4") and skipped[0].reason == "marks and images differ"
    before = unpacked.stat().st_mtime_ns
    assert read_problems(tmp_path / "train.parquet", "visual", images=folder)[0] == problems
    assert unpacked.stat().st_mtime_ns == before and len(list(folder.iterdir())) == 1


def test_times_in_parquet_are_texts_and_a_broken_text_costs_its_row(tmp_path):
    """Nanoseconds, as pandas writes them, are beyond Python's own; a byte that is no UTF-8 once ended the reading."""
    texts = pyarrow.array([f"q{i}".encode() for i in range(70)] + [b"\xff\xfe", b"last"], pyarrow.binary())
    columns = {
        "problem": pyarrow.Array.from_buffers(pyarrow.string(), 72, texts.buffers()),
        "answer": ["1"] * 72,
        "made": pyarrow.array(range(72), pyarrow.timestamp("ns")),
        "until": pyarrow.array([2**52] * 72, pyarrow.duration("s")),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    problems, skipped = read_problems(tmp_path / "rows.parquet")
    assert [p.problem for p in problems] == [f"q{i}" for i in range(70)] + ["last"]
    assert problems[1].metadata == {"made": "1970-01-01 00:00:00.000000001", "until": str(2**52)}
    (drop,) = skipped
    assert drop.where.endswith("rows.parquet, row 71") and drop.reason == "unreadable row" and "problem" in drop.detail


def test_rows_of_a_broken_part_of_a_parquet_file_are_counted_one_by_one(tmp_path):
    rows = [{"problem": f"{i} " + "?" * 50, "answer": "1"} for i in range(300)]
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=100, use_dictionary=False)
    start = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content = file.read_bytes()
    file.write_bytes(content[:start] + b"\xff" * 64 + content[start + 64 :])
    problems, skipped = read_problems(file)
    assert [p.id for p in problems] == [f"rows-{n}" for n in [*range(1, 101), *range(201, 301)]]
    assert [drop.where.rpartition(" ")[2] for drop in skipped] == [str(n) for n in range(101, 201)]
    assert {drop.reason for drop in skipped} == {"unreadable row"}


def test_parquet_round_trip_holds_the_images(tmp_path):
    whole = Problem(
        "a", "<image>Which?", "B", (str(_png(tmp_path)),), "perception", "detail", None, "letter", "docci", 0.25,
        {"model": "base", "samples": 4}, ("B", "A"), (1.0, 0.0), {"caption": "A red square.", "box": [1, 2]},
    )  # fmt: skip
    text = Problem("b", "2 + 2?", "4", capability="text", response="4")
    assert write_rows(tmp_path / "rows.parquet", [whole, text]) == 2
    (tmp_path / "red.png").unlink()
    problems, skipped = read_problems(tmp_path / "rows.parquet", images=tmp_path / "unpacked")
    assert skipped == [] and problems[1] == text
    assert dataclasses.replace(problems[0], images=whole.images) == whole
    with Image.open(problems[0].images[0]) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
    write_rows(tmp_path / "rows.jsonl", problems)
    assert read_problems(tmp_path / "rows.jsonl")[0] == problems


def test_file_that_is_no_parquet_and_folder_that_takes_no_images_are_errors(tmp_path):
    (tmp_path / "rows.parquet").write_text("PAR1 not at all")
    with pytest.raises(InputError, match="no readable Parquet file"):
        read_problems(tmp_path / "rows.parquet")
    write_rows(tmp_path / "good.parquet", [Problem("a", "p", "1", (str(_png(tmp_path)),))])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="CAPCUR_IMAGES"):
        read_problems(tmp_path / "good.parquet", images=tmp_path / "file")
    with pytest.raises(InputError, match=r"must end in \.jsonl or \.parquet"):
        write_rows(tmp_path / "rows.json", [])


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("B", "letter"), ("(C)", "letter"), ("12", "number"), ("-1.5", "number"), (r"\frac{1}{2}", "number"),
        ("3,000", "number"), ("50%", "number"), ("top left", "word"), ("yes", "word"), ("x + 1", "expression"),
        (r"\sqrt{2}", "expression"), ("x = 5", "expression"), ("", ""), ("a" * 9999, "expression"),
    ],
)  # fmt: skip
def test_answer_types(answer, kind):
    assert answer_type_of(answer) == kind


@pytest.mark.parametrize(
    ("given", "answer", "kept"),
    [
        ("letter", "b", True), ("number", "5 cm", True), ("expression", "5", True), ("word", "A", True),
        ("letter", "12", False), ("number", "x + 1", False), ("word", "12", False), ("choice", "A", False),
    ],
)  # fmt: skip
def test_given_answer_type_must_fit_the_answer(tmp_path, given, answer, kept):
    good = {"problem": "p", "answer": "1"}
    row = {"problem": "p", "answer": answer, "answer_type": given}
    problems, skipped = read_problems(_write(tmp_path / "rows.jsonl", good, row))
    assert [p.answer_type for p in problems[1:]] == [given] * kept
    assert [drop.reason for drop in skipped] == ["bad answer_type"] * (not kept)


def test_tally_counts_all(tmp_path):
    rows = [{"problem": "p", "answer": "1"}, {"problem": "p"}, {"answer": "1"}, {"problem": "q", "answer": ""}]
    tally = Tally(shown=1)
    assert len(list(tally.kept(read_rows(_write(tmp_path / "rows.jsonl", *rows))))) == 1
    assert tally.summary() == {"rows": 4, "kept": 1, "dropped": {"no answer": 2, "no problem": 1}}
    assert [str(drop).split(": ")[1] for drop in tally.examples] == [
        "`answer` is missing or empty; give the gold answer (or a `response`, for SFT)"
    ]


@pytest.mark.parametrize(
    ("given", "images"),
    [({}, ()), ({"images": None}, ()), ({"images": "a.png"}, ("a.png",)), ({"images": ["b/../a.png"]}, ("a.png",))],
)
def test_images_may_be_missing_one_text_or_a_list(tmp_path, given, images):
    problems, _ = read_problems(_write(tmp_path / "rows.jsonl", {"problem": "p", "answer": "1"} | given))
    assert problems[0].images == tuple(str(tmp_path / image) for image in images)


def test_row_keeps_its_own_capability_and_absolute_image(tmp_path):
    row = {"problem": "p", "answer": "1", "images": ["/elsewhere/a.png"], "capability": "visual", "kind": "k"}
    problems, _ = read_problems(_write(tmp_path / "rows.jsonl", row), capability="text")
    assert (problems[0].capability, problems[0].kind, problems[0].images) == ("visual", "k", ("/elsewhere/a.png",))


def test_numbers_become_text(tmp_path):
    rows = [
        {"id": 7, "problem": "p", "answer": 12},
        {"problem": "p", "answer": -1.5},
        {"problem": "p", "answer": " 0 "},
    ]
    problems, _ = read_problems(_write(tmp_path / "rows.jsonl", *rows))
    assert [(p.id, p.answer) for p in problems] == [("7", "12"), ("rows-2", "-1.5"), ("rows-3", "0")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{not json", "not JSON"),
        ('{"problem": "p", "answer": NaN}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "not an object"),
        ({"answer": "1"}, "`problem` is missing"),
        ({"problem": " ", "answer": "1"}, "`problem` is missing or empty"),
        ({"problem": ["p"], "answer": "1"}, "`problem` is a JSON list"),
        ({"problem": "p"}, "`answer` is missing"),
        ({"problem": "p", "answer": "  "}, "`answer` is missing or empty"),
        ({"problem": "p", "answer": True}, "`answer` is a JSON bool"),
        ({"problem": "p", "answer": [["1"]]}, "`answer` is a JSON list"),
        ({"problem": "p", "answer": "1", "response": ""}, "`response` is empty"),
        ({"problem": "p", "answer": "1", "images": {"file": "a"}}, "`images` is no list"),
        ({"problem": "p", "answer": "1", "images": ["a", 3]}, "`images` is no list"),
        ({"problem": "p", "answer": "1", "images": [""]}, "empty or impossible path"),
        ({"problem": "p", "answer": "1", "images": ["data:image/png;base64," + "A" * 999]}, "no image of a known kind"),
        ({"problem": "<image><image>p", "answer": "1", "images": ["a"]}, "2 <image> marks for 1 images"),
        ({"problem": "<image>p", "answer": "1"}, "1 <image> marks for 0 images"),
        ({"id": "good", "problem": "p", "answer": "1"}, "is that of line 1"),
        ({"problem": "\ud800", "answer": "1"}, "surrogate"),
        ('{"problem": "p", "answer": 1' + "0" * 400 + "}", "no finite number"),
        ({"problem": "p", "answer": "1", "pass_rate": 1.5}, "`pass_rate` is no number from 0 to 1"),
        ({"problem": "p", "answer": "1", "pass_rate": "high"}, "`pass_rate` is no number"),
        ({"problem": "p", "answer": "1", "correctness": [2]}, "`correctness` is no list"),
        ({"problem": "p", "answer": "1", "predictions": "A"}, "`predictions` is no list"),
        ({"problem": "p", "answer": "1", "metadata": [1]}, "`metadata` is no JSON object"),
        ('{"problem": "p", "answer": "1", "x": ' + "[" * 99 + "]" * 99 + "}", "nested"),
    ],
)
def test_bad_row_is_skipped_with_file_line_trouble_and_remedy(tmp_path, row, words):
    good = {"id": "good", "problem": "p", "answer": "1"}
    path = _write(tmp_path / "rows.jsonl", good, row, good | {"id": "last"})
    problems, skipped = read_problems(path)
    assert [p.id for p in problems] == ["good", "last"]
    assert len(skipped) == 1 and len(str(skipped[0])) < len(str(path)) + 200  # no base64 image in a log
    assert skipped[0].where == f"{path}:2" and words in skipped[0].detail and "; " in skipped[0].detail


def test_undecodable_line_costs_only_itself(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"problem": "caf\xe9", "answer": "1"}\n{"problem": "q", "answer": "2"}\n')
    problems, skipped = read_problems(path)
    assert [p.problem for p in problems] == ["q"] and skipped[0].reason == "not UTF-8"


def test_byte_order_mark_crlf_blank_lines_and_line_separators_are_tolerated(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"problem": "a\u2028b", "answer": "1"}\r\n\r\n{"problem": "q", "answer": "2"}'.encode())
    problems, skipped = read_problems(path)
    assert [(p.id, p.problem) for p in problems] == [("rows-1", "a\u2028b"), ("rows-3", "q")]
    assert skipped == []


def test_missing_file_folder_and_file_without_good_rows_are_errors(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jsonl: no such problem file"):
        read_problems(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="not a file"):
        read_problems(tmp_path)
    with pytest.raises(InputError, match=r"bad.jsonl: no usable row among 1; .*bad.jsonl:1: not JSON"):
        read_problems(_write(tmp_path / "bad.jsonl", "nope"))
    with pytest.raises(InputError, match=r"empty.jsonl: no usable row among 0"):
        read_problems(_write(tmp_path / "empty.jsonl"))


def test_round_trip_and_images_below_the_folder_move_with_it(tmp_path):
    here = tmp_path / "here"
    problems = [
        Problem("a", "<image> ünï\ncode\u2028", "x", (str(here / "images" / "1.png"),), "visual", "k"),
        Problem("b", "Describe.", "", ("/elsewhere/2.png",), response="A circle."),
    ]
    write_rows(here / "rows.jsonl", problems)
    assert read_problems(here / "rows.jsonl") == (problems, [])
    here.rename(tmp_path / "there")
    moved, _ = read_problems(tmp_path / "there" / "rows.jsonl")
    assert moved[0].images == (str(tmp_path / "there" / "images" / "1.png"),)
    assert moved[1].images == ("/elsewhere/2.png",)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [Problem("a", "p", "1")])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="two rows have the id 'a'"):
        write_rows(path, [Problem("a", "p", "1"), Problem("a", "q", "2")])

    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(rows_lib.os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        write_rows(path, [Problem("b", "p", "1")])
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["rows.jsonl"]


def test_set_is_built_once_and_again_when_outdated_damaged_or_half_made(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {split: [Problem(f"{split}-1", "p", "1")] for split in ("train", "validation", "test")}

    files = build_set(tmp_path / "sets", "text", "1", make)
    assert sorted(files) == ["test", "train", "validation"] and all(file.is_file() for file in files.values())
    assert build_set(tmp_path / "sets", "text", "1", make) == files and len(calls) == 1
    build_set(tmp_path / "sets", "text", "2", make)
    assert len(calls) == 2
    files["test"].write_text("cut")
    build_set(tmp_path / "sets", "text", "2", make)
    assert len(calls) == 3 and read_problems(files["test"])[0][0].id == "test-1"
    (tmp_path / "sets" / "text.json").unlink()
    build_set(tmp_path / "sets", "text", "2", make)
    assert len(calls) == 4


def test_stable_hash_never_changes_and_separates_its_parts():
    assert problem_lib.stable_hash("a", 1) == 9484037261928657086
    assert problem_lib.stable_hash("a", "11") != problem_lib.stable_hash("a1", "1")


def test_even_shares_add_up():
    assert problem_lib.even_shares(1000, ("a", "b", "c")) == {"a": 334, "b": 333, "c": 333}
