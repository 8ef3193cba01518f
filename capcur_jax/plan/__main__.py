"""Compiles what a run would run, for devices that aren't there, and says whether it fits and what it would take.

python -m capcur_jax.plan --config=configs/staged.py:qwen3_vl_8b --topology=cuda:h200:1x1x8 [--json]

Exit code 0: it fits; 1: it does not; 2: the command can't be used. docs/plan.md explains the numbers; capcur_jax/aot.py
lists the topologies and what each needs installed.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags, logging
from ml_collections import config_flags

from capcur_jax.errors import InputError
from capcur_jax.plan import topologies


class Assumptions(NamedTuple):
    """What no compiler says."""

    headroom: float = 0.1
    utilisation: float = 0.35
    bandwidth: float = 0.6


def options() -> flags.FlagValues:
    """The command line's."""
    values, share = flags.FlagValues(), dict(lower_bound=0.01, upper_bound=1.0)
    text = "A config file, e.g. configs/staged.py:qwen3_vl_8b."
    config_flags.DEFINE_config_file("config", None, text, lock_config=True, flag_values=values)
    text = "cpu:8, tpu:v5p:2x2x2, cuda:h200:1x1x8...; see capcur_jax/aot.py."
    flags.DEFINE_string("topology", None, text, flag_values=values)
    flags.DEFINE_bool("json", False, "Print one JSON document instead of tables.", flag_values=values)
    flags.DEFINE_list("without_images", ["text"], "Stages whose prompts have no image.", flag_values=values)
    usual = Assumptions()
    text = "Share of a device's memory to leave free: the runtime, collectives' buffers, fragmentation."
    flags.DEFINE_float("headroom", usual.headroom, text, lower_bound=0.0, upper_bound=0.9, flag_values=values)
    text = "Assumed share of peak FLOP/s in training, recomputation counted."
    flags.DEFINE_float("utilisation", usual.utilisation, text, **share, flag_values=values)
    text = "Assumed share of the bandwidth of memory and links."
    flags.DEFINE_float("bandwidth_utilisation", usual.bandwidth, text, **share, flag_values=values)
    return values


def measure(program: Any, devices: int, chip: topologies.Chip | None, assumed: Assumptions) -> dict[str, Any]:
    """What the compiler says of one program. Bytes are a device's; FLOPs all devices'."""
    from capcur_jax.plan import hlo

    started = time.perf_counter()
    traced = program.trace()
    result: dict[str, Any] = {
        "name": program.name,
        "runs_a_step": program.times,
        "flops": hlo.jaxpr_flops(traced.jaxpr, program.trips[0]),
        "flops_smallest": hlo.jaxpr_flops(program.smallest().jaxpr, program.trips[1]),
        "resident_bytes": program.resident,
    }
    try:
        compiled = traced.lower().compile()
    except Exception as error:  # jaxlib has no class of its own for it
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        shown = str(error).partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0]
        return {**result, "fits": False, "out_of_memory": shown, "compile_seconds": time.perf_counter() - started}
    memory = compiled.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "aliases": "alias", "temp": "temp"}
    sizes = {f"{name}_bytes": getattr(memory, f"{field}_size_in_bytes") for name, field in names.items()}
    # A TPU's compiler reports less than this as the peak where it reuses arguments; a CPU's reports no real peak.
    held = sizes["arguments_bytes"] + sizes["outputs_bytes"] - sizes["aliases_bytes"] + sizes["temp_bytes"]
    peak = max(held, memory.peak_memory_in_bytes)
    traffic = hlo.collectives(compiled.as_text())
    result |= {
        **sizes,
        "peak_bytes": peak,
        # What the program does not use is dropped from its arguments, but lies there all the same.
        "needed_bytes": peak + program.resident + max(program.given - sizes["arguments_bytes"], 0),
        "collectives": [collective._asdict() for collective in traffic.collectives],
        "sent_bytes": traffic.sent,
        "loops_of_unknown_length": traffic.unknown_loops,
        "compile_seconds": time.perf_counter() - started,
    }
    if chip:
        result["fits"] = result["needed_bytes"] <= chip.memory_bytes * (1 - assumed.headroom)
        for key, smallest in (("seconds", False), ("seconds_smallest", True)):
            result[key] = seconds(result, program, devices, chip, assumed, smallest)
    return result


def seconds(
    measured: dict[str, Any], program: Any, devices: int, chip: topologies.Chip, assumed: Assumptions, smallest: bool
) -> float:
    """An estimate of one run: what takes longest of computing, moving memory and sending, at the assumed shares of the
    peaks. At the smallest shapes the loop's turns are fewer; what a program without a loop sends stays as it is."""
    turns = program.trips[smallest]
    moved = program.reads * turns or measured["arguments_bytes"] + measured["outputs_bytes"]
    return max(
        measured["flops_smallest" if smallest else "flops"] / devices / chip.flops / assumed.utilisation,
        moved / chip.bandwidth / assumed.bandwidth,
        measured["sent_bytes"] * turns / program.trips[0] / chip.link / assumed.bandwidth,
    )


def report(
    config: Any,
    topology: topologies.Topology,
    devices: Sequence[Any],
    *,
    without_images: Sequence[str] = (),
    assumed: Assumptions,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The plan as plain JSON types. `tell` is told what is being compiled. Raises InputError."""
    from capcur_jax.plan import programs as plan_programs
    from capcur_jax.records import metrics

    chip = topology.facts
    variants = plan_programs.variants(config, devices, without_images)
    stages, hours, smallest_hours = [], 0.0, 0.0
    for variant in variants:
        programs = []
        for program in variant.programs:
            tell(f"compiling {program.name} ({', '.join(stage.name for stage in variant.stages)})")
            programs.append(measure(program, variant.mesh.size, chip, assumed))
        entry: dict[str, Any] = {
            "stages": [stage.name for stage in variant.stages],
            "images": variant.images,
            "mesh": dict(variant.mesh.shape),
            "shapes": variant.shapes,
            "parameters": variant.parameters,
            "programs": programs,
            "step": {
                "flops": sum(p["flops"] * p["runs_a_step"] for p in programs),
                "collectives": _of_a_step(programs),
                "sent_bytes": sum(p.get("sent_bytes", 0) * p["runs_a_step"] for p in programs),
            },
        }
        if chip:
            entry["fits"] = all(p["fits"] for p in programs)
        if chip and entry["fits"]:
            steps = sum(stage.steps for stage in variant.stages)
            step, smallest = (
                sum(p[key] * p["runs_a_step"] for p in programs) for key in ("seconds", "seconds_smallest")
            )
            entry["estimate"] = {
                "steps": steps,
                "seconds_a_step": [smallest, step],
                "device_hours": [s * steps * len(devices) / 3600 for s in (smallest, step)],
            }
            smallest_hours += entry["estimate"]["device_hours"][0]
            hours += entry["estimate"]["device_hours"][1]
        stages.append(entry)
    result: dict[str, Any] = {
        "topology": topology.name,
        "devices": len(devices),
        "training_devices": variants[0].mesh.size,
        "rollout_engine": config.rollout.engine,
        "device_kind": devices[0].device_kind,
        "chip": chip._asdict() if chip else None,
        "headroom": assumed.headroom,
        "stages": stages,
        "peak_bytes": max(
            (p["needed_bytes"] for s in stages for p in s["programs"] if "needed_bytes" in p), default=None
        ),
        "versions": metrics.versions() | compiler_versions(topology.platform),
    }
    if chip:
        result["fits"] = all(stage["fits"] for stage in stages)
        result["usable_bytes"] = int(chip.memory_bytes * (1 - assumed.headroom))
    if chip and result["fits"]:
        result["estimate"] = {
            "device_hours": [smallest_hours, hours],
            "utilisation": assumed.utilisation,
            "bandwidth_utilisation": assumed.bandwidth,
            "is": "an estimate, not a measurement: between all batches in the smallest and all in the largest declared "
            "shapes; without start-up, evaluation, checkpoints and data",
        }
    return result


def _of_a_step(programs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The collectives of all programs, as often as they run."""
    total: dict[tuple[str, int], list[int]] = {}
    for program in programs:
        for collective in program.get("collectives", ()):
            counts = total.setdefault((collective["kind"], collective["devices"]), [0, 0])
            counts[0] += collective["runs"] * program["runs_a_step"]
            counts[1] += collective["bytes"] * program["runs_a_step"]
    return [{"kind": k, "devices": n, "runs": runs, "bytes": size} for (k, n), (runs, size) in sorted(total.items())]


def compiler_versions(platform: str) -> dict[str, str]:
    """Of what compiled for the platform."""
    from importlib.metadata import version

    names = {"tpu": ("libtpu",), "cuda": ("jax-cuda12-plugin", "nvidia-cudnn-cu12")}.get(platform, ())
    return {name: version(name) for name in names}


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


def render(plan: dict[str, Any]) -> None:
    """Prints the plan as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120 if not sys.stdout.isatty() else None, highlight=False)
    say = console.print
    say(f"[bold]{plan['config']}[/bold] on {plan['topology']}: {plan['devices']} x {plan['device_kind']}")
    if plan["rollout_engine"] != "local":
        say(f"{plan['training_devices']} of them train; servers sample: their memory and time are not in this plan.")
    if plan["chip"]:
        say(
            f"A device has {_gib(plan['chip']['memory_bytes'])} GiB; headroom {plan['headroom']:.0%} leaves "
            f"{_gib(plan['usable_bytes'])} GiB. Peak {_count(plan['chip']['flops'])}FLOP/s."
        )
    else:
        say("Virtual CPU devices are for numerics: temp bytes and collectives do not predict an accelerator's.")
    for stage in plan["stages"]:
        shapes = ", ".join(f"{name} {value}" for name, value in stage["shapes"].items())
        names, count = ", ".join(stage["stages"]), _count(stage["parameters"])
        say(f"\n[bold]{names}[/bold]: mesh {stage['mesh']}, {count} parameters")
        say(f"Compiled and counted at the largest declared shapes, every row full: {shapes}.")
        sizes = ("arguments", "outputs", "aliases", "temp", "peak", "+ resident")
        table = Table("program", "runs a step", *sizes, "FLOPs", "sends", "fits",
                      title="GiB a device; FLOPs of all devices", title_justify="left")  # fmt: skip
        for p in stage["programs"]:
            sizes = [
                _gib(p.get(f"{name}_bytes")) for name in ("arguments", "outputs", "aliases", "temp", "peak", "needed")
            ]
            fits = {True: "yes", False: "NO", None: ""}[p.get("fits")]
            sent = _gib(p.get("sent_bytes"))
            table.add_row(p["name"], str(p["runs_a_step"]), *sizes, _count(p["flops"]), sent, fits)
        say(table)
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
    if "estimate" in plan:
        low, high = plan["estimate"]["device_hours"]
        shares = [f"{plan['estimate'][key]:.0%}" for key in ("utilisation", "bandwidth_utilisation")]
        say(
            f"\n[bold]Estimate[/bold] (not measured) of the run: {_short(low)} to {_short(high)} device-hours, from "
            f"all batches in the smallest to all in the largest declared shapes, at {shares[0]} of peak FLOP/s and "
            f"{shares[1]} of memory and link bandwidth; without start-up, evaluation and checkpoints."
        )
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
        topology = topologies.parse(values.topology)
        plan = {
            "config": config_flags.get_config_filename(values["config"]),
            "overrides": [argument for argument in arguments if argument.startswith("--config.")],
            **report(
                values.config,
                topology,
                topologies.devices(topology.name),
                without_images=values.without_images,
                assumed=Assumptions(values.headroom, values.utilisation, values.bandwidth_utilisation),
                tell=lambda line: print(line, file=sys.stderr, flush=True),
            ),
        }
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if values.json:
        print(json.dumps(plan, indent=1))
    else:
        render(plan)
    return 0 if plan.get("fits", True) else 1


def _parse(values: flags.FlagValues, arguments: list[str]) -> None:
    """Raises InputError."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\n{values.get_help()}")
        sys.exit(0)
    try:
        rest = values(arguments)
        if values.config is not None:
            _ = values.config.order  # a config file that can't be read shows itself here only
    except (flags.Error, OSError) as error:
        raise InputError(str(error)) from None
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise  # a mistake inside the config file: its own line helps more than ours
        raise InputError(f"the config has no such key, or it holds another type of value: {error}") from None
    if len(rest) > 1:
        raise InputError(f"unknown argument {rest[1]!r}; settings look like --config.seed=1")
    for name, example in (("config", "configs/staged.py:qwen3_vl_8b"), ("topology", "cuda:h200:1x1x8")):
        if values[name].value is None:
            raise InputError(f"--{name} is missing; for example --{name}={example}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
