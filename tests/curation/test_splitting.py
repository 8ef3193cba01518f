"""Splits by image: what belongs together stays together, whatever the order, the file and the format."""

import collections
import random

import pytest

from capcur_jax.curation.splitting import assign, image_keys, split_file
from capcur_jax.data.problem import SPLITS, Problem
from capcur_jax.data.rows import read_problems, read_rows, write_rows
from capcur_jax.errors import InputError
from tests.conftest import random_image
from tests.curation.command import run, write


def split_of(directory, suffix=".jsonl"):
    """id -> split."""
    files = {split: directory / f"{split}{suffix}" for split in SPLITS}
    return {row.id: split for split, file in files.items() for row in read_rows(file, images=directory / "unpacked")}


@pytest.fixture
def rows(tmp_path):
    """40 images of three questions each, and 20 text rows."""
    rows = []
    for number in range(40):
        random_image(12, 9, seed=number).save(tmp_path / f"{number}.png")
        rows += [{"id": f"{number}-{q}", "problem": f"Question {q}?", "answer": "1", "images": [f"{number}.png"]}
                 for q in range(3)]  # fmt: skip
    return rows + [{"id": f"text-{n}", "problem": f"What is {n} + 1?", "answer": "2"} for n in range(20)]


# ---------------------------------------------------------------------- keys and hashes


def test_shares_are_those_of_the_paper_and_an_image_has_one_split():
    keys = [[f"id {number}"] for number in range(20_000)]
    counts = collections.Counter(assign(keys))
    assert [round(counts[split] / 200) for split in SPLITS] == [85, 5, 10]
    counts = collections.Counter(assign(keys, (1, 1, 0)))
    assert counts["test"] == 0 and abs(counts["train"] - 10_000) < 300


def test_a_split_depends_on_nothing_but_the_key_and_the_salt():
    assert assign([["id 7"], ["id 8"], ["id 9"]], (1, 1, 1)) == ["validation", "train", "test"]  # for ever
    keys = [[f"id {number}"] for number in range(200)]
    whole = dict(zip(map(tuple, keys), assign(keys), strict=True))
    some = random.Random(0).sample(keys, 50)
    assert assign(some) == [whole[tuple(key)] for key in some]
    assert assign(keys, salt="other") != assign(keys)


def test_rows_that_are_linked_by_images_go_together_in_any_order():
    chains = [[f"pixels {chain}-{link}", f"pixels {chain}-{link + 1}"] for chain in range(50) for link in range(8)]
    keys = chains + [[f"pixels {chain}-{link}"] for chain in range(50) for link in range(9)]
    order = list(range(len(keys)))
    expected = assign(keys, (1, 1, 1))
    for chain in range(50):
        assert (
            len({split for key, split in zip(keys, expected, strict=True) if key[0].startswith(f"pixels {chain}-")})
            == 1
        )
    assert len(set(expected)) == 3
    random.Random(1).shuffle(order)
    assert assign([keys[i] for i in order], (1, 1, 1)) == [expected[i] for i in order]


def test_the_image_id_comes_before_the_pixels_and_text_is_for_rows_without_images():
    assert image_keys(Problem("1", "Q?", "a", ("x",), metadata={"image_id": 7}), ["ff"]) == ["id 7", "pixels ff"]
    assert image_keys(Problem("1", "Q?", "a", ("x",), metadata={"image_id": "7"}), []) == ["id 7"]
    assert image_keys(Problem("1", "Q?", "a", ("x",), metadata={"image_id": {"a": 1}}), ["ff"]) == ["pixels ff"]
    assert image_keys(Problem("1", "What  IS it?", "a"), []) == image_keys(Problem("2", "what is it", "b"), [])
    assert image_keys(Problem("1", "x + 1", "a"), []) != image_keys(Problem("1", "x - 1", "a"), [])


@pytest.mark.parametrize("shares", [(1, 2), (0, 0, 0), (-1, 1, 1), (float("nan"), 1, 1), (float("inf"), 1, 1)])
def test_shares_that_make_no_sense_are_refused(shares):
    with pytest.raises(InputError, match="--shares"):
        assign([["id 1"]], shares)


# ---------------------------------------------------------------------- files


def test_all_rows_of_an_image_lie_in_one_split_and_every_row_in_exactly_one(rows, tmp_path, capsys):
    file = write(tmp_path / "all.jsonl", rows)
    code, result, err = run(capsys, "split", "--input", file, "--output", tmp_path / "out", "--shares", 60, 20, 20)
    assert code == 0 and "validation" in err
    found = split_of(tmp_path / "out")
    assert set(found) == {row["id"] for row in rows}
    assert all(len({found[f"{number}-{q}"] for q in range(3)}) == 1 for number in range(40))
    assert result["splits"] == {split: list(found.values()).count(split) for split in SPLITS}
    assert min(result["splits"].values()) > 0 and sum(result["images"].values()) == 40
    problems, drops = read_problems(tmp_path / "out" / "train.jsonl")
    assert not drops and problems[0].images[0] == str(tmp_path / "1.png")  # the folder is another; the images are not


def test_the_order_of_rows_and_copies_under_other_names_change_nothing(rows, tmp_path):
    split_file(write(tmp_path / "all.jsonl", rows), tmp_path / "one", (1, 1, 1))
    for number in range(40):  # another format, the same pixels
        random_image(12, 9, seed=number).save(tmp_path / f"copy{number}.bmp")
        rows[3 * number]["images"] = [f"copy{number}.bmp"]
    random.Random(2).shuffle(rows)
    split_file(write(tmp_path / "shuffled.jsonl", rows), tmp_path / "two", (1, 1, 1))
    assert split_of(tmp_path / "one") == split_of(tmp_path / "two")


def test_an_image_id_in_the_metadata_decides(rows, tmp_path):
    for row in rows:
        row["metadata"] = {"image_id": "one for all"}
    split_file(write(tmp_path / "all.jsonl", rows), tmp_path / "out", (1, 1, 1))
    assert len(set(split_of(tmp_path / "out").values())) == 1


def test_rows_with_broken_images_and_broken_rows_are_counted(rows, tmp_path):
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:60])
    rows[0]["answer"] = None
    result = split_file(write(tmp_path / "all.jsonl", rows), tmp_path / "out")
    assert result["dropped"] == {"broken image": 3, "no answer": 1} and result["kept"] == 136
    assert any("id 5-0" in drop["where"] and "5.png" in drop["detail"] for drop in result["dropped_examples"])
    assert sum(result["splits"].values()) == 136


def test_parquet_in_parquet_out(rows, tmp_path):
    write_rows(tmp_path / "all.parquet", read_rows(write(tmp_path / "all.jsonl", rows)))
    split_file(tmp_path / "all.jsonl", tmp_path / "lines", (1, 1, 1))
    split_file(tmp_path / "all.parquet", tmp_path / "table", (1, 1, 1), images=tmp_path / "unpacked")
    assert split_of(tmp_path / "table", ".parquet") == split_of(tmp_path / "lines")


def test_a_split_never_overwrites_its_input(rows, tmp_path, capsys):
    file = write(tmp_path / "train.jsonl", rows)
    code, _, err = run(capsys, "split", "--input", file, "--output", tmp_path)
    assert code == 2 and "overwrite" in err and len(file.read_text().splitlines()) == len(rows)


def test_a_place_that_can_not_be_written_is_named(rows, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file, no folder")
    file = write(tmp_path / "all.jsonl", rows)
    code, _, err = run(capsys, "split", "--input", file, "--output", tmp_path / "taken")
    assert code == 2 and "taken" in err and "Traceback" not in err
