"""A run that begins with a checkpoint and data of the Hub and ends there. The Hub is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests import tiny
from tests.hub.stand_in import TOKEN

ROOT = Path(__file__).resolve().parents[2]
ROWS = "hf://datasets/owner/sums/train.jsonl"


@pytest.mark.e2e
def test_a_run_from_the_hub_to_the_hub(hub, checkpoint, sets, tmp_path, monkeypatch):
    card = b"---\nlicense: other\nlicense_name: tongyi\nlicense_link: LICENSE\n---\n# Small\n"
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    begun = hub.add("models/owner/small-vl", files | {"README.md": card})
    hub.add("datasets/owner/sums", {"train.jsonl": Path(sets["data.sets.text.train"]).read_bytes()})
    settings = {
        "checkpoint": "owner/small-vl", **tiny.SETTINGS, **sets, "data.sets.text.train": ROWS,
        "order": "('text',)", "stages.text.steps": 2, "stages.text.prompts": 4, "evaluation.sets": "('text',)",
    }  # fmt: skip
    config, workdir = ROOT / "configs" / "staged.py", tmp_path / "run"
    command = [sys.executable, "-m", "capcur_jax.main", f"--config={config}", f"--workdir={workdir}"]
    command += [*tiny.arguments(settings), "--push_to_hub=owner/mine"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

    def run(**variables):
        environment = os.environ | {"PYTHONPATH": path} | variables
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)

    early = run()
    assert early.returncode == 1 and "`hf auth login`" in early.stderr and not (workdir / "metrics.jsonl").exists()

    hub.broken = True
    failed = run(HF_TOKEN=TOKEN)
    again = f"python -m capcur_jax.hub.push {workdir}/checkpoints/final owner/mine"
    assert failed.returncode == 1 and again in failed.stderr, failed.stderr
    assert json.loads((workdir / "summary.json").read_text())["status"] == "finished"
    inputs = json.loads((workdir / "inputs.json").read_text())["inputs"]
    assert inputs["checkpoint"] == f"owner/small-vl@{begun}" and inputs["data.sets.text.train"].endswith("/train.jsonl")

    hub.broken = False
    sent = run(HF_TOKEN=TOKEN)
    assert sent.returncode == 0 and f"sent to {hub.endpoint}/owner/mine" in sent.stdout, sent.stderr
    final = workdir / "checkpoints" / "final"
    assert hub.files("models/owner/mine") == {file.name: file.read_bytes() for file in final.iterdir()}

    told = ModelCard.load(final / "README.md")
    assert told.data.to_dict() == {
        "license": "other", "license_name": "tongyi", "license_link": "LICENSE", "base_model": "owner/small-vl",
        "datasets": ["owner/sums"], "library_name": "transformers", "pipeline_tag": "image-text-to-text",
        "tags": ["capcur_jax", "grpo"],
    }  # fmt: skip
    for line in (
        f"from [owner/small-vl@{begun}](https://huggingface.co/owner/small-vl/tree/{begun})",
        f"| text | train | {ROWS} |",
        "| text | test | text-test.jsonl | 12 of 24 |",
        "| base | ",
        "| after text | ",
        "Conditions: split test; greedy, at most 8 tokens; ",
        "The base's own: other, tongyi, LICENSE.",
    ):
        assert line in told.text, told.text
    assert str(tmp_path) not in told.text
