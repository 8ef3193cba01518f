"""What a benchmark is: its rows, how a question is put, when a reply is right, and what is reported of many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MODES = ("official", "kit")  # the benchmark's own scorer; the rules of VLMEvalKit, without its guesses


@dataclasses.dataclass(frozen=True)
class Row:
    """One question of a benchmark, with what its rules and its metrics read."""

    index: str  # unique in the file; a number's text form, so that a table's 7 and a JSON key "7" are one row
    question: str  # the published text, without what `Benchmark.put` adds
    gold: tuple[str, ...]  # the right answer, or several accepted ones: a letter where there are options
    images: tuple[Path, ...] = ()  # encoded files, byte for byte as published, in the order in which they are shown
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by letter; {}: an open question
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of this benchmark: category, unit, group, ...
    cluster: str = ""  # rows of one cluster are right or wrong together (one image, one group); "": its own
    cells: Mapping[str, str] = dataclasses.field(default_factory=dict)  # a table's cells, which its scorers read again


class Reply(NamedTuple):
    """What a model answered to a row."""

    text: str
    finish: str = ""  # "stop" | "length" (cut off at the limit) | "": not known
    tokens: int | None = None  # end token included; None: not known
    extracted: str | None = None  # what an extraction by a judge gave, in recorded predictions
    failed: str = ""  # why there is no reply at all; it counts as wrong


class Verdict(NamedTuple):
    """Whether a reply is right, and who says so."""

    credit: float  # 0 to 1
    by: str  # "rule" | "judge" | "none": undecided, which counts as wrong
    read: str | None = None  # what was taken for the answer; None: nothing was


NOTHING = "unanswered"  # a judge's word for a reply that gives no answer


class Ask(NamedTuple):
    """What only a judge can decide.

    kind: "letter" (which option the reply names), "yes_no", "extract" (the final answer in the reply; the rule then
        compares what comes back), "equal" (whether `answer` says the same as the gold).
    answer: of "equal": the extracted answer.
    question: what the judge reads in place of the row's question ("": the row's).
    """

    kind: str
    answer: str = ""
    question: str = ""


# (row, text of the reply as it is read, what a judge's extraction gave or None) -> the verdict, or what to ask a judge.
Rule = Callable[[Row, str, "str | None"], "Verdict | Ask"]
# (rows, their verdicts, mode) -> {"score": main number in per cent, further numbers and {class: numbers}}.
Metrics = Callable[[Sequence[Row], Sequence[Verdict], str], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark; docs/evaluation.md says how to write one.

    name: as on the command line.
    title: as in print.
    files: names under which the set is published, the first of them VLMEvalKit's table.
    where: who publishes them, for `--list`.
    sets: number of rows -> which set that is ("testmini"); another number is a subset, and said to be one.
    digests: first 8 hex digits of the md5 of known tables -> their version.
    load: file or folder -> rows (tables.Rows says what was left out). Raises InputError that names file and row.
    put: the text that follows the images.
    official, kit: the two rules.
    metrics: what is reported.
    reading: which of rules.READINGS the rules need, whatever is asked for; "": they take both.
    whole: as `load`, of the set that `load`'s is drawn from, where one folder holds both.
    """

    name: str
    title: str
    files: tuple[str, ...]
    where: str
    sets: Mapping[int, str]
    load: Callable[[Path, Path | None], list[Row]]  # (file or folder, folder for unpacked images; None: no images)
    put: Callable[[Row], str]
    official: Rule
    kit: Rule
    metrics: Metrics
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reading: str = ""
    whole: Callable[[Path, Path | None], list[Row]] | None = None
