"""Images as arrays at the size that the model sees: decoded in worker processes, kept within a budget of memory."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator

import cachetools
import numpy as np
from PIL import Image

from capcur_jax.data import image_files
from capcur_jax.data.image_files import MAX_PIXELS, Unreadable
from capcur_jax.data.image_pool import ImagePool
from capcur_jax.models.inputs import BadImage

BICUBIC = int(Image.Resampling.BICUBIC)
TIMEOUT_S = 60.0  # for one image, on a machine that may be busy compiling; the largest allowed take a few
MEMORY_MB = 4096  # address space of a worker: the largest allowed image, transparent, and its resizing
SIZES_KEPT = 100_000  # headers remembered


def load_image(path: str) -> Image.Image:
    """An RGB image, decoded whole in this thread, upright. Raises BadImage."""
    with _named(path):
        return image_files.load(path)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Unreadable becomes BadImage, which says of what file."""
    try:
        yield
    except Unreadable as error:
        raise BadImage(f"{path}: {error}") from None


def _identity(path: str, *how: Hashable) -> tuple[Hashable, ...]:
    """What tells this content of the file, read in this way, from another. Raises Unreadable."""
    return path, *image_files.version(path), *how


def _remembered(read: Callable, budget: int, cost: Callable = lambda value: 1):
    """`read(path, ...)`, which keeps the values used last as long as their costs are within the budget. For threads."""
    cache = cachetools.LRUCache(budget, getsizeof=cost)
    return cachetools.cached(cache, key=_identity, lock=threading.Lock(), info=True)(read)


def _pixels(
    source, flaws: dict[str, str], max_pixels: int, path: str, size: tuple[int, int], resample: int
) -> np.ndarray:
    data, flaw = source.resized(path, *size, resample, max_pixels)
    if flaw:
        flaws[path] = flaw
    found = np.frombuffer(data, np.uint8).reshape(*size, 3)
    found.flags.writeable = False
    return found


class ImageStore:
    """Reads images for any number of threads; what `image_files` says becomes of them.

    Args:
      workers: processes that decode, started when they are first needed. One that an image kills, or that takes longer
        than `timeout_s` over it, is replaced and the image tried once more; then it is a bad image. 0: the calling
        thread decodes, where a decoder's crash is the process's and libtiff may write to the terminal.
      cache_mb: MiB of resized images that are kept, the last used.
      max_pixels: a header that says more is refused, and nothing decoded.
      timeout_s, memory_mb: of a worker, for one image: seconds by the clock, MiB of address space.

    A file that was changed is read anew. Use it as a context manager, or close it; else it ends with the process.
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
        self._pool = ImagePool(workers, memory_mb, timeout_s) if workers else None
        if self._pool:
            weakref.finalize(self, self._pool.close)  # also runs at exit
        source = self._pool or image_files
        # Not methods: a cycle would keep the workers of a store that nobody holds.
        self._size = _remembered(functools.partial(source.size, max_pixels=max_pixels), SIZES_KEPT)
        self.flaws: dict[str, str] = {}  # path -> what is wrong with a file that could be read all the same
        pixels = functools.partial(_pixels, source, self.flaws, max_pixels)
        self._load = _remembered(pixels, cache_mb * 2**20, cost=lambda found: found.nbytes)

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
        with _named(path):
            return self._size(path)

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
        with _named(path):
            return self._load(path, size, int(resample))

    def counters(self) -> dict[str, int]:
        """Totals since the start: images found in the cache and not, its bytes now, workers that died of an image,
        images whose file has a flaw that viewers overlook too."""
        images = self._load.cache_info()
        deaths = self._pool.deaths if self._pool else 0
        counts = {"hits": images.hits, "misses": images.misses, "bytes": images.currsize, "deaths": deaths}
        return counts | {"flawed": len(self.flaws)}
