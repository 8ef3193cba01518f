"""A run's programs by the compiler's account, and an estimate of its seconds and device-hours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from capcur_jax.plan import topologies


class Assumptions(NamedTuple):
    """Assumptions that no compiler can check."""

    headroom: float = 0.1
    utilisation: float = 0.35
    bandwidth: float = 0.6


def measure(program: Any, devices: int, chip: topologies.Chip | None, assumed: Assumptions) -> dict[str, Any]:
    """One program by the compiler's account. Bytes are a device's; FLOPs all devices'."""
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
        # Unused parameters are dropped from the program's arguments, but lie on the device all the same.
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
    from capcur_jax import policy
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
        "samples_in_process": policy.engine_kind(config).in_process,
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
    """The collectives of all programs in a step, times how often each program runs."""
    total: dict[tuple[str, int], list[int]] = {}
    for program in programs:
        for collective in program.get("collectives", ()):
            counts = total.setdefault((collective["kind"], collective["devices"]), [0, 0])
            counts[0] += collective["runs"] * program["runs_a_step"]
            counts[1] += collective["bytes"] * program["runs_a_step"]
    return [{"kind": k, "devices": n, "runs": runs, "bytes": size} for (k, n), (runs, size) in sorted(total.items())]


def compiler_versions(platform: str) -> dict[str, str]:
    """Versions of the packages that compiled for the platform."""
    from importlib.metadata import version

    names = {"tpu": ("libtpu",), "cuda": ("jax-cuda12-plugin", "nvidia-cudnn-cu12")}.get(platform, ())
    return {name: version(name) for name in names if name not in topologies.missing(platform)}
