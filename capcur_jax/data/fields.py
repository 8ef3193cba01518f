"""One row of a problem file -> Problem: every field checked, and named where it is wrong."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from capcur_jax.answers import quantities, spelling
from capcur_jax.answers.kinds import ANSWER_TYPES, answer_type_of, hint_of
from capcur_jax.answers.spelling import ANSWER_LENGTH
from capcur_jax.data import golds, row_files
from capcur_jax.data.backslashes import restored
from capcur_jax.data.problem import IMAGE_MARK, BadRow, Problem, refuse_half_pair, short
from capcur_jax.data.row_images import IMAGES_VARIABLE, RowImages, image_bytes, is_count, is_image_key

KEYS = (
    "id", "problem", "answer", "answers", "images", "capability", "kind", "response", "answer_type", "source",
    "pass_rate", "pass_rate_by", "predictions", "correctness", "metadata",
)  # fmt: skip
_NUMBERED_MARK = re.compile(r"<image ?(\d{1,2})>")
_LONG = 256  # characters of metadata from which on a picture in base64 is looked for
_DEPTH = 32  # of metadata


class RowReader:
    """Rows of one file -> Problems."""

    def __init__(self, path: Path, capability: str, images: str | os.PathLike | None):
        self._capability = capability
        beside = path.with_name(row_files.stem(path) + "-images")
        self._images = RowImages(path, images or os.environ.get(IMAGES_VARIABLE) or beside)

    def problem(self, row: Any, default_id: str) -> Problem:
        """Raises BadRow."""
        if not isinstance(row, dict):
            detail = f"a JSON {type(row).__name__}, not an object; write one JSON object a line"
            raise BadRow("not an object", detail)
        row, left_out = _readable(row)
        problem, response = _text(row, "problem"), None
        if not problem.strip():
            raise BadRow("no problem", "`problem` is missing or empty; give the question")
        if row.get("response") is not None:
            response = _text(row, "response")
            if not response.strip():
                raise BadRow("bad response", "`response` is empty; give the target text or leave the key out")
        done = _Repairs()
        done.what += left_out
        problem = done.text(problem, "problem")
        response = done.text(response, "response") if response is not None else None
        accepted, changed = golds.accepted(_given_golds(row), problem, _text(row, "answer_type"))
        done.what += changed
        if not accepted and response is None:
            detail = "`answer` is missing or empty; give the gold answer (or a `response`, for SFT)"
            raise BadRow("no answer", detail)
        if any(row.get(key) for key in ("video", "videos")):
            raise BadRow("video", "the row has a video, and images alone are read; take the row out")
        images = self._images.of(row)
        self._images.refuse_strays(row, KEYS, images)
        problem, images = _marked(problem, images, done)
        correctness = _numbers(row.get("correctness"))
        answer = accepted[0] if accepted else ""
        return Problem(
            id=_text(row, "id", numbers=True) or default_id,
            problem=problem,
            answer=answer,
            images=images,
            capability=_text(row, "capability") or self._capability,
            kind=_text(row, "kind"),
            response=response,
            answer_type=_answer_type(row, answer, problem),
            source=_text(row, "source"),
            pass_rate=_pass_rate(row.get("pass_rate"), correctness),
            pass_rate_by=_object(row.get("pass_rate_by"), "pass_rate_by"),
            predictions=_predictions(row.get("predictions")),
            correctness=correctness,
            metadata=_metadata(row),
            answers=accepted if len(accepted) > 1 else (),
            repaired=tuple(dict.fromkeys(done.what)),
        )


def _readable(row: dict) -> tuple[dict, list[str]]:
    """The row without the values that can't be read, and what is counted. Raises BadRow where a key is needed."""
    bad = {key: value for key, value in row.items() if isinstance(value, BadRow)}
    for key, error in bad.items():
        if (key in KEYS and key != "metadata") or is_image_key(key):
            raise error
    left_out = [f"{short(key)} can't be read and is left out" for key in bad]
    return {key: value for key, value in row.items() if key not in bad} if bad else row, left_out


class _Repairs:
    """What was changed of a row, in the words that are counted."""

    def __init__(self):
        self.what: list[str] = []

    def text(self, text: str, key: str) -> str:
        """The text with lost backslashes put back. Raises BadRow."""
        found = restored(text, key)
        self.what += ["lost backslash put back"] * (found != text)
        if found.count(";base64,") and re.search(r"data:image/[\w.+-]+;base64,", found):
            raise BadRow("image in the text", f"`{key}` holds a picture as a data URI; move it to `images`")
        return found


def _given_golds(row: dict) -> list[tuple[str, Any]]:
    """(key, value) of each gold that a row gives."""
    first, several = row.get("answer"), row.get("answers")
    if several is not None and not isinstance(several, list):
        raise BadRow("bad answers", f"`answers` is a JSON {type(several).__name__}; give a list of texts")
    if isinstance(first, list):
        if several:
            raise BadRow("bad answer", "`answer` is a list beside `answers`; give one of them")
        if len(first) > 1 and all(isinstance(one, str) and re.fullmatch("[A-Z]", one.strip()) for one in first):
            detail = '`answer` is a list of letters: all of them, or any? Write "A, C" for all, or `answers` for any'
            raise BadRow("list of letters", detail)
        first, several, key = None, first, "answer"
    else:
        key = "answers"
    found = [("answer", first)] if first is not None else []
    return found + [(key, one) for one in several or [] if one is not None]


def _marked(problem: str, images: tuple[str, ...], done: _Repairs) -> tuple[str, tuple[str, ...]]:
    """The question with a plain mark for each image, or with none. Raises BadRow.

    Numbered marks (<image1>, <image 2>) count where there are no plain ones and each image has exactly one; the images
    then come in the marks' order. Else they are text.
    """
    marks = problem.count(IMAGE_MARK)
    numbers = [int(number) for number in _NUMBERED_MARK.findall(problem)] if not marks and images else []
    if not marks and images and sorted(numbers) == list(range(1, len(images) + 1)):
        done.what.append("numbered image marks read")
        return _NUMBERED_MARK.sub(IMAGE_MARK, problem), tuple(images[number - 1] for number in numbers)
    if marks not in (0, len(images)):
        detail = f"{marks} {IMAGE_MARK} marks for {len(images)} images; give one mark an image, or no mark"
        raise BadRow("marks and images differ", detail)
    return problem, images


def _text(row: dict, key: str, numbers: bool = False) -> str:
    """`row[key]` as text, "" where it is missing or null; numbers become text only where asked."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str | bytes) and not numbers:
        raise BadRow(f"bad {key}", f"`{key}` is a JSON {type(value).__name__}; give text")
    value, _ = golds.as_text(value, key)
    refuse_half_pair(value, key)
    return value


def _answer_type(row: dict, answer: str, problem: str) -> str:
    """Raises BadRow for a type that the answer can't be of."""
    given, found = _text(row, "answer_type"), answer_type_of(answer, hint_of(problem))
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
        "quantity": quantities.quantity(text) is not None,
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
            value = json.loads(value, parse_constant=row_files.refuse_constant)
    if not isinstance(value, dict):
        raise BadRow(f"bad {key}", f"`{key}` is no JSON object; correct it or leave it out")
    return _plain(value)


def _metadata(row: dict) -> dict:
    other = {key: row[key] for key in row if key not in KEYS and (not is_image_key(key) or is_count(row[key]))}
    return _object(row.get("metadata"), "metadata") | _plain(other)


def _plain(value: Any, depth: int = 0) -> Any:
    """A value in JSON's types, fit to be written: of bytes only their number."""
    if depth > _DEPTH:
        raise BadRow("bad metadata", f"metadata is nested more than {_DEPTH} deep; flatten it")
    if isinstance(value, dict):
        return {_whole(str(key)): _plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):  # pairs of a Parquet map
        return [_plain(inner, depth + 1) for inner in value]
    if isinstance(value, bytes) or (isinstance(value, str) and len(value) > _LONG and _is_picture(value)):
        return f"{len(value)} bytes"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, int | float | bool) else _whole(str(value))


def _is_picture(text: str) -> bool:
    try:
        return image_bytes(text) is not None
    except BadRow:
        return False


def _whole(text: str) -> str:
    """Text that can be written: halves of surrogate pairs become question marks."""
    return text.encode("utf-8", "replace").decode()
