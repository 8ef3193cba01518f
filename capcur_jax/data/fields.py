"""One row of a problem file -> Problem: every field checked, and named where it is wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from capcur_jax.answers import spelling, units
from capcur_jax.answers.kinds import ANSWER_TYPES, answer_type_of
from capcur_jax.answers.spelling import ANSWER_LENGTH
from capcur_jax.data.problem import IMAGE_MARK, Problem, short
from capcur_jax.errors import InputError
from capcur_jax.files import write_atomically

IMAGES_VARIABLE = "CAPCUR_IMAGES"
KEYS = (
    "id", "problem", "answer", "images", "capability", "kind", "response", "answer_type", "source", "pass_rate",
    "pass_rate_by", "predictions", "correctness", "metadata",
)  # fmt: skip
_MAGIC = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"RIFF", ".webp"), (b"BM", ".bmp"))
_DEPTH = 32  # of metadata


class BadRow(ValueError):
    """What is wrong with one row: the reason it is counted under, and "what; remedy"."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)


def unpack_image(data: bytes, folder: str | os.PathLike) -> str:
    """Writes an image's bytes into a folder, named by their content, unless it is there. Returns the path."""
    suffix = next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), ".image")
    path = Path(folder) / f"{hashlib.sha256(data).hexdigest()[:40]}{suffix}"
    try:
        if not (path.is_file() and path.stat().st_size == len(data)):
            write_atomically(path, data, sync=False)  # one that was cut short is written again
    except OSError as error:
        raise InputError(
            f"{path.parent}: images can't be unpacked there ({error.strerror}); make it writable, or for a data "
            f"command set {IMAGES_VARIABLE} to another folder"
        ) from None
    return str(path)


def decoded(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise BadRow("not UTF-8", "not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        detail = f"not JSON ({short(str(error), 80)}); write one JSON object a line"
        raise BadRow("not JSON", detail) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class RowReader:
    """Rows of one file -> Problems."""

    def __init__(self, path: Path, capability: str, images: str | os.PathLike | None):
        self._folder, self._capability = os.path.abspath(path.parent), capability
        beside = path.with_name(path.stem + "-images")
        self._images = os.path.abspath(images or os.environ.get(IMAGES_VARIABLE) or beside)

    def problem(self, row: Any, default_id: str) -> Problem:
        """Raises BadRow."""
        if not isinstance(row, dict):
            detail = f"a JSON {type(row).__name__}, not an object; write one JSON object a line"
            raise BadRow("not an object", detail)
        problem = _text(row, "problem")
        if not problem.strip():
            raise BadRow("no problem", "`problem` is missing or empty; give the question")
        response = _text(row, "response") if row.get("response") is not None else None
        if response is not None and not response.strip():
            raise BadRow("bad response", "`response` is empty; give the target text or leave the key out")
        answer = _text(row, "answer", numbers=True).strip()
        if not answer and response is None:
            detail = "`answer` is missing or empty; give the gold answer (or a `response`, for SFT)"
            raise BadRow("no answer", detail)
        images = self._paths(row.get("images"))
        marks = problem.count(IMAGE_MARK)
        if marks not in (0, len(images)):
            detail = f"{marks} {IMAGE_MARK} marks for {len(images)} images; give one mark an image, or no mark"
            raise BadRow("marks and images differ", detail)
        correctness = _numbers(row.get("correctness"))
        return Problem(
            id=_text(row, "id", numbers=True) or default_id,
            problem=problem,
            answer=answer,
            images=images,
            capability=_text(row, "capability") or self._capability,
            kind=_text(row, "kind"),
            response=response,
            answer_type=_answer_type(row, answer),
            source=_text(row, "source"),
            pass_rate=_pass_rate(row.get("pass_rate"), correctness),
            pass_rate_by=_object(row.get("pass_rate_by"), "pass_rate_by"),
            predictions=_predictions(row.get("predictions")),
            correctness=correctness,
            metadata=_metadata(row),
        )

    def _paths(self, value: Any) -> tuple[str, ...]:
        images = [] if value is None else value if isinstance(value, list) else [value]
        return tuple(self._path(image) for image in images)

    def _path(self, image: Any) -> str:
        data = None
        if isinstance(image, dict) and set(image) <= {"bytes", "path"}:
            image, data = image.get("path"), image.get("bytes")
        elif isinstance(image, bytes):
            image, data = None, image
        if isinstance(data, bytes):
            return unpack_image(data, self._images)
        if not isinstance(image, str) or data is not None:
            detail = "`images` is no list of paths; give a list of texts (in Parquet, or of {bytes, path})"
            raise BadRow("bad images", detail)
        if not image.strip() or "\0" in image or _has_half_pair(image):
            raise BadRow("bad images", "`images` holds an empty or impossible path; give the path of the file")
        if image.startswith("data:") or "://" in image:
            detail = f"`images` holds {short(image)}, no path; save the image as a file and give its path"
            raise BadRow("bad images", detail)
        return os.path.normpath(os.path.join(self._folder, image))


def _has_half_pair(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _text(row: dict, key: str, numbers: bool = False) -> str:
    """`row[key]` as text, "" where it is missing or null; numbers become text only where asked."""
    value = row.get(key)
    if value is None:
        return ""
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) < 1e300:  # NaN too
            raise BadRow(f"bad {key}", f"`{key}` is no finite number; give text")
        value = str(value)
    if not isinstance(value, str):
        raise BadRow(f"bad {key}", f"`{key}` is a JSON {type(value).__name__}; give text")
    if _has_half_pair(value):
        detail = f"`{key}` holds half of a surrogate pair, which no tokenizer takes; repair the text"
        raise BadRow(f"bad {key}", detail)
    return value


def _answer_type(row: dict, answer: str) -> str:
    """Raises BadRow for a type that the answer can't be of."""
    given, found = _text(row, "answer_type"), answer_type_of(answer)
    if not given or given == found:
        return found
    if given not in ANSWER_TYPES:
        detail = f"`answer_type` is {short(given)}; choose one of {', '.join(ANSWER_TYPES)}"
        raise BadRow("bad answer_type", detail)
    text = spelling.normalize(answer[:ANSWER_LENGTH])
    possible = {
        "letter": found in ("letter", "word"),  # a word: the text of an option
        "letters": found in ("letters", "letter", "word"),
        "number": found in ("number", "quantity"),
        "quantity": units.quantity(text) is not None,
        "word": any(character.isalpha() for character in text),
    }.get(given, True)
    if not possible:
        detail = f"`answer_type` is {given}, but `answer` is {short(answer)}; correct one of them or leave the type out"
        raise BadRow("bad answer_type", detail)
    return given


def _pass_rate(value: Any, correctness: tuple[float, ...]) -> float | None:
    if value is None:
        return sum(correctness) / len(correctness) if correctness else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BadRow("bad pass_rate", "`pass_rate` is no number from 0 to 1; correct it or leave it out")
    return float(value)


def _numbers(value: Any) -> tuple[float, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in value):
        detail = "`correctness` is no list of numbers from 0 to 1; correct it or leave it out"
        raise BadRow("bad correctness", detail)
    return tuple(map(float, value))


def _predictions(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(v is None or isinstance(v, str | int | float) for v in value):
        raise BadRow("bad predictions", "`predictions` is no list of texts; correct it or leave it out")
    return tuple("" if v is None else _whole(str(v)) for v in value)


def _object(value: Any, key: str) -> dict:
    """A JSON object, or one as text, as Parquet files have it."""
    if value is None:
        return {}
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value, parse_constant=_refuse_constant)
    if not isinstance(value, dict):
        raise BadRow(f"bad {key}", f"`{key}` is no JSON object; correct it or leave it out")
    return _plain(value)


def _metadata(row: dict) -> dict:
    return _object(row.get("metadata"), "metadata") | _plain({key: row[key] for key in row if key not in KEYS})


def _plain(value: Any, depth: int = 0) -> Any:
    """A value in JSON's types, fit to be written: of bytes only their number."""
    if depth > _DEPTH:
        raise BadRow("bad metadata", f"metadata is nested more than {_DEPTH} deep; flatten it")
    if isinstance(value, dict):
        return {_whole(str(key)): _plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, depth + 1) for inner in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, int | float | bool) else _whole(str(value))


def _whole(text: str) -> str:
    """Text that can be written: halves of surrogate pairs become question marks."""
    return text.encode("utf-8", "replace").decode()
