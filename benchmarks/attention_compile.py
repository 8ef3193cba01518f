"""What attention compiles to on a TPU and a GPU that aren't there, and its memory beside plain XLA's. Needs no device.

    python benchmarks/attention_compile.py --targets=tpu:v5p:2x2x1,cuda:h100:1x1x2

For every layout of models/attention.py at an 8B model's sizes (bfloat16), forward and backward: the kernels that the
compiled program really calls, and the bytes it needs beyond arguments and results, as `attend` chooses and with
implementation="xla". The last two rows are split over two devices inside shard_map, by heads or by rows. What to
install for a target is said in capcur_jax/plan/topologies.py.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
from absl import app, flags

_TARGETS = flags.DEFINE_list("targets", ["tpu:v5p:2x2x1", "cuda:h100:1x1x2"], "see capcur_jax/plan/topologies.py")
_KEEP = flags.DEFINE_string("keep", "", "a file for one target's bytes as JSON, for the process that asks all")
_ONLY = flags.DEFINE_list("only", [], "layouts, by the beginnings of their names; none: all")
_KERNEL = re.compile(r"splash_mha_(?:fwd|dq|dkv)|__cudnn\$\w+")
_MIB = 2**20


def cases():
    """Name -> (shapes of q, k, v and the layout's arrays, layout of those arrays, what to split over two devices)."""
    from capcur_jax.models.attention import Packed, Places, Segments

    G, T, N, K, H = 5, 2048, 32, 8, 128  # Qwen3-VL-8B's heads, a group of 5

    def own(rows, tokens, slots):
        return (rows, tokens, N, H), (rows, slots, K, H), (rows, slots, K, H)

    def rows(count, tokens, groups, each=G):
        return *own(count, tokens, tokens), *((count, groups * n) for n in (1, 1, each, each))

    def packed(*places):
        return Packed(Places(*places), prompt=T, response=T)

    def alone(*places):
        return Packed(Places(*places), prompt=T, response=0)

    def images(patches, heads, size):
        return *((1, patches, heads, size) for _ in range(3)), (1, patches), (1, 8), (1, 8)

    return {
        "packed rows": (rows(1, 8 * T, 6), packed, None),
        "prompts alone": (rows(1, 8 * T, 16, 0), alone, None),
        "images (heads of 80)": (images(8192, 16, 80), Segments, None),
        "images (heads of 72)": (images(8192, 16, 72), Segments, None),
        "windows of 64": (images(8192, 16, 80)[:4], functools.partial(Segments, reach=64), None),
        "packed rows (heads / 2)": (rows(1, 8 * T, 6), packed, "heads"),
        "packed rows (rows / 2)": (rows(2, 8 * T, 6), packed, "rows"),
    }


def measure(target: str) -> None:
    """Prints the target's table."""
    from capcur_jax.plan import topologies

    devices = topologies.devices(target)  # before anything else of jax

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from capcur_jax.devices import sharding
    from capcur_jax.models.attention import attend

    def compiled(shapes, layout, split, implementation, backward):
        mesh = Mesh(np.array(devices[: 2 if split else 1]), ("x",))
        place = {"rows": ("x",), "heads": (None, None, "x"), None: ()}[split]
        # Lengths and segment ids have no heads.
        specs = [PartitionSpec(*place if len(s) == 4 or split == "rows" else ()) for s in shapes]
        arrays = [
            jax.ShapeDtypeStruct(s, jnp.bfloat16 if len(s) == 4 else jnp.int32, sharding=NamedSharding(mesh, spec))
            for s, spec in zip(shapes, specs, strict=True)
        ]

        def function(q, k, v, *rest):
            return attend(q, k, v, layout(*rest), sharding.single(), implementation)

        if split:
            function = jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)

        def gradients(*arrays):
            floats = tuple(i for i, array in enumerate(arrays) if array.ndim == 4)
            return jax.grad(lambda *a: function(*a).astype(jnp.float32).sum(), argnums=floats)(*arrays)

        return jax.jit(gradients if backward else function).lower(*arrays).compile()

    found: dict[str, dict[str, int]] = {}
    print(f"\n{target}: {devices[0].device_kind}, jax {jax.__version__}; MiB beyond arguments and results, a device")
    print(f"{'layout':<28}{'pass':<10}{'attend':>10}{'xla':>10}  kernels of attend")
    for name, case in cases().items():
        if _ONLY.value and not name.startswith(tuple(_ONLY.value)):
            continue
        for backward in (False, True):
            began = time.perf_counter()
            programs = [compiled(*case, implementation, backward) for implementation in ("auto", "xla")]
            ours, theirs = (round(p.memory_analysis().temp_size_in_bytes / _MIB) for p in programs)
            way = "backward" if backward else "forward"
            found.setdefault(name, {}).update({way: ours, f"xla_{way}": theirs})
            calls = re.findall(r".* custom-call\(.*", programs[0].as_text())
            kernels = sorted({kernel for call in calls for kernel in _KERNEL.findall(call)}) or ["none: XLA"]
            seconds = time.perf_counter() - began
            line = f"{name:<28}{way:<10}{ours:>10}{theirs:>10}  {', '.join(kernels)}"
            print(f"{line} ({seconds:.0f} s)", flush=True)
    if _KEEP.value:
        Path(_KEEP.value).write_text(json.dumps(found), encoding="utf-8")


def main(argv: list[str]) -> None:
    if _KEEP.value:
        measure(_TARGETS.value[0])
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:  # one process a target: each has compiler settings of its own
        for number, target in enumerate(_TARGETS.value):
            kept = Path(folder) / f"{number}.json"
            more = [f"--only={','.join(_ONLY.value)}", f"--keep={kept}"]
            subprocess.run([sys.executable, argv[0], f"--targets={target}", *more], check=True)
            found.append(json.loads(kept.read_text(encoding="utf-8")))
    empty = dict.fromkeys(("forward", "backward", "xla_forward", "xla_backward"))
    layouts = [{"layout": name, "targets": [empty | one[name] for one in found]} for name in found[0]]
    record.write(
        {"targets": _TARGETS.value, "layouts": layouts},
        ("capcur_jax/models/attention*.py", "capcur_jax/models/packed*.py"),
    )


if __name__ == "__main__":
    app.run(main)
