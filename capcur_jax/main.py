"""Runs an experiment.

python -m capcur_jax.main --config=configs/staged.py[:preset] [--workdir=DIR] [--config.key=value ...]

With a --workdir that holds a run already, the run goes on where its last checkpoint left it. Several processes: the
same command in each, started by Slurm, Kubernetes, on TPU VMs, or with --coordinator, --process_id and --process_count.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from capcur_jax.errors import InputError, RolloutError
from capcur_jax.files import prepare_workdir
from capcur_jax.interruption import Interrupted
from capcur_jax.records import streams

_STARTED = time.monotonic()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A config file, e.g. configs/staged.py or configs/staged.py:qwen3_vl_8b.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for all files of the run; default: a dated folder in runs/.")
_PROFILE = flags.DEFINE_string("profile", "", "Steps to trace, such as 10-12; Perfetto reads WORKDIR/profile.")
_ACCEPT = flags.DEFINE_bool(
    "accept_changed_inputs", False, "Go on though data, weights, reward or packages are no longer those of the start."
)
_PUSH = flags.DEFINE_string("push_to_hub", "", "OWNER/NAME on the Hugging Face Hub that gets the finished checkpoint.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, in a run of several processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's number, from 0.")
_PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "How many processes the run has.")


def _take_devices(config: ConfigDict) -> None:
    """Tells JAX which of this host's devices the trainer takes, before JAX looks for them."""
    import jax

    from capcur_jax import policy
    from capcur_jax.devices import drivers

    drivers.without_drivers_cpu()
    drivers.keep_programs()
    if config.mesh.gpus:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, config.mesh.gpus)))
    if policy.engine_kind(config).shares_devices(config):
        # Memory that the trainer frees must go back to the driver, for the servers.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unknown argument {arguments[1]!r}; settings look like --config.seed=1")
    logging.set_verbosity(logging.WARNING)
    try:
        # Imported late: a mistyped flag should not wait for JAX.
        from capcur_jax.devices import cluster, distributed

        _take_devices(_CONFIG.value)
        cluster.initialize(cluster.Settings(_COORDINATOR.value, _PROCESS_ID.value, _PROCESS_COUNT.value))
        if distributed.process_count() > 1 and not _WORKDIR.value:
            raise InputError("a run of several processes needs --workdir, one that all of them see")
        config_file = config_flags.get_config_filename(flags.FLAGS["config"])
        workdir = prepare_workdir(_WORKDIR.value, Path(config_file).stem)
        from capcur_jax.checks import finished
        from capcur_jax.hub import push
        from capcur_jax.train import train

        if _PUSH.value:
            distributed.by_owner(lambda: push.check(_PUSH.value), "--push_to_hub")
        if summary := finished(workdir, _CONFIG.value, lambda line: print(line, file=sys.stderr)):
            print(f"{workdir} holds a finished run: {summary['steps']} steps, checkpoint {summary['checkpoint']}")
        else:
            summary = train(_CONFIG.value, workdir, started=_STARTED, profile=_PROFILE.value, accept=_ACCEPT.value)
        if _PUSH.value and summary["status"] == "finished":
            final = workdir / "checkpoints" / "final"
            if page := distributed.by_owner(lambda: push.push(final, _PUSH.value), "to send the checkpoint"):
                print(f"sent to {page}")
    except InputError as error:
        sys.exit(f"error: {error}")
    except Interrupted as signal:  # before the run had anything to save
        _end(f"{signal}: stopped before a step was made; the same command with --workdir={workdir} goes on")
    except RolloutError as error:  # of a run that began: what it learned is in its work directory
        sys.exit(f"error: {error}\nthe same command with --workdir={workdir} goes on")
    if summary["status"] == "finished":
        # What JAX and others want done at the end, the processes' parting included. Python's own shutdown is left out:
        # a thread of XLA that asks for its lock then, which is rare, ends the process by an abort.
        atexit._run_exitfuncs()
        _end("", status=0)
    if distributed.process_count() > 1:
        sys.exit(130)  # JAX ends the processes together
    _end("")


def _end(text: str, status: int = 130) -> NoReturn:
    """Ends the process at once, by default with the status of one that a signal stopped."""
    if text:
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not through Python's shutdown, which would wait for a program that is being compiled


def _parse(arguments: list[str]) -> list[str]:
    from capcur_jax import presets
    from capcur_jax.records import command_line

    try:
        rest = flags.FLAGS(arguments)
        if _CONFIG.value is None:
            raise InputError(command_line.NO_CONFIG)
        _ = _CONFIG.value.order  # a config file that can't be read shows itself here only
        return rest
    except flags.Error as error:
        sys.exit(f"error: {command_line.mistyped(error, flags.FLAGS)}")
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        sys.exit(f"error: {presets.explained(error)}")


if __name__ == "__main__":
    streams.prepare()
    try:
        app.run(main, flags_parser=_parse)
    except KeyboardInterrupt:  # before the run, or the second signal
        _end("stopped at once; the same command with its --workdir goes on from the last checkpoint")
