"""Runs an experiment.

python -m capcur_jax.main --config=configs/staged.py[:preset] [--workdir=DIR] [--config.key=value ...]
"""

from __future__ import annotations

import datetime
import sys
import time
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from capcur_jax.errors import InputError

_STARTED = time.monotonic()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A config file, e.g. configs/staged.py or configs/staged.py:qwen3_vl_8b.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where all that the run writes goes; default: a dated folder in runs/.")


def prepare_workdir(path: str | None, config_file: str) -> Path:
    """A new work directory. Raises InputError where another run's records lie already."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    workdir = Path(path) if path else Path("runs") / f"{stamp}_{Path(config_file).stem}"
    records = workdir / "metrics.jsonl"
    if records.exists() and records.stat().st_size:
        raise InputError(f"{workdir} holds a run already (metrics.jsonl); give another --workdir or delete it")
    try:
        # Two runs that start in the same second must not share a dated folder.
        while not path and workdir.exists():
            workdir = workdir.with_name(workdir.name + "_")
        workdir.mkdir(parents=True, exist_ok=bool(path))
    except OSError as error:
        raise InputError(f"--workdir={workdir} can't be made ({error.strerror}); give another one") from None
    return workdir


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unknown argument {arguments[1]!r}; settings look like --config.seed=1")
    logging.set_verbosity(logging.WARNING)
    try:
        workdir = prepare_workdir(_WORKDIR.value, config_flags.get_config_filename(flags.FLAGS["config"]))
        # Imported late: a mistyped flag should not wait for JAX.
        from capcur_jax.train import train

        summary = train(_CONFIG.value, workdir, started=_STARTED)
    except InputError as error:
        sys.exit(f"error: {error}")
    if summary["status"] != "finished":
        sys.exit(130)


def _parse(arguments: list[str]) -> list[str]:
    flags.mark_flag_as_required("config")
    try:
        rest = app.parse_flags_with_usage(arguments)
        _ = _CONFIG.value.order  # a config file that can't be read shows itself here only
        return rest
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise  # a mistake inside the config file: its own line helps more than ours
        sys.exit(f"error: the config has no such key, or it holds another type of value: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
