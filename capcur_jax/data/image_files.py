"""Image files -> upright RGB pixels of a given size, with Pillow alone: what the image workers run.

What comes out, for whatever was in the file:

- the first frame of an animation, the first page of a document;
- upright, as EXIF or XMP say that it was held; unreadable EXIF is ignored;
- transparency (alpha, a palette's, a colour's) composited on white, as transformers' processor does it;
- palettes, CMYK, YCbCr and LAB by Pillow's own conversion; colour profiles are not applied, as nowhere in training;
- 12-bit, 16-bit and float grayscale brought to 8 bits by the narrowest usual range that holds its values
  (`_eight_bits`), where Pillow alone would clip everything above 255 to white;
- a JPEG without its last bytes as viewers show it, if hardly any of it is lost with them, and a PNG without its texts
  where they are too large: `flaw` says so.

Files are untrusted. Only the formats below are opened (Pillow's others include one that starts Ghostscript), only
regular files, and no image is decoded whose header says that it is larger than a limit.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from PIL import ExifTags, Image, UnidentifiedImageError

# Each registers what it opens; without them Pillow would import all of its own when it meets the first odd file.
for _name in ("Avif", "Bmp", "Gif", "Jpeg2K", "Jpeg", "Png", "Ppm", "Tiff", "WebP"):
    importlib.import_module(f"PIL.{_name}ImagePlugin")
FORMATS = tuple(
    name for name in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
MAX_PIXELS = 100_000_000  # by the header; a phone's largest mode has fifty to two hundred million, a photo ten to fifty
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)
# Chunks behind a PNG's pixels that may say how it was held.
_LATE = re.compile(rb"eXIf|(?:iTXt|tEXt|zTXt)(?:XML:com\.adobe\.xmp|Raw profile type exif)\0")
# Pillow warns of what it finds odd in a file. Here that is either a reason to refuse the file or nothing.
_HUSH = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


MAX_LOST = 0.1  # of a JPEG that lacks its last bytes
_BLOCK = 16  # rows of pixels that are coded together, from left to right
_LONG_TEXT = 1 << 16  # bytes
_FLAW = "capcur_flaw"  # key of an image's `info`
_Value = TypeVar("_Value")
FIX = "replace it or take the row out"


class Unreadable(ValueError):
    """What is wrong with an image file and what to do about it, as "what; remedy", without the path."""


def version(path: str) -> tuple[int, int]:
    """What changes when the file does: nanoseconds of its last change, bytes. Raises Unreadable."""
    with _explained():
        found = os.stat(path)
        _check_regular(found)
        return found.st_mtime_ns, found.st_size


def size(path: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the upright image; no pixel is decoded. Raises Unreadable."""
    return _read(path, max_pixels, lambda image, flaw: _upright_size(image, _orientation(image)))


def load(path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image, decoded whole, upright and RGB. Raises Unreadable."""
    return _read(path, max_pixels, _decoded)


def flaw(image: Image.Image) -> str:
    """What is wrong with the file of an image that `load` could read all the same; "" where nothing is."""
    return image.info.get(_FLAW, "")


def resized(path: str, height: int, width: int, resample: int, max_pixels: int = MAX_PIXELS) -> tuple[bytes, str]:
    """The RGB pixels [height, width, 3] of `load`'s image at that size, uint8, and its `flaw`. Raises Unreadable."""
    image = load(path, max_pixels)
    with _explained():
        return image.resize((width, height), Image.Resampling(resample)).tobytes(), flaw(image)


def _decoded(image: Image.Image, flaw: str) -> Image.Image:
    orientation = _orientation(image)
    height, width = _upright_size(image, orientation)
    image.load()
    rgb = _rgb(image)
    if flaw == _CUT and (lost := _lost(rgb)) > MAX_LOST:
        raise Unreadable(f"{flaw}, and with them {lost:.0%} of the picture; {FIX}")
    # Pillow turns a TIFF by itself when it loads it.
    if orientation in _TURNS and image.format != "TIFF":
        rgb = rgb.transpose(_TURNS[orientation])
    if rgb.size != (width, height):
        raise Unreadable(f"its header says {width} x {height} pixels and it has {rgb.width} x {rgb.height}; {FIX}")
    rgb.info[_FLAW] = flaw
    return rgb


def _lost(rgb: Image.Image) -> float:
    """The share of the pixels at the bottom that are the gray which a JPEG's decoder puts where there are no data."""
    import numpy as np  # here: it would be most of a worker's start

    gray = (np.asarray(rgb) == 128).all(axis=-1)
    rows = np.flatnonzero(~gray.all(axis=1))  # with something in them
    start = rows[-1] + 1 - _BLOCK if len(rows) else 0
    return gray[max(0, start) :].sum() / gray.size


# ---------------------------------------------------------------------- mending


def _with_end(data: bytes) -> bytes:
    """A JPEG's mark of its end, behind what there is of one."""
    return data + b"\xff\xd9" if data.startswith(b"\xff\xd8\xff") else data


def _without_texts(data: bytes) -> bytes:
    """A PNG without its compressed texts and its long ones."""
    found, place = [data[:8]], 8
    while place + 8 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        chunk = data[place : place + 12 + length]
        place += len(chunk)
        if not (kind == b"zTXt" or (kind in (b"tEXt", b"iTXt") and length > _LONG_TEXT)):
            found.append(chunk)
    return b"".join(found)


_CUT = "its last bytes are missing"
# What Pillow says of a file that viewers open, what is wrong with it, and the bytes that Pillow opens in its place.
_MENDS = (
    ("truncated", _CUT, _with_end),
    ("MAX_TEXT_CHUNK", "its texts are too large and were not read", _without_texts),
    ("text chunks", "its texts are too large and were not read", _without_texts),
)


def _read(path: str, max_pixels: int, use: Callable[[Image.Image, str], _Value]) -> _Value:
    """`use` of the opened image and its flaw; where Pillow refuses what viewers show, of the mended file."""
    with _explained():
        try:
            with _opened(path, max_pixels) as image:
                return use(image, "")
        except (OSError, ValueError) as error:
            mends = [] if isinstance(error, Unreadable) else [mend for mend in _MENDS if mend[0] in str(error)]
            if not mends:
                raise
        _, flaw, mend = mends[0]
        with _opened(path, max_pixels, mend) as image:
            return use(image, flaw)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Whatever Pillow raises becomes Unreadable: broken files make it raise a dozen kinds."""
    try:
        yield
    except Unreadable:
        raise
    except FileNotFoundError:
        raise Unreadable("no such image; put it there or take the row out") from None
    except UnidentifiedImageError:
        raise Unreadable(f"not an image of a known format ({', '.join(FORMATS)}); {FIX}") from None
    except Image.DecompressionBombError:
        raise Unreadable("too many pixels to be decoded; shrink the image or take the row out") from None
    except MemoryError:
        raise Unreadable("not enough memory to decode it; shrink the image or take the row out") from None
    except Exception as error:
        raise Unreadable(f"not a readable image ({_words(error)}); {FIX}") from None


def _words(error: Exception) -> str:
    """An error in one short line: some quote the file."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    said = "".join(c if c.isprintable() else " " for c in said[:1000])
    return " ".join(said.split())[:160] or type(error).__name__


@contextlib.contextmanager
def _opened(path: str, max_pixels: int, mend: Callable[[bytes], bytes] | None = None) -> Iterator[Image.Image]:
    """Header read, pixels not yet. Raises what Pillow does, and Unreadable."""
    if _HUSH not in warnings.filters:  # catch_warnings is no way: it is not safe in threads
        warnings.filters.insert(0, _HUSH)
    with open(path, "rb", opener=_open_file) as file:
        source = io.BytesIO(mend(file.read())) if mend else file
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                what = f"{image.width} x {image.height} pixels, and {max_pixels} are allowed"
                raise Unreadable(f"{what}; shrink it or take the row out")
            yield image


def _open_file(path: str, flags: int) -> int:
    """A file descriptor; never waits, as opening a pipe would."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    try:
        _check_regular(os.fstat(descriptor))
    except Unreadable:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable("not a file; give the image itself or take the row out")


def _orientation(image: Image.Image) -> int:
    """How the image was held, 1 to 8 as EXIF counts."""
    try:
        if image.format == "PNG":
            # Its own getexif decodes the pixels to get at what comes behind them.
            if "exif" not in image.info and _says_late(image):
                image.load()
            exif = Image.Image.getexif(image)
        else:
            exif = image.getexif()
        value = exif.get(ExifTags.Base.Orientation, 1)
    except (MemoryError, Image.DecompressionBombError):
        raise
    except Exception:
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _says_late(image: Image.Image) -> bool:
    """Whether a PNG has EXIF or XMP behind its pixels. Leaves the file where it was."""
    file = image.fp
    at, end = file.tell(), file.seek(0, os.SEEK_END)
    try:
        place, pixels = 8, False
        while place + 8 <= end:
            file.seek(place)
            head = file.read(40)
            if head[4:8] == b"IDAT":
                pixels = True
            elif pixels and _LATE.match(head, 4):
                return True
            place += 12 + int.from_bytes(head[:4], "big")
        return False
    finally:
        file.seek(at)


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    width, height = image.size
    # Of a TIFF Pillow has exchanged them already where its own tag says so.
    done = image.format == "TIFF" and image.tag_v2.get(ExifTags.Base.Orientation) in _ON_ITS_SIDE
    return (width, height) if orientation in _ON_ITS_SIDE and not done else (height, width)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grayscale in 8 bits.

    0 is black, and white is the end of the narrowest range that holds all values: 1 (floats alone), 255, 65535; in
    16-bit formats 4095, which are 12 bits, or 65535: dark ones stay dark. Where none does, black and white are the
    least and the greatest value. What is no number becomes as black as the least value.
    """
    import numpy as np  # here: it would be most of a worker's start

    values = np.asarray(image)
    if image.mode == "F":
        finite = np.isfinite(values)
        least, most = (float(end(values[finite])) if finite.any() else 0.0 for end in (np.min, np.max))
        values = np.where(finite, values, least)
    else:
        least, most = float(values.min()), float(values.max())
    low, high = 0.0, 65535.0
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        high = 4095.0 if most <= 4095 else high
    elif least < 0 or most > high:
        low, high = least, most
    elif most <= 255:
        high = 1.0 if image.mode == "F" and most <= 1 else 255.0
    scaled = (values.astype(np.float64) - low) * (255.0 / max(high - low, 1e-300))
    return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))
