"""What an evaluation leaves: WORKDIR/scores.json, and WORKDIR/predictions/NAME.tsv with a row for each question.

The tables are VLMEvalKit's (its columns, all cells quoted) with columns of ours behind them. `compare`, `errors` and
the page read them again, without a model and without the benchmarks' files.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capcur_jax.errors import InputError
from capcur_jax.evaluation.benchmarks.base import MODES, Reply, Row, Verdict
from capcur_jax.files import write_atomically

SCORES, PREDICTIONS, FINAL = "scores.json", "predictions", "evaluation/final"
_LONGEST_CELL = 1 << 27
# After the table's own columns. The kit ignores them; `images` are paths, `thinking` what a server keeps apart.
OURS = (
    "prediction", "thinking", "finish", "tokens", "failed", "cluster", "images",
    *(f"{mode}{what}" for mode in MODES for what in ("", "_by", "_read")),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question as it was put, what came back, and the verdicts by mode. `row` has the facts that a table holds."""

    row: Row
    reply: Reply
    verdicts: Mapping[str, Verdict]

    @property
    def cluster(self) -> str:
        """Of rows that are right or wrong together; a row without one is its own."""
        return self.row.cluster or f"row {self.row.index}"

    @property
    def category(self) -> str:
        return str(self.row.facts.get("category") or self.row.facts.get("kind") or "")


@dataclasses.dataclass(frozen=True)
class Folder:
    """An evaluation that was read. answered: benchmark -> its questions by index, in the table's order."""

    path: Path
    name: str
    scores: Mapping[str, Any]
    answered: Mapping[str, Mapping[str, Answered]]


def predictions_file(folder: Path, benchmark: str) -> Path:
    return folder / PREDICTIONS / f"{benchmark}.tsv"


def write_predictions(file: Path, answered: Iterable[Answered], thinking: Mapping[str, str] | None = None) -> None:
    """Writes the table of a benchmark, atomically. `thinking`: by index."""
    answered, thinking = list(answered), thinking or {}
    letters = sorted({letter for one in answered for letter in one.row.options})
    facts = list(dict.fromkeys(key for one in answered for key in one.row.facts if key not in OURS))
    reserved = {"index", "question", "answer", *letters}
    others = dict.fromkeys(key for one in answered for key in one.row.cells if key not in {*OURS, *reserved, *facts})
    # Without those that no row has: VLMEvalKit's scorers make a group of each empty cell.
    told = {key for one in answered for key, value in one.row.facts.items() if value not in ("", None)}
    facts = [key for key in facts if key not in reserved and key in told]
    buffer = io.StringIO(newline="")
    table = csv.writer(buffer, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    table.writerow(["index", "question", *letters, "answer", *facts, *others, *OURS])
    for one in answered:
        row, reply = one.row, one.reply
        gold = row.gold[0] if len(row.gold) == 1 else json.dumps(list(row.gold), ensure_ascii=False)
        table.writerow(
            [
                row.index,
                row.question,
                *(row.options.get(letter, "") for letter in letters),
                gold,
                *(_cell(row.facts.get(key)) for key in facts),
                *(row.cells.get(key, "") for key in others),
                reply.text,
                thinking.get(row.index, ""),
                reply.finish,
                "" if reply.tokens is None else reply.tokens,
                reply.failed,
                row.cluster,
                json.dumps([str(path) for path in row.images], ensure_ascii=False),
                *(cell for mode in MODES for cell in _verdict_cells(one.verdicts.get(mode))),
            ]
        )
    write_atomically(file, buffer.getvalue().encode("utf-8", "backslashreplace"))


def read(place: str | Path) -> Folder:
    """The evaluation of a folder, or of a training run its final one.

    Raises:
      InputError: there is none, or one of its files is not as it was written.
    """
    path = Path(place)
    name = path.name
    if not (path / SCORES).is_file() and (path / FINAL / SCORES).is_file():
        path = path / FINAL
    if not (path / SCORES).is_file():
        raise InputError(
            f"{place}: holds no {SCORES}; give the --workdir of an evaluation, or a training run that has finished"
        )
    scores = read_scores(path)
    files = sorted((path / PREDICTIONS).glob("*.tsv"))
    if not files:
        raise InputError(f"{path}: holds no {PREDICTIONS}/NAME.tsv; evaluate again with the same --workdir")
    return Folder(path, name or path.resolve().name, scores, {file.stem: read_predictions(file) for file in files})


def read_predictions(file: Path) -> dict[str, Answered]:
    """The questions of a table by index, in its order. Raises InputError naming file and row."""
    csv.field_size_limit(_LONGEST_CELL)
    found: dict[str, Answered] = {}
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            table = csv.DictReader(lines, delimiter="\t")
            missing = {"index", "answer", "prediction"} - set(table.fieldnames or ())
            if missing:
                raise InputError(f"{file}: no column {', '.join(sorted(missing))}; evaluate again")
            for number, cells in enumerate(table, 1):
                try:
                    one = _answered(cells)
                except (ValueError, TypeError) as error:
                    raise InputError(f"{file}, row {number}: {error}; evaluate again") from None
                if one.row.index in found:
                    raise InputError(f"{file}, row {number}: index {one.row.index!r} is there twice; evaluate again")
                found[one.row.index] = one
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: can't be read ({error}); evaluate again") from None
    return found


def conditions(folder: Folder, benchmark: str) -> dict[str, Any]:
    """What a score depends on, as flat keys: those of the whole evaluation, and the benchmark's own."""
    whole = folder.scores.get("conditions")
    own = (folder.scores.get("benchmarks") or {}).get(benchmark) or {}
    return {**_flat(whole or {}), **_flat(own.get("conditions") or {})}


def read_scores(folder: Path) -> dict[str, Any]:
    """What FOLDER/scores.json holds. Raises InputError."""
    file = folder / SCORES
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: can't be read ({error}); evaluate again with the same --workdir") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds no scores; evaluate again with the same --workdir")
    return found


def score_of(folder: Folder, benchmark: str, mode: str) -> float | None:
    """The main number in per cent, None where scores.json has none."""
    own = (folder.scores.get("benchmarks") or {}).get(benchmark) or {}
    score = (own.get(mode) or {}).get("score")
    return float(score) if isinstance(score, (int, float)) else None


# ---------------------------------------------------------------------- cells


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, tuple, dict)) else value


def _verdict_cells(verdict: Verdict | None) -> Sequence[Any]:
    if verdict is None:
        return "", "", ""
    return f"{verdict.credit:.6g}", verdict.by, "" if verdict.read is None else verdict.read


def _answered(cells: Mapping[str | None, Any]) -> Answered:
    if None in cells or None in cells.values():
        raise ValueError("it has another number of cells than the head")
    texts = {str(key): value for key, value in cells.items()}
    options = {key: value for key, value in texts.items() if len(key) == 1 and key.isupper() and value != ""}
    known = {"index", "question", "answer", *options, *OURS}
    facts = {key: value for key, value in texts.items() if key not in known and value != ""}
    images = tuple(Path(path) for path in json.loads(texts.get("images") or "[]"))
    row = Row(
        texts["index"], texts.get("question", ""), _golds(texts["answer"]), images, options, facts,
        texts.get("cluster", ""),
    )  # fmt: skip
    tokens = texts.get("tokens")
    reply = Reply(
        texts["prediction"], texts.get("finish", ""), int(tokens) if tokens else None, failed=texts.get("failed", "")
    )
    verdicts = {mode: found for mode in MODES if (found := _verdict(texts, mode))}
    return Answered(row, reply, verdicts)


def _golds(text: str) -> tuple[str, ...]:
    if text.startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            return (text,)
        if isinstance(found, list) and all(isinstance(one, str) for one in found):
            return tuple(found)
    return (text,)


def _verdict(texts: Mapping[str, str], mode: str) -> Verdict | None:
    if not texts.get(mode):
        return None
    credit = float(texts[mode])
    if not 0 <= credit <= 1:
        raise ValueError(f"`{mode}` is {credit}, no credit from 0 to 1")
    read, by = texts.get(f"{mode}_read") or None, texts.get(f"{mode}_by", "")
    return Verdict(credit, by, read)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
