"""The first minutes on an accelerator: what no compiler that runs elsewhere can say. At most 8 minutes on one H200.

    python benchmarks/on_card.py [--parts=rows,images,layer,decode_64,decode_256,step] [--record=on_card]
    python benchmarks/on_card.py --small      # all parts at tiny sizes, on a CPU too: whether they run at all

rows     attention of packed rows (Qwen3-VL-8B's heads, the paper's lengths): largest error against a dense mask in
         float32, TFLOP/s forward and backward
images   the same of images in a row of patches (heads of 72)
layer    one layer of the 8B decoder on a packed row of 14k tokens: TFLOP/s forward, and forward and backward
decode_* a token of the 8B decoder for 64 and for 256 rows: milliseconds, and bytes a second of what it must read
         (weights, keys and values)
step     a whole GRPO step of a small model: seconds, by laptop_step.py

Every part is a process of its own with a time limit: a kernel that breaks the device ends its part alone, and the
others go on. Weights, lengths and images are made here; nothing is fetched. All parts but the last need jax with its
plugin and cuDNN, flax, absl-py, jaxtyping and numpy; the last one what `pip install -e .` brings. The exit status is 1
where a part failed.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import record
from absl import app, flags

_PARTS = flags.DEFINE_list(
    "parts", ["rows", "images", "layer", "decode_64", "decode_256", "step"], "Which parts, in this order."
)
_SMALL = flags.DEFINE_bool("small", False, "Tiny sizes, for any machine. Their figures say nothing.")
_ONE = flags.DEFINE_string("one", "", "A part and a file for its figures, PART:FILE, for the process that asks all.")
SECONDS, EACH = 470, 150  # of all parts and of one, at most; small ones have no limit


class Sizes(NamedTuple):
    """Tokens and patches of rows; the model; rows, places and tokens of decoding."""

    tokens: int
    checked: int  # tokens of the row that is compared with a dense mask
    layer: int
    patches: int
    image: int  # patches of an image, at most
    longest: tuple[int, int]  # tokens of a prompt and of a response
    text: dict[str, Any]
    vision: tuple[int, int]  # heads, and their length
    decoding: tuple[int, ...]
    places: int
    turns: int
    steps: int


LARGE = Sizes(16384, 2048, 14336, 16384, 4600, (2048, 2048), {}, (16, 72), (64, 256), 1024, 16, 8)
SMALL = Sizes(
    512, 256, 256, 512, 128, (64, 48),
    {"width": 64, "mlp_width": 96, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocabulary": 128,
     "mrope_sections": (4, 2, 2)},
    (2, 24), (4, 8), 32, 2, 3,
)  # fmt: skip
T, GB = 1e12, 1e9


def timed(function: Callable, *arrays: Any, rounds: int = 8) -> float:
    """Seconds of a call: the mean of `rounds` that follow one another, after one that compiles."""
    import jax

    jax.block_until_ready(function(*arrays))
    started = time.perf_counter()
    for _ in range(rounds):
        out = function(*arrays)
    jax.block_until_ready(out)
    return (time.perf_counter() - started) / rounds


def normal(seed: int, *shape: int, scale: float = 1.0):
    import jax
    import jax.numpy as jnp

    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(jnp.bfloat16)


def ways():
    """The kernels of the device that is there, and how to call them."""
    import jax

    from capcur_jax.models import packed_gpu, packed_tpu

    if jax.default_backend() == "gpu":
        return packed_gpu, {}
    return (packed_tpu, {}) if jax.default_backend() == "tpu" else (packed_gpu, {"implementation": "xla"})


def drawn(tokens: int, longest: tuple[int, int], group: int = 5):
    """Groups with the paper's lengths (docs/plan.md), one behind the other, as many as a row of so many tokens takes.

    Returns their places, and the pairs of a query and a key that it sees.
    """
    import numpy as np

    from capcur_jax.models.packed import Places

    random = np.random.default_rng(0)
    rows, at, pairs = [], 0, 0
    share = [most / 2048 for most in longest]  # lengths shrink with their bounds
    while True:
        prompt = int(np.clip(share[0] * (520 * np.exp(0.45 * random.standard_normal()) + 130), 1, longest[0]))
        spread = 0.45 * random.standard_normal() + 0.35 * random.standard_normal(group)
        own = np.clip(share[1] * 467 * np.exp(spread), 1, longest[1]).astype(int)
        if at + prompt + own.sum() > tokens:
            break
        ends = at + prompt + np.cumsum(own)
        rows.append((at, prompt, ends - own, own))
        pairs += prompt * (prompt + 1) // 2 + int((prompt * own + own * (own + 1) // 2).sum())
        at = int(ends[-1])
    start, length, own_start, own_length = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    return Places(start[None], length[None], own_start.reshape(1, -1), own_length.reshape(1, -1)), pairs


def dense(q, k, v, seen):
    """Attention by its definition, in float32; `seen` [T, T]: which keys a query sees. 0 where it sees nothing."""
    import jax
    import jax.numpy as jnp

    q, k, v = (x[0].astype(jnp.float32) for x in (q, k, v))
    q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    scores = jnp.einsum("tkgh,skh->kgts", q, k, precision="highest") * q.shape[-1] ** -0.5
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), 0)
    return jnp.einsum("kgts,skh->tkgh", weights, v, precision="highest").reshape(1, *q.shape[:1], -1, q.shape[-1])


def both(function: Callable) -> Callable:
    """Output and gradients of a function of q, k and v, for a given gradient of its output."""
    import jax

    def run(q, k, v, gradient):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(gradient.astype(out.dtype))

    return jax.jit(run)


def errors(ours: Callable, seen, shapes: list[tuple[int, ...]]) -> dict[str, float]:
    """Largest errors of output and gradients, each relative to the largest value of its array."""
    import jax.numpy as jnp

    arrays = [normal(seed, *shape) for seed, shape in enumerate([*shapes, shapes[0]])]
    found, expected = both(ours)(*arrays), both(lambda q, k, v: dense(q, k, v, seen))(*arrays)
    names = ("out", "dq", "dk", "dv")
    pairs = zip(names, found, expected, strict=True)
    return {
        n: float(jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y.astype(jnp.float32)).max()) for n, x, y in pairs
    }


def speed(ours: Callable, pairs: int, shapes: list[tuple[int, ...]]) -> dict[str, float]:
    """TFLOP/s forward, and backward with 2.5 times its FLOPs (the scores are computed once more)."""
    import jax

    *arrays, gradient = [normal(seed, *shape) for seed, shape in enumerate([*shapes, shapes[0]])]
    _, pull = jax.jit(lambda q, k, v: jax.vjp(ours, q, k, v))(*arrays)
    seconds = timed(jax.jit(ours), *arrays), timed(jax.jit(lambda pull, gradient: pull(gradient)), pull, gradient)
    flops = 4 * pairs * shapes[0][2] * shapes[0][3]
    found = {}
    for name, one, work in zip(("forward", "backward"), seconds, (flops, 2.5 * flops), strict=True):
        found |= {f"{name}_ms": 1e3 * one, f"{name}_tflops": work / one / T}
    return found


def config_of(sizes: Sizes):
    """The decoder: Qwen3-VL-8B's, or a tiny one."""
    import dataclasses

    from capcur_jax.models import config, published

    return dataclasses.replace(config.from_dict(published.config("qwen3_vl_8b")).text, **sizes.text)


# ---------------------------------------------------------------------- parts


def rows(sizes: Sizes) -> dict[str, float]:
    """Packed rows' attention."""
    import jax.numpy as jnp
    import numpy as np

    from capcur_jax.models.packed import Packed

    kernels, options = ways()
    text = config_of(sizes)

    def case(tokens):
        longest = sizes.longest if tokens == sizes.tokens else (tokens // 4, tokens // 8)
        places, pairs = drawn(tokens, longest)
        heads = [(1, tokens, n, text.head_dim) for n in (text.heads, text.kv_heads, text.kv_heads)]
        layout = Packed(type(places)(*map(jnp.asarray, places)), *longest)
        return places, pairs, heads, lambda q, k, v: kernels.packed(q, k, v, layout, **options)

    places, _, heads, ours = case(sizes.checked)
    seen = np.zeros((sizes.checked,) * 2, bool)
    for number, (start, length) in enumerate(zip(places.response_start[0], places.response_length[0], strict=True)):
        group = number // (places.response_start.shape[1] // places.prompt_start.shape[1])
        first, end = places.prompt_start[0, group], places.prompt_start[0, group] + places.prompt_length[0, group]
        seen[first:end, first:end] = np.tri(end - first, dtype=bool)
        seen[start : start + length, start : start + length] = np.tri(length, dtype=bool)
        seen[start : start + length, first:end] = True
    found = {f"error_{name}": value for name, value in errors(ours, jnp.asarray(seen), heads).items()}
    _, pairs, heads, ours = case(sizes.tokens)
    return found | speed(ours, pairs, heads)


def images(sizes: Sizes) -> dict[str, float]:
    """Attention of images in a row of patches."""
    import jax.numpy as jnp
    import numpy as np

    kernels, options = ways()

    def case(patches, most):
        random, lengths = np.random.default_rng(0), []
        while sum(lengths) < patches - most:
            lengths.append(int(random.integers(most // 4, most + 1)) // 4 * 4)
        lengths = np.array([lengths], np.int32)
        starts = np.cumsum(lengths, -1, dtype=np.int32) - lengths
        tables = jnp.asarray(starts), jnp.asarray(lengths)
        heads = [(1, patches, *sizes.vision)] * 3
        return lengths[0], heads, lambda q, k, v: kernels.segments(q, k, v, *tables, most, **options)

    lengths, heads, ours = case(sizes.checked, sizes.checked // 4)
    ids = np.zeros(sizes.checked, np.int32)
    ids[: lengths.sum()] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    seen = jnp.asarray((ids[:, None] == ids) & (ids > 0))
    found = {f"error_{name}": value for name, value in errors(ours, seen, heads).items()}
    lengths, heads, ours = case(sizes.patches, sizes.image)
    return found | speed(ours, int((lengths.astype(np.int64) ** 2).sum()), heads)


def layer(sizes: Sizes) -> dict[str, float]:
    """One layer of the decoder on a packed row."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from capcur_jax.models.packed import Packed
    from capcur_jax.models.rope import text_angles
    from capcur_jax.models.text import DecoderLayer

    (kernels, options), text = ways(), config_of(sizes)
    places, pairs = drawn(sizes.layer, sizes.longest)
    layout = Packed(type(places)(*map(jnp.asarray, places)), *sizes.longest)
    graph, parameters = nnx.split(DecoderLayer(text, jnp.bfloat16, jnp.bfloat16, nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters) if leaf.ndim > 1)
    angles = text_angles(jnp.broadcast_to(jnp.arange(sizes.layer), (3, 1, sizes.layer)), text)

    def forward(parameters, h):
        one = nnx.merge(graph, parameters)
        q, k, v = one.qkv(h, angles)
        return one.finish(h, kernels.packed(q, k, v, layout, **options))

    def gradient(parameters, h, of_out):
        out, pull = jax.vjp(forward, parameters, h)
        return pull(of_out.astype(out.dtype))

    h, of_out = normal(0, 1, sizes.layer, text.width), normal(1, 1, sizes.layer, text.width)
    seconds = timed(jax.jit(forward), parameters, h), timed(jax.jit(gradient), parameters, h, of_out)
    linear, attention = 2 * count * sizes.layer, 4 * pairs * text.heads * text.head_dim
    flops = linear + attention, 3 * linear + 3.5 * attention
    names = ("forward", "forward_and_backward")
    found = {f"{name}_ms": 1e3 * value for name, value in zip(names, seconds, strict=True)}
    return found | {f"{n}_tflops": f / s / T for n, f, s in zip(names, flops, seconds, strict=True)}


def decode(sizes: Sizes, number: int) -> dict[str, float]:
    """Tokens of the whole decoder with its head, several in one program, as a run decodes them."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from capcur_jax.models import config, published
    from capcur_jax.models.decoding import DecodingModel
    from capcur_jax.models.paged import Tables
    from capcur_jax.models.qwen_vl import QwenVL
    from capcur_jax.rollout.local import bursts

    text, count = config_of(sizes), sizes.decoding[number]
    known = dataclasses.replace(config.from_dict(published.config("qwen3_vl_8b")), text=text)
    model = nnx.eval_shape(lambda: QwenVL(known, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    decoding = DecodingModel(model, gathered=True)
    leaves, tree = jax.tree.flatten(decoding.abstract_weights(nnx.state(model)))
    weights = jax.tree.unflatten(tree, [normal(i, *leaf.shape, scale=0.02) for i, leaf in enumerate(leaves)])
    # Of the embedding a token reads one row.
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) - weights.embedding.nbytes
    size = min(128, sizes.places)
    tables = jnp.arange(count * (sizes.places // size), dtype=jnp.int32).reshape(count, -1)

    def run(weights, pages, tokens):
        def turn(carry, step):
            tokens, pages = carry
            at, live = jnp.full(count, sizes.places - sizes.turns + step), jnp.ones(count, bool)
            logits, pages = decoding.step(weights, pages, tokens, at, at, live, Tables(tables))
            return (jnp.argmax(logits, -1).astype(jnp.int32), pages), None

        return jax.lax.scan(turn, (tokens, pages), jnp.arange(sizes.turns))[0]

    program = jax.jit(run, donate_argnums=1, compiler_options=bursts.options(jax.default_backend()))
    tokens, pages = jnp.zeros(count, jnp.int32), decoding.empty_pages(tables.size, size)
    read += sum(leaf.nbytes for leaf in jax.tree.leaves(pages))
    spent = []
    for _ in range(4):
        started = time.perf_counter()
        tokens, pages = jax.block_until_ready(program(weights, pages, tokens))
        spent.append((time.perf_counter() - started) / sizes.turns)
    seconds = min(spent[1:])
    return {"rows": count, "token_ms": 1e3 * seconds, "gb_s": read / seconds / GB}


def step(sizes: Sizes) -> dict[str, float]:
    """A whole GRPO step of a small model, in float32: the very functions that a run calls."""
    import statistics

    from laptop_step import ours
    from step_inputs import write_checkpoint

    with tempfile.TemporaryDirectory() as directory:
        checkpoint, problems = write_checkpoint(Path(directory), problems=32)
        taken = ours(checkpoint, problems, sizes.steps)
    return {f"{phase}_s": statistics.median(one[phase] for one in taken) for phase in taken[0]}


PARTS = {
    "rows": rows, "images": images, "layer": layer, "decode_64": functools.partial(decode, number=0),
    "decode_256": functools.partial(decode, number=1), "step": step,
}  # fmt: skip


# ---------------------------------------------------------------------- all of them


def run_one(part: str, file: str) -> None:
    """A part in this process; its figures go to the file."""
    import jax

    device = jax.devices()[0]
    print(f"{part}: {device.device_kind}, jax {jax.__version__}", flush=True)
    found = PARTS[part](SMALL if _SMALL.value else LARGE)
    Path(file).write_text(json.dumps(found), encoding="utf-8")


def ask(script: str, part: str, folder: Path, limit: float | None) -> dict[str, float] | None:
    """The part's figures; None, and what went wrong on standard output, where it failed. `limit`: in seconds."""
    file = folder / f"{part}.json"
    command = [sys.executable, script, f"--one={part}:{file}", *(["--small"] if _SMALL.value else [])]
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}  # of the card's: decoding 256 rows takes most of it
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=os.environ | memory)
    except subprocess.TimeoutExpired:
        print(f"\n{part}: FAILED, not done after {limit:.0f} s", flush=True)
        return None
    print(f"\n{done.stdout.strip() or part} ({time.perf_counter() - started:.0f} s)")
    if done.returncode or not file.is_file():
        last = "\n".join(done.stderr.strip().splitlines()[-12:])
        print(f"{part}: FAILED with exit status {done.returncode}\n{last}", flush=True)
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    for name, value in found.items():
        print(f"  {name:<24}{value:>12.4g}", flush=True)
    return found


def main(argv: list[str]) -> None:
    if _ONE.value:
        run_one(*_ONE.value.split(":", 1))
        return
    if unknown := set(_PARTS.value) - set(PARTS):
        raise app.UsageError(f"--parts: unknown {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    started, found = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        for part in _PARTS.value:
            left = None if _SMALL.value else max(min(EACH, SECONDS - (time.perf_counter() - started)), 1)
            found[part] = ask(argv[0], part, Path(folder), left)
    if failed := [part for part, figures in found.items() if figures is None]:
        print(f"\nfailed: {', '.join(failed)}")
        sys.exit(1)
    print("\nall parts ran")
    record.write({"small": _SMALL.value, "parts": found}, ("capcur_jax/models/**",))


if __name__ == "__main__":
    app.run(main)
