"""A run's programs by the compiler's account, and an estimate of its seconds and device-hours."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from capcur_jax.errors import InputError
from capcur_jax.plan import topologies


def measure(program: Any, chip: topologies.Chip | None, headroom: float) -> dict[str, Any]:
    """One program by the compiler's account. Bytes are a device's; FLOPs all devices'."""
    return verdict(program, account(program), chip, headroom)


def verdict(program: Any, account: dict[str, Any], chip: topologies.Chip | None, headroom: float) -> dict[str, Any]:
    """The account with what lies on a device while the program runs, and whether that fits."""
    from capcur_jax.plan import fitting

    result = {"name": program.name, "runs_a_step": program.times, "resident_bytes": program.resident, **account}
    size = fitting.needed(program, account)
    if size is not None:
        result["needed_bytes"] = size
    if chip:
        result["fits"] = size is not None and size <= usable(chip, headroom)
    return result


def usable(chip: topologies.Chip, headroom: float) -> int:
    """Bytes of a device that programs may fill."""
    return int(chip.memory_bytes * (1 - headroom))


def account(program: Any) -> dict[str, Any]:
    """What the compiler says of a program, whatever lies beside it."""
    from capcur_jax.plan import fitting, flops, hlo

    started = time.perf_counter()
    traced = program.trace()
    result: dict[str, Any] = {"flops": flops.jaxpr_flops(traced.jaxpr, program.turns or 1)}
    text, sizes = fitting.compiled(traced)
    if text is None:
        return {**result, **sizes, "compile_seconds": time.perf_counter() - started}
    traffic = hlo.traffic(text, program.turns)
    return {
        **result,
        **sizes,
        "collectives": [collective._asdict() for collective in traffic.collectives],
        "sent_bytes": traffic.sent,
        "moved_bytes": traffic.moved,
        "moved_bytes_a_turn": traffic.moved_a_turn,
        "collectives_a_turn": traffic.collectives_a_turn,
        "kernels": list(traffic.kernels),
        "loops_of_unknown_length": traffic.unknown_loops,
        "compile_seconds": time.perf_counter() - started,
    }


def report(
    config: Any,
    topology: topologies.Topology,
    devices: Sequence[Any],
    *,
    without_images: Sequence[str] = (),
    headroom: float = 0.1,
    lengths: Sequence[str] = (),
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The plan as plain JSON types. Raises InputError.

    Args:
        lengths: see plan/lengths.py; none: the estimate is of the smallest and the largest lengths alone. The document
            ends with the first's; "others" has those of the rest.
        tell: is told what is being compiled.
    """
    from capcur_jax import policy, schedule
    from capcur_jax.plan import fitting
    from capcur_jax.plan import lengths as lengths_lib
    from capcur_jax.plan import programs as plan_programs
    from capcur_jax.records import metrics

    chip = topology.facts
    if lengths and not chip:
        raise InputError(
            f"--lengths={','.join(lengths)}: a CPU's devices have no rates; leave it out, or plan for a chip"
        )
    for stage in schedule.stages(config):
        if stage.epochs:
            where = f"config.stages.{stage.name}"
            raise InputError(f"{where}.epochs: a plan has no data to count; give {where}.steps, and epochs=0")
    merge = plan_programs.architecture(config).config.vision.merge_size
    kinds = {which: lengths_lib.extreme(config, merge, which == "largest") for which in ("smallest", "largest")}
    kinds |= {name: lengths_lib.of(name, config, merge) for name in lengths}

    def told(variant: Any, program: Any) -> dict[str, Any]:
        tell(f"compiling {program.name} ({', '.join(stage.name for stage in variant.stages)})")
        return account(program)

    accounts = fitting.Account(told)
    config, decided = fitting.settle(
        config, devices, accounts, usable(chip, headroom) if chip else None, without_images
    )
    variants = plan_programs.variants(config, devices, without_images)
    stages = []
    for variant in variants:
        programs = [verdict(p, accounts(config, variant, p), chip, headroom) for p in variant.programs]
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
            tell(f"counting a step ({', '.join(stage.name for stage in variant.stages)})")
            entry |= _timed(config, variant, programs, topology, len(devices), kinds)
        stages.append(entry)
    result: dict[str, Any] = {
        "topology": topology.name,
        "devices": len(devices),
        "training_devices": variants[0].mesh.size,
        "rollout_engine": config.rollout.engine,
        "samples_in_process": policy.engine_kind(config).in_process,
        "device_kind": devices[0].device_kind,
        "chip": chip._asdict() if chip else None,
        "headroom": headroom,
        "decided": decided,
        "stages": stages,
        "peak_bytes": max(
            (p["needed_bytes"] for s in stages for p in s["programs"] if "needed_bytes" in p), default=None
        ),
        "versions": metrics.versions() | compiler_versions(topology.platform),
    }
    if chip:
        result["fits"] = all(stage["fits"] for stage in stages)
        result["usable_bytes"] = usable(chip, headroom)
    if chip and result["fits"]:
        hours = [[stage["estimate"]["device_hours"][end] for stage in stages] for end in (0, 1)]
        result["estimate"] = {
            "device_hours": [sum(each) for each in hours],
            "is": "an estimate, not a measurement: between all batches in the smallest and all in the largest declared "
            "shapes; without start-up, evaluation, checkpoints and data",
        }
        if lengths:
            first, *others = (_whole(stages, number) for number in range(len(kinds) - 2))
            result |= {"others": others, "lengths": first}
    return result


def _whole(stages: Sequence[dict[str, Any]], number: int) -> dict[str, Any]:
    """The run at the lengths of that number: a step of a stage with images, and the hours of all stages."""
    of = [[stage, *stage["others"]][number] for stage in stages]
    shown = next((one for one, stage in zip(of, stages, strict=True) if stage["images"]), of[0])
    hours = sum(one["lengths"]["device_hours"] for one in of)
    return {"name": shown["name"]} | shown["lengths"] | {"device_hours": hours}


def _timed(
    config: Any,
    variant: Any,
    programs: Sequence[dict[str, Any]],
    topology: topologies.Topology,
    devices: int,
    kinds: Mapping[str, Any],
) -> dict[str, Any]:
    """Estimates of a step at each kind of lengths: "estimate" of the smallest and the largest, "lengths" with their
    "name" and "phases" of the next kind, and "others" with the same of the rest."""
    from capcur_jax.plan import phases, rates

    measured = {program["name"]: program for program in programs}
    step = phases.Step(config, variant, measured, rates.of(topology), topology.facts, devices)
    steps, stage, found = sum(stage.steps for stage in variant.stages), variant.stages[0], {}
    for name, drawn in kinds.items():
        passed, figures = step.of(drawn(stage, variant.images))
        figures["device_hours"] = figures["step_seconds"] * steps * devices / 3600
        found[name] = figures, [phase.record() for phase in passed]
    ends = [found.pop(which)[0] for which in ("smallest", "largest")]
    result: dict[str, Any] = {
        "estimate": {
            "steps": steps,
            "seconds_a_step": [figures["step_seconds"] for figures in ends],
            "device_hours": [figures["device_hours"] for figures in ends],
        }
    }
    timed = [{"name": name, "phases": passed, "lengths": figures} for name, (figures, passed) in found.items()]
    return result | timed[0] | {"others": timed[1:]} if timed else result


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
