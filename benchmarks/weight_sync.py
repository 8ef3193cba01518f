"""Seconds from a trainer's parameters to an SGLang server that has them: gather, write, verify, load.

    python benchmarks/weight_sync.py --sglang_python=$(python launch/sglang_cpu.py | tail -1) [--rounds=3]

A Qwen3-VL of half a billion random parameters, float32 in the trainer and 1 GB in bfloat16 as published, goes through
`WeightStore` to a server, in memory-backed storage and on disk: all of it, and with a frozen vision tower. `gather` and
`write` are the store's own (write: beyond the gathering that goes on meanwhile).

Beside them, in the same run: plain writes of as many bytes to as many files from as many threads, until the last write
returns and until fsync does; and the store's file writer alone, checksums included, of tensors gathered before. All are
medians.
"""

from __future__ import annotations

import os

import record

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import json
import logging
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from capcur_jax.models import config as config_lib
from capcur_jax.models import fresh, huggingface, weight_files
from capcur_jax.rollout.sglang import manifest
from capcur_jax.rollout.sglang.weights import Update, WeightStore

_PYTHON = flags.DEFINE_string(
    "sglang_python", None, "Python of the server's environment; without it nothing is loaded."
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements of each; the median counts.")
_LAYERS = flags.DEFINE_integer("layers", 32, "Of the decoder: 25 MB each.")
_MEMORY = flags.DEFINE_string("memory", "/dev/shm", "A memory-backed directory.")
_DISK = flags.DEFINE_string("disk", tempfile.gettempdir(), "A directory on a disk.")
_JSON = flags.DEFINE_string("json", None, "A file for the figures.")

WRITERS = 4
START_S, CALL_S = 300, 300
SERVER_FLAGS = (
    "--device=cpu", "--attention-backend=torch_native", "--mm-attention-backend=sdpa", "--sampling-backend=pytorch",
    "--dtype=bfloat16", "--disable-cuda-graph", "--disable-overlap-schedule", "--sleep-on-idle", "--load-format=dummy",
    "--mem-fraction-static=0.5", "--max-total-tokens=2048", "--context-length=512", "--max-running-requests=4",
    "--skip-server-warmup", "--host=127.0.0.1",
)  # fmt: skip


def architecture(layers: int) -> dict:
    return {
        "vocabulary": 320,
        "tied": True,
        "min_pixels": 1024,
        "max_pixels": 65536,
        "text": {
            "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": layers, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 2048, "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        "vision": {
            "depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 256,
            "deepstack_visual_indexes": [2, 5, 8],
        },
    }  # fmt: skip


def stepped(parameters: nnx.State, freeze_vision: bool) -> nnx.State:
    """Parameters as after an optimizer step: new arrays, except the frozen ones."""
    flat = nnx.to_flat_state(parameters)
    moved = [(p, x if freeze_vision and p[0] == "visual" else x.replace(x[...] + 1e-3)) for p, x in flat]
    return jax.block_until_ready(nnx.from_flat_state(moved))


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


# ---------------------------------------------------------------------- writing


def in_threads(run: Callable, items: list) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(run, items))


def raw(directory: Path, sizes: list[int], block: np.ndarray, sync: bool) -> float:
    """Plain writes of as many bytes to as many files."""

    def write(item: tuple[int, int]) -> None:
        number, size = item
        with open(directory / f"raw-{number}", "wb", buffering=0) as file:
            for at in range(0, size, len(block)):
                file.write(block[: min(len(block), size - at)])
            if sync:
                os.fsync(file.fileno())

    took = seconds(lambda: in_threads(write, list(enumerate(sizes))))
    for file in directory.glob("raw-*"):
        file.unlink()
    return took


def writer_alone(directory: Path, files: Mapping[str, dict[str, np.ndarray]]) -> float:
    """The store's file writer, of tensors that are on the host."""
    took = seconds(
        lambda: in_threads(lambda item: weight_files.write(directory / item[0], item[1]), list(files.items()))
    )
    for name in files:
        (directory / name).unlink()
    return took


# ---------------------------------------------------------------------- the server


@contextlib.contextmanager
def server(python: str, model: Path, log: Path) -> Iterator[httpx2.Client]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    variables |= {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_VLM_CACHE_SIZE_MB": "0"}
    variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [python, "-m", "sglang.launch_server", f"--model-path={model}", f"--port={port}", *SERVER_FLAGS]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=CALL_S, trust_env=False) as client:
            end = time.monotonic() + START_S
            while True:
                with contextlib.suppress(httpx2.TransportError):
                    if client.get("/health").is_success:
                        break
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
                time.sleep(1)
            yield client
    finally:
        process.terminate()
        process.wait()


def load(client: httpx2.Client, directory: Path, version: int) -> float:
    """Seconds of the update itself; it is paused before and goes on after."""
    client.post("/pause_generation", json={"mode": "retract"}).raise_for_status()
    body = {"model_path": str(directory), "load_format": "safetensors", "weight_version": str(version)}
    began = time.perf_counter()
    answer = client.post("/update_weights_from_disk", json={**body, "flush_cache": True})
    took = time.perf_counter() - began
    if not answer.is_success or not answer.json()["success"]:
        sys.exit(f"the server refused version {version}: {answer.text[:500]}")
    client.post("/continue_generation", json={}).raise_for_status()
    return took


def logprobs(client: httpx2.Client) -> list[float]:
    sampling = {"max_new_tokens": 4, "temperature": 0}
    body = {"input_ids": [20, 21, 22, 23], "sampling_params": sampling, "return_logprob": True}
    answer = client.post("/generate", json=body).raise_for_status().json()
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


# ---------------------------------------------------------------------- all of it


def measure(place: str, root: Path, parameters: nnx.State, config, client: httpx2.Client | None) -> list[dict]:
    directory = Path(tempfile.mkdtemp(prefix="weight_sync-", dir=root))
    store = WeightStore(directory / "weights", config, jnp.bfloat16, writers=WRITERS)
    block = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    version, rows = 0, []
    try:
        for what in ("full", "frozen vision"):
            found: dict[str, list[float]] = {}
            for _ in range(_ROUNDS.value):
                if what == "full" or not version:
                    version, parameters = version + 1, stepped(parameters, False)
                else:
                    version, parameters = version + 1, stepped(parameters, True)
                update: Update = store.write(parameters, version)
                took = dict(update.seconds)
                took["verify"] = seconds(lambda at=update.directory: manifest.verify(at))
                if client:
                    before = logprobs(client)
                    took["load"] = load(client, update.directory if version > 1 else update.complete, version)
                    if logprobs(client) == before:
                        sys.exit("the server answers as before the update")
                store.discard(before=version)
                sizes = [file.bytes for file in update.files]
                took["raw"], took["raw + fsync"] = (raw(directory, sizes, block, sync) for sync in (False, True))
                gathered = {f.name: _tensors(parameters, config, f) for f in update.files}
                took["writer alone"] = writer_alone(directory, gathered)
                del gathered
                for name, value in took.items():
                    found.setdefault(name, []).append(value)
            row = {"place": place, "what": what, "bytes": update.bytes, "files": len(update.files)}
            rows.append(row | {name: statistics.median(values) for name, values in found.items()})
    finally:
        store.close()
        shutil.rmtree(directory)
    return rows


def _tensors(parameters: nnx.State, config, file) -> dict[str, np.ndarray]:
    path = file.name.rpartition("-of-")[0].rpartition("-")[0]
    tensors = huggingface.published_tensors(parameters, config, jnp.bfloat16, only={path})
    return {name: tensor for name, tensor in tensors if name in file.checksums}


def report(rows: list[dict]) -> None:
    columns = ("gather", "write", "verify", "load", "raw", "raw + fsync", "writer alone")
    print(f"{'':24}{'GB':>6}{'files':>7}" + "".join(f"{name:>14}" for name in columns) + f"{'writer / raw':>14}")
    for row in rows:
        row["writer / raw"] = row["raw"] / row["writer alone"]
        cells = "".join(f"{row[name]:>12.2f} s" if name in row else f"{'-':>14}" for name in columns)
        named = f"{row['place']}, {row['what']}"
        print(f"{named:24}{row['bytes'] / 1e9:>6.2f}{row['files']:>7}{cells}{row['writer / raw']:>14.2f}")


def main(_) -> None:
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="weight_sync-") as scratch:
        model = fresh.write_skeleton(Path(scratch) / "model", ["What shape is it? A circle of 12 dots."] * 20,
                                     architecture(_LAYERS.value))  # fmt: skip
        config = config_lib.from_directory(model)
        parameters = nnx.state(huggingface.create(config, seed=0))
        with contextlib.ExitStack() as stack:
            log = Path(scratch) / "server.log"
            client = stack.enter_context(server(_PYTHON.value, model, log)) if _PYTHON.value else None
            rows = []
            for place, root in (("memory", _MEMORY.value), ("disk", _DISK.value)):
                rows += measure(place, Path(root), parameters, config, client)
    report(rows)
    print(json.dumps(rows))
    if _PYTHON.value:
        names = {"full": "all weights", "frozen vision": "vision tower frozen"}
        updates = [
            {"what": names[row["what"]], **{key: row[key] for key in ("bytes", "gather", "write", "verify", "load")}}
            for row in rows
            if row["place"] == "memory"
        ]
        speeds = [row["writer / raw"] for row in rows]
        record.write(
            {"updates": updates, "writer_against_raw": [round(min(speeds), 1), round(max(speeds), 1)]},
            [f"capcur_jax/rollout/sglang/{name}.py" for name in ("weights", "manifest", "sync")],
        )


if __name__ == "__main__":
    app.run(main)
