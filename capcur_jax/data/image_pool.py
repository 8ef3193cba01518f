"""`image_files.size` and `image_files.resized` in processes that an image may kill."""

from __future__ import annotations

from typing import Any

from capcur_jax import workers
from capcur_jax.data.image_files import FIX, Unreadable

_REMEDY = "Make room for it, or set config.data.workers to 0: images are decoded in the trainer's own threads then"


class ImagePool(workers.Pool):
    """Decodes images for any number of threads. A worker that an image kills is replaced and the image tried once more.

    Args:
      count: processes, started when they are first needed.
      memory_mb, timeout_s: of a worker, for one image: MiB of address space, seconds by the clock.
    """

    def __init__(self, count: int, memory_mb: int, timeout_s: float):
        about = dict(name="the image worker", remedy=_REMEDY, tries=2)
        super().__init__(count, "capcur_jax.data.image_worker", memory_mb, timeout_s, **about)

    def size(self, path: str, max_pixels: int) -> tuple[int, int]:
        """As `image_files.size`. Raises RuntimeError where workers can't be started or the pool is closed."""
        return tuple(self._read({"path": path, "max_pixels": max_pixels})[0]["size"])

    def resized(
        self, path: str, height: int, width: int, resample: int, max_pixels: int
    ) -> tuple[bytearray | None, str]:
        """As `image_files.resized`. Raises RuntimeError where workers can't be started or the pool is closed."""
        wanted = {"size": (height, width), "resample": resample}
        reply, pixels = self._read({"path": path, "max_pixels": max_pixels, **wanted})
        return pixels, reply["flaw"]

    def _read(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytearray | None]:
        try:
            reply, pixels = self.ask(request)
        except workers.Died as error:
            raise Unreadable(f"it ended the process that decoded it ({error}); {FIX}") from None
        if "error" in reply:
            raise Unreadable(reply["error"])
        return reply, pixels
