"""How much of what the trainer computes is padding, by counts: benchmarks/packing.py under the presets."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.test_main import ROOT


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, float]]]:
    command = [sys.executable, "benchmarks/packing.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])["results"]


@pytest.mark.parametrize("lengths", ["paper", "mathvision", "geo3k", "text"])
def test_published_sizes_have_little_padding(found, lengths):
    eight, many = found[lengths]
    assert (eight["device_rows"], many["device_rows"]) == (8, 32)
    assert 0 < eight["token_padding"] <= 0.06 and 0 < many["token_padding"] <= 0.08
    assert all(0 <= one.get("patch_padding", 0) <= 0.15 for one in (eight, many))


def test_prompts_computed_once_and_packed_are_under_half_of_full_sequences(found):
    assert all(one["computed"] <= 0.45 for one in found["mathvision"])
    assert all(one["packing"] < one["computed"] for many in found.values() for one in many)


@pytest.mark.parametrize("stage", ["perception", "text", "visual", "merged"])
def test_the_laptop_run_has_little_padding_and_few_programs(found, stage):
    (one,) = found[f"laptop, {stage}"]
    assert 0 < one["token_padding"] <= 0.08 and 0 <= one.get("patch_padding", 0) <= 0.15
    assert 2 * one["programs"] <= 25 / 2  # in both passes, where response and prompt buckets were 25
