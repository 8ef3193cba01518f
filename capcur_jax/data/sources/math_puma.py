"""Math PUMA: synthesised and collected mathematics with figures, of the Math-PUMA models' second and third stage.

From: Hugging Face Math-PUMA/Math-PUMA_Data_Stage2 (folders Synthesis with train.json, VarsityTutors and
VisualWebInstruct with train.jsonl) and Math-PUMA_Data_Stage3 (MathV-360K, VarsityTutors, VisualWebInstruct), each with
images.tar.gz, unpacked beside it. Licence: GPL-3.0. The fields are those that the authors' training code reads
(github.com/wwzhuang01/Math-PUMA): `image_url`, `instruction`, `output`; the second stage's rows are pairs that ask the
same twice, with `image_url_2`, `instruction_2`, `output_2` for the version that has more of the question in its image.
How the files are laid out inside and where `image_url` starts couldn't be checked: a JSON list and JSON lines are both
read, and an image is looked for under every tail of its path, from the row's file up.

Of a pair the second version is taken where it has an image, else the first. The answer is what `output` ends in (a box,
"Answer: ...", "The answer is ..."); rows without one, or with prose, are dropped. Options are lines. Ids are the folder
and the row's number, `kind` is the folder, metadata `image_id`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from capcur_jax.data.problem import BadRow, Drop, Problem
from capcur_jax.data.sources import published, wording
from capcur_jax.data.sources.published import Record

PATTERNS = tuple(f"{folder}train.{suffix}" for folder in ("", "*/", "*/*/") for suffix in ("json", "jsonl"))
ORIGIN = (
    "https://huggingface.co/datasets/Math-PUMA/Math-PUMA_Data_Stage2 (FOLDER/train.json[l]; images.tar.gz, unpacked)"
)


def read(directory: Path, images: Path) -> Iterator[Problem | Drop]:
    """The rows of train.json and train.jsonl in `directory` and two levels of folders. Raises InputError."""

    def convert(record: Record) -> Problem:
        row = record.value
        version = "_2" if published.optional_text(row, "image_url_2").strip() else ""
        name = published.optional_text(row, f"image_url{version}").strip()
        if not name:
            raise BadRow("no image", "the row has no image; this set is of visual questions")
        asked, solution = published.text(row, f"instruction{version}"), published.text(row, f"output{version}")
        problem, options = wording.split_choices(wording.without_instruction(asked))
        parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
        # Down to its last folder: a bare name could be that of another image.
        tails = ["/".join(parts[start:]) for start in range(max(1, len(parts) - 1))][-8:]
        places = [place for tail in tails for place in (tail, f"images/{tail}")]
        folder = record.file.parent.name if record.file.parent != directory else ""
        return published.question(
            "math_puma",
            "-".join(part for part in (folder, str(record.number)) if part),
            problem,
            wording.final_answer(solution, options),
            capability="visual",
            images=[published.image_file(directory, record, *places)],
            options=options,
            kind=folder,
            metadata={"image_id": "/".join(part for part in (folder, *parts[-2:]) if part)},
        )

    files = published.find(directory, PATTERNS, ORIGIN)
    yield from published.problems(published.all_records(files), convert)
