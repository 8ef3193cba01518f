"""Rows of problems: one frozen record, its JSONL file format, and sets of files that are built on first use.

A file holds one JSON object a line with the keys of the published rows (`id`, `problem`, `answer`, `images`) and this
project's own (`capability`, `kind`, and `response` for SFT rows). Other keys are ignored, so published rows with their
`predictions`, `correctness` and `pass_rate` are read as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

IMAGE_MARK = "<image>"
SPLITS = ("train", "validation", "test")


ANSWER_TYPES = ("letter", "number", "expression", "word")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with its gold answer; see the comments for what each field may hold."""

    id: str  # unique inside its file
    problem: str  # the question without any instruction; "<image>" marks say where images go, else they go in front
    answer: str  # gold answer as text; "" only where `response` is given
    images: tuple[str, ...] = ()  # absolute paths
    capability: str = ""  # "perception" | "text" | "visual" | a user's own
    kind: str = ""  # finer kind, e.g. "shape" or "corners"
    response: str | None = None  # the target of an SFT row; of a caption set the caption
    answer_type: str = ""  # one of ANSWER_TYPES; "": not said
    source: str = ""  # the data set that it comes from
    pass_rate: float | None = None  # the share of a model's responses that were right (paper, difficulty)
    # Whose: {"model", "samples", "temperature", "max_new_tokens", ...}.
    pass_rate_by: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    predictions: tuple[str, ...] = ()  # the answers found in those responses
    correctness: tuple[float, ...] = ()  # the accuracy of each
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # free; JSON values


class Drop(NamedTuple):
    """A row that can't be used. Never silently: whoever leaves a row out yields or counts one of these."""

    where: str  # "file:line", "file, row 3", the path of an image
    reason: str  # a few words that are counted, such as "no answer" or "broken image"
    detail: str  # what is wrong with this one; what to do about it


class _BadRow(ValueError):
    """What is wrong with one row and what to do about it, as "what; remedy"."""


def read_problems(path: str | os.PathLike, capability: str = "") -> tuple[list[Problem], list[str]]:
    """Reads a JSONL file of problems.

    Args:
      path: UTF-8 JSONL; a byte order mark, CRLF and blank lines are fine. Relative image paths start at its folder.
      capability: given to rows that name none.

    Returns:
      The good rows in file order, and one line "file:line: what; remedy" for each row that was skipped.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no file, or none of its rows is good.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such problem file; check the path in the config, or build the set first")
    if not path.is_file():
        raise ValueError(f"{path}: not a file; give the JSONL file itself")
    folder = os.path.abspath(path.parent)
    problems: list[Problem] = []
    skipped: list[str] = []
    lines_by_id: dict[str, int] = {}
    # Bytes, split at \n only: a str would also break at U+2028, and one bad byte would cost the whole file.
    for line_number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            problem = _parse(line, folder, f"{path.stem}-{line_number}", capability)
            if problem.id in lines_by_id:
                first = lines_by_id[problem.id]
                raise _BadRow(f"id {_short(problem.id)} is that of line {first}; give each row its own")
        except _BadRow as error:
            skipped.append(f"{path}:{line_number}: {error}")
            continue
        lines_by_id[problem.id] = line_number
        problems.append(problem)
    if not problems:
        first = f" The first trouble: {skipped[0]}" if skipped else ""
        raise ValueError(f"{path}: no usable row among {len(skipped)}; give one JSON object a line.{first}")
    return problems, skipped


def write_problems(path: str | os.PathLike, problems: Iterable[Problem]) -> None:
    """Writes a JSONL file that `read_problems` reads back equal; it appears whole or not at all.

    Images below the file's folder are stored relative to it, so that the folder can be moved; others stay absolute.

    Raises:
      ValueError: two rows share an id.
    """
    path = Path(path)
    folder = os.path.abspath(path.parent)
    seen: set[str] = set()
    lines = []
    for problem in problems:
        if problem.id in seen:
            raise ValueError(f"{path}: two rows have the id {_short(problem.id)}; give each row its own")
        seen.add(problem.id)
        row = {"id": problem.id, "problem": problem.problem, "answer": problem.answer}
        row["images"] = [_stored_path(image, folder) for image in problem.images]
        row |= {"capability": problem.capability, "kind": problem.kind}
        if problem.response is not None:
            row["response"] = problem.response
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a temporary file beside `path` (made with its folders) and renames it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def build_set(
    directory: str | os.PathLike,
    name: str,
    version: str,
    make: Callable[[], dict[str, list[Problem]]],
    splits: Sequence[str] = SPLITS,
) -> dict[str, Path]:
    """Gives the files `directory/<name>-<split>.jsonl`, making them where they are not there yet.

    A manifest `<name>.json` with the version and the files' digests is written last. Files without it, of another
    version, or changed since are made again. `make` must be deterministic: two processes that build at the same time
    then put equal files in place.

    Args:
      make: gives the rows of each split; called only to build.
    """
    directory = Path(directory)
    files = {split: directory / f"{name}-{split}.jsonl" for split in splits}
    manifest_file = directory / f"{name}.json"
    if not (manifest_file.is_file() and manifest_file.read_bytes() == _manifest(version, files)):
        rows = make()
        manifest_file.unlink(missing_ok=True)
        for split, file in files.items():
            write_problems(file, rows[split])
        write_atomically(manifest_file, _manifest(version, files))
    return files


def stable_hash(*parts: object) -> int:
    """A 64-bit integer that depends on the parts' texts only: the same in every process, Python and machine."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def even_shares(total: int, kinds: Sequence[str]) -> dict[str, int]:
    """How many of `total` rows each kind gets; the first kinds get one more where it does not divide."""
    return {kind: total // len(kinds) + (i < total % len(kinds)) for i, kind in enumerate(kinds)}


def boxed_response(reasoning: str, answer: str) -> str:
    """The response that the format reward wants: reasoning inside <think></think>, then the boxed answer."""
    return f"<think>{reasoning}</think> \\boxed{{{answer}}}"


def _manifest(version: str, files: dict[str, Path]) -> bytes:
    digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else "" for f in files.values()}
    return (json.dumps({"version": version, "sha256": digests}, indent=1) + "\n").encode()


def _parse(line: bytes, folder: str, default_id: str, capability: str) -> Problem:
    """One line as a Problem; raises _BadRow."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise _BadRow("not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _BadRow(f"not JSON ({_short(str(error), 80)}); write one JSON object a line") from None
    if not isinstance(row, dict):
        raise _BadRow(f"a JSON {type(row).__name__}, not an object; write one JSON object a line")

    problem = _text(row, "problem")
    if not problem.strip():
        raise _BadRow("`problem` is missing or empty; give the question")
    response = _text(row, "response") if row.get("response") is not None else None
    if response is not None and not response.strip():
        raise _BadRow("`response` is empty; give the target text or leave the key out")
    answer = _text(row, "answer", numbers=True).strip()
    if not answer and response is None:
        raise _BadRow("`answer` is missing or empty; give the gold answer (or a `response`, for SFT)")
    images = _images(row.get("images"), folder)
    marks = problem.count(IMAGE_MARK)
    if marks not in (0, len(images)):
        raise _BadRow(f"{marks} {IMAGE_MARK} marks for {len(images)} images; give one mark an image, or no mark")
    return Problem(
        id=_text(row, "id", numbers=True) or default_id,
        problem=problem,
        answer=answer,
        images=images,
        capability=_text(row, "capability") or capability,
        kind=_text(row, "kind"),
        response=response,
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _text(row: dict, key: str, numbers: bool = False) -> str:
    """`row[key]` as text, "" where it is missing or null; numbers become text only where asked."""
    value = row.get(key)
    if value is None:
        return ""
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _BadRow(f"`{key}` is a JSON {type(value).__name__}; give text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadRow(f"`{key}` holds half of a surrogate pair, which no tokenizer takes; repair the text")
    return value


def _images(value: object, folder: str) -> tuple[str, ...]:
    images = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise _BadRow("`images` is no list of paths; give a list of texts")
    for image in images:
        if not image.strip() or "\0" in image:
            raise _BadRow("`images` holds an empty or impossible path; give the path of the file")
        if image.startswith("data:") or "://" in image:
            raise _BadRow(f"`images` holds {_short(image)}, no path; save the image as a file and give its path")
    return tuple(os.path.normpath(os.path.join(folder, image)) for image in images)


def _stored_path(image: str, folder: str) -> str:
    image = os.path.abspath(image)
    return os.path.relpath(image, folder) if image.startswith(os.path.join(folder, "")) else image


def _short(text: str, length: int = 40) -> str:
    """A value for a message, cut so that no prompt or base64 image lands in a log."""
    return repr(text if len(text) <= length else text[: length - 1] + "…")
