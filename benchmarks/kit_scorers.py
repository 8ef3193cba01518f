"""Whether VLMEvalKit's own scorers read our tables of predictions, and come to the numbers of our `kit` mode.

    python benchmarks/kit_scorers.py --kit_python=PATH [--data=DIR]

Questions are a small table of each benchmark in the kit's format, or those of the kit's tables in --data; replies are
scripted: right, wrong and unreadable ones in several forms. Our code scores them and writes predictions/NAME.tsv. A
process of --kit_python, an environment with VLMEvalKit in it, then runs `evaluate` of the kit's dataset classes on
these files. Numbers stand side by side; the exit status is 1 where one differs or a file can't be read. Of WeMath the
kit has the published scorer, too, which it takes where there is no judge: our `official` mode is held against that.

No judge is asked: where the kit insists on one it gets "Z", its word for "nothing fits". After a word that it can't
read it draws a letter, and the score is another one each time. That and what else docs/evaluation.md names as not
copied don't occur here. Only the modules of the scorers are imported, so that the kit's libraries for models need not
be there. Its code for WeMath needs a pandas before 3:

    pip install --no-deps ms-vlmeval
    pip install 'pandas<3' openpyxl xlsxwriter pillow tqdm validators huggingface_hub sty filelock python-dotenv \\
        portalocker requests timeout-decorator latex2sympy2_extended rich tabulate json_repair

It ran with ms-vlmeval 0.0.20, the kit's package on PyPI of 2026-05. A checkout of the kit was not tried.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import random
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from PIL import Image

from capcur_jax.errors import InputError
from capcur_jax.evaluation import outcome
from capcur_jax.evaluation.benchmarks import registry
from capcur_jax.evaluation.benchmarks.base import MODES, Benchmark, Reply, Row
from capcur_jax.evaluation.folders import Answered, predictions_file
from capcur_jax.evaluation.scoring import score

_KIT = flags.DEFINE_string("kit_python", None, "Python of an environment with VLMEvalKit.", required=True)
_DATA = flags.DEFINE_string("data", None, "Folder with the kit's tables (default: small ones of our own).")
_NEAR = 0.006  # per cent: the kit rounds some numbers to two decimals

# Ours -> the kit's module, class and dataset.
SETS = {
    "mmstar": ("image_mcq", "ImageMCQDataset", "MMStar"),
    "realworldqa": ("image_mcq", "ImageMCQDataset", "RealWorldQA"),
    "aokvqa": ("image_mcq", "ImageMCQDataset", "A-OKVQA"),
    "blink": ("image_mcq", "ImageMCQDataset", "BLINK"),
    "vstar": ("image_mcq", "ImageMCQDataset", "VStarBench"),
    "visonlyqa": ("image_mcq", "ImageMCQDataset", "VisOnlyQA-VLMEvalKit"),
    "cvbench_2d": ("image_mcq", "CVBench", "CV-Bench-2D"),
    "pope": ("image_yorn", "ImageYORNDataset", "POPE"),
    "hallusionbench": ("image_yorn", "ImageYORNDataset", "HallusionBench"),
    "mathvision": ("image_vqa", "MathVision", "MathVision"),
    "mathvista": ("image_vqa", "MathVista", "MathVista_MINI"),
    "wemath": ("image_mcq", "WeMath", "WeMath"),
    "dynamath": ("dynamath", "Dynamath", "DynaMath"),
    "chartqa": ("image_vqa", "ImageVQADataset", "ChartQA_TEST"),
    "textvqa": ("image_vqa", "ImageVQADataset", "TextVQA_VAL"),
}

# The kit's word for its judge, by the mode of ours that has its rules then. Of WeMath it tries the rules of `kit` only
# where a judge is there.
JUDGES = {"kit": "exact_matching"}
WEMATH_JUDGES = {"kit": "silent", "official": "exact_matching"}

KIT = """
import importlib, importlib.util, json, pathlib, sys, types
module, name, dataset, table, predictions, result, *judges = sys.argv[1:]
spec = importlib.util.find_spec("vlmeval")
if spec is None:
    sys.exit("no package vlmeval in this environment")
home = pathlib.Path(list(spec.submodule_search_locations)[0])
for package in ("vlmeval", "vlmeval.dataset"):  # without their __init__, which import every model and dataset
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = [str(home.joinpath(*package.split(".")[1:]))]
module = importlib.import_module(f"vlmeval.dataset.{module}")

class Silent:
    def working(self):
        return True
    def generate(self, *arguments, **settings):
        return "Z"

module.build_judge = lambda *arguments, **settings: Silent()
kind = getattr(module, name)
made = kind.__new__(kind)  # its __init__ downloads the dataset
made.dataset_name, made.data = dataset, module.load(table)
found = [made.evaluate(predictions, model=judge, nproc=2) for judge in judges]
pathlib.Path(result).write_text(json.dumps([json.loads(one.to_json(orient="records")) for one in found]))
"""


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError("it takes flags alone")
    different = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in SETS:
            folder = Path(temporary) / name
            folder.mkdir()
            different += _benchmark(registry.get(name), folder)
    if different:
        raise SystemExit(1)


def _benchmark(benchmark: Benchmark, folder: Path) -> int:
    """Prints both sides' numbers. Returns how many differ."""
    source = Path(_DATA.value) if _DATA.value else write_table(folder / benchmark.files[0], MADE[benchmark.name]())
    try:
        rows = list(benchmark.load(source, folder / "images"))
    except InputError as error:
        if not _DATA.value:
            raise
        print(f"{benchmark.name:15} left out: {error}")
        return 0
    if not all(row.cells for row in rows):
        print(f"{benchmark.name:15} left out: --data has the benchmark's own file, not the kit's table")
        return 0
    replies = [Reply(_reply(benchmark.name, row, number)) for number, row in enumerate(rows)]
    scored = {mode: score(benchmark, rows, replies, mode) for mode in MODES}
    answered = [
        Answered(row, reply, {mode: scored[mode].verdicts[at] for mode in MODES})
        for at, (row, reply) in enumerate(zip(rows, replies, strict=True))
    ]
    entry = outcome.outcome(answered, benchmark.metrics, {}, scored)
    outcome.write(folder, {"benchmarks": {benchmark.name: entry}}, {benchmark.name: answered})
    files = getattr(benchmark.load(source, None), "files", (source,))
    result, judges = folder / "kit.json", WEMATH_JUDGES if benchmark.name == "wemath" else JUDGES
    done = subprocess.run(
        [_KIT.value, "-c", KIT, *SETS[benchmark.name], str(files[0]), str(predictions_file(folder, benchmark.name)),
         str(result), *judges.values()],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        print(f"{benchmark.name:15} VLMEvalKit can't score our table: {done.stderr.strip()[-1500:]}")
        return 1
    different = 0
    for mode, records in zip(judges, json.loads(result.read_text()), strict=True):
        for what, value in kit_numbers(benchmark.name, records).items():
            mine: Any = scored[mode].numbers
            for key in what:
                mine = mine[key]
            same = abs(mine - value) <= _NEAR
            different += not same
            print(f"{benchmark.name:15} {len(rows):6} rows  {mode:8} {'/'.join(what):28} ours {mine:8.3f}  "
                  f"kit {value:8.3f}  {'same' if same else 'DIFFERENT'}")  # fmt: skip
    return different


def kit_numbers(name: str, records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], float]:
    """The kit's numbers in per cent, WeMath's classes as counts, by the keys under which ours stand."""
    first = records[0]
    if name == "visonlyqa":
        return {("splits", record["split"]): 100 * record["Overall"] for record in records}
    if SETS[name][0] == "image_mcq" and name != "wemath":
        ours = {"mmstar": ("categories",), "vstar": ("categories",), "blink": ("tasks",), "cvbench_2d": ()}.get(name)
        classes = {key: 100 * value for key, value in first.items() if key not in ("split", "Overall")}
        found = {} if ours is None else {(*ours, key): value for key, value in classes.items()}
        return {("score",): 100 * first["Overall"], **found}
    if name == "pope":
        names = {"Overall": "f1", "acc": "accuracy", "precision": "precision", "recall": "recall"}
        return {
            (*(() if record["split"] == "Overall" else (record["split"],)), ours): record[theirs]
            for record in records
            for theirs, ours in names.items()
        }
    if name == "hallusionbench":
        return {(key,): first[key] for key in ("aAcc", "fAcc", "qAcc")}
    if name == "dynamath":
        rows = {record["Setting"]: 100 * record["Overall"] for record in records}
        return {("average",): rows["Average"], ("worst_case",): rows["Worst Case"]}
    if name in ("mathvision", "mathvista"):
        column = "Subject" if name == "mathvision" else "Task&Skill"
        return {("score",): next(record["acc"] for record in records if record[column] == "Overall")}
    if name == "wemath":
        return _wemath_numbers(first)
    return {("score",): first["Overall"]}


_STEPS = {"S1": "One-step(S1)", "S2": "Two-step(S2)", "S3": "Three-step(S3)"}
_CLASSES = {
    "IK": "InsufficientKnowledge", "IG": "InadequateGeneralization", "CM": "CompleteMastery", "RM": "RoteMemorization",
}  # fmt: skip


def _wemath_numbers(record: Mapping[str, str]) -> dict[tuple[str, ...], float]:
    """Percentages are texts there, and counts stand in brackets behind their rates: "11.24% (59)"."""
    found: dict[tuple[str, ...], float] = {(key,): _percent(record[theirs]) for key, theirs in _STEPS.items()}
    for how in ("Strict", "Loose"):
        for key, theirs in _CLASSES.items():
            rate, count = record[f"{theirs} ({how})"].split()
            ours = key if key[0] == "I" else f"{key}_{how.lower()}"
            found |= {(ours,): float(count.strip("()")), ("rates", ours): _percent(rate)}
        # It divides by all 525 groups, whatever the table holds.
        if sum(found[key,] for key in ("IK", "IG", f"CM_{how.lower()}", f"RM_{how.lower()}")) == sum(_GROUPS.values()):
            found[how.lower(),] = _percent(record[f"Score ({how})"])
        else:
            found = {key: value for key, value in found.items() if key[0] != "rates"}
    return found


def _percent(text: str) -> float:
    return float(text.rstrip("%"))


# ---------------------------------------------------------------------- replies


def _reply(name: str, row: Row, number: int) -> str:
    """One of several forms, right ones oftener than others. Of some groups all are right."""
    gold, letters = row.gold[0], list(row.options)
    chance = random.Random(f"group {row.cluster or row.index}").choice((1.0, 0.7, 0.3))
    draw = random.Random(number)
    right = draw.random() < chance
    if not right and draw.random() < 0.2:
        return "It is hard to say what this picture shows us today without any doubt, whoever looks."
    if letters:
        letter = gold if right else draw.choice([other for other in letters if other != gold])
        return draw.choice(
            (letter, f"({letter})", f"The answer is {letter}.", f'Step by step\tfirst, "second".\n\n{letter}',
             f"<Thought process>: seen <Answer>: {letter}", f"<think>seen</think>\n\n{letter}",
             *([] if right else [f"<think>seen</think>{gold}"]))  # only a judge reads that
        )  # fmt: skip
    if name in ("pope", "hallusionbench"):
        word = gold if right else {"Yes": "No", "No": "Yes"}[gold]
        forms = (word, f"{word}, as one can see.", f"So:\n{word.lower()}.", f"<think>seen</think>\n{word}")
        return draw.choice(forms if right else (*forms, "Yes and no."))
    answer = gold if right else "77777"
    if name == "dynamath":
        kind = row.facts["kind"]
        wrong = {"multiple choice": "E", "float": "77777.5", "text": "seldom"}[kind]
        answer = gold if right else wrong
        return json.dumps({"solution": "It follows.", "short answer": answer}, indent=draw.randrange(3))
    return answer


# ---------------------------------------------------------------------- tables


def write_table(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """VLMEvalKit's TSV. Each row gets a picture of its own."""
    names = ["index", "image", *dict.fromkeys(key for row in rows for key in row if key != "index")]
    with file.open("w", encoding="utf-8", newline="") as target:
        table = csv.DictWriter(target, names, delimiter="\t", restval="", lineterminator="\n")
        table.writeheader()
        for number, row in enumerate(rows):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (number % 256, 9, 90)).save(picture, "PNG")
            image = base64.b64encode(picture.getvalue()).decode()
            table.writerow({"index": number + 3, "image": image} | dict(row))
    return file


_COUNT = 60
_GROUPS = {2: 360, 3: 165}  # WeMath's by their number of steps
_COLOURS = dict(zip("ABCD", ("crimson", "turquoise", "ochre", "violet"), strict=True))


def _choices(**cells: Any) -> list[dict[str, Any]]:
    """With questions that hold tabs, quotes and breaks of lines."""
    return [
        {"question": f'Which "colour"\tis it, {n}?\nLook.', **_COLOURS, "answer": "ABCD"[n % 4],
         **{key: values[n % len(values)] for key, values in cells.items()}}
        for n in range(_COUNT)
    ]  # fmt: skip


def _cvbench() -> list[dict[str, Any]]:
    shared = {"split": "2D", "type": "2D"}
    return [
        row | {"prompt": f"{row['question']} Select.", "choices": str(list(_COLOURS.values())), **shared}
        for row in _choices(source=("ADE20K", "COCO", "COCO"), task=("Count", "Relation"))
    ]


def _pope() -> list[dict[str, Any]]:
    splits = "random", "popular,adversarial", "random,popular,adversarial"
    return [
        {"question": f"Is there a dog, {n}?", "answer": ("Yes", "No", "No")[n % 3], "category": splits[n % 7 % 3]}
        for n in range(_COUNT)
    ]


def _hallusion() -> list[dict[str, Any]]:
    return [
        {"index": f"VD_chart_x_{n // 6}_{n // 2 % 3}_{n % 2}", "question": f"Is it, {n}?",
         "answer": ("Yes", "No")[n % 2], "category": "VD", "l2-category": "VD_chart"}
        for n in range(_COUNT)
    ]  # fmt: skip


def _mathvision() -> list[dict[str, Any]]:
    chosen = [{"question": f"Which, {n}?", "choices": str(list(_COLOURS.values())), "answer": "ABCD"[n % 4]}
              for n in range(_COUNT // 2)]  # fmt: skip
    free = [{"question": f"How many, {n}?", "choices": "[]", "answer": ("12", "0.5", "x+1")[n % 3]} for n in range(30)]
    return [
        row | {"category": ("algebra", "counting")[n % 2], "level": n % 5 + 1} for n, row in enumerate(chosen + free)
    ]


def _mathvista() -> list[dict[str, Any]]:
    shared = {"task": "geometry", "skills": "['arithmetic']", "category": "math", "source": "x", "grade": "none",
              "context": "figure", "split": "testmini", "language": "english"}  # fmt: skip
    chosen = [
        {"question": f"Which, {n}?", "choices": str(list(_COLOURS.values())), "answer": list(_COLOURS.values())[n % 4],
         "answer_option": "ABCD"[n % 4], "question_type": "multi_choice", "answer_type": "text", **shared}
        for n in range(_COUNT // 2)
    ]  # fmt: skip
    free = [
        {"question": f"How many, {n}?", "choices": "[]", "answer": ("12", "1.5")[n % 2], "question_type": "free_form",
         "answer_type": ("integer", "float")[n % 2], "precision": ("", "1.0")[n % 2], **shared}
        for n in range(30)
    ]  # fmt: skip
    return chosen + free


def _wemath() -> list[dict[str, Any]]:
    """As many groups as the whole set has, in its order: role by role, so that a group's rows lie far apart."""
    concepts = "Area of Triangles", "Axial Symmetry", "Route Map", "Understanding Sectors"
    roles = [
        {"ID": f"{many}steps_{group}", "key": f"{many}steps_{part}", "split": "testmini", "hint": "Look closely.",
         "knowledge concept": ";".join(concepts[:many]) if part == "multi" else concepts[(group + int(part)) % 4]}
        for many, groups in _GROUPS.items()
        for part in (*map(str, range(1, many + 1)), "multi")
        for group in range(1, groups + 1)
    ]  # fmt: skip
    rows = _choices()
    return [rows[n % 4] | role for n, role in enumerate(roles)]


def _dynamath() -> list[dict[str, Any]]:
    kinds = ("float", "3.5"), ("multiple choice", "B"), ("text", "even")
    # The index of a seed's first variant is the seed's number: the kit's worst case reads it so.
    return [
        {"index": seed + 10 * variant, "qid": seed, "varid": variant + 1, "question": f"What, {seed}?",
         "answer_type": kinds[seed % 3][0], "answer": kinds[seed % 3][1], "subject": "algebra",
         "knowledge_level": "high school"}
        for variant in range(10) for seed in range(10)
    ]  # fmt: skip


def _chartqa() -> list[dict[str, Any]]:
    answers = "12", "45%", "blue", "0.5"
    splits = "test_human", "test_augmented"
    return [{"question": f"What, {n}?", "answer": answers[n % 4], "split": splits[n % 2]} for n in range(_COUNT)]


def _textvqa() -> list[dict[str, Any]]:
    people = [["the shop", *["shop"] * (n % 4), *["Shop 5"] * (9 - n % 4)] for n in range(_COUNT)]
    return [{"question": f"What is written, {n}?", "answer": str(said)} for n, said in enumerate(people)]


MADE = {
    "mmstar": lambda: _choices(category=("math", "logic"), l2_category=("number", "code")), "realworldqa": _choices,
    "aokvqa": _choices, "blink": lambda: _choices(category=("Counting", "Jigsaw", "Jigsaw")),
    "vstar": lambda: _choices(category=("direct_attributes", "relative_position")),
    "visonlyqa": lambda: _choices(split=("Eval_Real", "Eval_Synthetic", "Eval_Real"), category=("angle", "size")),
    "cvbench_2d": _cvbench, "pope": _pope, "hallusionbench": _hallusion, "mathvision": _mathvision,
    "mathvista": _mathvista, "wemath": _wemath, "dynamath": _dynamath, "chartqa": _chartqa, "textvqa": _textvqa,
}  # fmt: skip


if __name__ == "__main__":
    app.run(main)
