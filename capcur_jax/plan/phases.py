"""The phases of a step at given lengths: how often their programs run, what they compute and move, how long that
takes at the rates of plan/rates.py, and what bounds it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from capcur_jax import policy
from capcur_jax.learner import packing
from capcur_jax.learner.minibatches import Micro
from capcur_jax.models.packed_rows import RowShape
from capcur_jax.plan import flops, rates, work
from capcur_jax.plan.lengths import Group
from capcur_jax.plan.programs import Program, Variant
from capcur_jax.plan.rates import HOST, Kernel, Rates
from capcur_jax.plan.topologies import Chip

ROLLOUT = ("prefill", "decode")
TRAINER = ("old", "reference", "gradient", "optimizer")
_PROGRAMS = {"old": "old log-probs", "reference": "reference log-probs", "gradient": "gradient"}


@dataclasses.dataclass
class Phase:
    """Counts are of a step and of all devices, bytes of one device."""

    phase: str
    runs: int
    seconds_by: dict[str, float]  # kind of work -> seconds
    tokens: tuple[int, int] = (0, 0)  # computed, and real ones among them
    patches: tuple[int, int] = (0, 0)
    flops: float = 0.0
    bytes_a_turn: int = 0  # that the compiled loop reads and writes

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by.values())

    def record(self) -> dict[str, Any]:
        """As plain JSON types."""
        bound = max(self.seconds_by, key=self.seconds_by.__getitem__) if self.seconds else ""
        pairs = {name: dict(zip(("computed", "real"), getattr(self, name), strict=True)) for name in _PAIRS}
        return dataclasses.asdict(self) | pairs | {"seconds": self.seconds, "bound_by": bound}


_PAIRS = ("tokens", "patches")


class Step:
    """A step of a variant on devices of one kind; programs are traced at the shapes that occur.

    Args:
        measured: the variant's programs by name, as estimate.measure has them.
        devices: of the topology; the trainer's are those of the variant's mesh.
    """

    def __init__(
        self, config: ConfigDict, variant: Variant, measured: Mapping[str, Any], rate: Rates, chip: Chip, devices: int
    ):
        self._config, self._variant, self._measured, self._rates, self._chip = config, variant, measured, rate, chip
        self._devices, self._trainers = devices, variant.mesh.size
        self._programs = {program.name: program for program in variant.programs}
        self._shards = variant.mesh.shape["data"] * variant.mesh.shape["fsdp"]
        self._known = variant.layout.processor.config
        self._largest = variant.layout.shards * max(variant.layout.lengths)  # tokens, as compiled
        self._counts = functools.cache(_counts)
        self._vision_counts: dict[tuple[Any, ...], np.ndarray] = {}

    def of(self, groups: Sequence[Group]) -> tuple[list[Phase], dict[str, Any]]:
        """The phases, and the step's figures. Raises InputError where lengths fit no declared shape."""
        micros = work.updates(groups, self._variant.layout)
        useful, sampled = work.useful(groups), None
        phases: list[Phase] = []
        if self._variant.slots.rows:
            buckets, longest = self._variant.layout.buckets, self._config.rollout.max_new_tokens
            sampled = work.sampled(groups, buckets, self._shards, self._variant.slots, longest, self._variant.images)
            phases += [self._prefill(sampled, useful), self._decode(sampled, useful)]
        elif self._variant.layout.sampled:
            phases += self._served(groups, useful, micros[0][0])
        flat = [micro for update in micros for micro in update]
        for phase, name in _PROGRAMS.items():
            if name in self._programs:
                passed = [micro for update in micros[1:] for micro in update] if phase == "old" else flat
                phases.append(self._pass(phase, self._programs[name], passed))
        hidden = sum(phase.seconds for phase in phases if phase.phase in ROLLOUT)
        phases += [self._optimizer(len(micros)), self._weights(), self._host(flat, useful, hidden)]
        return phases, self._figures(phases, flat, useful, sampled)

    # ------------------------------------------------------------------ trainer

    def _pass(self, phase: str, program: Program, micros: Sequence[Micro]) -> Phase:
        rate, measured = self._rates, self._measured[program.name]
        exposed = rate.exposed_gradient if phase == "gradient" else rate.exposed
        by: dict[str, float] = dict.fromkeys(
            ("layers", "attention", "vision layers", "vision attention", "sends", "launch"), 0.0
        )
        total, repeats = 0.0, (np.ones(2), np.ones(2))
        if phase == "gradient":  # how many forward passes it is worth depends on no shape
            shape = micros[0].shape
            both = zip(self._split(program.at, shape), self._split(self._variant.forward, shape), strict=True)
            repeats = tuple(np.divide(all_, one, out=np.ones(2), where=one > 0) for all_, one in both)
            repeats[0][1] -= 1  # packed rows' plain form computes its scores once more backwards, kernels don't
        for micro in micros:
            once = self._split(self._variant.forward, micro.shape)
            text, vision = (one * times for one, times in zip(once, repeats, strict=True))
            # Attention's plain form, which is what is traced, pads prompts and responses: kernels don't.
            pairs = work.pairs(micro) * work.pair_flops(self._known)
            # The tower's is traced for whole rows of patches, of which kernels skip what is not an image's own.
            shape = micro.shape
            own = work.patch_pairs(micro) / max(len(micro.rows) * shape.patch_rows * shape.patches**2, 1)
            own = 1.0 if self._known.vision.window else own
            total += text[0] + pairs * repeats[0][1] + vision[0] + own * vision[1]
            by["layers"] += text[0] / self._trainers / rate.linear
            by["attention"] += self._attended(pairs, repeats[0][1], rate.attention)
            by["vision layers"] += vision[0] / self._trainers / rate.vision
            by["vision attention"] += self._seen(own * once[1][1], repeats[1][1])
            # Sums of activations have nothing to hide behind, and there are more of them in a larger batch.
            split = self._variant.mesh.shape["tensor"] > 1
            share = work.tokens(micro) / self._largest if split else exposed
            by["sends"] += measured["sent_bytes"] * share / rate.link
            by["launch"] += rate.launch
        slots = _total(micros)
        tokens = int(slots[1]), int(slots[0])
        return Phase(phase, len(micros), by, tokens, (int(slots[4]), int(slots[3])), float(total))

    def _attended(self, forward: float, repeats: float, kernel: Kernel) -> float:
        """Seconds of attention whose plain form is traced `repeats` times: once in a forward pass, twice more where it
        is gone through backwards."""
        backward = repeats > 1.5
        forwards = repeats - 2 if backward else 1.0
        seconds = forwards / kernel.forward + (rates.BACKWARD / kernel.backward if backward else 0.0)
        return forward / self._trainers * seconds

    def _seen(self, forward: float, repeats: float) -> float:
        if not forward:
            return 0.0
        kernel, dim = self._rates.images, self._known.vision.head_dim
        return self._attended(forward * (-(-dim // kernel.heads) * kernel.heads / dim), repeats, kernel)

    def _split(self, at: Any, shape: RowShape) -> tuple[np.ndarray, np.ndarray]:
        """FLOPs (linear, attention) of the decoder and of the vision tower."""
        text = self._counts(at, shape._replace(patch_rows=0, patches=0))
        if not shape.patch_rows:
            return text, np.zeros(2)
        key = at, shape.patch_rows, shape.patches
        if key not in self._vision_counts:  # the tower sees nothing of the text
            self._vision_counts[key] = self._counts(at, shape) - text
        return text, self._vision_counts[key]

    def _optimizer(self, updates: int) -> Phase:
        measured = self._measured["update"]
        moved = measured["arguments_bytes"] + measured["outputs_bytes"]
        return Phase("optimizer", updates, {"memory": updates * moved / self._rates.memory})

    # ------------------------------------------------------------------ local sampler

    def _prefill(self, sampled: work.Sampled, useful: work.Useful) -> Phase:
        rate, program = self._rates, self._programs["prefill"]
        measured, slots = self._measured["prefill"], 0
        by = dict.fromkeys(("layers", "attention", "vision layers", "vision attention", "sends", "launch", "host"), 0.0)
        total, tokens = 0.0, 0
        rows = self._shards  # of tokens; each has its rows of patches
        whole = rows * sum(shape.patch_rows * shape.patches**2 for shape, _ in sampled.admissions)
        own = 1.0 if self._known.vision.window else useful.patch_pairs / max(whole, 1)
        for shape, seen in sampled.admissions:
            text, vision = self._split(program.at, shape)
            vision = vision * np.array([1.0, own])  # see _pass
            pairs = seen * work.pair_flops(self._known)
            total += text[0] + pairs + vision.sum()
            tokens, slots = tokens + rows * shape.length, slots + rows * shape.patch_rows * shape.patches
            layers = text[0] / self._trainers / rate.linear
            attention = self._attended(pairs, 1.0, rate.attention)
            by["layers"] += layers
            by["attention"] += attention
            by["vision layers"] += vision[0] / self._trainers / rate.vision
            by["vision attention"] += self._seen(vision[1], 1.0)
            by["sends"] += max(measured["sent_bytes"] / rate.link - layers - attention, 0.0)
            by["launch"] += rate.launch
            by["host"] += self._arrays(shape) / HOST.arrays
        patches = slots, useful.patches
        return Phase("prefill", len(sampled.admissions), by, (tokens, useful.prompts), patches, float(total))

    def _decode(self, sampled: work.Sampled, useful: work.Useful) -> Phase:
        rate, measured, rows = self._rates, self._measured["decoding"], self._variant.slots.rows
        turns, steps = self._programs["decoding"].turns, max(sampled.steps, 1)
        text, shares = self._known.text, self._variant.mesh.shape["tensor"]
        cached = 2 * text.depth * text.kv_heads * text.head_dim * jnp.dtype(self._config.model.dtype).itemsize
        # What a kernel reads of the pages depends on what is in them, which no compiled text says.
        live = sampled.live * cached / shares / steps
        memory = (measured["moved_bytes_a_turn"] + live) / rate.memory
        computing = measured["flops"] / turns / self._trainers / rate.linear
        sends = measured["sent_bytes"] / turns / rate.link + measured["collectives_a_turn"] * rate.gather
        by = dict.fromkeys(("memory", "layers", "launch", "sends", "between bursts"), 0.0)
        for size, made in sampled.bursts:
            local = max(memory, computing * size / rows)
            beside = min(rate.hidden * (local + rate.turn), sends)
            by["memory" if local > computing * size / rows else "layers"] += made * local
            by["launch"] += made * rate.turn
            by["sends"] += made * (sends - beside)
            by["between bursts"] += rate.launch + measured["moved_bytes"] / rate.memory
        slots = sum(size * made for size, made in sampled.bursts) * self._shards
        total = measured["flops"] / turns * slots / (rows * self._shards)
        bytes_a_turn = int(measured["moved_bytes_a_turn"] + live)
        return Phase("decode", sampled.steps, by, (slots, useful.responses), flops=total, bytes_a_turn=bytes_a_turn)

    # ------------------------------------------------------------------ servers

    def _served(self, groups: Sequence[Group], useful: work.Useful, micro: Micro) -> list[Phase]:
        """A model of servers; none of their programs is compiled here."""
        text = self._known.text
        devices = self._devices if self._config.rollout.sglang.colocate else self._devices - self._trainers
        prompts = np.array([size.tokens for size, _ in groups])[:, None]
        rows = np.array([responses for _, responses in groups])
        width = self._variant.weight_bytes // self._variant.parameters
        cached = 2 * text.depth * text.kv_heads * text.head_dim * width
        waits = len(groups) / devices > HOST.server_prompts
        steps = int(rows.max() * (HOST.server_waves if waits else 1))
        read = ((prompts + rows / 2) * rows).sum() * cached / devices
        decoded = {
            "memory": steps * self._variant.weight_bytes / self._rates.memory
            + read / (self._chip.bandwidth * HOST.server_memory),
            "launch": steps * HOST.server_step + HOST.server_start,
        }
        linear = work.linear_flops(self._known, useful._replace(tokens=useful.prompts, responses=len(groups)))
        total = linear + self._vision(useful, micro)
        prefilled = {"layers": total / devices / (self._rates.linear * HOST.server_prefill)}
        return [
            Phase("prefill", len(groups), prefilled, (useful.prompts,) * 2, (useful.patches,) * 2, total),
            Phase("decode", steps, decoded, (useful.responses,) * 2),
        ]

    # ------------------------------------------------------------------ the rest

    def _weights(self) -> Phase:
        config, size, by = self._config, self._variant.weight_bytes, {}
        if policy.engine_kind(config).in_process:
            if self._variant.layout.sampled:  # the copy for decoding is read and written
                by["memory"] = 2 * size / (1 if config.rollout.gathered else self._shards) / self._rates.memory
            if config.rollout.gathered and self._variant.layout.sampled:
                by["sends"] = size * (1 - 1 / self._shards) / self._rates.link
        elif self._variant.layout.sampled:
            by["host"] = size / HOST.served
            if config.rollout.sglang.colocate:
                by["swap"] = 2 * self._variant.state_bytes / HOST.offload
        return Phase("weights", int(bool(by)), by)

    def _host(self, micros: Sequence[Micro], useful: work.Useful, sampling: float) -> Phase:
        """`sampling`: seconds in which groups are sampled and those that are whole are graded."""
        blank = functools.cache(lambda shape: _bytes(self._variant.layout.blank(shape, passes=True)))
        by = {"arrays": sum(blank(micro.shape) for micro in micros) / HOST.arrays}
        if self._variant.layout.sampled:
            responses = sum(len(item.rows) for micro in micros for row in micro.rows for item in row)
            seconds = responses / (HOST.graded * (self._config.reward.workers or HOST.graders))
            # The user's own function may want its batch as a whole.
            by["grading"] = seconds if self._config.reward.function else max(seconds - sampling, 0.0)
        return Phase("host", len(micros), by)

    def _arrays(self, shape: RowShape) -> int:
        """Bytes of a batch of prompts as the host makes it."""
        layout, most = self._variant.layout, self._variant.slots.each
        return _bytes(layout.buckets.blank(self._shards, shape, most, self._known, layout.processor.pad_token))

    def _forward(self, useful: work.Useful, micro: Micro) -> float:
        """FLOPs of one forward pass of real tokens and patches; the vision tower's by those traced for a batch."""
        total = work.linear_flops(self._known, useful) + useful.pairs * work.pair_flops(self._known)
        return total + self._vision(useful, micro)

    def _vision(self, useful: work.Useful, micro: Micro) -> float:
        if not micro.shape.patch_rows:
            return 0.0
        linear, attention = self._split(self._variant.forward, micro.shape)[1]
        row = micro.shape.patches
        slots = len(micro.rows) * micro.shape.patch_rows * row
        return useful.patches * linear / slots + useful.patch_pairs * attention / (slots * row)

    def _figures(
        self, phases: Sequence[Phase], micros: Sequence[Micro], useful: work.Useful, sampled: work.Sampled | None
    ) -> dict[str, Any]:
        """What a plan ends with, in seconds a step."""
        layout, config = self._variant.layout, self._config
        took = {phase.phase: phase.seconds for phase in phases}
        rollout = sum(took.get(name, 0.0) for name in ROLLOUT)
        trainer = sum(took.get(name, 0.0) for name in TRAINER)
        parts = [rollout, trainer + took["host"]]
        ahead = layout.sampled and not policy.engine_kind(config).in_process and config.rollout.async_steps > 0
        step = (max(parts) if ahead else sum(parts)) + took["weights"]
        # Of each real token: forwards and backwards of the gradient, and the passes that the objective asks for.
        passes = 3 + layout.reference + layout.old * (1 - 1 / layout.updates) + layout.sampled
        text = self._known.text
        parameters = work.layer_parameters(self._known) + 2 * text.width * text.vocabulary
        shares = packing.shares(_total(micros))
        return {
            "step_seconds": step,
            "rollout_seconds": rollout,
            "trainer_seconds": trainer,
            "weights_seconds": took["weights"],
            "host_seconds": took["host"],
            "mfu": passes * self._forward(useful, micros[0]) / (step * self._devices * self._chip.flops),
            "mfu_easyr1": 6 * parameters * useful.full / (took["gradient"] * self._trainers * self._chip.flops),
            "padding_text": shares["token_padding"],
            "padding_patches": shares.get("patch_padding", 0.0),
            "decode_steps": next((phase.runs for phase in phases if phase.phase == "decode"), 0),
            "admissions": len(sampled.admissions) if sampled else 0,
        }


def _counts(at: Any, shape: RowShape) -> np.ndarray:
    """FLOPs (linear, attention) of a program at a shape."""
    jaxpr = at(shape).jaxpr
    return np.array([flops.jaxpr_flops(jaxpr, kind=kind) for kind in ("linear", "attention")], float)


def _total(micros: Sequence[Micro]) -> np.ndarray:
    return sum((micro.slots() for micro in micros), np.zeros(len(packing.SLOTS), np.int64))


def _bytes(batch: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
