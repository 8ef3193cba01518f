"""Images as arrays at the size that the model sees: decoded in worker processes, kept within a budget of memory."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Hashable

import numpy as np
from PIL import Image

from capcur_jax.data import image_files
from capcur_jax.data.image_files import FIX, MAX_PIXELS, Unreadable
from capcur_jax.data.image_pool import Died, Pool
from capcur_jax.models.inputs import BadImage

BICUBIC = int(Image.Resampling.BICUBIC)
TIMEOUT_S = 60.0  # for one image, on a machine that may be busy compiling; the largest allowed take a few
MEMORY_MB = 4096  # address space of a worker: the largest allowed image, transparent, and its resizing
SIZES_KEPT = 100_000  # headers remembered


def load_image(path: str) -> Image.Image:
    """An RGB image, decoded whole in this thread, upright. Raises BadImage."""
    try:
        return image_files.load(path)
    except Unreadable as error:
        raise BadImage(f"{path}: {error}") from None


class _Recent:
    """The values used last, as many as a budget holds. For any threads."""

    def __init__(self, budget: int):
        self._budget, self._lock = budget, threading.Lock()
        self._kept: collections.OrderedDict[Hashable, tuple[object, int]] = collections.OrderedDict()
        self.held = self.hits = self.misses = 0

    def get(self, key: Hashable):
        with self._lock:
            if key not in self._kept:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, value, cost: int) -> None:
        with self._lock:
            if key in self._kept:  # two threads wanted it at once
                self.held -= self._kept.pop(key)[1]
            if cost > self._budget:
                return
            self._kept[key] = value, cost
            self.held += cost
            while self.held > self._budget:
                self.held -= self._kept.popitem(last=False)[1][1]


class ImageStore:
    """Reads images for any number of threads; what `image_files` says becomes of them.

    Args:
      workers: processes that decode, started when they are first needed. One that an image kills, or that takes longer
        than `timeout_s` over it, is replaced and the image tried once more; then it is a bad image. 0: the calling
        thread decodes, where a decoder's crash is the process's and libtiff may write to the terminal.
      cache_mb: MiB of resized images that are kept, the last used.
      max_pixels: a header that says more is refused, and nothing decoded.
      timeout_s, memory_mb: of a worker, for one image: seconds by the clock, MiB of address space.

    A file that was changed is read anew. Used as a context manager, or closed; what is not ends with the process.
    """

    def __init__(
        self,
        workers: int = 0,
        cache_mb: int = 0,
        *,
        max_pixels: int = MAX_PIXELS,
        timeout_s: float = TIMEOUT_S,
        memory_mb: int = MEMORY_MB,
    ):
        self._max_pixels, self._timeout_s = max_pixels, timeout_s
        self._sizes, self._pixels = _Recent(SIZES_KEPT), _Recent(cache_mb * 2**20)
        self._pool = Pool(workers, max_pixels, timeout_s, memory_mb) if workers else None
        if self._pool:
            weakref.finalize(self, self._pool.close)  # also runs at exit

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. A thread that is still reading gets RuntimeError."""
        if self._pool:
            self._pool.close()

    def size(self, path: str) -> tuple[int, int]:
        """(height, width) of the upright image by its header. Raises BadImage: "path: what; remedy"."""
        key = self._identify(path)
        found = self._sizes.get(key)
        if found is None:
            found = self._ask(path, image_files.size, {})
            self._sizes.put(key, found, 1)
        return found

    def load(self, path: str, size: tuple[int, int], resample: int = BICUBIC) -> np.ndarray:
        """The upright RGB image, resized as Pillow does; read-only.

        Args:
          size: (height, width) to resize it to.
          resample: a filter of `PIL.Image.Resampling`.

        Returns: [height, width, 3] uint8.

        Raises:
          BadImage: "path: what; remedy".
          RuntimeError: workers can't be started, or the store is closed.
        """
        key = *self._identify(path), size, resample
        found = self._pixels.get(key)
        if found is None:
            pixels = self._ask(path, image_files.resized, {"size": size, "resample": int(resample)})
            found = np.frombuffer(pixels, np.uint8).reshape(*size, 3)
            found.flags.writeable = False
            self._pixels.put(key, found, found.nbytes)
        return found

    def counters(self) -> dict[str, int]:
        """Totals since the start: images found in the cache and not, its bytes now, workers that died of an image."""
        return {
            "hits": self._pixels.hits,
            "misses": self._pixels.misses,
            "bytes": self._pixels.held,
            "deaths": self._pool.deaths if self._pool else 0,
        }

    def _identify(self, path: str) -> tuple:
        """What tells this content of the file from another. Raises BadImage."""
        try:
            return path, *image_files.version(path)
        except Unreadable as error:
            raise BadImage(f"{path}: {error}") from None

    def _ask(self, path: str, here, request: dict):
        """The pixels' bytes, or the (height, width) where `request` names no size: from `here`, a function of
        image_files, or a worker."""
        try:
            if not self._pool:
                resizing = (*request["size"], request["resample"]) if request else ()
                return here(path, *resizing, max_pixels=self._max_pixels)
            reply, pixels = self._pool.ask({"path": path, **request})
        except Unreadable as error:
            raise BadImage(f"{path}: {error}") from None
        except Died as error:
            raise BadImage(f"{path}: it ended the process that decoded it ({error}); {FIX}") from None
        if "error" in reply:
            raise BadImage(f"{path}: {reply['error']}")
        return tuple(reply["size"]) if pixels is None else pixels
