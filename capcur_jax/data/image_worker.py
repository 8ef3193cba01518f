"""Decodes images in a process that may die of one: the program behind `image_pool.ImagePool`.

Its requests and replies, one of `workers.serve`'s lines each:

    parent: {"path": "a.jpg", "max_pixels": 10000}                                      its size when upright
    worker: {"size": [480, 640]}
    parent: {"path": "a.jpg", "max_pixels": 10000, "size": [448, 640], "resample": 3}   its pixels at that size
    worker: {"flaw": "", "bytes": 860160}, then that many bytes: [448, 640, 3] uint8
    worker: {"error": "not a file; give the image itself or take the row out"}          to either

Decoders are C code that a crafted file may crash, fill the memory with, or keep busy: here that ends this process
alone.
"""

from typing import Any

from capcur_jax import workers
from capcur_jax.data import image_files


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], bytes | None]:
    path, max_pixels = request["path"], request["max_pixels"]
    try:
        if "size" not in request:
            return {"size": image_files.size(path, max_pixels)}, None
        pixels, flaw = image_files.resized(path, *request["size"], request["resample"], max_pixels)
        return {"flaw": flaw}, pixels
    except image_files.Unreadable as error:
        return {"error": str(error)}, None


if __name__ == "__main__":
    workers.serve(_answer)
