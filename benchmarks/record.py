"""Keeps what a benchmark found where the pages read it: benchmarks/results/NAME.json.

A benchmark calls `write` at its end. Nothing is kept without --record=NAME, so that a quick try changes no figure.
`python docs/write.py` then writes the figures into the pages. A benchmark that is run in two ways has two names, such
as image_padding and image_padding_larger; docs/figures.jinja has all of them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
_RECORD = flags.DEFINE_string("record", "", "A name: figures are kept in benchmarks/results/NAME.json, for the pages.")


def write(
    figures: Mapping[str, Any], measures: Sequence[str], packages: Sequence[str] = (), versions: Mapping[str, str] = {}
) -> None:
    """Keeps figures under the name that --record gives.

    Args:
      figures: what was found. A number that is no number (NaN, infinity) is an error.
      measures: globs of the files whose speed, memory or behaviour this is. Where they change later, the pages say that
        the figure is older than its code. (): what a run learned, which has its commit alone.
      packages: whose versions count, beside jax.
      versions: those of other environments.
    """
    if not _RECORD.value:
        return
    if missing := [glob for glob in measures if not any(ROOT.glob(glob))]:
        sys.exit(f"record.write: no file is named {', '.join(missing)}")
    if _git("status", "--porcelain", "--", *(f":(glob){glob}" for glob in measures or ("capcur_jax/**",))):
        print("uncommitted changes are in what was measured: the record names the commit before them", file=sys.stderr)
    found = {name: importlib.metadata.version(name) for name in ("jax", *packages)}
    record = {
        "command": command(sys.argv),
        "commit": _git("rev-parse", "--short=7", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **found, **versions},
        "measures": list(measures),
        "figures": dict(figures),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{_RECORD.value}.json"
    path.write_text(json.dumps(record, indent=1, allow_nan=False, default=float) + "\n", encoding="utf-8")
    print(f"kept in {path}; python docs/write.py writes it into the pages", file=sys.stderr)


def command(arguments: Sequence[str]) -> str:
    """The command line as it can be shown: without --record, and PATH for places on this machine."""
    shown = [f"benchmarks/{Path(arguments[0]).name}"]
    for argument in arguments[1:]:
        name, _, value = argument.rpartition("=")
        if name != "--record":
            hidden = Path(value).expanduser().is_absolute()
            shown.append(f"{name}=PATH" if hidden and name else "PATH" if hidden else shlex.quote(argument))
    return " ".join(["python", *shown])


def machine() -> str:
    """The machine in words, without its name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{cores} CPU cores" + (f" ({model})" if model else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
