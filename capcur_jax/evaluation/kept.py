"""What the base scored, kept for the runs that would ask it the same: those of a grid share it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capcur_jax.data import identity
from capcur_jax.data.sets import Sets
from capcur_jax.devices import distributed
from capcur_jax.policy import engine_kind
from capcur_jax.records import jsonl, metrics

Results = list[dict[str, Any]]
RESULTS = "results.json"
FOLDER = Path("evaluation", "base")  # of a work directory: what else an evaluation leaves there
# What a greedy or sampled answer and its grade depend on, besides what `identity` reads.
_SECTIONS = ("model", "prompt", "rollout", "reward", "evaluation")
_ELSEWHERE = {"evaluation": ("base_results", "blind"), "reward": ("workers",), "rollout": ("sglang",)}


def once(config: ConfigDict, sets: Sets, workdir: Path, evaluate: Callable[[], Results]) -> Results:
    """The base's results from `config.evaluation.base_results`, or those of `evaluate`, which are kept there then.

    What `workdir` holds in evaluation/base is kept and given with them. Of several processes all call this.
    """
    entry = Path(config.evaluation.base_results).expanduser() / key(config, sets)
    there = (entry / RESULTS).is_file()
    distributed.barrier("base results")  # before another process writes them
    if not distributed.agree(not there):
        if distributed.is_owner() and (entry / FOLDER).is_dir():
            shutil.copytree(entry / FOLDER, workdir / FOLDER, dirs_exist_ok=True)
        return json.loads((entry / RESULTS).read_text(encoding="utf-8"))
    results = evaluate()
    if distributed.is_owner():
        _keep(entry, results, workdir)
    return results


def key(config: ConfigDict, sets: Sets) -> str:
    """By content: checkpoint, questions, reward, packages and commit; settings; the seed where answers are sampled."""
    read = identity.of_run(config, sets, [(name, config.evaluation.split) for name in config.evaluation.sets])
    settings = {name: config[name].to_dict() for name in _SECTIONS}
    for section, names in _ELSEWHERE.items():
        for name in names:
            del settings[section][name]
    seed = config.seed if config.evaluation.temperature else 0
    dtype = engine_kind(config).dtype(config)  # servers have one of their own
    known = {"read": read, "settings": settings, "seed": seed, "dtype": dtype, "commit": metrics.versions()["commit"]}
    return hashlib.sha256(jsonl.to_json(known, sort_keys=True).encode()).hexdigest()[:16]


def _keep(entry: Path, results: Results, workdir: Path) -> None:
    """The entry has all of it or is not there; where another run was first, its entry stays."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".", dir=entry.parent))
    try:
        if (workdir / FOLDER).is_dir():
            shutil.copytree(workdir / FOLDER, made / FOLDER)
        jsonl.write_json_atomic(made / RESULTS, results)
        if not entry.exists():
            os.rename(made, entry)
    except OSError:
        if not entry.exists():
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
