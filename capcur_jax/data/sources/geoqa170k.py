"""GeoQA170K (published as Geo170K): geometry questions with worked solutions, of G-LLaVA.

From: Hugging Face Luckyjhg/Geo170K: qa_tuning.json and images.zip, which unpacks to images/{geo3k,geoqa_plus,test}.
Licence: none is stated for the set; its images are GeoQA+'s and Geometry3K's. qa_tuning.json is a list with `image`
("geoqa_plus/1.png") and `conversations`, turns {"from": "human" or "gpt", "value": ...}. The human turn holds a mark
<image>, an instruction, "Question:" and "Choices:" with lines "A:40°"; the other reasons and ends in "Answer: B" or in
words to that end. (The layout is that of the set's own code and of copies of its rows; how solutions end was seen in
few of them, so that is read tolerantly.) alignment.json, captions, isn't read.

A row's first question and answer become a problem, without the instruction (training adds its own), the options as
lines; rows whose solution ends in no answer are dropped, and so are those where the right option is there twice. Ids
are the row's number. Metadata: `image_id`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from capcur_jax.data.problem import BadRow, Drop, Problem
from capcur_jax.data.sources import published, wording
from capcur_jax.data.sources.published import Record

PATTERNS = ("qa_tuning.json", "*/qa_tuning.json", "qa_tuning-*.parquet", "data/qa_tuning-*.parquet")
ORIGIN = "https://huggingface.co/datasets/Luckyjhg/Geo170K (qa_tuning.json; images.zip, unpacked)"


def read(directory: Path, images: Path) -> Iterator[Problem | Drop]:
    """The rows of qa_tuning.json (or, where it is not there, of its Parquet). Raises InputError."""

    def convert(record: Record) -> Problem:
        row = record.value
        name = published.text(row, "image")
        turns = row.get("conversations")
        turns = [turn if isinstance(turn, dict) else {} for turn in turns] if isinstance(turns, list) else []
        if [turn.get("from") for turn in turns[:2]] != ["human", "gpt"]:
            raise BadRow("bad dialogue", "`conversations` is not a human turn and then one of gpt")
        asked, solution = published.text(turns[0], "value"), published.text(turns[1], "value")
        problem, options = wording.split_choices(wording.without_instruction(asked))
        return published.question(
            "geoqa170k",
            str(record.number),
            problem,
            wording.final_answer(solution, options),
            capability="visual",
            images=[published.image_file(directory, record, f"images/{name}", name)],
            options=options,
            kind="choice" if options else "open",
            metadata={"image_id": name},
        )

    file = published.find(directory, PATTERNS, ORIGIN)[0]
    yield from published.problems(published.records(file), convert)
