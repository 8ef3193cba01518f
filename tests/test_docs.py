"""The pages name what is there: links, files, modules and rooms; the README stays short."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import keys
import pytest

from capcur_jax import checks, presets
from tests.test_layers import LAYERS, PACKAGE

ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATTERNS = {"paper.py", "capcur_jax/data/sources/NAME.py"}


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def faults(page: Path, text: str) -> list[str]:
    """Links, files and modules that the text names and that are not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = (page.parent / path).resolve() if path else page
            if not target.exists():
                found.append(f"link {link}")
            elif anchor and anchor not in anchors(target):
                found.append(f"heading {link}")
    for path in set(re.findall(r"(?<![\w./*-])((?:[\w.-]+/)*[\w-]+\.py)\b", text)) - PATTERNS:
        if not ((ROOT / path).exists() or (ROOT / "tests" / path).exists() or list(PACKAGE.rglob(path))):
            found.append(f"file {path}")
    rooms = "capcur_jax|tests|benchmarks|configs|docs|launch|notebooks"
    for path in re.findall(rf"\b((?:{rooms})/[\w/]*/)(?![\w<{{*.])", text):
        if not (ROOT / path).is_dir():
            found.append(f"folder {path}")
    for module in re.findall(r"python -m (capcur_jax[\w.]*\w)", text):
        spec = importlib.util.find_spec(module)
        if spec is None or (spec.submodule_search_locations and not importlib.util.find_spec(f"{module}.__main__")):
            found.append(f"module {module}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    assert not faults(page, page.read_text())


@pytest.mark.parametrize("text", [
    "[a](docs/nowhere.md)", "[a](docs/data.md#nowhere)", "`capcur_jax/drawing.py`", "`rollout/nowhere.py`",
    "in `opening.py`", "capcur_jax/nowhere/", "python -m capcur_jax.evaluation.report RUN",
])  # fmt: skip
def test_what_is_not_there_is_found(text):
    assert len(faults(ROOT / "README.md", text)) == 1


def test_what_a_run_that_goes_on_may_change_is_told():
    text = (ROOT / "docs" / "training.md").read_text()
    told = re.search(r"may change: (.*?)\. Any other changed key", text, re.DOTALL)[1]
    assert sorted(re.findall(r"`([\w.]+)`", told)) == sorted(checks.MAY_CHANGE)


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_contributing_has_the_layers():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    told = [re.split(r"\s{2,}", line)[0].split() for line in block.splitlines()]
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    assert told == [[room for room in line.split() if room in there] for line in LAYERS.strip().split("\n")]


def strings() -> list[str]:
    """Every text of the package's code; what is filled in stands as NUL."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [re.sub(r"\s+", " ", text) for text in found]


def test_messages_of_troubleshooting_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages, said = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE), strings()
    assert len(messages) > 40

    def there(message: str) -> bool:
        parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        return any(re.search(".*?".join(parts), text) for text in said)

    assert [message for message in messages if not there(message)] == []
    assert not there("this message is nowhere")


def test_every_key_of_a_config_is_told():
    told, meant = keys.values(), keys.meanings()
    there = {key for key, _ in keys.leaves(presets.defaults())}
    there |= {f"stages.NAME.{key}" for key, _ in keys.leaves(presets.stage((), 0, 0, 0.0))}
    there |= {f"data.sets.NAME.{key}" for key in presets.defaults().data.sets.text}
    assert set(told) == there
    assert [key for key in there if len(meant[key]) < 4] == []
    table = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    assert all(f"| `{key.rpartition('.')[2]}` | " in table for key in there)
    assert meant["objective.clip_low"] == "the ratio counts down to 1 - clip_low"
    assert (
        meant["model.remat"].startswith("What is computed again backwards")
        and "laptop `2`" in told["objective.updates_per_batch"]
    )
