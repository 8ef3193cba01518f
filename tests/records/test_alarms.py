"""What goes wrong in a stage is said, once, and what goes well is not."""

import re
from pathlib import Path

import numpy as np
import pytest

from capcur_jax.records import alarms

STEPS = 80
HEALTHY = {
    "entropy": 1.0, "reward": 0.5, "accuracy": 0.5, "equal_groups": 0.4, "truncated": 0.05,
    "logprob_difference_mean": 0.004,
}  # fmt: skip


def run(stage="text", steps=STEPS, **changed):
    """Records, step after step as a run makes them; `changed`: a key's values at the end. Noise as in a run."""
    random, records = np.random.default_rng(0), []
    for step in range(steps):
        done = step / (steps - 1)
        values = {key: value + done * (changed.get(key, value) - value) for key, value in HEALTHY.items()}
        noisy = {key: float(value * (1 + 0.1 * random.standard_normal())) for key, value in values.items()}
        records.append({"type": "step", "step": step + 1, "stage": stage, **noisy})
        if found := alarms.raised(records):
            records[-1]["alarms"] = found
    return records


def names(records):
    return [name for record in records for name in record.get("alarms", {})]


def test_a_healthy_run_raises_none():
    better = {"reward": 1.0, "accuracy": 0.95, "entropy": 0.2, "equal_groups": 0.7, "truncated": 0.0}
    assert names(run()) == names(run(**better)) == []


@pytest.mark.parametrize(
    ("key", "end", "alarm"),
    [
        ("entropy", 4.0, "entropy_up"),
        ("entropy", -0.5, "entropy_zero"),
        ("reward", 0.0, "reward_falling"),
        ("accuracy", 0.0, "accuracy_falling"),
        ("equal_groups", 1.2, "equal_groups"),
        ("truncated", 0.9, "truncation"),
        ("logprob_difference_mean", 0.3, "sampler_difference"),
    ],
)
def test_each_sign_raises_its_alarm_once(key, end, alarm):
    records = run(**{key: end})
    assert names(records) == [alarm]
    again = [*records, *run("visual", **{key: end})]
    assert alarms.raised([*again[:-1], {**again[-1], "alarms": {}}]) == {}  # the next stage has raised its own


def test_one_bad_step_raises_none_and_neither_do_missing_figures():
    records = run()
    records[-1] |= {"reward": 0.0, "accuracy": float("nan"), "entropy": 30.0}
    assert "reward_falling" not in alarms.raised(records)
    assert alarms.raised([{"type": "step", "step": n, "loss": 1.0} for n in range(60)]) == {}


def test_the_docs_have_a_remedy_for_each():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", text.partition("## Alarms")[2], re.MULTILINE)
    assert rows == list(alarms.ALARMS)
