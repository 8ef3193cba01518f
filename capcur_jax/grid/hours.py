"""Device-hours of a row by the committed plans (docs/plan.md): an estimate, nothing measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capcur_jax import schedule
from capcur_jax.grid.budget import IMITATION
from capcur_jax.grid.jobs import PROJECT

PLANS = PROJECT / "benchmarks" / "plans"


def device_hours(config: ConfigDict, preset: str) -> str:
    """At the plan's lengths, such as "1,420 (paper)"; "-" without a plan for lengths of the preset's whole run that
    fits. Stages that imitate are in no plan: "and captions" says that they are left out."""
    plan = _plan(preset, PLANS)
    if plan is None:
        return "-"
    by_images = {stage["images"]: stage["lengths"]["step_seconds"] for stage in plan["stages"]}
    seconds, left_out = 0.0, []
    for stage in schedule.stages(config):
        if stage.objective == IMITATION:
            left_out.append(stage.name)
        else:
            seconds += stage.steps * by_images[set(stage.data) != {"text"}]
    said = f"{seconds * plan['devices'] / 3600:,.0f} ({plan['lengths']['name']})"
    return " and ".join([said, *left_out])


@functools.cache
def _plan(preset: str, directory: Path) -> Mapping[str, Any] | None:
    """The first plan of the preset's staged run as it is, GPUs of one host before others. A plan that older counting
    made has no lengths."""
    plans = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]
    fitting = [
        plan
        for plan in plans
        if plan["config"].endswith(f"staged.py:{preset}") and not plan["overrides"] and "lengths" in plan
    ]
    return min(fitting, key=lambda plan: (not plan["topology"].startswith("cuda"), plan["devices"]), default=None)
