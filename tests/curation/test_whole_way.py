"""The whole way at small scale: captions -> questions -> perception filter -> pass rates -> training -> data card.

The question writer is a scripted server with the OpenAI interface. The filter's models are real checkpoints whose
weights make them answer with one letter, some letter, and stop.
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import load_file, save_file

from capcur_jax.data.__main__ import main
from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import read_problems, write_rows
from capcur_jax.models.inputs import Processor
from capcur_jax.records import jsonl
from tests.conftest import random_checkpoint
from tests.rollout.scripted_server import ScriptedServer, turn_text

pytestmark = pytest.mark.e2e

COLORS = ("red", "green", "blue", "yellow", "black", "white", "brown", "gray")
SHAPES = ("circle", "rectangle")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
CAPTIONS = 160


def pictures(folder):
    """Images like easy-VQA's, and what is on them: one shape on a background."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(CAPTIONS):
        color, ground = random.choice(COLORS, 2, replace=False)
        shape, corner = random.choice(SHAPES), random.choice(CORNERS)
        left, top = 36 * ("right" in corner) + 4, 36 * ("bottom" in corner) + 4
        image = Image.new("RGB", (64, 64), str(ground))
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)((left, top, left + 20, top + 20), fill=str(color))
        image.save(folder / f"{number}.png")
        caption = f"A {color} {shape} lies in the {corner} corner of a {ground} picture."
        text = "Describe the image in detail."
        yield Problem(
            str(number), text, "", (str(folder / f"{number}.png"),), response=caption, source="pictures",
            metadata={"image_id": str(number)},
        )  # fmt: skip


def write_question(body):
    """A scripted writer: the color, sometimes with a mistake that it mends when it is told."""
    turns = [message for message in body["messages"] if message["role"] == "user"]
    text = "".join(turn_text({"messages": [turn]}) for turn in turns)
    color, shape, ground = re.search(r"A (\w+) (\w+) lies in the .* corner of a (\w+) picture", text).groups()
    if color == "brown":
        return "I would rather not."
    if color == "gray" and "cannot be used" not in text:
        return "```json\n{not json}\n```"
    others = [other for other in COLORS if other not in (color, ground)][:3]
    row = {
        "question": f"Which colour has the {shape}?",
        "options": dict(zip("ABCD", [color, *others], strict=True)),
        "answer": "A",
        "kind": "detail",
    }
    return f"```json\n{json.dumps(row)}\n```"


def letter_checkpoint(directory, seed):
    """A model that answers A, B, C or D, as its random weights see the prompt, and ends."""
    directory = random_checkpoint(directory, seed=seed, tied=False)
    processor = Processor.from_directory(directory)
    letters = [processor.tokenizer.convert_tokens_to_ids(letter) for letter in "ABCD"]
    (file,) = directory.glob("*.safetensors")
    weights = load_file(file)
    embedding = next(value for name, value in weights.items() if name.endswith("embed_tokens.weight"))
    head = weights["lm_head.weight"]
    random = np.random.default_rng(seed)
    signal = random.standard_normal(head.shape[1]).astype(np.float32)
    signal /= np.linalg.norm(signal)
    head *= 0.01
    rows = random.standard_normal((4, head.shape[1])).astype(np.float32)
    head[letters] = rows - np.outer(rows @ signal, signal)  # a letter says nothing of the next one
    embedding[letters] = 300 * signal
    head[processor.end_tokens[0]] = 2 * signal
    save_file(weights, file, metadata={"format": "pt"})
    return directory


def command(*arguments, capsys):
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


RUN = {
    "config.evaluation.questions": "4",
    "config.evaluation.blind": "False",
    "config.prompt.max_tokens": "192",
    "config.prompt.token_buckets": "(192,)",
    "config.rollout.max_new_tokens": "8",
    "config.rollout.slots": "12",
    "config.packing.shapes": "((640, 8, 64),)",
    "config.log.tensorboard": "False",
    "config.export.each_stage": "False",
}


def test_from_captions_to_a_trained_model_and_a_data_card(tmp_path, capsys):
    write_rows(tmp_path / "captions.jsonl", pictures(tmp_path / "pictures"))
    questions, kept, rated = tmp_path / "questions.jsonl", tmp_path / "perception.parquet", tmp_path / "rated.parquet"

    # A question for every caption but the brown ones, at which the writer refuses; letters in balance.
    with ScriptedServer(write_question) as server:
        arguments = ["--input", tmp_path / "captions.jsonl", "--output", questions]
        found = command("synthesize", *arguments, "--address", server.address, "--model", "writer", capsys=capsys)
    refused = sum("A brown" in row.response for row in read_problems(tmp_path / "captions.jsonl")[0])
    assert refused > 0 and found["dropped"] == {"no fenced block": refused} and found["repaired"] > 0
    assert found["kept"] == CAPTIONS - refused and max(found["letters"].values()) - min(found["letters"].values()) <= 1

    # Kept is what both models answer rightly from the caption, and wrongly from the picture.
    models = [letter_checkpoint(tmp_path / name, seed) for name, seed in (("first", 49), ("second", 57))]
    chosen = [part for model in models for part in ("--model", model)]
    found = command("filter", "--input", questions, "--output", kept, *chosen, capsys=capsys)
    rows, _ = read_problems(kept)
    assert found["rows"] == found["kept"] + sum(found["dropped"].values()) and len(rows) == found["kept"] >= 8
    for row in rows:
        assert set(row.metadata["filter"]) == {"first", "second"} and row.images
        for said in row.metadata["filter"].values():
            assert said["caption"] == row.answer and said["image"] not in (row.answer, None)

    # How often the base answers them rightly; some sums, and sums that need a picture.
    sums = [Problem(f"sum-{n}", f"What is {n} + {n + 1}?", str(2 * n + 1), capability="text") for n in range(12)]
    seen = read_problems(tmp_path / "captions.jsonl")[0][:8]
    corners = [
        Problem(
            f"corners-{row.id}", "How many corners has the shape, plus 2?", "6" if "rectangle" in row.response else "2",
            row.images, "visual",
        )
        for row in seen
    ]  # fmt: skip
    write_rows(tmp_path / "sums.jsonl", sums)
    write_rows(tmp_path / "corners.jsonl", corners)
    files = {"perception": rated, "text": tmp_path / "text.jsonl", "visual": tmp_path / "visual.jsonl"}
    for name, output in zip((kept, tmp_path / "sums.jsonl", tmp_path / "corners.jsonl"), files.values(), strict=True):
        settings = [f"--{key}={RUN[key]}" for key in RUN if key.startswith(("config.prompt", "config.rollout.slots"))]
        arguments = ["--input", name, "--output", output, "--samples", 4, "--max_new_tokens", 24, *settings]
        found = command("difficulty", *arguments, capsys=capsys)
        rows, _ = read_problems(output)
        assert found["kept"] == len(rows) == sum(found["histogram"])
        assert all(row.pass_rate == sum(row.correctness) / 4 and row.pass_rate_by["samples"] == 4 for row in rows)

    # The stages of the config on them, each from easy to hard.
    sets = {
        f"config.data.sets.{name}.{split}": str(file) for name, file in files.items() for split in ("train", "test")
    }
    counts = (("steps", "0"), ("epochs", "1"), ("prompts", "4"))
    sets |= {f"config.stages.{name}.{key}": value for name in files for key, value in counts}
    flags = [f"--{key}={value}" for key, value in {**RUN, **sets}.items()]
    run = [sys.executable, "-m", "capcur_jax.main", "--config=configs/capability_x_difficulty.py"]
    subprocess.run([*run, f"--workdir={tmp_path / 'run'}", *flags], check=True, stdout=subprocess.DEVNULL)
    records = [record for record in jsonl.read_jsonl(tmp_path / "run" / "metrics.jsonl") if record["type"] == "step"]
    steps = len(read_problems(rated)[0]) // 4
    assert [record["stage"] for record in records] == ["perception"] * steps + ["text"] * 3 + ["visual"] * 2
    assert all(record["compilations"] == 0 and np.isfinite(record["loss"]) for record in records)

    # A page that shows it.
    page = tmp_path / "card.html"
    command("card", "--input", *files.values(), "--output", page, capsys=capsys)
    text = page.read_text()
    assert "data:image/" in text and all(word in text for word in ("perception", "text", "What is", "pass rate"))
