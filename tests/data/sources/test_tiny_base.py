"""The base's corpus: right answers, some broken formats, nothing from a test split."""

import collections
import importlib.util
import re

import pytest

from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import read_problems
from capcur_jax.data.sources import easy_vqa, tiny_base, word_problems

pytestmark = pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="pip install easy-vqa")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_base.build(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(files):
    return {split: read_problems(files[split])[0] for split in ("train", "validation")}


def test_every_row_is_read_back_and_has_a_response(files, rows):
    assert all(not read_problems(file)[1] for file in files.values())
    assert all(row.response for found in rows.values() for row in found)
    assert files["test"] == files["validation"]
    counts = collections.Counter(row.capability for row in rows["train"])
    assert dict(counts) == {**tiny_base.COUNTS["train"], "text": tiny_base.MIXED, "caption": counts["caption"]}
    assert counts["caption"] > 10_000


def test_nothing_comes_from_a_test_split_and_validation_is_held_out(rows):
    for split, found in rows.items():
        for row in found:
            if row.images:
                folder, name = row.images[0].split("/")[-2:]
                assert folder == "train"
                assert easy_vqa.is_validation(int(name.removesuffix(".png"))) == (split == "validation")
            else:
                a, b = map(int, re.findall(r"\d+", row.problem))
                assert word_problems.split_of(row.kind, a, b) == split


def test_answers_are_right(rows):
    """The base is to be weak by what it has not learned, not by mistakes that it was taught."""
    answered = [
        (row, re.search(r"boxed\{(.*)\}", row.response)) for row in rows["train"] if row.capability != "caption"
    ]
    assert all(found.group(1) == row.answer for row, found in answered if found)


def test_some_responses_have_a_broken_format_and_the_others_the_asked_one(rows):
    answered = [row.response for row in rows["train"] if row.capability != "caption"]
    whole = [bool(re.fullmatch(r"<think>.+</think> \\boxed\{[^{}]+\}", response)) for response in answered]
    assert 1 - sum(whole) / len(whole) == pytest.approx(tiny_base.BROKEN, abs=0.005)


def test_captions_name_what_is_certain(rows):
    colors, shapes = "|".join(easy_vqa.COLOR_NAMES), "|".join(easy_vqa.SHAPES)
    pattern = rf"A( small| medium| large)? ({colors}) ({shapes})( at the (top|bottom) (left|right))?\."
    wordings = collections.defaultdict(set)
    for row in rows["train"]:
        if row.capability == "caption":
            found = re.fullmatch(pattern, row.response)
            assert found and row.answer == ""
            assert row.kind == ("caption:whole" if found.group(1) and found.group(4) else "caption:part")
            wordings[row.images].add(row.problem)
    assert {len(texts) for texts in wordings.values()} == {3}


def test_the_same_row_always_gets_the_same_response():
    problem, facts = Problem("train-1-add-2", "How many?", "12", kind="add"), {"a": 7, "b": 5}
    assert len({tiny_base.respond(problem, facts) for _ in range(3)}) == 1
    assert tiny_base.respond(problem, facts).answer == "12"


def test_unknown_capability_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no capability 'text'; use one of base, captions, sums"):
        tiny_base.build(tmp_path, "text")


@pytest.mark.parametrize(("name", "capability"), [("captions", "caption"), ("sums", "text")])
def test_captions_and_sums_are_sets_of_their_own(files, rows, name, capability):
    alone = read_problems(tiny_base.build(files["train"].parent, name)["train"])[0]
    assert {row.capability for row in alone} == {capability}
    mixed = {(row.id, row.response) for row in rows["train"] if row.capability == capability}
    assert mixed <= {(row.id, row.response) for row in alone}
