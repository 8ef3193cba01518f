"""The images that a row gives, under whatever key and in whatever form; docs/data.md has the tables.

A row whose image lies where nobody looks would be used without it, and its question be guessed. So the usual spellings
of the key are read, and a picture under any other key costs the row: bytes, or the path of a file that is there. A name
of a file that is not there says where the row came from, and stays metadata.
"""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from capcur_jax.data.problem import BadRow, refuse_half_pair, short
from capcur_jax.errors import InputError
from capcur_jax.files import write_atomically

IMAGES_VARIABLE = "CAPCUR_IMAGES"
_MAGIC = (
    (re.compile(rb"\x89PNG"), ".png"),
    (re.compile(rb"\xff\xd8"), ".jpg"),
    (re.compile(rb"GIF8"), ".gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), ".webp"),
    (re.compile(rb"II\*\0|MM\0\*"), ".tif"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), ".avif"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), ".jp2"),
    (re.compile(rb"BM"), ".bmp"),
)
# Without case and punctuation: image, Images, img, image_path, image-url, picture, image_1, ...
_KEY = re.compile(r"(?:image|img|picture|photo|pic)s?(?:path|file|byte|url|base64|b64)?s?(\d{0,2})")
_PROSE = re.compile(r"\s[^/\\]*\Z")  # blanks in the last part: "see a.png"
_PATH_LIKE = re.compile(r"[^\n\r\t<>|*\"]{1,300}\.(?:png|jpe?g|gif|webp|bmp|tiff?|avif|jp2)", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{32,}=*\s*")
_LONGEST_PATH = 4096
_MENTIONED = 16  # entries of a list that are looked at


class _Remote(BadRow):
    """An address rather than an image."""


def unpack_image(data: bytes, folder: str | os.PathLike) -> str:
    """Writes an image's bytes into a folder, named by their content, unless it is there. Returns the path."""
    path = Path(folder) / f"{hashlib.sha256(data).hexdigest()[:40]}{_suffix(data) or '.image'}"
    try:
        if not (path.is_file() and path.stat().st_size == len(data)):
            write_atomically(path, data, sync=False)  # one that was cut short is written again
    except OSError as error:
        raise InputError(
            f"{path.parent}: images can't be unpacked there ({error.strerror}); make it writable, or for a data "
            f"command set {IMAGES_VARIABLE} to another folder"
        ) from None
    return str(path)


def is_image_key(key: str) -> bool:
    """Whether images are read under this key of a row, unless a number stands there (`is_count`)."""
    return _spelled(key) is not None


def is_count(value: Any) -> bool:
    """Whether it is a number, which under an image's key is an id or a count and no image."""
    return isinstance(value, int | float) and value == value  # NaN: nothing, as tables have it


def image_bytes(text: str) -> bytes | None:
    """The image in a data URI or in bare base64, None where the text is neither. Raises BadRow: a broken one."""
    if text[:5].casefold() == "data:":
        head, comma, body = text.partition(",")
        if not comma or not head[5:].casefold().startswith("image"):
            raise BadRow("bad images", f"{short(text)} is no data URI of an image; give the image's path")
        found = _decoded(body) if head.casefold().endswith(";base64") else unquote_to_bytes(body)
        if not _suffix(found):
            raise BadRow("bad images", f"{short(text)} holds no image of a known kind; give the path of a PNG or JPEG")
        return found
    if not _BASE64.fullmatch(text[:4096]):
        return None
    start = _decoded(text[:64])
    return _decoded(text) if start and _suffix(start) else None


class RowImages:
    """The images of one file's rows.

    Args:
      path: the file; paths in it are from its folder.
      unpacked: folder for images whose bytes lie in the rows.
    """

    def __init__(self, path: Path, unpacked: str | os.PathLike):
        self._folder, self._unpacked = os.path.abspath(path.parent), os.path.abspath(unpacked)

    def of(self, row: dict) -> tuple[str, ...]:
        """The absolute paths of a row's images. Raises BadRow."""
        found: dict[str, tuple[str, ...]] = {}
        trouble = None
        for keys, values in _given(row):
            try:
                found[keys] = tuple(self._path(value, keys) for value in values)
            except _Remote as error:  # where the picture came from, if another key has the picture
                trouble = trouble or error
        if trouble and not found:
            raise trouble
        if len(found) > 1:  # a path to nothing, beside a key that has the picture, says where it came from
            found = {key: paths for key, paths in found.items() if all(map(os.path.isfile, paths))} or found
        (first, images), *others = found.items() or [("", ())]
        for key, paths in others:
            if not _same(images, paths):
                raise BadRow("images differ", f"`{first}` and `{key}` give different images; keep one of the keys")
        return images

    def refuse_strays(self, row: dict, known: tuple[str, ...], images: tuple[str, ...]) -> None:
        """Raises BadRow where a key that is not read holds an image.

        A path counts where the row has no image, or where its file is there and is none of the row's images.
        """
        for key, value in row.items():
            if key in known or is_image_key(key):
                continue
            for part in value[:_MENTIONED] if isinstance(value, list) else [value]:
                if self._is_stray(part, images):
                    shown = short(part) if isinstance(part, str) else "bytes"
                    detail = (
                        f"{short(key)} holds an image ({shown}) and is not read; rename the key to `images`, or move "
                        "it into `metadata` where the question is not about it"
                    )
                    raise BadRow("image under another key", detail)

    def _is_stray(self, value: Any, images: tuple[str, ...]) -> bool:
        data, value = None, _addressed(value)
        if isinstance(value, dict) and value and set(value) <= {"bytes", "path"}:
            value, data = value.get("path"), value.get("bytes")
        elif isinstance(value, bytes):
            value, data = None, value
        elif isinstance(value, str):
            with contextlib.suppress(BadRow):
                data = image_bytes(value)
        if isinstance(data, str):  # base64, as JSON has bytes
            with contextlib.suppress(BadRow):
                data = image_bytes(data)
        if isinstance(data, bytes) and _suffix(data) not in (None, ".bmp"):
            digest = hashlib.sha256(data).digest()
            return not any(_digest(image) == digest for image in images)
        if not isinstance(value, str) or "://" in value or not _PATH_LIKE.fullmatch(value.strip()):
            return False
        path = self._located(value.strip())
        if not images and not _PROSE.search(value.strip()):
            return True  # a row of a set with images goes blind here, whether or not the file lies where the path says
        return os.path.isfile(path) and not any(_same((path,), (image,)) for image in images)

    def _path(self, image: Any, key: str) -> str:
        data, image = None, _addressed(image)
        if isinstance(image, dict) and set(image) <= {"bytes", "path"}:
            image, data = image.get("path"), image.get("bytes")
        elif isinstance(image, bytes):
            image, data = None, image
        if isinstance(image, str) and data is None:
            data = image_bytes(image)
        elif isinstance(data, str):  # base64, as JSON has bytes
            data = image_bytes(data) or data
        if isinstance(data, bytes):
            return unpack_image(data, self._unpacked)
        if not isinstance(image, str) or data is not None:
            detail = f"`{key}` is no list of paths; give a list of texts (in Parquet, or of {{bytes, path}})"
            raise BadRow("bad images", detail)
        if not image.strip() or "\0" in image or len(image) > _LONGEST_PATH:
            raise BadRow("bad images", f"`{key}` holds an empty or impossible path; give the path of the file")
        refuse_half_pair(image, key)
        if "://" in image:
            raise _Remote(
                "bad images", f"`{key}` holds {short(image)}, no path; save the image as a file, give its path"
            )
        return self._located(image)

    def _located(self, image: str) -> str:
        """The absolute path. Where nothing is there, also of backslashes as slashes and of the other spelling of
        accents, as other systems write them."""
        path = os.path.normpath(os.path.join(self._folder, image))
        if (image.isascii() and "\\" not in image) or os.path.exists(path):
            return path
        for spelled in (image, image.replace("\\", "/")):
            place = os.path.abspath(os.sep) if os.path.isabs(spelled) else self._folder
            for part in filter(None, spelled.split("/")):
                ways = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
                place = next((p for p in (os.path.join(place, way) for way in ways) if os.path.exists(p)), "")
                if not place:
                    break
            if place:
                return os.path.normpath(place)
        return path


@functools.lru_cache(1024)
def _spelled(key: str) -> re.Match | None:
    return _KEY.fullmatch(re.sub(r"[\W_]+", "", key.casefold()))


def _given(row: dict) -> Iterator[tuple[str, list]]:
    """Keys that images are read under, and the values there; numbered ones (`image_1`, `image_2`) together."""
    numbered: dict[int, tuple[str, list]] = {}
    for key, value in row.items():
        match = _spelled(key)
        values = _listed(value) if match else []
        if values and match[1]:
            other, before = numbered.setdefault(int(match[1]), (key, values))
            if before != values:
                raise BadRow("images differ", f"`{other}` and `{key}` give different images; keep one of the keys")
        elif values:
            yield key, values
    if numbered:
        ordered = [numbered[number] for number in sorted(numbered)]
        yield ", ".join(key for key, _ in ordered), [value for _, values in ordered for value in values]


def _listed(value: Any) -> list:
    """A key's value as a list; [] of what gives no image."""
    if isinstance(value, str) and value.strip()[:1] == "[":  # a list as text, as tables have it
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(value.strip()[:100_000])
    if value in (None, "", [], {}, b"") or isinstance(value, int | float):
        return []
    if isinstance(value, dict) and set(value) <= {"bytes", "path"} and not any(value.values()):
        return []
    return value if isinstance(value, list) else [value]


def _addressed(image: Any) -> Any:
    """The path or data URI of {"url": ...}, as OpenAI's messages have images; anything else as it is."""
    if isinstance(image, dict) and set(image) <= {"type", "image_url"} and isinstance(image.get("image_url"), dict):
        image = image["image_url"]
    return image["url"] if isinstance(image, dict) and "url" in image and set(image) <= {"url", "detail"} else image


def _same(images: tuple[str, ...], others: tuple[str, ...]) -> bool:
    if images == others:
        return True
    return len(images) == len(others) and all(
        one == other or (_digest(one) and _digest(one) == _digest(other))
        for one, other in zip(images, others, strict=True)
    )


def _digest(path: str) -> bytes:
    if not os.path.isfile(path):  # a pipe would be waited for
        return b""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _suffix(data: bytes) -> str | None:
    return next((suffix for magic, suffix in _MAGIC if magic.match(data)), None)


def _decoded(text: str) -> bytes:
    """Base64, also without its last signs and in its spelling for addresses; b"" of anything else."""
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    text = text[: len(text) - (len(text) % 4 == 1)]
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return b""
