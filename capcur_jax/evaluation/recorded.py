"""Recorded predictions: VLMEvalKit's table (TSV, XLSX), its JSON, or JSON lines with `index` and `prediction`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capcur_jax.data.problem import BadRow, short
from capcur_jax.data.sources import published
from capcur_jax.errors import InputError
from capcur_jax.evaluation import contents
from capcur_jax.evaluation.benchmarks.base import Reply, Row
from capcur_jax.evaluation.tables import index_text

FAILED = "Failed to obtain answer via API"  # what the kit writes where a request failed
XLSX_CELL = 32767  # characters that a cell of a workbook holds; the rest is lost when it is written
_OTHERS = "that stand beside another answer than the row's"
_FEW = 10  # predictions, all of which may differ
_MANY = 0.2  # of the predictions: more than any new version of a set has changed
_REPLACED = {code: "�" for code in range(0xD800, 0xE000)}  # half pairs, which are no text


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One recorded reply. keys: what may tell its row beside the index, as text: WeMath's ID and key, of a table
    the right answer."""

    index: str
    reply: Reply
    keys: dict[str, str] = dataclasses.field(default_factory=dict)


def read(path: Path) -> list[Prediction]:
    """The predictions of a file. Raises InputError: it has none, or a row without index or with one twice."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give --predictions=FILE, the kit's TSV or XLSX, or JSON lines")
    found, seen = [], set()
    workbook = contents.kind_of(path) == "xlsx"
    for label, value in contents.records(path):
        try:
            prediction = _prediction(value, workbook)
            if prediction.index in seen:
                raise BadRow("index twice", f"index {short(prediction.index)} is there twice; keep one of them")
        except BadRow as error:
            raise InputError(f"{label}: {error.args[1]}") from None
        seen.add(prediction.index)
        found.append(prediction)
    if not found:
        raise InputError(f"{path}: no prediction in it; give the kit's TSV or XLSX, or JSON lines")
    return found


def _prediction(value: Any, workbook: bool) -> Prediction:
    if isinstance(value, BadRow):
        raise value
    columns = value.columns if isinstance(value, contents.Cells) else value
    if "prediction" not in columns:
        raise BadRow("no prediction", "`prediction` is missing; rows have `index` and `prediction`")
    index = index_text(value.get("index"))
    if not index:
        raise BadRow("no index", "`index` is missing or empty; rows have `index` and `prediction`")
    text, extracted = _text(value, "prediction"), None
    if (given := value.get("extracted")) is not None:
        extracted = _text(value, "extracted") if isinstance(given, str | float) else str(given)  # a list is [1, 2]
    finish = "length" if workbook and len(text) >= XLSX_CELL else ""
    failed = ""
    if extracted is not None:
        pass  # there was a reply, whatever became of its text
    elif value.get("prediction") is None and not isinstance(value, contents.Cells):
        failed = "no reply"
    elif FAILED in text:
        failed = "the request failed"
    names = ("ID", "key", "answer") if isinstance(value, contents.Cells) else ("ID", "key")
    keys = {key: _text(value, key) for key in names if isinstance(value.get(key), str)}
    return Prediction(index, Reply(text, finish, extracted=extracted, failed=failed), keys)


def _text(value: dict, key: str) -> str:
    found = value.get(key)
    return found.translate(_REPLACED) if isinstance(found, str) else published.as_text(found, key)


def join(
    rows: Sequence[Row], predictions: Sequence[Prediction], path: Path
) -> tuple[list[Row], list[Reply], list[str]]:
    """(the rows that have a prediction, their replies, what is to be said of the others).

    A prediction belongs to the row of its index. Where indices are no row's, they are the rows' numbers from 0.
    WeMath's rows are told by `ID` and `key` where predictions have both.

    Raises:
      InputError: none is of a row, or many stand beside another right answer than their row's.
    """
    by_index = {row.index: at for at, row in enumerate(rows)}
    by_number = {str(at): at for at in range(len(rows))}
    by_role = {(row.facts["ID"], row.facts["key"]): at for at, row in enumerate(rows) if "key" in row.facts}
    indices = [prediction.index for prediction in predictions]
    names, how = by_index, ""
    if any(index not in by_index for index in indices) and all(index in by_number for index in indices):
        names, how = by_number, "indices are the rows' numbers from 0"
    replies: dict[int, Reply] = {}
    count: Counter[str] = Counter()
    for prediction in predictions:
        at = names.get(prediction.index)
        role = prediction.keys.get("ID", ""), prediction.keys.get("key", "")
        if all(role) and by_role:
            count["told by ID and key, not by index"] += at != by_role.get(role)
            at = by_role.get(role)
        if at is None:
            count["of no row of the data, not scored"] += 1
        elif at in replies:
            raise InputError(f"{path}: two predictions are of row {short(rows[at].index)}; keep one of them")
        else:
            replies[at] = prediction.reply
            count["cut off, as long as a workbook's cell can be"] += prediction.reply.finish == "length"
            count[_OTHERS] += not _agrees(rows[at], prediction.keys.get("answer"))
    if not replies:
        what = f"none of {len(predictions)} predictions is of a row of the data (index {short(indices[0])}, ...)"
        raise InputError(f"{path}: {what}; give the data that they were made with (--data)")
    if len(replies) > _FEW and count[_OTHERS] > _MANY * len(replies):
        what = f"{count[_OTHERS]} of {len(replies)} predictions stand beside another answer than that of the row"
        raise InputError(f"{path}: {what} of their index; give the data that they were made with (--data)")
    said = [how] if how else []
    said += [f"{number} predictions {reason}" for reason, number in count.items() if number]
    if len(replies) < len(rows):
        said.append(f"{len(rows) - len(replies)} of {len(rows)} rows have no prediction: the score is of a subset")
    kept = sorted(replies)
    return [rows[at] for at in kept], [replies[at] for at in kept], said


def _agrees(row: Row, answer: str | None) -> bool:
    """Whether the answer that a table of predictions has is the row's; a list of answers is not looked at."""
    if answer is None or answer.startswith("["):
        return True
    return _plain(answer) in {_plain(known) for known in (*row.gold, str(row.facts.get("answer", "")))}


def _plain(answer: str) -> str | float:
    """Without brackets and case; a number as its value: a workbook makes 30 of 30.0."""
    answer = answer.strip("() ").casefold()
    try:
        return value if (value := float(answer)) == value else answer
    except ValueError:
        return answer
