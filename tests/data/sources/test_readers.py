"""Each reader on a few rows of its own format: texts, marks, letters, answers, ids, and what is dropped and why."""

import importlib.util
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from capcur_jax.data.problem import Drop
from capcur_jax.data.rows import Tally, read_rows, write_rows
from capcur_jax.data.sources import published
from capcur_jax.errors import InputError

# Tests are imported one by one, with no package around them.
_SPEC = importlib.util.spec_from_file_location("published_fixtures", Path(__file__).with_name("published_fixtures.py"))
fixtures = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fixtures)


def read(name, folder):
    """(problems by id less the source, drops) of the invented rows."""
    fixtures.MAKERS[name](folder)
    rows = list(published.reader(name).read(folder, folder / "unpacked"))
    drops = [row for row in rows if isinstance(row, Drop)]
    problems = {row.id.removeprefix(f"{name}-"): row for row in rows if not isinstance(row, Drop)}
    assert len(problems) + len(drops) == len(rows)
    assert all(row.source == name for row in problems.values())
    return problems, [(drop.where.removeprefix(f"{folder}{os.sep}"), drop.reason) for drop in drops]


def below(folder, problem):
    return [os.path.relpath(image, folder) for image in problem.images]


def test_every_set_has_a_reader_and_a_maker():
    assert set(fixtures.MAKERS) == set(published.NAMES)
    with pytest.raises(InputError, match="no reader of 'docc'; choose one of docci, pixmo_cap"):
        published.reader("docc")


def test_docci(tmp_path):
    problems, drops = read("docci", tmp_path)
    assert list(problems) == ["train_00000", "qual_dev_00001", "train_00000-2"]
    first = problems["train_00000"]
    assert (first.problem, first.answer, first.answer_type) == ("Describe the image in detail.", "", "")
    assert (first.response, first.capability) == ("A red barn left of two trees.", "perception")
    assert below(tmp_path, first) == ["images/train_00000.jpg"]
    assert first.metadata == {"image_id": "train_00000", "split": "train"}
    assert problems["qual_dev_00001"].metadata["split"] == "qual_dev"
    assert problems["train_00000-2"].metadata["image_id"] == "train_00000"
    assert drops == [
        ("docci_descriptions.jsonlines:2", "missing image"),
        ("docci_descriptions.jsonlines:3", "not JSON"),
        ("docci_descriptions.jsonlines:5", "duplicate row"),
        ("docci_descriptions.jsonlines:7", "no description"),
        ("docci_descriptions.jsonlines:8", "bad image"),
        ("docci_descriptions.jsonlines:9", "not an object"),
        ("docci_descriptions.jsonlines:10", "not UTF-8"),
    ]


def test_docci_captions_of_imageinwords(tmp_path):
    fixtures.put(tmp_path / "images/test_00731.jpg")
    row = {"image": "test_00731", "DOCCI": "A chair.", "IIW": "A chair, long.", "metrics/Hallucination": "same"}
    fixtures.put_lines(tmp_path / "DOCCI_Test/data.jsonl", row)
    (problem,) = published.reader("docci").read(tmp_path, tmp_path / "unpacked")
    assert problem.response == "A chair." and problem.metadata == {"image_id": "test_00731", "split": "test"}


def test_pixmo_cap_takes_images_saved_under_the_hash_of_their_url(tmp_path):
    problems, drops = read("pixmo_cap", tmp_path)
    assert [problem.response for problem in problems.values()] == [
        "What a.jpg shows.", "What org/b shows.", "What c.png shows.",
    ]  # fmt: skip
    first = next(iter(problems.values()))
    assert first.metadata["image_url"] == "https://example.org/a.jpg" and first.metadata["split"] == "train"
    assert below(tmp_path, first) == [f"images/{first.metadata['image_id']}.jpg"]
    assert [reason for _, reason in drops] == ["missing image", "no caption", "no image_url"]
    assert drops[0][0] == "data/train-00000-of-00002.parquet, row 2"


def test_pixmo_cap_with_embedded_images(tmp_path):
    image = {"bytes": fixtures.image_bytes(), "path": None}
    rows = [{"image_url": "https://example.org/a", "caption": words, "image": image} for words in ("One.", "Two.")]
    fixtures.put_parquet(tmp_path / "train-00000-of-00001.parquet", rows)
    problems = list(published.reader("pixmo_cap").read(tmp_path, tmp_path / "unpacked"))
    assert [problem.response for problem in problems] == ["One.", "Two."]
    assert problems[0].images == problems[1].images and len(list((tmp_path / "unpacked").iterdir())) == 1
    assert problems[1].id == problems[0].id + "-2"


def test_orz_math(tmp_path):
    problems, drops = read("orz_math", tmp_path)
    assert {row_id: (row.answer, row.answer_type) for row_id, row in problems.items()} == {
        "13k-1": ("4", "number"), "13k-2": (r"\frac{1}{2}", "number"), "13k-9": ("12", "number"),
    }  # fmt: skip
    assert problems["13k-1"].problem == "What is $2+2$?" and problems["13k-1"].capability == "text"
    assert problems["13k-1"].metadata == {"pass_at_n": 0.25} and problems["13k-2"].metadata == {}
    assert [reason for _, reason in drops] == [
        "no answer", "no value", "bad dialogue", "bad dialogue", "not an object", "marks and images differ",
        "answer too long",
    ]  # fmt: skip
    assert drops[0][0] == "orz_math_13k_collection_hard.json, row 3"


def test_clevr_math(tmp_path):
    problems, drops = read("clevr_math", tmp_path)
    assert {row_id: (row.answer, row.kind) for row_id, row in problems.items()} == {
        "CLEVR_train_000000-0": ("3", "subtraction"), "CLEVR_train_000000-1": ("5", "addition"),
        "CLEVR_test_000003-0": ("0", "subtraction-multihop"),
    }  # fmt: skip
    first = problems["CLEVR_train_000000-0"]
    assert first.problem == "<image>\nSubtract all cubes. How many objects are left?" and first.capability == "visual"
    assert below(tmp_path, first) == ["CLEVR_v1.0/images/train/CLEVR_train_000000.png"]
    assert first.metadata == {"image_id": "CLEVR_train_000000", "split": "train"}
    assert [reason for _, reason in drops] == ["missing image", "bad answer", "no answer", "no split"]


def test_geoqa170k(tmp_path):
    problems, drops = read("geoqa170k", tmp_path)
    assert {row_id: (row.answer, row.answer_type) for row_id, row in problems.items()} == {
        "1": ("C", "letter"), "2": ("B", "letter"), "6": ("7", "number"),
    }  # fmt: skip
    assert problems["1"].problem == "<image>\nHow large is angle C?\nA. 40°\nB. 60°\nC. 80°\nD. 100°"
    assert problems["6"].problem == "<image>\nWhat is the radius?"
    assert problems["1"].metadata == {"image_id": "geoqa_plus/1.png"} and problems["1"].capability == "visual"
    assert [(where.rpartition(" ")[2], reason) for where, reason in drops] == [
        ("3", "no final answer"), ("4", "answer is no option"), ("5", "ambiguous options"), ("7", "no final answer"),
        ("8", "missing image"), ("9", "marks and images differ"), ("10", "bad dialogue"),
    ]  # fmt: skip


def test_math_puma(tmp_path):
    problems, drops = read("math_puma", tmp_path)
    assert {row_id: (row.problem, row.answer) for row_id, row in problems.items()} == {
        "Synthesis-1": ("<image>\nFind AC.", "5"),
        "VarsityTutors-1": ("<image>\nWhich one is it? A. five B. six C. seven", "B"),
        "VarsityTutors-2": ("<image>\nWhich one is it?\nA. five\nB. six", "B"),
    }
    assert below(tmp_path, problems["Synthesis-1"]) == ["Synthesis/images/a/2.png"]  # of an author's absolute path
    assert problems["Synthesis-1"].metadata == {"image_id": "Synthesis/a/2.png"}
    assert [reason for _, reason in drops] == ["no final answer", "no image", "missing image", "bad instruction"]


def test_math_puma_takes_no_image_of_the_same_name_elsewhere(tmp_path):
    fixtures.put(tmp_path / "images/1.png")
    row = {"image_url": "/data/b/1.png", "instruction": "How many?", "output": "Answer: 3"}
    fixtures.put_lines(tmp_path / "train.jsonl", row)
    (drop,) = published.reader("math_puma").read(tmp_path, tmp_path / "unpacked")
    assert drop.reason == "missing image"


def test_docvqa(tmp_path):
    problems, drops = read("docvqa", tmp_path)
    assert list(problems) == ["337", "400"]
    first, second = problems.values()
    assert (first.problem, first.answer) == ("<image>\nWhat is the date?", "1/8/93")
    assert first.answers == ("1/8/93", "January 8, 1993") and first.kind == "handwritten" and not second.answers
    assert below(tmp_path, first) == ["spdocvqa_images/xnbl0037_1.png"]
    assert first.metadata["image_id"] == second.metadata["image_id"] == "xnbl0037_1"
    assert second.metadata["split"] == "val" and second.answer == "C"
    assert Path(second.images[0]).read_bytes() == fixtures.image_bytes("blue")
    assert [reason for _, reason in drops] == ["no answer", "missing image", "bad answers", "missing image"]


def test_arxivqa_keeps_letters_and_finds_the_label(tmp_path):
    problems, drops = read("arxivqa", tmp_path)
    assert {row_id: row.answer for row_id, row in problems.items()} == {
        "cond-mat-1": "B", "cond-mat-2": "A", "cond-mat-3": "C", "cond-mat-9": "B", "cond-mat-10": "B",
    }  # fmt: skip
    assert problems["cond-mat-1"].problem == ("<image>\nWhat does the figure show?\nA. A line\nB. A circle\nC. A point")
    assert problems["cond-mat-10"].problem.endswith("\nA. up\nB. down")
    assert problems["cond-mat-1"].metadata == {"subject": "cond-mat", "image_id": "1501.00713_2"}
    assert drops == [
        ("arxivqa.jsonl:4", "answer is no option"),
        ("arxivqa.jsonl:5", "ambiguous options"),
        ("arxivqa.jsonl:6", "bad options"),
        ("arxivqa.jsonl:7", "bad options"),
        ("arxivqa.jsonl:8", "missing image"),
        ("arxivqa.jsonl:12", "bad options"),
    ]


def test_gsm8k(tmp_path):
    problems, drops = read("gsm8k", tmp_path)
    assert {row_id: (row.answer, row.metadata["split"]) for row_id, row in problems.items()} == {
        "train-1": ("6", "train"), "train-2": ("1234567", "train"), "test-1": ("-7.50", "test"),
    }  # fmt: skip
    assert all(row.answer_type == "number" and row.images == () for row in problems.values())
    assert problems["train-1"].problem == "Ann has 2 hens.\nHow many eggs?"
    assert [reason for _, reason in drops] == ["no final answer", "no final answer", "no answer"]


def test_visonlyqa(tmp_path):
    problems, drops = read("visonlyqa", tmp_path)
    assert {row_id: (row.answer, row.answer_type, row.kind) for row_id, row in problems.items()} == {
        "one": ("C", "letter", "3d__size"), "two": ("False", "word", "3d__size"), "four": ("B", "letter", "3d__size"),
        "text_one": ("C", "letter", "text_3d__size"), "seven": ("A", "letter", "charts__extraction"),
    }  # fmt: skip
    asked = "<image>\nThe cube is X times taller than the ball. Which is a reasonable estimate?\nA. 0.5\nB. 1\nC. 2"
    assert problems["one"].problem == problems["text_one"].problem == asked
    assert problems["text_one"].metadata["caption"] == "The following text provides information.\n\nObject 1: cube"
    assert "caption" not in problems["one"].metadata
    assert problems["two"].problem == "<image>\nThere is no ball. True or False?\n\nA ball is round."
    assert problems["four"].problem.endswith("a, b, or c?\nChoices: A, B, C")
    assert below(tmp_path, problems["one"]) == ["val/images/CLEVR/CLEVR_val_003454.png"]  # a level above the rows
    assert all(row.capability == "perception" for row in problems.values())
    assert [reason for _, reason in drops] == ["answer is no option", "several answers", "missing image"]


def test_mathvision(tmp_path):
    problems, drops = read("mathvision", tmp_path)
    assert {row_id: (row.problem, row.answer, row.answer_type) for row_id, row in problems.items()} == {
        "4": ("How many digits are there?\n<image>", "6", "number"),
        "6": ("Which kitten is it? <image>\nChoices: A, B, C", "B", "letter"),
        # One picture holds the parts and names them so.
        "357": ("<image>\nLike this <image1> or this <image2>?\nA. $\\frac{1}{2}$\nB. A circle", "A", "letter"),
        "358": ("<image>\nWhich of these?\nA. <image1>\nB. <image2>", "B", "letter"),
        "11": ("How many? <image>\nA. 1\nB. 2", "A", "letter"),
    }
    assert problems["4"].metadata == {"image_id": "4", "subject": "counting", "level": 3, "split": "testmini"}
    assert "level" not in problems["6"].metadata and problems["11"].metadata["split"] == "test"
    assert drops == [
        ("data/testmini.jsonl:5", "missing image"),
        ("data/testmini.jsonl:6", "answer is no option"),
        ("data/test.jsonl:1", "duplicate row"),
    ]


@pytest.mark.parametrize("name", published.NAMES)
def test_missing_files_are_named_with_their_origin(name, tmp_path):
    module = published.reader(name)
    with pytest.raises(InputError, match=r"holds none of .*; get them from https://"):
        list(module.read(tmp_path, tmp_path / "unpacked"))
    with pytest.raises(InputError, match=r"no such folder; --input is the folder with the files of https://"):
        list(module.read(tmp_path / "absent", tmp_path / "unpacked"))
    assert module.__doc__ and "Licence" in module.__doc__ and "From: " in module.__doc__


def test_files_that_are_no_list_and_no_parquet_are_named(tmp_path):
    fixtures.put(tmp_path / "qa_tuning.json", b'{"message": "rate limited"}\n{}')
    rows = list(published.reader("geoqa170k").read(tmp_path, tmp_path / "unpacked"))
    assert [row.reason for row in rows] == ["no image", "no image"]  # one object a line: read as rows
    fixtures.put(tmp_path / "clevr-math-train.json", b'{"message": "rate limited"}')
    with pytest.raises(InputError, match=r"clevr-math-train.json: not a JSON list, or an object with one under 'ques"):
        list(published.reader("clevr_math").read(tmp_path, tmp_path / "unpacked"))
    fixtures.put(tmp_path / "train-1.parquet", b"<html>")
    with pytest.raises(InputError, match=r"train-1.parquet: no readable Parquet file"):
        list(published.reader("pixmo_cap").read(tmp_path, tmp_path / "unpacked"))


JUNK = (
    None,
    True,
    0,
    -1.5,
    1e308,
    "",
    " ",
    "A",
    "<image>",
    "\ud800",
    "\0",
    "x" * 700,
    [],
    {},
    [None],
    ["", 1],
    {"a": []},
)


def mutated(value, chance, picks):
    """The value with some of what is in it replaced, dropped or repeated."""
    if picks.random() < chance:
        return picks.choice(JUNK)
    if isinstance(value, dict):
        return {key: mutated(part, chance, picks) for key, part in value.items() if picks.random() > chance / 4}
    if isinstance(value, list):
        parts = [mutated(part, chance, picks) for part in value if picks.random() > chance / 4]
        return parts + parts[:1] if picks.random() < chance / 4 else parts
    return value


@pytest.mark.parametrize("name", [name for name in published.NAMES if name != "pixmo_cap"])
def test_mutated_rows_and_bytes_are_kept_or_counted(name, tmp_path):
    picks = random.Random(name)
    source = tmp_path / "source"
    fixtures.MAKERS[name](source)
    files = [file for suffix in ("json", "jsonl", "jsonlines") for file in sorted(source.rglob(f"*.{suffix}"))]
    originals = {file: file.read_bytes() for file in files}
    reasons = Counter()
    for turn in range(24):
        for file, original in originals.items():
            if turn % 2:
                content = bytearray(original)
                for _ in range(picks.randrange(1, 6)):
                    content[picks.randrange(len(content))] = picks.choice(b'"\\{}[],:x\xff\x00\n')
                file.write_bytes(content)
            elif file.suffix == ".json":
                value = json.loads(original)
                lists = (
                    [part for part in value.values() if isinstance(part, list)] if isinstance(value, dict) else [value]
                )
                for part in lists:
                    part[:] = [mutated(row, 0.1, picks) for row in part]
                file.write_text(json.dumps(value))
            else:
                rows = [
                    json.loads(line) for line in original.splitlines() if line.startswith(b"{") and line.endswith(b"}")
                ]
                file.write_text("".join(json.dumps(mutated(row, 0.1, picks)) + "\n" for row in rows))
        tally = Tally()
        try:
            count = write_rows(
                tmp_path / "out.jsonl", tally.kept(published.reader(name).read(source, tmp_path / "new"))
            )
        except InputError:  # the one object or list around all rows is broken
            continue
        assert tally.rows == count + tally.dropped.total()
        assert all(reason and len(detail) < 400 for _, reason, detail in tally.examples)
        reasons += tally.dropped
        if count:
            assert not [row for row in read_rows(tmp_path / "out.jsonl") if isinstance(row, Drop)]
    assert len(reasons) > 5


@pytest.mark.parametrize("value", [7, True, [], b"no image", {"bytes": b""}, {"path": "a.png"}, ["x"], 0.5])
def test_columns_of_another_type_are_counted(value, tmp_path):
    good = {"question": "Who?", "answers": ["x"], "ucsf_document_id": "a", "ucsf_document_page_no": "1"}
    good["image"] = {"bytes": fixtures.image_bytes(), "path": None}
    for number, column in enumerate(good):
        row = good | {"questionId": column, column: value}
        fixtures.put_parquet(tmp_path / f"train-{number}.parquet", [row])
    rows = list(published.reader("docvqa").read(tmp_path, tmp_path / "unpacked"))
    kept = {row.id.removeprefix("docvqa-") for row in rows if not isinstance(row, Drop)}
    assert len(rows) == len(good)
    expected = {"image"} if isinstance(value, bytes) else {"answers"} if value == ["x"] else set()
    if type(value) in (int, float):  # as good as a text
        expected = {"question", "ucsf_document_id", "ucsf_document_page_no"}
    assert kept == expected


def test_a_page_that_is_broken_inside_a_parquet_file_costs_the_rest_of_it(tmp_path):
    rows = [{"image_url": f"https://example.org/{i}", "caption": str(i) * 50} for i in range(4000)]
    file = fixtures.put_parquet(tmp_path / "train-0.parquet", rows)
    intact = Counter(row.reason for row in published.reader("pixmo_cap").read(tmp_path, tmp_path / "unpacked"))
    assert intact == {"missing image": 4000}
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"\xff" * 64 + content[68:])
    with pytest.raises(InputError, match="no readable Parquet file"):
        list(published.reader("pixmo_cap").read(tmp_path, tmp_path / "unpacked"))
