"""Compiles a run's programs for devices that aren't there, and says whether the run fits and what it takes.

python -m capcur_jax.plan --config=configs/staged.py:qwen3_vl_8b --topology=cuda:h200:1x1x8 [--lengths=paper] [--json]

Exit code 0: it fits; 1: it does not; 2: the command can't be used. docs/plan.md explains the numbers;
capcur_jax/plan/topologies.py lists the topologies and what each needs installed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from capcur_jax import bounds, presets
from capcur_jax.errors import InputError
from capcur_jax.plan import fitting, lengths, topologies
from capcur_jax.plan.estimate import report
from capcur_jax.records import command_line, streams
from capcur_jax.records.jsonl import to_json

# Options that went, and what says it now.
REMOVED = {
    name: "the rates of capcur_jax/plan/rates.py, one for each kind of work, took its place (docs/plan.md); "
    "--lengths=NAME says what a step of such lengths takes"
    for name in ("utilisation", "bandwidth_utilisation")
}


def options() -> flags.FlagValues:
    """The command line's."""
    values = flags.FlagValues()
    text = "A config file, e.g. configs/staged.py:qwen3_vl_8b."
    config_flags.DEFINE_config_file("config", None, text, lock_config=True, flag_values=values)
    text = "cpu:8, tpu:v5p:2x2x2, cuda:h200:1x1x8...; see capcur_jax/plan/topologies.py."
    flags.DEFINE_string("topology", None, text, flag_values=values)
    text = f"Lengths of a step's prompts and responses, one or several: {', '.join(lengths.NAMES)}, a run's records."
    flags.DEFINE_list("lengths", [], text, flag_values=values)
    flags.DEFINE_bool("json", False, "Print one JSON document instead of tables.", flag_values=values)
    flags.DEFINE_list("without_images", ["text"], "Stages whose prompts have no image.", flag_values=values)
    text = "Share of a device's memory to leave free: the runtime, collectives' buffers, fragmentation."
    flags.DEFINE_float("headroom", fitting.HEADROOM, text, lower_bound=0.0, upper_bound=0.9, flag_values=values)
    return values


# ---------------------------------------------------------------------- tables


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:,.2f}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _count(number: float) -> str:
    if not number:
        return "0"
    power = min(int(math.log10(number)) // 3, 6)
    return f"{number / 10 ** (3 * power):.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}".strip()


def _phases(say: Callable[..., None], stage: dict[str, Any]) -> None:
    """A step's phases at lengths of a name."""
    from capcur_jax.records.tables import titled

    head = ("phase", "runs", "tokens", "real", "patches", "real", "FLOPs", "GB a turn", "s", "bound by")
    rows = []
    for p in stage["phases"]:
        counts = [_count(p[what][which]) for what in ("tokens", "patches") for which in ("computed", "real")]
        turn = f"{p['bytes_a_turn'] / 1e9:.1f}" if p["bytes_a_turn"] else ""
        bound = f"{p['bound_by']} {p['seconds_by'][p['bound_by']] / p['seconds']:.0%}" if p["bound_by"] else ""
        rows.append((p["phase"], f"{p['runs']:,}", *counts, _count(p["flops"]), turn, _short(p["seconds"]), bound))
    say(titled(f"A step at lengths {stage['name']!r}; all devices, seconds estimated", head, rows))
    of = stage["lengths"]
    say(
        f"{_short(of['step_seconds'])} s a step: rollouts {_short(of['rollout_seconds'])}, trainer "
        f"{_short(of['trainer_seconds'])}, weights {_short(of['weights_seconds'])}, host {_short(of['host_seconds'])}. "
        f"MFU {of['mfu']:.1%} of the step, {of['mfu_easyr1']:.1%} of the gradient as EasyR1 counts. Padding: text "
        f"{of['padding_text']:.1%}, patches {of['padding_patches']:.1%}."
    )


def render(plan: dict[str, Any]) -> None:
    """Prints the plan as tables."""
    from rich.console import Console

    from capcur_jax.records.tables import titled

    console = Console(width=120 if not sys.stdout.isatty() else None, highlight=False)
    say = console.print
    say(f"[bold]{plan['config']}[/bold] on {plan['topology']}: {plan['devices']} x {plan['device_kind']}")
    if not plan["samples_in_process"]:
        say(f"{plan['training_devices']} of them train; servers sample: their memory and time are not in this plan.")
    if plan["chip"]:
        say(
            f"A device has {_gib(plan['chip']['memory_bytes'])} GiB; headroom {plan['headroom']:.0%} leaves "
            f"{_gib(plan['usable_bytes'])} GiB. Peak {_count(plan['chip']['flops'])}FLOP/s."
        )
    else:
        say("Virtual CPU devices are for numerics: temp bytes and collectives do not predict an accelerator's.")
    for key, why in plan["decided"].items():
        say(f"config.{key} = {why}")
    for stage in plan["stages"]:
        shapes = ", ".join(f"{name} {value}" for name, value in stage["shapes"].items())
        names, count = ", ".join(stage["stages"]), _count(stage["parameters"])
        say(f"\n[bold]{names}[/bold]: mesh {stage['mesh']}, {count} parameters")
        say(f"Compiled and counted at the largest declared shapes, every row full: {shapes}.")
        sizes = ("arguments", "outputs", "aliases", "temp", "peak", "needed")
        head = ("program", "runs a step", *sizes[:-1], "+ resident", "FLOPs", "sends", "fits")
        rows = []
        for p in stage["programs"]:
            fits = {True: "yes", False: "NO", None: ""}[p.get("fits")]
            used = [_gib(p.get(f"{name}_bytes")) for name in sizes]
            rows.append((p["name"], str(p["runs_a_step"]), *used, _count(p["flops"]), _gib(p.get("sent_bytes")), fits))
        say(titled("GiB a device; FLOPs of all devices", head, rows))
        for p in stage["programs"]:
            if "out_of_memory" in p:
                say(f"[bold]{p['name']}[/bold] does not fit, says the compiler: {p['out_of_memory']}")
            if p.get("loops_of_unknown_length"):
                say(f"{p['name']}: {p['loops_of_unknown_length']} loops of unknown length counted once")
        step = stage["step"]
        say(f"A step: {_count(step['flops'])}FLOPs; a device sends {_gib(step['sent_bytes'])} GiB:")
        for c in step["collectives"]:
            among = f" among {c['devices']}" if c["devices"] else ""
            say(f"  {c['kind']}{among}: {c['runs']:,} runs, {_gib(c['bytes'])} GiB")
        if "estimate" in stage:
            low, high = stage["estimate"]["seconds_a_step"]
            say(f"Estimate: {_short(low)} to {_short(high)} s a step, {stage['estimate']['steps']} steps")
        for one in (stage, *stage["others"]) if "phases" in stage else ():
            _phases(say, one)
    if "estimate" in plan:
        low, high = plan["estimate"]["device_hours"]
        say(
            f"\n[bold]Estimate[/bold] (not measured) of the run: {_short(low)} to {_short(high)} device-hours, from "
            "all batches in the smallest to all in the largest declared shapes, without start-up, evaluation and "
            "checkpoints."
        )
    for of in (plan["lengths"], *plan["others"]) if "lengths" in plan else ():
        say(f"[bold]At lengths {of['name']!r}[/bold]: {_short(of['device_hours'])} device-hours.")
    if "fits" in plan:
        say(f"\n[bold]{'Fits' if plan['fits'] else 'Does not fit'}[/bold]: the largest program needs "
            f"{_gib(plan['peak_bytes'])} of {_gib(plan['usable_bytes'])} GiB a device.")  # fmt: skip
    say("Versions: " + ", ".join(f"{name} {value}" for name, value in plan["versions"].items()), style="dim")


# ---------------------------------------------------------------------- command line


def main(arguments: list[str]) -> int:
    """The exit code."""
    logging.set_verbosity(logging.WARNING)
    values = options()
    try:
        _parse(values, arguments)
        bounds.check(values.config)
        presets.check_deleted(values.config)
        topology = topologies.parse(values.topology)
        plan = {
            "config": config_flags.get_config_filename(values["config"]),
            "overrides": [argument for argument in arguments if argument.startswith("--config.")],
            **report(
                values.config,
                topology,
                topologies.devices(topology.name, kernels=values.config.model.attention != "xla"),
                without_images=values.without_images,
                headroom=values.headroom,
                lengths=values.lengths,
                tell=lambda line: print(line, file=sys.stderr, flush=True),
            ),
        }
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if values.json:
        print(to_json(plan, indent=1))
    else:
        render(plan)
    return 0 if plan.get("fits", True) else 1


def _parse(values: flags.FlagValues, arguments: list[str]) -> None:
    """Raises InputError."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\n{values.get_help()}")
        sys.exit(0)
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name in REMOVED:
            raise InputError(f"--{name} was removed: {REMOVED[name]}")
    try:
        rest = values(arguments)
        if values.config is not None:
            _ = values.config.order  # a config file that can't be read shows itself here only
    except flags.Error as error:
        raise InputError(command_line.mistyped(error, values)) from None
    except OSError as error:
        raise InputError(str(error)) from None
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(presets.explained(error)) from None
    if len(rest) > 1:
        raise InputError(f"unknown argument {rest[1]!r}; settings look like --config.seed=1")
    for name, example in (("config", "configs/staged.py:qwen3_vl_8b"), ("topology", "cuda:h200:1x1x8")):
        if values[name].value is None:
            raise InputError(f"--{name} is missing; for example --{name}={example}")


if __name__ == "__main__":
    streams.prepare()
    sys.exit(main(sys.argv))
