"""Figures of the pages: what benchmarks keep, what the pages make of it, and the mark of one older than its code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import model_parity
import pytest
import record
import write
from absl import flags

from tests.test_layers import PACKAGE

ROOT = PACKAGE.parent
RESULTS = write.results()


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def without_marks(text: str) -> str:
    return text.replace(write.OLDER, "")


@pytest.mark.parametrize("page", write.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_have_what_is_written_into_them(page):
    text = page.read_text(encoding="utf-8")
    assert without_marks(write.written(text, RESULTS)) == without_marks(text), "run: python docs/write.py"


def test_a_figure_that_is_older_than_its_code_says_so():
    lacking = {name for name, result in RESULTS.items() if result["older"] is None}
    if len(lacking) == len(RESULTS):
        pytest.skip("no git history: nothing says what has changed since a figure")
    assert not lacking, "measured at commits that the history lacks"
    wrong = [page.name for page in write.PAGES if write.written(text := page.read_text("utf-8"), RESULTS) != text]
    assert not wrong, "run: python docs/write.py"


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_says_where_it_comes_from_and_is_shown(name):
    result = RESULTS[name]
    assert re.fullmatch(r"[0-9a-f]{7,40}", result["commit"]) and re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert "jax" in result["versions"] and result["machine"] and result["figures"]
    script = re.match(r"python (benchmarks/\w+\.py)", result["command"])
    assert script and "record.write(" in (ROOT / script[1]).read_text(encoding="utf-8")
    assert "/" not in result["command"].removeprefix(script[0]).replace("configs/", ""), "a path of some machine"
    for glob in result["measures"]:
        assert any(ROOT.glob(glob)), glob
    shown = re.findall(r"<!-- figures: \w+ of ([\w, ]+) -->", "".join(page.read_text("utf-8") for page in write.PAGES))
    assert name in {one.strip() for names in shown for one in names.split(",")}


def test_what_changed_after_its_commit_is_older(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "room").mkdir()
    for name in ("measured", "other"):
        (tmp_path / "room" / f"{name}.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    (tmp_path / "room" / "other.py").write_text("2\n")
    globs = ["room/meas*.py"]
    assert write.changed(tmp_path, commit, globs) is False
    assert write.changed(tmp_path, commit, []) is False
    (tmp_path / "room" / "measured.py").write_text("2\n")
    assert write.changed(tmp_path, commit, globs) is True
    assert write.changed(tmp_path, "0" * 40, globs) is None
    result = {**RESULTS["rollout"], "older": True}
    assert write.standing(result).endswith("**Older than its code.**")
    assert "Older" not in write.standing({**result, "older": False})


def test_a_block_is_replaced_and_the_rest_stays():
    text = "before\n<!-- figures: gains of three_seeds -->\nold\n<!-- end -->\nafter\n"
    new = write.written(text, RESULTS)
    assert new.startswith("before\n<!-- figures") and new.endswith("\n<!-- end -->\nafter\n") and "old" not in new
    assert "Learned" in new and RESULTS["three_seeds"]["commit"] in new
    assert write.written(new, RESULTS) == new


def test_a_benchmark_keeps_what_it_found(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(record, "_git", lambda command, *_: {"status": "", "rev-parse": "1234567"}[command])
    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/load.py", "--folder=/tmp/here", "--rounds=3", "--record=some"])
    values = flags.FlagValues()
    monkeypatch.setattr(record, "_RECORD", flags.DEFINE_string("record", "", "", flag_values=values))
    values(["test"])
    record.write({"a": 1.0}, ())
    assert not record.FOLDER.exists(), "kept without --record"
    values["record"].value = "some"
    record.write({"a": 1.0}, ("capcur_jax/models/*.py",), versions={"peer": "1"})
    kept = json.loads((record.FOLDER / "some.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="JSON"):
        record.write({"a": float("nan")}, ())
    assert kept["command"] == "python benchmarks/load.py --folder=PATH --rounds=3"
    assert kept["figures"] == {"a": 1.0} and kept["versions"]["peer"] == "1" and "CPU cores" in kept["machine"]
    assert kept.keys() == RESULTS["load"].keys() - {"older"}
    with pytest.raises(SystemExit, match=r"no file is named capcur_jax/nowhere\.py"):
        record.write({}, ("capcur_jax/nowhere.py",))


def test_parity_takes_the_worst_of_all_cases():
    cases = ElementTree.Element("cases")

    parity = "test_logits_and_gradients_equal_transformers"

    def add(test: str, case: str, **properties: str) -> None:
        one = ElementTree.SubElement(cases, "testcase", name=f"{test}[{case}]")
        for name, value in properties.items():
            ElementTree.SubElement(one, "property", name=name.replace("_", " "), value=value)

    for case, logits in (("tied", "1e-6"), ("nine", "3e-6"), ("windowed", "5e-6"), ("windowed nine", "4e-6")):
        for kind in ("text", "one image", "batch"):
            add(parity, f"{case}-{kind}", logits=logits, gradient="2e-6 (tower)")
    add("test_a_prompt_computed_once_equals_full_sequences", "qwen3_vl", gradient="1e-6", logprobs="2e-6")
    halves = {"ours, float32 parameters,": "0.2", "transformers'": "0.3"}
    add("test_bfloat16_is_as_near_to_float32_as_transformers_is", "qwen3_vl", **halves)
    found = model_parity.figures(list(cases))
    assert [one["text"] for one in found["largest"]] == [5e-6, 2e-6, 3e-6, 2e-6]
    assert found["shared_prompt"] == 2e-6 and found["bfloat16"] == {"ours": [0.2], "transformers": [0.3]}
    tests = "".join((ROOT / name).read_text(encoding="utf-8") for name in model_parity.FILES)
    for case in cases:
        assert f"def {case.get('name').partition('[')[0]}(" in tests
