"""Whether weight files are what the server can take, and whether it has taken them.

SGLang says "success" of an update with names that it doesn't know, and crashes on others. So names and shapes are
compared with the table before it sees them, and afterwards the parameters that it holds with what was sent.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path

from flax import nnx

from capcur_jax.errors import RolloutError
from capcur_jax.models import huggingface, weight_files
from capcur_jax.models.config import ModelConfig
from capcur_jax.models.qwen_vl import QwenVL

UNTOLD = "not told of it"
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
        found |= huggingface.published_shapes(".".join(path), leaf.shape, config)
    return found


def files(directory: Path, config: ModelConfig, names: Collection[str] | None = None) -> tuple[str, ...]:
    """Names of the tensors in weight files that a server may read: those of the table alone, each in its shape.

    Args:
        names: what has to be there, and nothing else; None: all of a checkpoint.

    Raises RolloutError naming the file and the tensor.
    """
    wanted = declared(config)
    found: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            tensors = list(weight_files.header(file))
        except weight_files.CheckpointError as error:
            raise RolloutError(f"weights for the servers: {error}; they were not told of it") from None
        for tensor in tensors:
            if tensor.name not in wanted:
                raise RolloutError(f"{file}: no {config.family} has a tensor {tensor.name}; the servers were {UNTOLD}")
            if tensor.shape != wanted[tensor.name] or tensor.kind not in weight_files.FLOATS:
                raise RolloutError(
                    f"{file}: {tensor.name} is {tensor.kind} {tensor.shape}, and {wanted[tensor.name]} in a "
                    f"{config.family} of this config.json; the servers were {UNTOLD}"
                )
            if tensor.name in found:
                raise RolloutError(f"{file}: {tensor.name} is in {found[tensor.name]} too; the servers were {UNTOLD}")
            found[tensor.name] = file.name
    differing = sorted(found.keys() ^ set(wanted if names is None else names))
    if differing:
        raise RolloutError(
            f"{directory}: {differing[0]} is {'there and should not be' if differing[0] in found else 'missing'}; the "
            f"servers were {UNTOLD}"
        )
    return tuple(found)


def served_name(published: str) -> str:
    """The parameter of SGLang's that holds a published tensor."""
    visual = "visual." in published
    for ours, theirs in SERVED:
        if visual and ours in (".q_proj.", ".k_proj.", ".v_proj."):
            continue
        published = published.replace(ours, theirs)
    return published


Ranks = list[dict[str, str]]  # of each rank of a server: its parameters' names -> hashes


def arrived(before: Ranks | None, now: Ranks, sent: Collection[str], differing: Collection[str]) -> str:
    """What is wrong with a server after an update, "" if nothing is.

    Args:
        before: what it held before the update; None: unknown.
        now: what it holds.
        sent: published tensors that it was given.
        differing: those of them whose contents are known to differ from what it had.
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
