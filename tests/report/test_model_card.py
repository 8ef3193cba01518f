"""The card of an export says what the records say, and what they don't is called unknown."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from capcur_jax import presets
from capcur_jax.records import jsonl
from capcur_jax.report import model_card

STAGES = [{"stage": name, "objective": kind, "data": "a | b"} for name, kind in (("text", "sft"), ("visual", "grpo"))]


@pytest.fixture
def workdir(tmp_path):
    config = presets.get("laptop", order=("text", "visual"))
    config.evaluation.sets = ("text",)
    jsonl.write_json_atomic(tmp_path / "config.json", config.to_dict())
    summary = {"status": "finished", "stages": STAGES, "best_validation": 0.625}
    summary["left_out"] = {"text": {"base": 1, "after_visual": 2}}
    jsonl.write_json_atomic(tmp_path / "summary.json", summary)
    with jsonl.JsonLines(tmp_path / "metrics.jsonl") as lines:
        for step in range(1, 41):
            stage = "text" if step <= 20 else "visual"
            lines.write({"type": "step", "stage": stage, "step": step, "accuracy": step / 40, "loss": 1.0})
        for moment, accuracy in (("base", 0.25), ("text", 0.5), ("visual", 0.75)):
            lines.write({"type": "evaluation", "after": moment, "capability": "text", "accuracy": accuracy})
    for name in ("1-text", "best", "final"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "config.json").touch()
    return tmp_path


def cards(workdir, source=None) -> dict[str, ModelCard]:
    written = model_card.write(workdir, source or workdir, "")
    return {file.parent.name: ModelCard.load(file) for file in written}


def test_each_export_has_what_it_came_to(workdir):
    found = cards(workdir)
    assert list(found) == ["1-text", "best", "final"]
    assert found["1-text"].data.tags == ["capcur_jax", "sft"] and found["final"].data.tags[1:] == ["grpo", "sft"]
    assert "after the stage text" in found["1-text"].text and "at the end of the run" in found["final"].text
    assert "| visual | grpo | a \\| b |" in found["final"].text and "grpo" not in found["1-text"].text
    assert "| visual | 20 |  | 53.8% to 98.8% |  | 1 to 1 |" in found["final"].text
    for name, moments in {"1-text": (25, 50), "final": (25, 50, 75), "best": (25,)}.items():
        titles = ("base", "after text", "after visual")
        rows = [f"| {title} | {share}.0% |" for title, share in zip(titles, moments, strict=False)]
        assert [line for line in found[name].text.splitlines() if line.endswith(".0% |")] == rows
    assert "chosen by: 62.5%" in found["best"].text
    assert "3 answers are missing" in found["final"].text and "1 answers are missing" in found["1-text"].text
    assert found["final"].data.base_model is None and "checkpoint `tiny_qwen3_vl`" in found["final"].text


@pytest.mark.parametrize("card", [
    None, "# No head\n", "---\nlicense: [\n---\n", "---\nlibrary_name: x\n---\n", "---\n- a\n---\n",
])  # fmt: skip
def test_a_licence_that_nobody_told_is_unknown(workdir, tmp_path, card):
    base = tmp_path / "base"
    base.mkdir()
    if card is not None:
        (base / "README.md").write_text(card)
    final = cards(workdir, base)["final"]
    assert final.data.license == "unknown" and "Unknown: the base came without" in final.text


def test_the_shipped_base_tells_its_licence(workdir):
    final = cards(workdir, model_card.Path(presets.TINY_CHECKPOINT))["final"]
    assert final.data.license == "apache-2.0" and "The base's own: apache-2.0." in final.text


def test_before_any_stage_nothing_is_claimed(workdir):
    (workdir / "summary.json").unlink()
    (workdir / "metrics.jsonl").write_text("")
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"checkpoint": ""}))
    text = cards(workdir)["final"].text
    assert "random weights" in text and "None: it was not evaluated." in text and "is unknown" in text
