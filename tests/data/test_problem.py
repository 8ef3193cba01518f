"""Problem files: what is read, what is skipped with which words, and that what is written comes back equal."""

import json
import os

import pytest

from capcur_jax.data import problem as problem_lib
from capcur_jax.data.problem import Problem, build_set, read_problems, write_problems


def _write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_published_row_is_read_with_its_extra_keys_ignored(tmp_path):
    row = {"problem": "<image>How many?", "answer": "A", "images": ["images/a.jpg"], "pass_rate": 0.5}
    row |= {"predictions": ["A", "B"], "correctness": [1, 0]}
    problems, skipped = read_problems(_write(tmp_path / "perception.jsonl", row), capability="perception")
    image = str(tmp_path / "images" / "a.jpg")
    assert problems == [Problem("perception-1", "<image>How many?", "A", (image,), capability="perception")]
    assert skipped == []


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
        ({"problem": "p", "answer": ["1"]}, "`answer` is a JSON list"),
        ({"problem": "p", "answer": "1", "response": ""}, "`response` is empty"),
        ({"problem": "p", "answer": "1", "images": {"path": "a"}}, "`images` is no list"),
        ({"problem": "p", "answer": "1", "images": ["a", 3]}, "`images` is no list"),
        ({"problem": "p", "answer": "1", "images": [""]}, "empty or impossible path"),
        ({"problem": "p", "answer": "1", "images": ["data:image/png;base64," + "A" * 999]}, "save the image as a file"),
        ({"problem": "<image><image>p", "answer": "1", "images": ["a"]}, "2 <image> marks for 1 images"),
        ({"problem": "<image>p", "answer": "1"}, "1 <image> marks for 0 images"),
        ({"id": "good", "problem": "p", "answer": "1"}, "is that of line 1"),
        ({"problem": "\ud800", "answer": "1"}, "surrogate"),
    ],
)
def test_bad_row_is_skipped_with_file_line_trouble_and_remedy(tmp_path, row, words):
    good = {"id": "good", "problem": "p", "answer": "1"}
    path = _write(tmp_path / "rows.jsonl", good, row, good | {"id": "last"})
    problems, skipped = read_problems(path)
    assert [p.id for p in problems] == ["good", "last"]
    assert len(skipped) == 1 and len(skipped[0]) < len(str(path)) + 200  # no base64 image in a log
    assert skipped[0].startswith(f"{path}:2: ") and words in skipped[0] and "; " in skipped[0]


def test_undecodable_line_costs_only_itself(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"problem": "caf\xe9", "answer": "1"}\n{"problem": "q", "answer": "2"}\n')
    problems, skipped = read_problems(path)
    assert [p.problem for p in problems] == ["q"] and "UTF-8" in skipped[0]


def test_byte_order_mark_crlf_blank_lines_and_line_separators_are_tolerated(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"problem": "a\u2028b", "answer": "1"}\r\n\r\n{"problem": "q", "answer": "2"}'.encode())
    problems, skipped = read_problems(path)
    assert [(p.id, p.problem) for p in problems] == [("rows-1", "a\u2028b"), ("rows-3", "q")]
    assert skipped == []


def test_missing_file_folder_and_file_without_good_rows_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such problem file"):
        read_problems(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="not a file"):
        read_problems(tmp_path)
    with pytest.raises(ValueError, match=r"bad.jsonl: no usable row among 1; .*bad.jsonl:1: not JSON"):
        read_problems(_write(tmp_path / "bad.jsonl", "nope"))
    with pytest.raises(ValueError, match=r"empty.jsonl: no usable row among 0"):
        read_problems(_write(tmp_path / "empty.jsonl"))


def test_round_trip_and_images_below_the_folder_move_with_it(tmp_path):
    here = tmp_path / "here"
    problems = [
        Problem("a", "<image> ünï\ncode\u2028", "x", (str(here / "images" / "1.png"),), "visual", "k"),
        Problem("b", "Describe.", "", ("/elsewhere/2.png",), response="A circle."),
    ]
    write_problems(here / "rows.jsonl", problems)
    assert read_problems(here / "rows.jsonl") == (problems, [])
    here.rename(tmp_path / "there")
    moved, _ = read_problems(tmp_path / "there" / "rows.jsonl")
    assert moved[0].images == (str(tmp_path / "there" / "images" / "1.png"),)
    assert moved[1].images == ("/elsewhere/2.png",)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_problems(path, [Problem("a", "p", "1")])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="two rows have the id 'a'"):
        write_problems(path, [Problem("a", "p", "1"), Problem("a", "q", "2")])

    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(problem_lib.os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        write_problems(path, [Problem("b", "p", "1")])
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
