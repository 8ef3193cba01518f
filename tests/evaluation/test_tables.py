from __future__ import annotations

import base64
import hashlib
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from capcur_jax.errors import InputError
from capcur_jax.evaluation import tables
from capcur_jax.evaluation.benchmarks import mmstar
from tests.evaluation.published import base64_of, choices, lines, png, table, workbook


def load(path, unpacked=None):
    return mmstar.BENCHMARK.load(path, unpacked)


def test_images_are_unpacked_once_byte_for_byte(tmp_path):
    file = table(tmp_path / "a.tsv", [choices(1), choices(2, image=base64_of(1)), choices(3)])
    for _ in range(2):
        rows = load(file, tmp_path / "images")
        assert [row.images[0].read_bytes() for row in rows] == [png(1), png(1), png(3)]
    assert len(list((tmp_path / "images").iterdir())) == 2
    assert rows[0].cluster == rows[1].cluster != rows[2].cluster


def test_a_short_image_names_another_row_before_or_behind_it(tmp_path):
    cells = [choices(1, image="3"), choices(2, image="3.0"), choices(3), choices(4, image="3")]
    rows = load(table(tmp_path / "a.tsv", cells), tmp_path / "images")
    assert {row.images[0].read_bytes() for row in rows} == {png(3)} and len({row.cluster for row in rows}) == 1
    assert len(rows) == len({row.index for row in rows}) == 4


def test_a_reference_is_followed_once(tmp_path):
    with pytest.raises(InputError, match=r"a\.tsv: `image` of row '1' names row '2'"):
        load(table(tmp_path / "a.tsv", [choices(1, image="2"), choices(2, image="3"), choices(3)]), tmp_path / "images")


def test_a_list_of_images_keeps_their_order(tmp_path):
    rows = load(table(tmp_path / "a.tsv", [choices(1, image=str([base64_of(5), base64_of(4)]))]), tmp_path / "images")
    assert [path.read_bytes() for path in rows[0].images] == [png(5), png(4)]


@pytest.mark.parametrize("paths", ["['b.png', 'a.png']", "b.png"])
def test_image_paths_are_looked_up_beside_the_table(tmp_path, paths):
    (tmp_path / "images" / "set").mkdir(parents=True)
    for name, shade in (("a.png", 1), ("b.png", 2)):
        (tmp_path / "images" / "set" / name).write_bytes(png(shade))
    cells = choices(1, image_path=paths)
    del cells["image"]
    (row,) = load(table(tmp_path / "set_local.tsv", [cells]), tmp_path / "unpacked")
    assert [path.read_bytes() for path in row.images] == ([png(2), png(1)] if paths[0] == "[" else [png(2)])


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "nowhere.png"])
def test_a_path_out_of_the_folder_or_to_nothing_is_refused(tmp_path, path):
    cells = choices(1, image_path=path)
    del cells["image"]
    with pytest.raises(InputError, match="row 1"):
        load(table(tmp_path / "a.tsv", [cells]), tmp_path / "images")


def test_rows_without_image_are_left_out_and_counted(tmp_path):
    rows = load(table(tmp_path / "a.tsv", [choices(1, image=""), choices(2), choices(3, image="nan")]))
    assert [row.index for row in rows] == ["2"] and rows.left_out == {"without image": 2}


def test_who_wants_no_images_needs_none(tmp_path):
    for image in ("", "/9j/4AAQ"):  # taken out, or cut short: no row with that index is there
        cells = [choices(1, image=image), choices(2, image=image)]
        file = table(tmp_path / "a.tsv", cells)
        assert [row.index for row in load(file)] == ["1", "2"]
        with pytest.raises(InputError):
            load(file, tmp_path / "images")


@pytest.mark.parametrize(
    "cells", [{"index": 2, "question": "q", "A": "x"}, {"index": 2, "answer": "", "question": "q"}]
)
def test_a_row_without_its_right_answer_is_an_error_that_says_so(tmp_path, cells):
    file = table(tmp_path / "a.tsv", [cells])
    with pytest.raises(InputError, match=r"a\.tsv, row 1: `answer` is missing or empty; give the file with the right"):
        load(file)


@pytest.mark.parametrize("text", ["None", "NA", "nan", "null", "N/A", "0"])
def test_texts_that_pandas_takes_for_nothing_survive(tmp_path, text):
    (row,) = load(table(tmp_path / "a.tsv", [choices(1, A=text, C="", question=text)]))
    assert row.options == {"A": text, "B": "blue"} and row.question == text


def test_the_index_is_text(tmp_path):
    assert [tables.index_text(value) for value in (7, 7.0, "7", " 7.0 ", "a_1.0", "-1.00", 1.5)] == [
        "7", "7", "7", "7", "a_1.0", "-1", "1.5",
    ]  # fmt: skip


def test_what_a_file_is_follows_from_its_content(tmp_path):
    own = [{"index": number, "question": f"Which?\nA: red, B: blue {number}", "answer": "B"} for number in range(3)]
    files = [lines(tmp_path / "a.json", own), table(tmp_path / "b.txt", own), workbook(tmp_path / "c.dat", own)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(own), tmp_path / "d")
    found = [load(file) for file in (*files, tmp_path / "d")]
    assert len({(tuple(row.index for row in rows), tuple(row.question for row in rows)) for rows in found}) == 1
    assert found[0].digest == hashlib.md5(files[0].read_bytes()).hexdigest()


def test_an_object_of_rows_in_one_line_is_no_json_lines(tmp_path):
    from capcur_jax.evaluation.contents import kind_of, records

    file = tmp_path / "a.json"
    file.write_text('{"7": {"question": "x"}, "8": {"question": "y"}}')
    assert kind_of(file) == "object"
    assert [value for _, value in records(file)] == [{"id": "7", "question": "x"}, {"id": "8", "question": "y"}]


@pytest.mark.parametrize("content, told", [
    (b"\x80\x04pickle", "pickle"), (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
    (b"index\n1\n", "no table"),
    (b"", "no table"), (b'index\tquestion\n1\t"open', "no table with tabs"), (b"PAR1junk", "Parquet"),
    (b"PK\x03\x04", "XLSX"),
    (b"index\tquestion\n\xff\xfe\tx\n", "UTF-8"), (b"[1, 2]", "object belongs"), (b"index\tindex\n", "no table"),
])  # fmt: skip
def test_what_is_no_benchmark_is_refused_with_its_name(tmp_path, content, told):
    file = tmp_path / "a.tsv"
    file.write_bytes(content)
    with pytest.raises(InputError, match=told) as error:
        load(file)
    assert "a.tsv" in str(error.value)


@pytest.mark.parametrize("cells, told", [
    ({"answer": ""}, "`answer` is missing"), ({"index": ""}, "index"), ({"image": "!" * 90}, "`image` is no base64"),
    ({"image": "[1, 2]" + " " * 90}, "no list of base64"), ({"question": ""}, "`question`"),
])  # fmt: skip
def test_a_row_that_is_not_as_published_names_file_and_row(tmp_path, cells, told):
    with pytest.raises(InputError, match=rf"a\.tsv, row 2: .*{told}"):
        load(table(tmp_path / "a.tsv", [choices(1), choices(2) | cells]), tmp_path / "images")


def test_an_index_is_there_once(tmp_path):
    with pytest.raises(InputError, match="twice"):
        load(table(tmp_path / "a.tsv", [choices(1), choices(1)]))


def test_literals_are_not_evaluated():
    assert tables.literal("['a', None, 1.5]", "choices") == ["a", None, 1.5]
    assert tables.literal('["a", null]', "choices") == ["a", None]
    for hostile in ("__import__('os').getcwd()", "9**9**9", "[" * 5000, "['a'" + ", 'a'" * 400_000 + "]", "f()"):
        with pytest.raises(ValueError, match="choices"):
            tables.literal(hostile, "choices")


def test_predictions_can_not_be_asked_but_scored(tmp_path):
    cells = choices(1, prediction="B")
    del cells["image"]
    file = table(tmp_path / "a.tsv", [cells])
    assert load(file)[0].images == ()
    with pytest.raises(InputError, match="no images"):
        load(file, tmp_path / "images")


def test_a_folder_is_searched_by_the_published_names(tmp_path):
    (tmp_path / "data").mkdir()
    table(tmp_path / "data" / "MMStar.tsv", [choices(1)])
    lines(tmp_path / "other.jsonl", [{"a": 1}])
    assert [file.name for file in load(tmp_path).files] == ["MMStar.tsv"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds none of MMStar\.tsv, .*Hugging Face"):
        load(tmp_path / "empty")


def test_memory_does_not_grow_with_the_images(tmp_path):
    big = base64.b64encode(png(1) + bytes(30_000)).decode()
    cells = [choices(number, image=big) for number in range(300)]
    file = table(tmp_path / "a.tsv", cells)
    del cells
    tracemalloc.start()
    rows = load(file, tmp_path / "images")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 300 and peak < 3e6 < file.stat().st_size / 3
