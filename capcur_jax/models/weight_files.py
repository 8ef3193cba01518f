"""The safetensors of a checkpoint directory: which tensor lies where, and parts of it copied into place.

The format (https://github.com/huggingface/safetensors#format) is 8 bytes, little-endian, with the length of the header;
the header, JSON {name: {dtype, shape, data_offsets}}; the tensors' bytes. Tensors are read from there with pread, for
safetensors' own reader holds Python's lock while it copies, and slices bfloat16 either out of a mapping of the file,
whose pages count as the process's memory, or out of the whole tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from capcur_jax.errors import InputError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
FLOATS = {"BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
BLOCK = 64  # rows read at once: few enough to be still in the processor's cache when they are copied on
RUN = 32 * BLOCK  # rows of one thread's task
THREADS = min(16, os.cpu_count() or 1)


class CheckpointError(InputError):
    """A checkpoint that can't be read; the message names the file, the tensor and what to do."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One published tensor: its place in a file."""

    name: str
    file: Path
    kind: str  # the format's name of its dtype
    shape: tuple[int, ...]
    start: int  # first byte in the file

    @property
    def dtype(self) -> np.dtype:
        return FLOATS[self.kind]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns: a vector is one row, all axes after the first are columns."""
        return (1, *self.shape) if len(self.shape) == 1 else (self.shape[0], math.prod(self.shape[1:]))


class Part(NamedTuple):
    """Where a rectangle of a tensor's matrix goes."""

    rows: tuple[int, int]  # from, to
    columns: tuple[int, int]
    target: np.ndarray  # [columns, rows] if the copy is transposed, otherwise [rows, columns]


def neutral(name: str) -> str:
    """One name for a tensor of both eras: `model.visual.*` and `model.language_model.*`, or `visual.*` and `model.*`.

    Which one a file has depends on the family and on the version of transformers that wrote it.
    """
    for prefix, short in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name


def find(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its neutral name, from the headers alone.

    Raises:
        CheckpointError: a file that is missing, cut off or not as its index says; a tensor that is there twice.
    """
    single, index = (directory / name for name in WEIGHTS)
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{directory} holds both {single.name} and {index.name}; delete the one that is left over"
        )
    listed: dict[str, str] = {}
    if index.is_file():
        try:
            listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{index} is not a safetensors index; copy the checkpoint again") from None
    elif not single.is_file():
        raise CheckpointError(
            f"{directory} holds no weights: neither {single.name} nor {index.name} is there. "
            "Point config.checkpoint to a Hugging Face checkpoint directory with its safetensors"
        )
    found: dict[str, Tensor] = {}
    for file in sorted(set(listed.values())) if listed else [single.name]:
        for tensor in _header(directory / file, next((name for name in listed if listed[name] == file), "")):
            twin = found.setdefault(neutral(tensor.name), tensor)
            if twin is not tensor:
                raise CheckpointError(
                    f"{tensor.file}: the tensor {tensor.name} is there already, as {twin.name} of {twin.file.name}; "
                    "the directory mixes two checkpoints: copy one of them into an empty directory"
                )
    for name, file in listed.items():
        if neutral(name) not in found or found[neutral(name)].file.name != file:
            raise CheckpointError(
                f"{directory / file}: the tensor {name} is missing, though {index.name} lists it; copy the file again"
            )
    return found


def _header(file: Path, holds: str) -> Iterator[Tensor]:
    """The tensors of one file. `holds`: a tensor that should be in it, for the message if it is not there at all."""
    holds = f", which should hold {holds}," if holds else ""
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            start = 8 + int.from_bytes(opened.read(8), "little")
            if not 8 < start <= size:
                raise ValueError(f"{size} bytes, no whole header")
            header = json.loads(opened.read(start - 8))
            header.pop("__metadata__", None)
            entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{file}{holds} can't be read ({reason}): it is missing or cut off; copy it again"
        ) from None
    for name, (kind, shape, first, end) in entries.items():
        if start + end > size:
            raise CheckpointError(
                f"{file}: the tensor {name} can't be read (the file ends at byte {size}, the tensor at {start + end}): "
                "it is missing or cut off; copy it again"
            )
        if kind in FLOATS and end - first != math.prod(shape) * FLOATS[kind].itemsize:
            raise CheckpointError(
                f"{file}: the tensor {name} can't be read ({end - first} bytes for shape {shape} of {kind}); "
                "copy the file again"
            )
        yield Tensor(name, file, kind, shape, start + first)


class Reader(contextlib.AbstractContextManager):
    """Copies parts of tensors into arrays, many at a time; its files stay open until it is closed."""

    def __init__(self):
        self._closing = contextlib.ExitStack()
        self._pool = self._closing.enter_context(ThreadPoolExecutor(THREADS))
        self._files: dict[Path, int] = {}  # descriptors

    def __exit__(self, *_) -> None:
        self._closing.close()

    def rows(self, tensor: Tensor, first: int, end: int) -> np.ndarray:
        """[end - first, columns] of its matrix, in its own dtype. Raises CheckpointError if the file got shorter."""
        width = tensor.matrix[1] * tensor.dtype.itemsize
        data = os.pread(self._files[tensor.file], (end - first) * width, tensor.start + first * width)
        if len(data) != (end - first) * width:
            raise CheckpointError(
                f"{tensor.file}: the tensor {tensor.name} was cut off while it was read; copy it again"
            )
        return np.frombuffer(data, tensor.dtype).reshape(end - first, -1)

    def open(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if tensor.file not in self._files:
                self._files[tensor.file] = os.open(tensor.file, os.O_RDONLY)
                self._closing.callback(os.close, self._files[tensor.file])

    def equal(self, one: Tensor, other: Tensor) -> bool:
        """Whether two tensors are the same bit for bit."""
        self.open([one, other])
        return (one.kind, one.shape) == (other.kind, other.shape) and all(
            self.rows(one, row, end).tobytes() == self.rows(other, row, end).tobytes()
            for row in range(0, one.matrix[0], RUN)
            for end in [min(row + RUN, one.matrix[0])]
        )

    def copy(self, wanted: Sequence[tuple[Tensor, Sequence[Part]]], transposed: bool) -> None:
        """Fills the targets of every tensor's parts, converted to their dtype. Each row is read once for all parts."""
        self.open([tensor for tensor, _ in wanted])

        def run(task) -> None:
            tensor, parts, first, end = task
            for row in range(first, end, BLOCK):
                block = self.rows(tensor, row, min(row + BLOCK, end))
                for rows, columns, target in parts:
                    a, b = max(rows[0], row), min(rows[1], row + len(block))
                    if a < b:
                        piece, place = block[a - row : b - row, slice(*columns)], slice(a - rows[0], b - rows[0])
                        if transposed:
                            _transpose(piece.astype(target.dtype, copy=False), target[:, place])
                        else:
                            target[place] = piece

        tasks = []
        for tensor, parts in wanted:
            first, last = min(part.rows[0] for part in parts), max(part.rows[1] for part in parts)
            tasks += [(tensor, parts, row, min(row + RUN, last)) for row in range(first, last, RUN)]
        for _ in self._pool.map(run, tasks):
            pass


def _transpose(piece: np.ndarray, target: np.ndarray) -> None:
    """target[...] = piece.T, rows first zipped into words of 8 bytes: one by one, NumPy moves 2-byte numbers slowly."""
    count = 8 // piece.dtype.itemsize
    if len(piece) % count:
        target[...] = piece.T
        return
    words = np.empty((len(piece) // count, piece.shape[1], count), piece.dtype)
    for i in range(count):
        words[..., i] = piece[i::count]
    target.view(np.uint64)[...] = words.view(np.uint64)[..., 0].T
