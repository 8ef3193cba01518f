"""Images of rows: under which keys they are read, in which forms, and what is refused so that no row goes blind."""

import base64
import json
import os
import unicodedata
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from capcur_jax.curation.splitting import split_file
from capcur_jax.data.problem import Drop
from capcur_jax.data.rows import read_problems, read_rows, write_rows
from tests.data.tables import table, written


@pytest.fixture
def folder(tmp_path):
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{name}.png")
    return tmp_path


def one(path, **how):
    (row,) = read_rows(path, **how)
    return row


@pytest.mark.parametrize(("row", "wanted"), table("row"))
def test_the_table_of_the_docs(folder, row, wanted):
    file = written(folder / "rows.jsonl", '{"problem": "p", "answer": "1", ' + row + "}")
    found = one(file)
    if wanted.startswith("refused: "):
        assert isinstance(found, Drop) and found.reason == wanted.removeprefix("refused: ") and "; " in found.detail
    else:
        names = [] if wanted == "none" else [name.strip("`") for name in wanted.split(", ")]
        assert [os.path.relpath(image, folder) for image in found.images] == names


def test_an_image_struct_of_parquet_is_seen_by_reader_and_split(folder):
    picture = (folder / "a.png").read_bytes()
    rows = [{"problem": f"q{i}", "answer": "red", "image": {"bytes": picture, "path": "a.png"}} for i in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.PARQUET")
    problems, drops = read_problems(folder / "rows.PARQUET", images=folder / "new")
    assert not drops and {Path(p.images[0]).read_bytes() for p in problems} == {picture}
    result = split_file(folder / "rows.PARQUET", folder / "splits", images=folder / "new")
    assert sorted(result["images"].values()) == [0, 0, 1] and sorted(result["splits"].values()) == [0, 0, 9]
    assert {path.rpartition(".")[2] for path in result["files"].values()} == {"parquet"}


@pytest.mark.parametrize("form", ["base64", "short base64", "uri", "dict", "uri in a list", "lines"])
def test_pictures_as_text_are_unpacked_and_never_shown(folder, form):
    picture = (folder / "a.png").read_bytes()
    text = base64.b64encode(picture).decode()
    value = {
        "base64": text, "short base64": text.rstrip("="), "uri": f"data:image/png;base64,{text}",
        "dict": {"bytes": text, "path": None}, "uri in a list": [f"data:image/png;base64,{text}"],
        "lines": "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
    }[form]  # fmt: skip
    file = written(folder / "rows.jsonl", {"problem": "p", "answer": "1", "image": value})
    (image,) = one(file, images=folder / "new").images
    with open(image, "rb") as found:
        assert found.read() == picture
    for key in ("scan", "problem", "response"):
        given = f"Look: data:image/png;base64,{text}" if key != "scan" else value
        drop = one(written(folder / "rows.jsonl", {"problem": "p", "answer": "1"} | {key: given}))
        assert drop.reason in ("image under another key", "image in the text") and len(str(drop)) < 400
        assert text[:60] not in str(drop)


def test_a_picture_in_metadata_is_only_counted(folder):
    text = base64.b64encode((folder / "a.png").read_bytes() * 3).decode()
    row = {"problem": "p", "answer": "1", "metadata": {"thumb": text, "uri": f"data:image/png;base64,{text}"}}
    problem = one(written(folder / "rows.jsonl", row))
    write_rows(folder / "out.jsonl", [problem])
    assert text[:60] not in (folder / "out.jsonl").read_text() and "bytes" in problem.metadata["thumb"]


@pytest.mark.parametrize(
    "value", ["data:image/png;base64,", "data:text/plain;base64,QUJD", "data:image/svg+xml,%3Csvg/%3E"]
)
def test_a_data_uri_that_holds_no_picture_is_named(folder, value):
    drop = one(written(folder / "rows.jsonl", {"problem": "p", "answer": "1", "images": [value]}))
    assert drop.reason == "bad images" and "; " in drop.detail


def test_bytes_under_an_unknown_key_cost_the_row_unless_they_are_its_image(folder):
    red, blue = ((folder / name).read_bytes() for name in ("a.png", "b.png"))
    rows = [
        {"problem": f"q{i}", "answer": "1", "images": ["a.png"], "shown": data} for i, data in enumerate((red, blue))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    good, bad = read_rows(folder / "rows.parquet")
    assert good.images == (str(folder / "a.png"),) and good.metadata == {"shown": f"{len(red)} bytes"}
    assert bad.reason == "image under another key" and "'shown'" in bad.detail


def test_backslashes_and_other_spellings_of_accents_are_found(folder):
    (folder / "grün").mkdir()
    name = unicodedata.normalize("NFD", "é.png")
    (folder / "a.png").rename(folder / unicodedata.normalize("NFC", "grün") / name)
    for given in ("grün/é.png", "grün\\é.png", unicodedata.normalize("NFD", "grün/é.png"), f".\\grün\\{name}"):
        (image,) = one(written(folder / "rows.jsonl", {"problem": "p", "answer": "1", "image": given})).images
        assert os.path.isfile(image), given
    (image,) = one(written(folder / "rows.jsonl", {"problem": "p", "answer": "1", "image": "no\\where.png"})).images
    assert image == str(folder / "no\\where.png")  # reported by its name where images are opened


def test_numbered_marks_count_where_each_image_has_one(folder):
    def read(text, *images):
        return one(written(folder / "rows.jsonl", {"problem": text, "answer": "1", "images": list(images)}))

    found = read("Is <image 2> like <image1>?", "a.png", "b.png")
    assert found.problem == "Is <image> like <image>?" and found.repaired
    assert [os.path.basename(image) for image in found.images] == ["b.png", "a.png"]
    for text, images in (("<image 1> and <image1>?", ["a.png"]), ("<image1>?", []), ("<image2>?", ["a.png"])):
        found = read(text, *images)
        assert found.problem == text and len(found.images) == len(images) and not found.repaired
    assert read("<image> or <image1>?", "a.png").problem == "<image> or <image1>?"
    assert read("Which tag, <img> or <image>?").reason == "marks and images differ"


def test_a_row_with_a_video_is_refused(folder):
    drop = one(written(folder / "rows.jsonl", {"problem": "<video>What?", "answer": "1", "videos": ["a.mp4"]}))
    assert drop.reason == "video" and "; " in drop.detail


def test_names_of_files_and_numbers_that_are_no_images_are_metadata(folder):
    other = {
        "hint": "see a.png",
        "image": 5,
        "pictures": 3,
        "link": "http://x/a.png",
    }
    problem = one(written(folder / "rows.jsonl", {"problem": "p", "answer": "1"} | other))
    assert not problem.images and problem.metadata == other
    row = {"problem": "p", "answer": "1", "file_name": "train2017/000001.jpg"}
    assert one(written(folder / "rows.jsonl", row)).reason == "image under another key"
    assert not isinstance(one(written(folder / "rows.jsonl", row | {"image": "a.png"})), Drop)
    write_rows(folder / "again.jsonl", [problem])
    assert one(folder / "again.jsonl") == problem


def test_keys_that_are_read_are_no_metadata(folder):
    row = {"problem": "p", "answer": "1", "image": "a.png", "img": None, "split": "train"}
    assert one(written(folder / "rows.jsonl", json.dumps(row))).metadata == {"split": "train"}
