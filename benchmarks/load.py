"""Loading a checkpoint against reading its files raw, and the memory it takes.

    python benchmarks/load.py [--folder=/tmp] [--gigabytes=2] [--rounds=5]

Makes a random bfloat16 Qwen3-VL of the 4B's widths and few layers in a temporary folder, in files of 500 MB. Raw is
`numpy.fromfile` of every file, kept until the last is read; loading is all of `huggingface.load` in bfloat16, until the
parameters are on their devices. The two take turns in one process with every file in the page cache (the first, untimed
turn of raw reading sees to that). Memory is the kernel's count of a fresh process that loads once: its highest resident
set less that before the call, compared with the parameters and the largest file.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
from absl import app, flags
from comparison import faster

_FOLDER = flags.DEFINE_string("folder", None, "Where the checkpoint is made (default: the system's temporary folder).")
_GIGABYTES = flags.DEFINE_float("gigabytes", 2.0, "Size of the checkpoint.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each.")
_CHILD = flags.DEFINE_enum("child", "", ["", "speed", "memory"], "Internal: what this process measures.")

LAYER_BYTES = 202e6  # one decoder layer of the 4B in bfloat16
OTHER_BYTES = 372e6  # embeddings of 32,768 tokens, vision tower


def make(directory: Path, gigabytes: float) -> None:
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from capcur_jax.models import config as config_lib
    from capcur_jax.models import huggingface
    from capcur_jax.models.qwen_vl import QwenVL

    layers = max(1, round((gigabytes * 1e9 - OTHER_BYTES) / LAYER_BYTES))
    published = {
        "model_type": "qwen3_vl", "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 32768, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": layers,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 5e6,
        },
        "vision_config": {
            "depth": 4, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
            "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [1],
        },
    }  # fmt: skip
    skeleton = directory.with_name("skeleton")
    skeleton.mkdir()
    (skeleton / "config.json").write_text(json.dumps(published), encoding="utf-8")
    config = config_lib.from_directory(skeleton)
    random = np.random.default_rng(0)

    def draw(leaf):
        bits = random.integers(0x3F80, dtype=np.uint16, size=leaf.shape)  # positive, below 1
        return leaf.replace(bits.view(jnp.bfloat16))

    abstract = nnx.state(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0))))
    drawn = nnx.from_flat_state([(path, draw(leaf)) for path, leaf in nnx.to_flat_state(abstract)])
    huggingface.save(directory, drawn, config, skeleton, shard_bytes=500_000_000)


def kernel(field: str) -> int:
    """Bytes, by the kernel's account of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def load(directory: Path):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from capcur_jax.models import huggingface

    model = huggingface.load(directory, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return jax.block_until_ready(nnx.state(model))


def read_raw(files: list[Path]):
    import numpy as np

    return [np.fromfile(file, np.uint8) for file in files]


def measure_speed(directory: Path) -> dict[str, list[float]]:
    import jax

    files = sorted(directory.glob("*.safetensors"))
    seconds = {name: [] for name in ("raw", "load", "raw, processor", "load, processor")}
    jax.devices()
    read_raw(files)
    for _ in range(_ROUNDS.value):
        for name, action, argument in (("raw", read_raw, files), ("load", load, directory)):
            start, processor = time.perf_counter(), time.process_time()
            kept = action(argument)
            seconds[name].append(time.perf_counter() - start)
            seconds[f"{name}, processor"].append(time.process_time() - processor)
            del kept
    return seconds


def measure_memory(directory: Path) -> dict[str, int]:
    import jax

    from capcur_jax.models import huggingface  # noqa: F401  so that its code is there before

    jax.devices()
    before = kernel("VmRSS")
    state = load(directory)
    return {"peak": kernel("VmHWM") - before, "parameters": sum(leaf.nbytes for leaf in jax.tree.leaves(state))}


def child(what: str, directory: Path) -> dict:
    command = [sys.executable, __file__, f"--child={what}", f"--folder={directory}", f"--rounds={_ROUNDS.value}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(_) -> None:
    if _CHILD.value:
        measure = {"speed": measure_speed, "memory": measure_memory}[_CHILD.value]
        print(json.dumps(measure(Path(_FOLDER.value))))
        return
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
        directory = Path(folder) / "checkpoint"
        make(directory, _GIGABYTES.value)
        sizes = [file.stat().st_size for file in directory.glob("*.safetensors")]
        seconds, memory = child("speed", directory), child("memory", directory)
    total = sum(sizes) / 1e9
    print(f"{total:.2f} GB in {len(sizes)} files, page cache warm, {_ROUNDS.value} turns of each")
    print("\n| | median s | fastest s | GB/s, median | processor s, median |\n|---|---|---|---|---|")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name in ("raw", "load"):
        wall = f"{median[name]:.2f} | {min(seconds[name]):.2f} | {total / median[name]:.2f}"
        print(f"| {name} | {wall} | {median[f'{name}, processor']:.2f} |")
    turns = sorted(zip(seconds["load"], seconds["raw"], strict=True), key=lambda turn: turn[1] / turn[0])
    said = [faster(*turn) for turn in turns]
    print(f"\nloading is {said[len(said) // 2]} than raw reading in the median turn (turns: {', '.join(said)})")
    allowed = memory["parameters"] + max(sizes)
    print(f"peak memory: {memory['peak'] / 1e9:.3f} GB; parameters {memory['parameters'] / 1e9:.3f} GB, ", end="")
    print(f"with the largest file {allowed / 1e9:.3f} GB")
    ratios = [raw / ours for ours, raw in turns]
    record.write(
        {
            "gb": total, "files": len(sizes), "rounds": _ROUNDS.value, "faster_median": ratios[len(ratios) // 2],
            "faster_least": ratios[0], "faster_most": ratios[-1],
            "seconds_fastest": [min(seconds["load"]), min(seconds["raw"])],
            "peak_gb": memory["peak"] / 1e9, "parameters_gb": memory["parameters"] / 1e9,
        },
        ("capcur_jax/models/huggingface.py", "capcur_jax/models/weight_files.py"),
    )  # fmt: skip


if __name__ == "__main__":
    app.run(main)
