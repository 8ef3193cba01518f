"""What a directory of weight files holds: manifest.json, written last, and the check of the files against it.

    {"version": 7, "tensors": {published name: {"file", "dtype", "shape", "checksum"}}}

dtype as safetensors names it; checksum as `weight_files.checksum`. A directory without it isn't whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from capcur_jax.errors import RolloutError
from capcur_jax.models import weight_files

NAME = "manifest.json"


def write(directory: Path, version: int, tensors: Mapping[str, dict]) -> None:
    content = {"version": version, "tensors": dict(tensors)}
    (directory / NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def verify(directory: str | Path, threads: int = 4) -> int:
    """Reads an update or a complete directory again; returns the version in its manifest.

    Raises:
        RolloutError: there is no manifest, or a file or tensor isn't the one that was written: naming both.
    """
    directory = Path(directory)
    try:
        read = json.loads((directory / NAME).read_text(encoding="utf-8"))
        tensors, version = dict(read["tensors"]), int(read["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RolloutError(f"{directory} is no whole version of the weights: its {NAME} ({error})") from None
    files: dict[str, dict[str, dict]] = {}
    for name, entry in tensors.items():
        files.setdefault(entry["file"], {})[name] = entry
    for file in directory.glob("*.safetensors"):
        if file.name not in files:
            raise RolloutError(f"{file} is not in {NAME}: it is of another version")
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda item: _verify_file(directory / item[0], item[1]), files.items()):
            pass
    return version


def _verify_file(file: Path, wanted: dict[str, dict]) -> None:
    try:
        found = {tensor.name: tensor for tensor in weight_files.header(file)}
        for name in found.keys() ^ wanted.keys():
            raise RolloutError(
                f"{file}: the tensor {name} is {'not in' if name in found else 'missing, it is in'} {NAME}"
            )
        for name, tensor in found.items():
            kind, shape = wanted[name]["dtype"], tuple(wanted[name]["shape"])
            if (tensor.kind, tensor.shape) != (kind, shape):
                raise RolloutError(f"{file}: {name} is {tensor.kind} {tensor.shape}, {NAME} says {kind} {shape}")
        for name, number in weight_files.checksums(file, list(found.values())).items():
            if number != wanted[name]["checksum"]:
                raise RolloutError(
                    f"{file}: the checksum of {name} is {number}, {NAME} says {wanted[name]['checksum']}"
                )
    except weight_files.CheckpointError as error:
        raise RolloutError(str(error)) from None
