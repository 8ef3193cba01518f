"""The safetensors of a checkpoint directory: which tensor lies where, parts of it copied into place; and new files.

The format (https://github.com/huggingface/safetensors#format) is 8 bytes, little-endian, with the length of the header;
the header, JSON {name: {dtype, shape, data_offsets}}; the tensors' bytes. Tensors are read from there with pread.
safetensors' own reader holds Python's lock while it copies; it slices bfloat16 either out of a mapping of the file,
whose pages count as the process's memory, or out of the whole tensor. Tensors are written from where they lie;
safetensors' own writer copies them all first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from capcur_jax.errors import InputError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
FLOATS = {"BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
KINDS = {dtype: kind for kind, dtype in FLOATS.items()}
# The exponent's bits by width and kind of number: all of them set is NaN or an infinity.
_EXPONENT = {"BF16": np.uint16(0x7F80), "F16": np.uint16(0x7C00), "F32": np.uint32(0x7F800000)}
BLOCK = 64  # rows read at once: few enough to be still in the processor's cache when they are copied on
RUN = 32 * BLOCK  # rows of one thread's task
THREADS = min(16, os.cpu_count() or 1)
PAGE = 4096  # bytes that share a sum in `checksum`
PIECE = 256 * PAGE  # bytes summed and written at once: still in the processor's cache when they are written


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
        for tensor in header(directory / file, next((name for name in listed if listed[name] == file), "")):
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


def header(file: Path, holds: str = "") -> Iterator[Tensor]:
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
        """[end - first, columns] of its matrix, in its own dtype.

        Raises CheckpointError if the file got shorter, and for NaN and infinities, which no training gets rid of.
        """
        width = tensor.matrix[1] * tensor.dtype.itemsize
        data = os.pread(self._files[tensor.file], (end - first) * width, tensor.start + first * width)
        if len(data) != (end - first) * width:
            raise CheckpointError(
                f"{tensor.file}: the tensor {tensor.name} was cut off while it was read; copy it again"
            )
        found = np.frombuffer(data, tensor.dtype).reshape(end - first, -1)
        if not finite(found):
            raise CheckpointError(
                f"{tensor.file}: the tensor {tensor.name} holds NaN or infinities (rows {first} to {end - 1}): it is "
                "damaged, or the training that wrote it had diverged; copy it again, or take an earlier checkpoint"
            )
        return found

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


def finite(array: np.ndarray) -> bool:
    """Whether no number of it is NaN or infinite; for the dtypes of `FLOATS`, several times faster than NumPy."""
    mask = _EXPONENT[KINDS[array.dtype]]
    return not array.size or bool((array.view(mask.dtype) & mask).max() != mask)


def sound(tensors: Iterable[tuple[str, np.ndarray]], directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that are about to be written to `directory`. Raises CheckpointError for one that is not finite."""
    for name, tensor in tensors:
        if not finite(np.ascontiguousarray(tensor)):
            raise CheckpointError(
                f"{directory} was not written: the tensor {name} holds NaN or infinities. The training diverged: lower "
                "the learning rate, and go on from an earlier checkpoint"
            )
        yield name, tensor


def transposed(matrix: np.ndarray, dtype) -> np.ndarray:
    """matrix [rows, columns] as [columns, rows] of `dtype` in memory of its own, several times faster than NumPy."""
    target = np.empty(matrix.shape[::-1], dtype)

    def run(first: int) -> None:
        for row in range(first, min(first + RUN, len(matrix)), BLOCK):
            block = slice(row, min(row + BLOCK, len(matrix)))
            _transpose(matrix[block].astype(dtype, copy=False), target[:, block])

    for _ in (_pool().map if len(matrix) > RUN else map)(run, range(0, len(matrix), RUN)):
        pass
    return target


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS)


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


def write(file: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Writes a file of these tensors, with the metadata that transformers looks for; returns the `checksum` of each.

    Raises:
        OSError: a full disk, for one.
    """
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that tensors start at a multiple of 8
    sums = {}
    with open(file, "wb", buffering=0) as opened:
        _write_all(opened, len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
            sums[name] = 0
            for at in range(0, len(data), PIECE):
                piece = data[at : at + PIECE]
                sums[name] = checksum(piece, sums[name])
                _write_all(opened, piece)
    return sums


def _write_all(opened: io.FileIO, data: bytes | np.ndarray) -> None:
    left = memoryview(data)
    while left:  # a disk that is nearly full takes a part
        left = left[opened.write(left) :]


def checksum(data: np.ndarray, before: int = 0) -> int:
    """CRC-32 of the sums of every `PAGE` bytes, as little-endian words of 8 bytes, then of the bytes that are left.

    A CRC of the bytes themselves would take longer than writing them to memory. `data` [n] uint8; `before`: of what
    comes before it, a multiple of `PAGE` bytes.
    """
    whole = len(data) // PAGE * PAGE
    sums = data[:whole].view("<u8").reshape(-1, PAGE // 8).sum(axis=1, dtype="<u8")
    return zlib.crc32(data[whole:], zlib.crc32(sums, before))


def checksums(file: Path, tensors: Sequence[Tensor]) -> dict[str, int]:
    """The same of tensors of a file, read from it. Raises CheckpointError if it got shorter."""
    sums = {}
    with open(file, "rb", buffering=0) as opened:
        for tensor in tensors:
            size, sums[tensor.name] = math.prod(tensor.shape) * tensor.dtype.itemsize, 0
            for at in range(0, size, PIECE):
                data = os.pread(opened.fileno(), min(PIECE, size - at), tensor.start + at)
                if len(data) < min(PIECE, size - at):
                    raise CheckpointError(f"{file}: the tensor {tensor.name} was cut off while it was read")
                sums[tensor.name] = checksum(np.frombuffer(data, np.uint8), sums[tensor.name])
    return sums
