"""The page of an evaluation: scores with what they depend on, wrong answers with pictures, filters, bounded size."""

import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from capcur_jax.errors import InputError
from capcur_jax.evaluation import errors, page
from tests.evaluation.made import answered, folder

EVIL = '<script>alert(1)</script> "quoted" & \u202e'


class Checked(html.parser.HTMLParser):
    """Counts tags, and finds ones that are not closed in order."""

    VOID = ("meta", "img", "br", "input", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def rows(tmp_path, count, categories=("algebra", "charts"), size=(40, 30)):
    found = []
    for at in range(count):
        file = tmp_path / f"{at}.png"
        Image.new("RGB", size, (at % 256, 99, 0)).save(file)
        finish, text = "length" if at % 5 == 1 else "stop", "" if at % 3 == 0 else f"it is {at}"
        category = categories[at % len(categories)]
        found.append(answered(at, at % 3 == 0, images=(file,), category=category, finish=finish, text=text))
    return found


def test_scores_conditions_and_wrong_answers_stand_on_the_page(tmp_path):
    path = folder(
        tmp_path / "run", {"mathvista": rows(tmp_path, 9), "pope": rows(tmp_path, 6)}, {"max_tokens": 48}, {"x": "y"}
    )
    scores = json.loads((path / "scores.json").read_text())
    scores["benchmarks"]["pope"]["official"] |= {
        "score": 81.25,
        "interval": [70.0, 90.5],
        "splits": {"random": {"f1": 77.5}},
    }
    (path / "scores.json").write_text(json.dumps(scores))
    text = page.write(path).read_text()
    checked = Checked(text)
    for said in ("81.2", "70.0 to 90.5", "splits: random: f1", "77.5", "max_tokens", "48", "10 of 10", "gold answer"):
        assert said in text
    assert checked.tags.count("article") == 10 and checked.tags.count("img") == 10 and "script" not in checked.tags
    assert "default-src 'none'" in text and "http" not in re.sub(r'http-equiv|"http://www.w3.org[^"]*"', "", text)


def test_every_filter_has_its_rule_and_its_articles(tmp_path):
    path = folder(tmp_path / "run", {"a": rows(tmp_path, 9), "b": rows(tmp_path, 6)})
    text = page.write(path).read_text()
    checked = Checked(text)
    articles = [found for tag, found in checked.attributes if tag == "article"]
    choices = re.findall(r'<select id="(\w+)">(.*?)</select>', text)
    assert [name for name, _ in choices] == ["benchmark", "category", "kind"]
    for name, options in choices:
        values = [value for value in re.findall(r'value="(\d*)"', options) if value]
        assert len(values) >= 2
        for value in values:
            assert f'body:has(#{name} option[value="{value}"]:checked) article:not([data-{name}="{value}"])' in text
            assert any(article.get(f"data-{name}") == value for article in articles)


def test_the_judges_classes_are_kinds_of_errors(tmp_path):
    path = folder(tmp_path / "run", {"a": rows(tmp_path, 9)})
    found = {
        "first": "question_misread", "present": ["perception", "question_misread"], "quote": "it is 1", "quoted": True,
        "confidence": "low", "saw": "image", "by": "judge",
    }  # fmt: skip
    kept = {
        "rows": {"a": {"1": found}}, "all": errors.summary([answered(1, False)], [found], 6), "show": "image",
        "judge": {"judge": "j1", "prompts": "1-ab"}, "definition": errors.CLASSES, "paper": errors.PAPER,
    }  # fmt: skip
    (path / "errors.json").write_text(json.dumps(kept))
    text = page.write(path).read_text()
    Checked(text)
    for said in (
        "question misread",
        "j1",
        "1-ab",
        "86.9",
        "First wrong step",
        "Anywhere: perception, question misread",
    ):
        assert said in text
    assert text.index("First wrong step") < text.index("nothing read</b>")  # those that the judge saw come first


def test_hostile_texts_are_escaped(tmp_path):
    row = answered(1, False, text=EVIL, gold=EVIL, question=EVIL, category=EVIL)
    path = folder(tmp_path / "run", {"a": [row]}, {EVIL: EVIL})
    text = page.write(path).read_text()
    checked = Checked(text)
    assert "script" not in checked.tags and "&lt;script&gt;" in text and "\u202e" not in text


def test_broken_and_missing_images_are_said(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no")
    images = (tmp_path / "broken.png", tmp_path / "missing.png")
    text = page.write(folder(tmp_path / "run", {"a": [answered(1, False, images=images)]})).read_text()
    assert "broken.png: UnidentifiedImageError" in text and "missing.png: FileNotFoundError" in text


def test_nothing_wrong_and_no_folder(tmp_path):
    assert "None." in page.write(folder(tmp_path / "run", {"a": [answered(1, True)]})).read_text()
    with pytest.raises(InputError):
        page.write(tmp_path / "nowhere")


def test_a_page_of_3000_photos_has_a_cap_and_says_so(tmp_path):
    rng = np.random.default_rng(0)
    photos = [tmp_path / f"{at}.jpg" for at in range(20)]
    for photo in photos:  # noise: the largest that a JPEG can be
        Image.fromarray(rng.integers(0, 255, (300, 400, 3), np.uint8)).save(photo)
    long = {"text": "long " * 5000}
    many = [answered(at, False, images=(photos[at % 20],), category=f"c{at % 30}", **long) for at in range(3000)]
    path = folder(tmp_path / "run", {"a": many[:1500], "b": many[1500:]})
    file = page.write(path)
    text = file.read_text()
    assert file.stat().st_size < 15 << 20
    assert text.count("<article") == page.MOST and "500 of 3,000" in text and "drawn by hash" in text
    assert len(re.findall(r'<article data-benchmark="1"', text)) == page.MOST // 2
