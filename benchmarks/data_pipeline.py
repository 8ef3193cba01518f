"""The cost of preparing prompts with images against transformers' own processor, and whether memory stays flat.

    python benchmarks/data_pipeline.py [--parts=speed,memory] [--rounds=3 --samples=20000]

speed: prompts from image files of many sizes, generated photos (JPEG) and drawings (PNG), and, with CAPCUR_SHARED_DATA
set, images of MathVision. One side opens them with Pillow and calls transformers' image processor, tokenizer and
chat template; the others are `PromptBuilder` over an `ImageStore` with 0, 1 and 2 workers, with nothing cached or all.
The sides take turns; medians. CPU seconds are those of this process and its workers, so that images/s per core can be
compared on a machine that does something else as well.

memory: samples in training's order through `loader.batches`, with a cache that holds less than half of the images.
Resident memory of this process and its workers, at most 5 % above what it was after a tenth of the samples.

The last line is JSON.
"""

from __future__ import annotations

import collections
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import record
from absl import app, flags
from image_architecture import ARCHITECTURE
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from capcur_jax.data import loader
from capcur_jax.data.curriculum import Curriculum
from capcur_jax.data.images import ImageStore
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import INSTRUCTION, PromptBuilder
from capcur_jax.models import fresh
from capcur_jax.models.inputs import Processor
from capcur_jax.models.vision import pixel_values

_PARTS = flags.DEFINE_list("parts", ["speed", "memory"], "What to measure.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each side.")
_IMAGES = flags.DEFINE_integer("images", 32, "Generated images, and as many of MathVision's at most.")
_SAMPLES = flags.DEFINE_integer("samples", 20_000, "Prompts of the memory part.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Workers of the memory part.")
QUESTION = "Which of the shapes in the image is left of the large blue square, and how many corners does it have?"
FILES = 300  # of the memory part


def picture(width: int, height: int, drawing: bool, random: np.random.Generator) -> Image.Image:
    """Smooth colours under fine noise, which compress like a photo, or shapes on white."""
    if drawing:
        image = Image.new("RGB", (width, height), "white")
        for _ in range(12):
            corners = np.sort(random.integers(0, (width, height), (2, 2)), axis=0).ravel().tolist()
            colour = tuple(random.integers(0, 256, 3).tolist())
            getattr(ImageDraw.Draw(image), random.choice(["rectangle", "ellipse"]))(corners, colour, "black", 2)
        return image
    coarse = random.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray((smooth + random.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))


def write(folder: Path, count: int, least: tuple[int, int], most: tuple[int, int]) -> list[str]:
    """Image files with sizes from `least` to `most`, two photos to a drawing, in a fixed random order."""
    random, paths = np.random.default_rng(0), []
    folder.mkdir()
    for number in range(count):
        share = number / max(count - 1, 1)
        width, height = (round(a * (b / a) ** share) for a, b in zip(least, most, strict=True))
        drawing = number % 3 == 2
        paths.append(str(folder / f"{number}.{'png' if drawing else 'jpg'}"))
        picture(width, height, drawing, random).save(paths[-1], **({} if drawing else {"quality": 90}))
    return random.permutation(paths).tolist()


def problems_of(paths: Sequence[str]) -> list[Problem]:
    return [Problem(path, QUESTION, "4", (path,)) for path in paths]


def cpu_seconds() -> float:
    """Of this process and the children that it has now."""
    children = (child.cpu_times() for child in psutil.Process().children())
    return time.process_time() + sum(times.user + times.system for times in children)


# ---------------------------------------------------------------------- speed


def plainly(processor: Processor, path: str):
    """One prompt with transformers' own pieces, as its processors put them together."""
    content = [{"type": "image"}, {"type": "text", "text": f"{QUESTION} {INSTRUCTION}"}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    image = Image.open(path).convert("RGB")
    done = processor.images(images=[image], return_tensors="np")
    count = done["image_grid_thw"][0].prod() // processor.images.merge_size**2
    text = text.replace("<|image_pad|>", "<|image_pad|>" * int(count))
    return done["pixel_values"], processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def speed(processor: Processor, paths: Sequence[str], spare: str, console: Console) -> dict:
    problems = problems_of(paths)

    def build(workers: int, warm: bool) -> tuple[float, float]:
        with ImageStore(workers, 4096 if warm else 0) as store, ThreadPoolExecutor(max(workers, 1)) as threads:
            builder = PromptBuilder(processor, "suffix", 10**6, 10**6, store)

            def run(part: Sequence[Problem]) -> None:
                collections.deque(threads.map(lambda problem: bool(builder.build(problem).tokens[0]), part), maxlen=0)

            run(problems if warm else problems_of([spare]) * 4 * workers)  # the start of workers is not what is timed
            found = timed(lambda: run(problems))
            assert not builder.skipped and store.counters()["hits"] == (len(problems) if warm else 0)
            return found

    def direct() -> tuple[float, float]:
        return timed(lambda: collections.deque((plainly(processor, path) for path in paths), maxlen=0))

    sides = {"transformers directly": direct}
    for warm in (False, True):
        for workers in (0, 1, 2):
            name = f"ours, workers={workers}, {'all cached' if warm else 'nothing cached'}"
            sides[name] = lambda workers=workers, warm=warm: build(workers, warm)
    for path in paths[:3]:  # equal work: the first image warms up both sides as well
        patches, tokens = plainly(processor, path)
        prompt = PromptBuilder(processor, "suffix", 10**6, 10**6).build(problems_of([path])[0])
        ours = pixel_values(prompt.patches, processor.config.vision)
        assert np.allclose(patches, ours, atol=1e-6) and np.array_equal(tokens, prompt.tokens), path
    taken = {name: [] for name in sides}
    for number in range(_ROUNDS.value):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            taken[name].append(sides[name]())
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in taken.items()}
    base = medians["transformers directly"][1]
    table = Table(title=f"{len(paths)} images, medians of {_ROUNDS.value} rounds; load {os.getloadavg()[0]:.1f}")
    for column in ("", "images/s", "CPU ms an image", "images/s per core", "CPU against transformers"):
        table.add_column(column, justify="right" if column else "left")
    for name, (wall, cpu) in medians.items():
        row = len(paths) / wall, 1e3 * cpu / len(paths), len(paths) / cpu, 100 * (cpu / base - 1)
        table.add_row(name, f"{row[0]:.1f}", f"{row[1]:.1f}", f"{row[2]:.1f}", f"{row[3]:+.1f} %")
    console.print(table)
    return {
        name: {"images_per_s": len(paths) / wall, "images_per_cpu_s": len(paths) / cpu, "overhead": cpu / base - 1}
        for name, (wall, cpu) in medians.items()
    }


# ---------------------------------------------------------------------- memory


def memory(processor: Processor, paths: Sequence[str], console: Console) -> dict:
    problems, here = problems_of(paths), psutil.Process()
    order = Curriculum().arrange([problems], 0, 16)
    total = sum(np.prod(processor.resized(*ImageStore().size(path))) * 3 for path in paths)
    batch, every = 16, max(_SAMPLES.value // 40, 16)
    with ImageStore(_WORKERS.value, int(total / 2.5) >> 20) as store:
        builder = PromptBuilder(processor, "suffix", 10**6, 10**6, store)
        batches = loader.batches(lambda number: builder.build(order[number]), batch)
        seen, curve, started = 0, [], time.perf_counter()
        while seen < _SAMPLES.value:
            next(batches)
            seen += batch
            if seen // every > len(curve):
                parent = here.memory_info().rss / 2**20
                children = [child.memory_info().rss / 2**20 for child in here.children()]
                curve.append((seen, parent, sum(children), store.counters()["bytes"] / 2**20))
        seconds, counters = time.perf_counter() - started, store.counters()
    settled = [(seen, parent + workers) for seen, parent, workers, _ in curve if seen >= _SAMPLES.value // 10]
    first, growth = settled[0][1], max(size for _, size in settled) / settled[0][1] - 1
    table = Table(
        title=f"{_SAMPLES.value} samples of {len(paths)} files, {total / 2**20:.0f} MiB resized, MiB resident"
    )
    for column in ("samples", "this process", f"{_WORKERS.value} workers", "together", "of them cached"):
        table.add_column(column, justify="right")
    for seen, parent, workers, cached in curve[:: max(len(curve) // 10, 1)]:
        table.add_row(str(seen), *(f"{size:.0f}" for size in (parent, workers, parent + workers, cached)))
    console.print(table)
    top = max(parent + workers for _, parent, workers, _ in curve)
    bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * (parent + workers) / top)] for _, parent, workers, _ in curve)
    console.print(f"0 to {top:.0f} MiB |{bars}|")
    console.print(
        f"greatest after the first tenth: {100 * growth:+.1f} % (at most 5); {seen / seconds:.0f} samples/s, "
        f"{100 * counters['hits'] / (counters['hits'] + counters['misses']):.0f} % from the cache"
    )
    return {"mib_after_a_tenth": first, "growth": growth, "last": settled[-1][1] / first - 1, **counters}


def main(_) -> None:
    console, figures = Console(width=120), {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        skeleton = fresh.write_skeleton(folder / "model", [QUESTION, INSTRUCTION, "user assistant"], ARCHITECTURE)
        processor = Processor.from_directory(skeleton)
        if "speed" in _PARTS.value:
            spare, *paths = write(folder / "speed", _IMAGES.value + 1, (300, 200), (2000, 1500))
            shared = os.environ.get("CAPCUR_SHARED_DATA", "")
            if shared:
                real = sorted(str(path) for path in Path(shared, "mathvision", "images").iterdir())
                paths += real[:: max(len(real) // _IMAGES.value, 1)][: _IMAGES.value]
            figures |= {"images": len(paths), "speed": speed(processor, paths, spare, console)}
        if "memory" in _PARTS.value:
            paths = write(folder / "memory", FILES, (100, 80), (360, 300))
            figures["memory"] = memory(processor, paths, console)
    print(json.dumps(figures))
    if {"speed", "memory"} <= figures.keys():
        found = {name: side["overhead"] for name, side in figures["speed"].items()}
        workers = ("0", "1", "2")
        record.write(
            {
                "images": figures["images"], "samples": _SAMPLES.value, "growth": figures["memory"]["growth"],
                "overhead": {n: found[f"ours, workers={n}, nothing cached"] for n in workers},
                "overhead_cached": found["ours, workers=0, all cached"],
            },
            [*(f"capcur_jax/data/{name}.py" for name in ("prompts", "images", "image_*", "loader")),
             "capcur_jax/models/inputs.py"],
        )  # fmt: skip


if __name__ == "__main__":
    app.run(main)
