"""The bounds of every number of a config, in one place. presets.py says what the keys do.

An interval has a square bracket where its end belongs to it; `or` puts a single number beside it. NaN and infinities
are in none. The keys of `create` are those of a config.json, which models/config.py checks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from capcur_jax.errors import InputError

_KEYS = {  # interval: keys; * is any stage
    "[0, 2000000000]": "seed",
    "[0, inf)": """
        packing.shapes mesh.gpus model.lora.rank data.workers data.image_cache_mb prompt.min_pixels prompt.max_pixels
        rollout.temperature rollout.top_k rollout.dynamic_retries rollout.slots rollout.page rollout.pages
        reward.workers reward.accuracy_weight reward.format_weight
        objective.clip_high objective.kl_coefficient objective.entropy_coefficient
        optimizer.weight_decay optimizer.max_gradient_norm
        validation.every validation.questions validation.temperature evaluation.questions evaluation.temperature
        evaluation.counterfactual
        log.rollout_prompts stages.*.steps stages.*.epochs stages.*.warmup_steps stages.*.curriculum.rows
        rollout.sglang.retries rollout.sglang.restarts rollout.sglang.gpus""",
    "[1, inf)": """
        prompt.max_tokens prompt.token_buckets prompt.patch_buckets
        rollout.group rollout.max_new_tokens rollout.prefill
        packing.groups
        objective.sampler_cap objective.updates_per_batch
        checkpointing.every checkpointing.keep log.rollouts_every stages.*.prompts
        stages.*.switch.checks stages.*.switch.window
        rollout.sglang.servers rollout.sglang.tensor_parallel rollout.sglang.concurrency rollout.sglang.file_mb""",
    "(0, inf)": """
        model.lora.alpha objective.advantage_epsilon optimizer.epsilon
        stages.*.curriculum.weights
        rollout.sglang.request_timeout_s rollout.sglang.start_timeout_s rollout.sglang.update_timeout_s""",
    "(0, 1]": """
        rollout.top_p validation.top_p evaluation.top_p stages.*.learning_rate
        stages.*.switch.above""",
    "[0, 1)": "optimizer.beta1 optimizer.beta2 rollout.sglang.memory_fraction",
    "[0, 1]": "objective.clip_low rollout.async_steps stages.*.curriculum.pass_rates",
    "0 or (1, inf)": "objective.clip_dual",
    "-1 or [1, inf)": "mesh.data mesh.fsdp mesh.tensor",
    "[0.1, inf)": "reward.timeout_s",
    "[16, inf)": "reward.memory_mb",
    "[0, 65535]": "rollout.sglang.port",
}
BOUNDS = {key: interval for interval, keys in _KEYS.items() for key in keys.split()}


def check(config: Mapping[str, Any] | ConfigDict, section: str = "") -> None:
    """Checks every number of a config, or of that section of one ("rollout.sglang").

    Raises:
      InputError: naming each key that is out of bounds, its value and its bounds.
    """
    wrong = [
        f"config.{key} = {value!r}: it must lie in {bounds}"
        for key, value in numbers(config, section)
        if (bounds := BOUNDS.get(general(key))) and not inside(value, bounds)
    ]
    if wrong:
        raise InputError("\n".join(wrong))


def numbers(config: Mapping[str, Any] | ConfigDict, section: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of a config by its dotted key; those of a tuple one by one."""
    for name, value in config.items():
        key = f"{section}.{name}" if section else name
        if isinstance(value, (Mapping, ConfigDict)):
            yield from numbers(value, key) if key != "create" else ()
        else:
            yield from ((key, number) for number in _flat(value))


def general(key: str) -> str:
    """The key in `BOUNDS`: that of any stage for that of one."""
    parts = key.split(".")
    return ".".join(["stages", "*", *parts[2:]]) if parts[0] == "stages" else key


@functools.cache
def _parsed(bounds: str) -> tuple[float | None, str, float, float, str]:
    """(the number beside it or None, opening bracket, low, high, closing bracket)."""
    beside, _, interval = bounds.rpartition(" or ")
    low, high = interval[1:-1].split(", ")
    return float(beside) if beside else None, interval[0], float(low), float(high), interval[-1]


def inside(value: float, bounds: str) -> bool:
    """Whether the number lies in the interval, or is the one beside it."""
    beside, opening, low, high, closing = _parsed(bounds)
    above = low <= value if opening == "[" else low < value
    below = value <= high if closing == "]" else value < high
    return value == beside or (above and below)


def _flat(value: Any) -> Iterator[int | float]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
