"""What is found to be shared with an evaluation set, and what is not taken for it."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, strategies
from PIL import Image

from capcur_jax.curation.contamination import compare
from capcur_jax.curation.fingerprints import Looks, TextIndex, fingerprint, jaccard, shingles, spelling, words
from capcur_jax.data import __main__ as data_command
from capcur_jax.models.inputs import BadImage
from tests.conftest import random_image

LONG = (
    "A farmer has 12 boxes with 8 apples in each of them and sells 30 of the apples on the market. How many apples "
    "does the farmer have left when the market closes in the evening?"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(id, problem, *images):
    return {"id": id, "problem": problem, "answer": "1", "images": list(images)}


def kinds_of(folder, train, against, **options):
    """id of a training row -> its surest kind, and the report."""
    files = write(folder / "train.jsonl", train), write(folder / "test.jsonl", against)
    report, _, kinds = compare([files[0]], [files[1]], **options)
    return {id: kind for (_, id), kind in kinds.items()}, report


@pytest.fixture
def folder(tmp_path):
    """a: an image; same: its pixels in another file; look: it, halved and saved as JPEG; b, c: others; broken ones."""
    image = random_image(160, 120, seed=3)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "same.bmp")
    image.resize((80, 60), Image.Resampling.LANCZOS).save(tmp_path / "look.jpg", quality=70)
    random_image(160, 120, seed=4).save(tmp_path / "b.png")
    random_image(160, 120, seed=5).save(tmp_path / "c.png")
    for name in ("broken", "copy"):
        (tmp_path / f"{name}.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    Image.new("RGB", (100, 100), "white").save(tmp_path / "white.png")
    Image.new("RGB", (90, 90), "white").save(tmp_path / "white2.png")
    return tmp_path


# ---------------------------------------------------------------------- rows


def test_each_kind_of_match_is_told_apart(folder):
    train = [
        row("both", "How many dots?", "same.bmp"),
        row("image", "What color is the sky above it?", "same.bmp"),
        row("look and text", "How  MANY dots", "look.jpg"),
        row("look", "What color is the sky above it?", "look.jpg"),
        row("template", "How many dots?", "b.png"),
        row("nothing", "Which is the largest?", "b.png"),
        row("text", LONG.replace(".", " ")),
        row("near", LONG.replace("closes in the evening", "closes")),
        row("numbers", LONG.replace("12", "17").replace("8", "9").replace("30", "64")),
        row("short", "How many dots?"),  # no image here, an image there
    ]
    against = [row("1", "<image>How many dots?", "a.png"), row("2", LONG), row("3", "Something else?", "c.png")]
    found, report = kinds_of(folder, train, against)
    assert found == {
        "both": "image and text", "image": "image", "look and text": "look and text", "look": "look",
        "text": "text", "near": "similar text",
    }  # fmt: skip
    assert report["training_rows"] == dict.fromkeys(report["training_rows"], 1)
    assert report["same_text_only"] == 2  # "template" and "short"
    (counts,) = report["evaluation_rows"].values()
    assert counts == {"rows": 3, "shared": 2, "shared_or_look": 2}


def test_thousands_of_equal_questions_about_other_images_are_no_contamination(folder):
    train = [row(f"t{n}", "How many objects are there?", "b.png") for n in range(2000)]
    against = [row(f"e{n}", "How many objects are there?", "c.png") for n in range(500)]
    found, report = kinds_of(folder, train, against)
    assert not found and report["pairs"] == 0 and report["same_text_only"] == 2000


def test_equal_images_that_can_not_be_decoded_and_flat_ones(folder):
    train = [row("1", "Q?", "copy.png"), row("2", "Q?", "white2.png"), row("3", "Q?", "missing.png")]
    against = [row("e1", "Q?", "broken.png"), row("e2", "Q?", "white.png"), row("e3", "Q?", "missing.png")]
    found, report = kinds_of(folder, train, against)
    assert found == {"1": "image and text"}  # the same bytes; two white pictures of two sizes say nothing
    assert report["unreadable_images"]["images"] == 3


def test_a_row_is_named_with_its_surest_matches_and_all_are_counted(folder):
    against = [row(f"e{n}", f"Question {n} of many about it?", "a.png") for n in range(300)]
    files = write(folder / "train.jsonl", [row("t", "Question 299 of many about it?", "same.bmp")]), write(
        folder / "test.jsonl", against)  # fmt: skip
    report, pairs, _ = compare([files[0]], [files[1]])
    assert report["pairs"] == 300 and len(pairs) == 5
    assert pairs[0]["against"]["id"] == "e299" and pairs[0]["kind"] == "image and text"
    assert list(report["evaluation_rows"].values()) == [{"rows": 300, "shared": 300, "shared_or_look": 300}]


def test_one_of_several_images_is_enough(folder):
    found, _ = kinds_of(folder, [row("t", "Q one?", "b.png", "same.bmp")], [row("e", "R two?", "a.png", "c.png")])
    assert found == {"t": "image"}


def test_the_threshold_is_that_of_near_texts(folder):
    train, against = [row("t", LONG.replace("evening", "night"))], [row("e", LONG)]
    score = jaccard(shingles(words(train[0]["problem"])), shingles(words(LONG)))
    assert 0.8 < score < 1
    assert kinds_of(folder, train, against, threshold=score)[0] == {"t": "similar text"}
    assert not kinds_of(folder, train, against, threshold=score + 0.001)[0]


# ---------------------------------------------------------------------- the command


def run(capsys, *arguments):
    code = data_command.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out else None, err


def test_the_command_reports_and_writes_what_is_clean(folder, capsys):
    train = write(folder / "train.jsonl", [
        row("both", "How many dots?", "same.bmp"), row("alike", "How many dots?", "look.jpg"),
        row("look", "What is this?", "look.jpg"),
        row("clean", "How many dots?", "b.png"), row("text", LONG), {"id": "bad", "problem": "Q?", "answer": None},
    ])  # fmt: skip
    second = write(folder / "second.jsonl", [row("clean", "Another row of that id?"), row("more", "Is it one more?")])
    test = write(folder / "test.jsonl", [row("e", "How many dots?", "a.png"), row("f", LONG)])
    arguments = ("contamination", "--train", train, second, "--against", test)
    output, clean = folder / "report.json", folder / "clean.jsonl"
    code, result, err = run(capsys, *arguments, "--output", output, "--remove", clean)
    assert code == 0 and "image and text" in err
    removed = result["removed"]
    assert (removed["rows"], removed["kept"]) == (8, 4)
    assert removed["dropped"] == {
        "contaminated: image and text": 1, "contaminated: text": 1, "no answer": 1, "id of another file": 1,
    }  # fmt: skip
    assert [json.loads(line)["id"] for line in clean.read_text().splitlines()] == ["alike", "look", "clean", "more"]
    report = json.loads(output.read_text())
    pairs = {pair["train"]["id"]: pair for pair in report["named_pairs"]}
    assert set(pairs) == {"both", "alike", "look", "text"} and pairs["both"]["against"] == {
        "file": str(test),
        "id": "e",
    }
    assert pairs["both"]["image_difference"] == 0 < pairs["look"]["image_difference"]
    assert result["train"]["dropped"] == {"no answer": 1}
    _, result, _ = run(capsys, *arguments, "--remove", clean, "--remove_look_alikes")
    removed = result["removed"]["dropped"]
    assert removed["contaminated: look"] == removed["contaminated: look and text"] == 1
    for wrong in (
        ("--threshold", 0), ("--remove", "clean.csv"), ("--remove", train), ("--remove", test), ("--output", second),
        ("--output", test), ("--output", clean, "--remove", clean),
    ):  # fmt: skip
        assert run(capsys, *arguments, *wrong)[0] == 2
    assert [len(file.read_text().splitlines()) for file in (train, second, test, clean)] == [6, 2, 2, 2]


# ---------------------------------------------------------------------- images


def test_pixels_count_and_not_the_file(folder):
    assert fingerprint(str(folder / "a.png")) == fingerprint(str(folder / "same.bmp"))
    assert fingerprint(str(folder / "a.png")) != fingerprint(str(folder / "b.png"))
    lying = Image.open(folder / "a.png").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(folder / "lying.png", exif=exif)
    assert fingerprint(str(folder / "lying.png")).pixels == fingerprint(str(folder / "a.png")).pixels
    Image.new("RGB", (2, 3)).save(folder / "tall.png")
    Image.new("RGB", (3, 2)).save(folder / "wide.png")
    assert fingerprint(str(folder / "tall.png")).pixels != fingerprint(str(folder / "wide.png")).pixels
    with pytest.raises(BadImage, match="broken"):
        fingerprint(str(folder / "broken.png"))


def test_changed_copies_look_alike_and_other_images_do_not(tmp_path):
    images = [random_image(160 + n, 120, seed=n) for n in range(60)]

    def looks(change):
        found = []
        for number, image in enumerate(images):
            change(image).save(tmp_path / f"{number}.png")
            found.append(fingerprint(str(tmp_path / f"{number}.png"), look=True).look)
        return found

    def jpeg(image):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=50)
        return Image.open(buffer)

    index = Looks(looks(lambda image: image))
    for change in (
        lambda image: image.resize((image.width // 2, image.height // 2)),
        jpeg,
        lambda image: image.point(lambda value: value * 0.9 + 12),
        lambda image: image.crop((2, 2, image.width - 2, image.height - 2)),
    ):
        assert [[place for place, _ in index.near(look)] for look in looks(change)] == [[n] for n in range(60)]
    assert index.near(None) == [] and Looks([None]).near(looks(jpeg)[0]) == []


# ---------------------------------------------------------------------- texts


def test_one_spelling():
    assert spelling("<image>\nWhat is $x^2 + 1$?") == spelling("what is  x^2+1") != spelling("what is x^2-1")
    assert spelling("Ｗｈａｔ？") == spelling("what")
    assert spelling("三个苹果") == "三 个 苹 果"
    assert spelling("!?") != spelling("...")


WORDS = strategies.lists(strategies.sampled_from("abcd"), max_size=14)


@given(strategies.lists(WORDS, max_size=40), WORDS, strategies.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_the_index_finds_exactly_what_comparing_all_pairs_finds(texts, text, threshold):
    texts, text = [shingles(words, 2) for words in texts], shingles(text, 2)
    expected = [jaccard(text, other) for other in texts]
    places, scores = TextIndex(texts).similar(text, threshold)
    assert sorted(places.tolist()) == [n for n, score in enumerate(expected) if score >= threshold]
    assert scores.tolist() == pytest.approx([expected[n] for n in places])
    assert list(scores) == sorted(scores, reverse=True)


def test_texts_without_words_share_nothing():
    assert jaccard(np.zeros(0, np.uint64), np.zeros(0, np.uint64)) == 0
