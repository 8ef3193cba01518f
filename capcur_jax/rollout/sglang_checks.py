"""Whether weight files are what the server can take, and whether it has taken them.

SGLang says "success" of an update with names that it doesn't know, and dies of others. So names and shapes are compared
with the table before it sees them, and afterwards the parameters that it holds with what was sent.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from capcur_jax.errors import RolloutError
from capcur_jax.models import names as names_lib
from capcur_jax.models.config import ModelConfig
from capcur_jax.models.qwen_vl import QwenVL

KINDS = {"BF16": 2, "F16": 2, "F32": 4}  # bytes of a number
SAMPLE_BYTES = 32 * 2**20  # of the files that are hashed here to see what must have changed in the servers
# Parts of published names -> of SGLang's, which joins some tensors in one parameter.
SERVED = (
    ("model.language_model.", "model."), ("model.visual.", "visual."), (".attn.qkv.", ".attn.qkv_proj."),
    (".q_proj.", ".qkv_proj."), (".k_proj.", ".qkv_proj."), (".v_proj.", ".qkv_proj."),
    (".gate_proj.", ".gate_up_proj."), (".up_proj.", ".gate_up_proj."),
)  # fmt: skip


@functools.cache
def declared(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor that a checkpoint of this model has."""
    abstract = nnx.state(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0))))
    found = {}
    for path, leaf in nnx.to_flat_state(abstract):
        ours = ".".join(path)
        template = names_lib.table(config)[ours]
        stacked = "{}" in template
        shape = names_lib.published_shape(ours, leaf.shape[stacked:], config)
        found |= {template.format(layer): shape for layer in range(leaf.shape[0] if stacked else 1)}
    return found


def headers(directory: Path) -> dict[str, tuple[Path, dict]]:
    """Tensor name -> (file, its entry in that safetensors file's header). Raises RolloutError for a broken file."""
    found: dict[str, tuple[Path, dict]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
        except (OSError, ValueError, struct.error) as error:
            raise RolloutError(f"{file} is no whole safetensors file ({error})") from None
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if file.stat().st_size != end:
            raise RolloutError(f"{file} has {file.stat().st_size} bytes, its header describes {end}: half written?")
        for name, entry in header.items():
            if name in found:
                raise RolloutError(f"{directory}: {name} is in {found[name][0].name} and in {file.name}")
            found[name] = (file, {**entry, "start": 8 + length + entry["data_offsets"][0]})
    return found


def files(directory: Path, config: ModelConfig, complete: bool) -> dict[str, tuple[Path, dict]]:
    """`headers` of weight files that a server may read: names and shapes of the table alone, all of it if `complete`.

    Raises RolloutError naming the tensor.
    """
    wanted, found = declared(config), headers(directory)
    if not found:
        raise RolloutError(f"{directory} holds no weights")
    for name, (file, entry) in found.items():
        if name not in wanted:
            raise RolloutError(f"{file}: {name} is no tensor of a {config.family}; the servers were not told of it")
        if tuple(entry["shape"]) != wanted[name] or entry["dtype"] not in KINDS:
            raise RolloutError(
                f"{file}: {name} is {entry['dtype']} {tuple(entry['shape'])}, a server of this {config.family} takes "
                f"{wanted[name]}; the servers were not told of it"
            )
        if int(np.prod(entry["shape"])) * KINDS[entry["dtype"]] != entry["data_offsets"][1] - entry["data_offsets"][0]:
            raise RolloutError(f"{file}: {name} has another size than its shape; the servers were not told of it")
    missing = sorted(wanted.keys() - found.keys())
    if complete and missing:
        raise RolloutError(f"{directory}: {len(missing)} tensors are missing, first {missing[0]}")
    return found


def served_name(published: str) -> str:
    """The parameter of SGLang's that holds a published tensor."""
    visual = "visual." in published
    for ours, theirs in SERVED:
        if visual and ours in (".q_proj.", ".k_proj.", ".v_proj."):
            continue
        published = published.replace(ours, theirs)
    return published


def digests(found: Mapping[str, tuple[Path, dict]], limit: int = SAMPLE_BYTES) -> dict[str, str]:
    """Tensor name -> hash of its bytes, of the smallest ones that together have `limit` bytes (and of one at least)."""
    result, total = {}, 0
    size = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, (_, entry) in found.items()}
    for name in sorted(size, key=lambda one: (size[one], one)):
        total += size[name]
        if result and total > limit:
            break
        file, entry = found[name]
        with file.open("rb") as stream:
            stream.seek(entry["start"])
            result[name] = hashlib.blake2b(stream.read(size[name]), digest_size=16).hexdigest()
    return result


Ranks = list[dict[str, str]]  # of each rank of a server: its parameters' names -> hashes


def arrived(before: Ranks | None, now: Ranks, sent: Mapping[str, tuple[Path, dict]], differing: Collection[str]) -> str:
    """What is wrong with a server after an update, "" if nothing is.

    Args:
        before: what it held before the update; None: unknown.
        now: what it holds.
        sent: published tensors that it was given.
        differing: those of them whose bytes are known to differ from what it had.
    """
    targets = {name: served_name(name) for name in sent}
    for name, target in targets.items():
        if not any(target in rank for rank in now):
            return f"it has no parameter {target} to take {name}: a version of SGLang with other names"
    if before is None or [rank.keys() for rank in before] != [rank.keys() for rank in now]:
        return ""
    touched = {name for old, new in zip(before, now, strict=True) for name in new if new[name] != old[name]}
    stale = sorted(name for name in differing if targets[name] not in touched)
    if stale:
        return f"{len(stale)} tensors didn't arrive, first {stale[0]}"
    # A head tied to the embeddings is one more parameter that holds them.
    foreign = sorted(touched - set(targets.values()) - {"lm_head.weight"})
    return f"{len(foreign)} parameters changed that weren't sent, first {foreign[0]}" if foreign else ""


def unequal(one: Ranks, other: Ranks) -> str:
    """How two servers with the same weights differ; "" if they don't, or have other ranks and can't be compared."""
    if [rank.keys() for rank in one] != [rank.keys() for rank in other]:
        return ""
    names = sorted({name for a, b in zip(one, other, strict=True) for name in a if a[name] != b[name]})
    return f"{len(names)} parameters, first {names[0]}, differ from those" if names else ""
