"""The perception and visual sets on the real images: facts, answers, splits, files."""

import collections
import hashlib
import importlib.util
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from capcur_jax.data.rows import read_problems
from capcur_jax.data.sources import easy_vqa

needs_images = pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="pip install easy-vqa")
CAPABILITIES = tuple(easy_vqa.KINDS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("images")
    return {capability: easy_vqa.build(directory, capability) for capability in CAPABILITIES}


@pytest.fixture(scope="module")
def rows(files):
    return {
        capability: {split: read_problems(file)[0] for split, file in of_split.items()}
        for capability, of_split in files.items()
    }


def _image(box, color=(255, 0, 0), background=(240, 235, 250)):
    pixels = np.full((64, 64, 3), background, np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = color
    return pixels


@pytest.mark.parametrize(
    ("box", "center", "side"),
    [((10, 20, 30, 26), (20.0, 23.0), 20), ((0, 0, 9, 12), (4.5, 6.0), 12), ((41, 31, 64, 64), (52.5, 47.5), 33)],
)
def test_measure_finds_color_center_and_side_even_at_the_border(box, center, side):
    assert easy_vqa.measure(_image(box)) == ("red", center, side)


def test_measure_knows_no_other_color():
    assert easy_vqa.measure(_image((5, 5, 20, 20), color=(255, 0, 255)))[0] is None


def test_position_is_uncertain_near_a_middle_line():
    assert easy_vqa.position_of(28.5, 35.5) == "bottom left"
    assert easy_vqa.position_of(60, 4) == "top right"
    assert easy_vqa.position_of(29, 50) is None and easy_vqa.position_of(50, 35) is None


def test_size_is_uncertain_near_a_cut():
    sides = (7, 17, 18, 19, 20, 24, 25, 26, 27, 33)
    expected = ["small", "small", None, None, "medium", "medium", None, None, "large", "large"]
    assert [easy_vqa.size_of(side) for side in sides] == expected


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ([("what is the blue shape?", "circle")], "circle"),
        ([("what color is the circle?", "blue")], "circle"),
        ([("is there a circle?", "yes")], "circle"),
        ([("is there not a circle?", "no")], "circle"),
        ([("is there a circle?", "no"), ("is no circle present?", "yes")], None),
        ([("is there a circle?", "yes"), ("what shape is present?", "triangle")], None),
        ([], None),
    ],
)
def test_a_fact_is_what_the_annotations_agree_on(asked, shape):
    assert easy_vqa.stated(asked, easy_vqa.SHAPES) == shape


PRICES = {"circle": 4, "rectangle": 9, "triangle": 7}


@pytest.mark.parametrize(
    ("kind", "facts", "reasoning", "answer"),
    [
        ("shape", {"shape": "triangle"}, "The shape is a triangle.", "triangle"),
        ("color", {"color": "yellow"}, "The shape is yellow.", "yellow"),
        ("position", {"position": "top left"}, "The shape is at the top left.", "top left"),
        ("size", {"size": "large"}, "The shape is large.", "large"),
        ("corners", {"shape": "triangle", "price": 7}, "The shape is a triangle. It has 3 corners. 3 x 7 = 21.", "21"),
        ("corners", {"shape": "circle", "price": 5}, "The shape is a circle. It has 0 corners. 0 x 5 = 0.", "0"),
        (
            "prices",
            {"shape": "rectangle", "prices": {"circle": 2, "rectangle": 6, "triangle": 9}, "count": 4},
            "The shape is a rectangle. A rectangle costs 6 coins. 4 x 6 = 24.",
            "24",
        ),
        ("code", {"color": "red", "plus": 8}, "The shape is red. Red has code 6. 6 + 8 = 14.", "14"),
    ],
)
def test_worked_solution(kind, facts, reasoning, answer):
    assert easy_vqa.worked(kind, facts) == (reasoning, answer)


def test_unknown_kind_capability_and_missing_package_are_clear_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no kind 'taste'"):
        easy_vqa.worked("taste", {})
    with pytest.raises(ValueError, match="no capability 'text'; use one of perception, visual"):
        easy_vqa.build(tmp_path, "text")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install easy-vqa"):
        easy_vqa.build(tmp_path, "visual")


@needs_images
def test_pixels_and_annotations_agree_on_every_color():
    for folder in ("train", "test"):
        asked = collections.defaultdict(list)
        for text, answer, number in json.loads((easy_vqa.package_data() / folder / "questions.json").read_text()):
            asked[number].append((text, answer))
        annotated = {number: easy_vqa.stated(pairs, easy_vqa.COLOR_NAMES) for number, pairs in asked.items()}
        splits = ("test",) if folder == "test" else ("train", "validation")
        for image in [image for split in splits for image in easy_vqa.image_facts(split)]:
            assert image.color is not None and annotated.get(image.number) in (image.color, None)


@needs_images
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sizes_and_balance(rows, capability):
    kinds = easy_vqa.KINDS[capability]
    assert {split: len(found) for split, found in rows[capability].items()} == easy_vqa.COUNTS
    for found in rows[capability].values():
        by_kind = collections.Counter(row.kind for row in found)
        assert set(by_kind) == set(kinds) and max(by_kind.values()) - min(by_kind.values()) <= 1
        assert {row.kind for row in found[: len(kinds)]} == set(kinds)  # any first part is balanced
        assert all(row.capability == capability and row.response is None for row in found)
        if capability == "perception":
            for kind in kinds:
                answers = collections.Counter(row.answer for row in found if row.kind == kind).values()
                assert max(answers) - min(answers) <= 1


@needs_images
def test_splits_share_no_image_and_only_open_questions_are_asked(rows):
    for of_split in rows.values():
        images = [{row.images[0] for row in found} for found in of_split.values()]
        assert not (images[0] & images[1] or images[0] & images[2] or images[1] & images[2])
        answers = {row.answer for found in of_split.values() for row in found}
        assert not answers & {"yes", "no"}
    assert {row.images for row in rows["visual"]["validation"]}.isdisjoint(
        row.images for row in rows["perception"]["train"]
    )
    assert sum(easy_vqa.is_validation(number) for number in range(4000)) == pytest.approx(200, abs=30)


@needs_images
def test_own_questions_are_easy_vqas_verbatim(rows):
    asked = {tuple(row) for row in json.loads((easy_vqa.package_data() / "test" / "questions.json").read_text())}
    own = [row for row in rows["perception"]["test"] if row.kind in ("shape", "color")]
    for row in own:
        assert (row.problem, row.answer, int(os.path.basename(row.images[0]).removesuffix(".png"))) in asked


def _numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


@needs_images
def test_visual_answers_follow_from_the_text_and_the_image(rows):
    facts = {(image.folder, image.number): image for s in ("train", "test") for image in easy_vqa.image_facts(s)}
    for row in rows["visual"]["train"] + rows["visual"]["test"]:
        folder, number = row.images[0].removesuffix(".png").split(os.sep)[-2:]
        image, numbers = facts[folder, int(number)], _numbers(row.problem)
        if row.kind == "corners":
            expected = numbers[0] * {"circle": 0, "rectangle": 4, "triangle": 3}[image.shape]
        elif row.kind == "prices":
            assert len(set(numbers[:3])) == 3  # distinct prices, or the shape need not be seen
            expected = numbers[3] * int(re.search(rf"{image.shape}(?: costs)? (\d)", row.problem).group(1))
        else:
            expected = int(re.search(rf"{image.color} (\d)", row.problem).group(1)) + numbers[-1]
        assert row.answer == str(expected)


@needs_images
def test_position_and_size_follow_from_the_pixels(rows):
    """Measured here from the whole shape's mass and rows, not from the product's bounding box."""
    for row in rows["perception"]["test"]:
        with Image.open(row.images[0]) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        value, count = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        shape_HxW = np.abs(pixels - value[count.argmax()]).sum(-1) > 100
        ys, xs = np.nonzero(shape_HxW)
        if row.kind == "position":
            # A triangle's mass is lower than its middle, by a sixth of its height.
            assert row.answer.endswith("left") == (xs.mean() < 31.5)
            assert row.answer.startswith("top") == (ys.mean() < 31.5) or abs(ys.mean() - 31.5) < 6
        if row.kind == "size":
            longest = max(np.ptp(xs), np.ptp(ys)) + 1
            assert abs(longest - {"small": 12.5, "medium": 22, "large": 30}[row.answer]) <= 6


@needs_images
def test_files_hold_relative_paths_of_images_that_are_there(files, rows):
    for capability, of_split in files.items():
        for split, file in of_split.items():
            assert '"images": ["images/' in file.read_text(encoding="utf-8").splitlines()[0]
            folder = file.parent / "images" / ("test" if split == "test" else "train")
            assert all(row.images[0].startswith(f"{folder}{os.sep}") for row in rows[capability][split])
            assert all(os.path.isfile(row.images[0]) for row in rows[capability][split])


@needs_images
def test_damaged_images_are_put_right_and_nothing_else_is_touched(files):
    file = files["visual"]["test"]
    before = file.stat().st_mtime_ns
    cut, gone = (file.parent / "images" / "test" / name for name in ("3.png", "4.png"))
    whole = cut.read_bytes()
    cut.write_bytes(whole[:10])
    gone.unlink()
    assert easy_vqa.build(file.parent, "visual") == files["visual"]
    assert cut.read_bytes() == whole and gone.is_file() and file.stat().st_mtime_ns == before


@needs_images
def test_bytes_are_those_of_the_version(files):
    known = {
        "easy-vqa-3": {
            "perception": "18614c92dc04a832d33136d12627c721dbaacc5da4f2e7bc1473e52a89de99ef",
            "visual": "53fd2248330cddfb2c7d5c5218a231b913d511dc5320d7e6757c069230050cb0",
        }
    }
    digests = {
        capability: hashlib.sha256(b"".join(file.read_bytes() for file in of_split.values())).hexdigest()
        for capability, of_split in files.items()
    }
    assert digests == known.get(easy_vqa.VERSION), "rows changed: raise VERSION, then note their digests here"
