"""New weight files, their checksums, and matrices turned around."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from capcur_jax.models import weight_files
from capcur_jax.models.weight_files import PAGE, PIECE, checksum


def numbers(*shape, dtype=np.float32):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_safetensors_reads_what_is_written(tmp_path, dtype):
    tensors = {
        "b": numbers(3, 5, dtype=dtype),
        "a.weight": numbers(700, 501, dtype=dtype),
        "one": numbers(7, dtype=dtype),
    }
    tensors["turned"] = numbers(6, 4, dtype=dtype).T
    sums = weight_files.write(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() == sums.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)
        assert sums[name] == checksum(np.frombuffer(tensor.tobytes(), np.uint8))
    with safe_open(tmp_path / "x.safetensors", "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
    listed = list(weight_files.header(tmp_path / "x.safetensors"))
    assert weight_files.checksums(tmp_path / "x.safetensors", listed) == sums


def test_a_disk_that_takes_a_part_gets_the_rest(tmp_path, monkeypatch):
    """One call writes at most 2 GiB, and a disk that is nearly full less."""

    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:1000])

    tensor = numbers(50, 90)
    write_all = weight_files._write_all
    monkeypatch.setattr(weight_files, "_write_all", lambda opened, data: write_all(Slow(opened), data))
    weight_files.write(tmp_path / "x.safetensors", {"x": tensor})
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["x"], tensor)


def test_a_checksum_sees_what_disks_do():
    data = np.random.default_rng(0).integers(0, 256, 3 * PAGE + 77, dtype=np.uint8)
    seen = {checksum(data)}
    for at in (0, 5, PAGE - 1, PAGE, 3 * PAGE - 1, 3 * PAGE, len(data) - 1):
        for bit in (1, 128):
            changed = data.copy()
            changed[at] ^= bit
            seen.add(checksum(changed))
    zeroed, swapped = data.copy(), data.copy()
    zeroed[PAGE : 2 * PAGE] = 0
    swapped[:PAGE], swapped[PAGE : 2 * PAGE] = data[PAGE : 2 * PAGE], data[:PAGE]
    seen |= {checksum(zeroed), checksum(swapped), checksum(data[:-1]), checksum(data[:PAGE]), checksum(data[:0])}
    assert len(seen) == 20


def test_a_checksum_in_pieces_is_that_of_the_whole():
    data = np.random.default_rng(1).integers(0, 256, 2 * PIECE + 5, dtype=np.uint8)
    pieces = 0
    for at in range(0, len(data), PIECE):
        pieces = checksum(data[at : at + PIECE], pieces)
    assert pieces == checksum(data) == checksum(data[2 * PIECE :], checksum(data[: 2 * PIECE]))


@pytest.mark.parametrize("shape", [(1, 1), (64, 3), (65, 130), (2048, 8), (4500, 7)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_transposed(shape, dtype):
    matrix = numbers(*shape)
    turned = weight_files.transposed(matrix, dtype)
    assert turned.dtype == dtype and turned.flags.c_contiguous
    np.testing.assert_array_equal(turned, matrix.T.astype(dtype))
    half = matrix.astype(dtype)
    np.testing.assert_array_equal(weight_files.transposed(half, dtype), half.T)
