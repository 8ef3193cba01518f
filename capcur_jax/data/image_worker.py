"""Decodes images in a process that may die of one: the program behind `images.ImageStore`.

Started as `python -m capcur_jax.data.image_worker MAX_PIXELS MEMORY_MB TIMEOUT_S`. Requests come to stdin and replies
leave by stdout, a JSON line each; pixels follow their line as they are:

    worker: {"ready": true}
    parent: {"path": "a.jpg"}                                            its size when upright
    worker: {"size": [480, 640]}
    parent: {"path": "a.jpg", "size": [448, 640], "resample": 3}         its pixels at that size
    worker: {"bytes": 860160}, then that many bytes: [448, 640, 3] uint8
    worker: {"error": "not a file; give the image itself or take the row out"}     to either

Decoders are C code that a crafted file may crash, fill the memory with, or keep busy: here that ends this process
alone. The parent's clock kills it; the limits set here hold where the parent is gone.
"""

import json
import os
import resource
import sys
from contextlib import suppress

from capcur_jax import workers
from capcur_jax.data import image_files


def _answer(request: dict, max_pixels: int) -> tuple[dict, bytes]:
    try:
        if "size" not in request:
            return {"size": image_files.size(request["path"], max_pixels)}, b""
        pixels = image_files.resized(request["path"], *request["size"], request["resample"], max_pixels)
        return {"bytes": len(pixels)}, pixels
    except image_files.Unreadable as error:
        return {"error": str(error)}, b""


def main() -> None:
    """Serves requests until the parent closes the pipe."""
    max_pixels, memory_mb, timeout_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    # Replies leave by a copy of stdout: what a library prints to the real one must not look like a reply.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    workers.limit(resource.RLIMIT_CORE, 0)
    workers.limit(resource.RLIMIT_FSIZE, 0)
    if sys.platform != "darwin":  # which does not know it
        workers.limit(resource.RLIMIT_AS, memory_mb * 2**20)

    def reply(message: dict, pixels: bytes = b"") -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        rest = memoryview(pixels)
        while rest:
            rest = rest[replies.write(rest) :]

    with suppress(BrokenPipeError):
        reply({"ready": True})
        os.dup2(devnull, 2)
        for line in sys.stdin.buffer:
            workers.roll_cpu_limit(timeout_s)
            reply(*_answer(json.loads(line), max_pixels))


if __name__ == "__main__":
    main()
