"""python -m capcur_jax.data build: files in both formats, the last line, what can't be built; and real data."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from capcur_jax.data.__main__ import main
from capcur_jax.data.rows import read_problems
from capcur_jax.data.sources import published

_SPEC = importlib.util.spec_from_file_location("published_fixtures", Path(__file__).with_name("published_fixtures.py"))
fixtures = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fixtures)

KEPT = {
    "docci": 3, "pixmo_cap": 3, "orz_math": 3, "clevr_math": 3, "geoqa170k": 3, "math_puma": 3, "docvqa": 2,
    "arxivqa": 5, "gsm8k": 3, "visonlyqa": 5, "mathvision": 5,
}  # fmt: skip


def build(capsys, name, folder, output, *more):
    """(exit code, last line on stdout, stderr) of the command."""
    code = main(["build", name, "--input", str(folder), "--output", str(output), *more])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if code == 0 else None, err


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", published.NAMES)
def test_builds_a_file_whose_rows_are_all_good(name, suffix, tmp_path, capsys):
    fixtures.MAKERS[name](tmp_path / "in")
    output = tmp_path / "out" / f"{name}.{suffix}"
    output.parent.mkdir()
    output.write_text("an older file")
    code, result, _ = build(capsys, name, tmp_path / "in", output)
    assert code == 0 and result["kept"] == KEPT[name] and result["output"] == str(output)
    assert result["rows"] == result["kept"] + sum(result["dropped"].values())
    assert len(result["first_drops"]) == min(5, sum(result["dropped"].values()))
    problems, skipped = read_problems(output)
    direct = [
        row for row in published.reader(name).read(tmp_path / "in", tmp_path / "direct") if hasattr(row, "answer")
    ]
    assert skipped == [] and [row.id for row in problems] == [row.id for row in direct]
    for row, expected in zip(problems, direct, strict=True):
        assert (row.problem, row.answer, row.response) == (expected.problem, expected.answer, expected.response)
        assert (row.answer_type, row.kind, row.source) == (expected.answer_type, expected.kind, name)
        assert row.metadata == expected.metadata and row.capability == expected.capability
        images = [Path(image).read_bytes() for image in row.images]
        assert images == [Path(image).read_bytes() for image in expected.images]
    left = {path.name for path in output.parent.iterdir()} - {output.name, f"{output.stem}-images"}
    assert not left


def test_a_drop_is_told_with_its_place(tmp_path, capsys):
    fixtures.gsm8k(tmp_path)
    _, result, err = build(capsys, "gsm8k", tmp_path, tmp_path / "out.jsonl")
    assert result["dropped"] == {"no final answer": 2, "no answer": 1}
    assert result["first_drops"][0] == f"{tmp_path / 'train.jsonl'}:3: `answer` has no line `#### number`"
    assert "dropped: no final answer" in err and "read" in err


def test_limit_stops_after_so_many_kept_rows(tmp_path, capsys):
    fixtures.gsm8k(tmp_path)
    _, result, _ = build(capsys, "gsm8k", tmp_path, tmp_path / "out.jsonl", "--limit", "2")
    assert (result["rows"], result["kept"], result["dropped"]) == (2, 2, {})
    assert len(read_problems(tmp_path / "out.jsonl")[0]) == 2


def test_building_again_gives_the_same_bytes(tmp_path, capsys):
    fixtures.docvqa(tmp_path / "in")
    contents = set()
    for _ in range(2):
        build(capsys, "docvqa", tmp_path / "in", tmp_path / "out.jsonl")
        contents.add((tmp_path / "out.jsonl").read_bytes())
    assert len(contents) == 1


def test_what_cannot_be_built_leaves_the_old_file_alone(tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("an older file")
    for more, words in (
        (["--input", str(tmp_path), "--output", str(output)], "holds none of "),
        (["--input", str(tmp_path / "no"), "--output", str(output)], "no such folder"),
        (["--input", str(tmp_path), "--output", str(tmp_path / "out.csv")], "the name must end in .jsonl or .parquet"),
        (["--input", str(tmp_path), "--output", str(output), "--limit", "0"], "--limit 0: give at least 1"),
    ):
        assert main(["build", "gsm8k", *more]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "folder.jsonl").mkdir()
    fixtures.gsm8k(tmp_path)
    published_bytes = (tmp_path / "train.jsonl").read_bytes()
    for name in ("train.jsonl", "test_rows.jsonl"):  # the set's own, and what the next build would take for it
        assert main(["build", "gsm8k", "--input", str(tmp_path), "--output", str(tmp_path / name)]) == 2
        assert "the set's own files" in capsys.readouterr().err
    assert (tmp_path / "train.jsonl").read_bytes() == published_bytes and not (tmp_path / "test_rows.jsonl").exists()
    assert build(capsys, "gsm8k", tmp_path, tmp_path / "folder.jsonl")[0] == 2
    assert output.read_text() == "an older file"
    with pytest.raises(SystemExit):
        main(["build", "imagenet", "--input", str(tmp_path), "--output", str(output)])


@pytest.mark.skipif("CAPCUR_SHARED_DATA" not in os.environ, reason="set CAPCUR_SHARED_DATA to a folder of real rows")
@pytest.mark.parametrize(
    ("name", "rows", "reasons"),
    [("gsm8k", 2819, set()), ("mathvision", 304, set()), ("visonlyqa", 280, {"missing image"})],
)
def test_real_rows(name, rows, reasons, tmp_path, capsys):
    folder = Path(os.environ["CAPCUR_SHARED_DATA"]) / name
    _, result, _ = build(capsys, name, folder, tmp_path / "out.jsonl")
    assert result["rows"] == rows and set(result["dropped"]) <= reasons
    problems, skipped = read_problems(tmp_path / "out.jsonl")
    assert skipped == [] and len(problems) == result["kept"]
    if name == "visonlyqa":
        plain = [row for row in problems if not row.kind.startswith("text_")]
        assert len(plain) == 140 and {row.answer for row in plain} <= {*"ABCDE", "True", "False"}
        assert all(row.metadata["caption"] for row in problems if row.kind.startswith("text_"))
    if name == "mathvision":
        assert sum(row.answer_type == "letter" for row in problems) == 191  # 190 with options
    if name == "gsm8k":
        assert all(row.answer_type == "number" for row in problems)


@pytest.mark.skipif("CAPCUR_SHARED_DATA" not in os.environ, reason="set CAPCUR_SHARED_DATA to a folder of real rows")
def test_real_captions_with_images_of_our_own(tmp_path, capsys):
    """The captions lie there without their images."""
    (source,) = (Path(os.environ["CAPCUR_SHARED_DATA"]) / "docci").glob("*.jsonl")
    (tmp_path / source.name).write_bytes(source.read_bytes())
    assert build(capsys, "docci", tmp_path, tmp_path / "out.jsonl")[1]["dropped"] == {"missing image": 100}
    for line in source.read_bytes().splitlines():
        fixtures.put(tmp_path / "images" / f"{json.loads(line)['image']}.jpg")
    _, result, _ = build(capsys, "docci", tmp_path, tmp_path / "out.jsonl")
    assert (result["rows"], result["kept"]) == (100, 100)
    assert all(len(row.response) > 50 for row in read_problems(tmp_path / "out.jsonl")[0])
