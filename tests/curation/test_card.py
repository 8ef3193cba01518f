"""The data card: its counts are the file's, its pictures are inside, and no row becomes a part of the page."""

import base64
import html.parser
import io
import json
import os
import random
import re
from pathlib import Path

import pytest
from PIL import Image

from capcur_jax.curation.card import licence_of, make_card
from capcur_jax.curation.card_pages import html_page, picture
from tests.conftest import random_image
from tests.curation.command import run, write
from tests.curation.test_checking import SEED, broken_images, mutated


def rows_of(folder):
    """30 rows: 12 perception of two kinds with images, 18 text."""
    random_image(50, 30).save(folder / "small.png")
    random_image(900, 600, seed=1).save(folder / "large.png")
    by = {"model": "base", "samples": 16}
    said = {"first": {"image": "B", "caption": "A"}, "second": {"image": "", "caption": "b"}}
    rows = [
        {"id": f"p{n}", "problem": f"Which {n}?\nA. one\nB. two", "answer": "A", "capability": "perception",
         "kind": ("shape", "color")[n % 2], "source": "docci", "images": [("small.png", "large.png")[n % 2]],
         "metadata": {"filter": said}}
        for n in range(12)
    ]  # fmt: skip
    rows += [
        {"id": f"t{n}", "problem": f"What is {n} + 1?", "answer": str(n + 1), "capability": "text", "source": "gsm8k",
         "pass_rate": n / 17, "pass_rate_by": by}
        for n in range(18)
    ]  # fmt: skip
    return rows


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text outside of them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def decoded(source):
    """The image of a data URI."""
    found = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", source)
    image = Image.open(io.BytesIO(base64.b64decode(found[2])))
    image.load()
    return image


def section(card, heading):
    (found,) = [section for section in card.sections if section.heading == heading]
    return {row[0]: tuple(row[1:]) for row in found.rows}


def test_the_counts_are_those_of_the_file(tmp_path):
    rows = [*rows_of(tmp_path), {"id": "bad", "problem": "?", "answer": None}]
    card = make_card([write(tmp_path / "set.jsonl", rows)])
    assert card.title == "set"
    assert card.facts == {
        "rows": "30", "images": "2", "rows without an image": "18", "pass rate, mean": "0.500", "dropped": "1",
    }  # fmt: skip
    assert section(card, "Capabilities") == {"text": (18, "60.0%"), "perception": (12, "40.0%")}
    assert section(card, "Sources")["docci"] == (12, "40.0%", "CC BY 4.0, texts and images")
    assert section(card, "Answers") == {"number": (18, "60.0%"), "letter": (12, "40.0%")}
    assert section(card, "Letters of multiple choice") == {"A": (12, "100.0%")}
    rates = section(card, "Pass rates")
    assert sum(count for count, _ in rates.values()) == 18 and rates["0.9-1.0"][0] == 2
    assert section(card, "Where the pass rates come from") == {"model: base, samples: 16": (18,)}
    (table,) = [s for s in card.sections if s.heading == "Perception-sensitive filter"]
    assert [tuple(row) for row in table.rows] == [
        ("first", "image alone", 0, 12, 0), ("first", "caption alone", 12, 0, 0),
        ("second", "image alone", 0, 0, 12), ("second", "caption alone", 0, 12, 0),
    ]  # fmt: skip
    assert section(card, "Rows left out here")["no answer"][0] == 1
    assert card.summary["kept"] == 30 and card.summary["capability"] == {"text": 18, "perception": 12}


def test_examples_are_spread_over_kinds_and_do_not_depend_on_the_order(tmp_path):
    rows = rows_of(tmp_path)
    ids = [row.id for row in make_card([write(tmp_path / "a.jsonl", rows)], examples=6).examples]
    random.Random(3).shuffle(rows)
    assert [row.id for row in make_card([write(tmp_path / "b.jsonl", rows)], examples=6).examples] == ids
    kinds = [(id[0], int(id[1:]) % 2 if id[0] == "p" else 0) for id in ids]
    assert sorted(kinds) == [("p", 0)] * 2 + [("p", 1)] * 2 + [("t", 0)] * 2
    assert len(make_card([tmp_path / "a.jsonl"], examples=100).examples) == 30
    assert make_card([tmp_path / "a.jsonl"], examples=0).examples == []


def test_the_page_is_one_file_with_its_pictures_inside(tmp_path, capsys):
    file = write(tmp_path / "set.jsonl", rows_of(tmp_path))
    code, result, _ = run(capsys, "card", "--input", file, "--output", tmp_path / "out", "--title", "My set")
    assert code == 0 and result["card"] == str(tmp_path / "out" / "card.html") and len(result["examples"]) == 12
    page = Page(Path(result["card"]).read_text())
    assert "My set" in page.texts and [tag for tag, _ in page.tags].count("article") == 12
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    with_image = sum(id.startswith("p") for id in result["examples"])
    assert len(pictures) == with_image > 2
    sizes = set()
    for source in pictures:
        sizes.add(decoded(source).size)
    assert sizes == {(50, 30), (320, 213)}
    assert sum(tag == "svg" for tag, _ in page.tags) == 2  # letters and pass rates
    first = Path(result["card"]).read_bytes()
    run(capsys, "card", "--input", file, "--output", tmp_path / "out", "--title", "My set")
    assert Path(result["card"]).read_bytes() == first
    assert os.fspath(tmp_path) not in first.decode()  # no paths of this machine


@pytest.mark.parametrize("name", ["card.md", "card.pdf"])
def test_a_card_is_a_page_and_nothing_else(name, tmp_path, capsys):
    code, _, err = run(capsys, "card", "--input", tmp_path / "not read.jsonl", "--output", tmp_path / name)
    assert code == 2 and f"{name}: a card is an HTML page; give a folder, or a name that ends in .html" in err


EVIL = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> [a](javascript:b) ![c](http://d) <http://e>"
    "\u202e\x1b[31m\n# head\n```\n\n<b>|`x`"
)


def evil_rows(folder):
    random_image(20, 20).save(folder / "a.png")
    names = ("id", "problem", "answer", "capability", "kind", "source")
    return [dict.fromkeys(names, EVIL) | {"answer": EVIL.replace("\x1b", ""),
        "images": [f"{EVIL[:25]}.png", "a.png"], "predictions": [EVIL], "pass_rate": 0.5, "pass_rate_by": {EVIL: EVIL},
        "metadata": {EVIL: EVIL, "filter": {EVIL: {"image": EVIL, "caption": 3}, "x": 7, "y": {"image": ["A"]}}}}, {
        "id": "sft", "problem": EVIL, "response": EVIL}, {"id": EVIL + "2"}]  # fmt: skip


def test_nothing_in_a_row_becomes_a_part_of_the_page(tmp_path, capsys):
    file = write(tmp_path / "<b>&.jsonl", evil_rows(tmp_path))
    code, result, _ = run(capsys, "card", "--input", file, "--output", tmp_path / "a.html", "--title", EVIL)
    assert code == 0 and result["kept"] == 2
    text = (tmp_path / "a.html").read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "a", "iframe", "object", "link", "form", "h4"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "img" or attributes["src"].startswith("data:image/")
    assert "\u202e" not in text and "\x1b" not in text and "default-src 'none'" in text
    assert any("<script>alert(1)" in shown for shown in page.texts)  # shown, as text


def test_what_the_steps_before_left_out_is_told(tmp_path, capsys):
    file = write(tmp_path / "set.jsonl", rows_of(tmp_path))
    (tmp_path / "filter.json").write_text('progress\n{"rows": 40, "kept": 30, "dropped": {"image answers it": 10}}\n')
    card = make_card([file], reports=[tmp_path / "filter.json"])
    assert section(card, "How it was made") == {"filter": (40, 30, "image answers it: 10")}
    (tmp_path / "other.json").write_text("nothing")
    arguments = ("card", "--input", file, "--output", tmp_path / "a.html", "--reports")
    for name in ("other.json", "missing.json"):
        code, _, err = run(capsys, *arguments, tmp_path / name)
        assert code == 2 and name in err


def test_a_file_without_a_good_row_makes_no_page(tmp_path, capsys):
    file = write(tmp_path / "set.jsonl", [{"id": "1"}])
    code, _, err = run(capsys, "card", "--input", file, "--output", tmp_path / "a.html")
    assert code == 2 and "`problem` is missing" in err and not (tmp_path / "a.html").exists()


@pytest.mark.parametrize(
    ("source", "licence"),
    [("gsm8k", "MIT"), ("visonlyqa", "GPL-3.0"), ("easy-VQA", "MIT"), ("unknown", ""), ("", ""), ("os.path", ""),
     ("__init__", ""), ("../rows", "")],
)  # fmt: skip
def test_licences(source, licence):
    assert licence_of(source) == licence


def test_pictures_of_odd_images(tmp_path):
    Image.new("RGB", (5000, 1), "red").save(tmp_path / "narrow.png")
    Image.new("P", (3, 3)).save(tmp_path / "palette.gif")
    assert decoded(picture(str(tmp_path / "narrow.png")).source).size == (320, 1)
    small = picture(str(tmp_path / "palette.gif"))
    assert small.source.startswith("data:image/png;") and small.enlarged and small.width == 159
    assert picture(str(tmp_path / "missing.png")).trouble.endswith("missing.png: missing or unreadable")


def test_a_thousand_mutated_rows_and_images_end_no_command(tmp_path, capsys):
    draw = random.Random(SEED)
    random_image(40, 30).save(tmp_path / "a.png")
    broken_images(tmp_path, draw)
    lines = [mutated(draw) for _ in range(1000)]
    lines += [
        json.dumps({"problem": f"{n}?", "answer": "1", "images": [f"mutated{n}.png"]}).encode() for n in range(60)
    ]
    lines = [line for line in lines if line.strip()]
    file = tmp_path / "fuzz.jsonl"
    file.write_bytes(b"\n".join(lines))

    code, result, _ = run(capsys, "card", "--input", file, "--output", tmp_path / "a.html", "--examples", 500)
    assert code == 0 and result["rows"] == len(lines) == result["kept"] + sum(result["dropped"].values())
    assert len(result["examples"]) > 200
    assert html_page(make_card([file], examples=5))

    code, result, _ = run(capsys, "split", "--input", file, "--output", tmp_path / "splits")
    assert code == 0 and result["rows"] == len(lines) == result["kept"] + sum(result["dropped"].values())
    assert sum(result["splits"].values()) == result["kept"] > 200

    arguments = ("contamination", "--train", file, "--against", tmp_path / "splits" / "train.jsonl")
    code, result, _ = run(capsys, *arguments, "--remove", tmp_path / "clean.jsonl")
    assert code == 0 and result["train"]["rows"] == len(lines)
    (counts,) = result["evaluation_rows"].values()
    assert counts["shared"] == counts["rows"] > 10  # they are rows of the training file
    removed = result["removed"]
    assert removed["rows"] == len(lines) == removed["kept"] + sum(removed["dropped"].values())
