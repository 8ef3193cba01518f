"""Asks a checkpoint one question and prints its answer as it comes.

python -m capcur_jax.generate [--checkpoint=DIR] [--image=FILE ...] --prompt=TEXT [--json]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from capcur_jax.data.problem import IMAGE_MARK, Problem
from capcur_jax.errors import InputError
from capcur_jax.hub import download
from capcur_jax.presets import TINY_CHECKPOINT
from capcur_jax.records import streams
from capcur_jax.records.jsonl import to_json

if TYPE_CHECKING:  # what costs seconds to import waits until the options are known to be good
    from capcur_jax.models.inputs import Processor, Prompt


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options. Exits with a usage line where they can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m capcur_jax.generate",
        description="Asks a checkpoint one question and prints its answer as it comes; everything else goes to stderr.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", default=TINY_CHECKPOINT, metavar="DIR",
        help="a Hugging Face checkpoint directory, or OWNER/NAME of one on the Hub (default: the small one that comes "
        "with this package)")  # fmt: skip
    add("--prompt", required=True, metavar="TEXT",
        help=f"the question; {IMAGE_MARK} marks in it say where the images go, else they come first")  # fmt: skip
    add("--image", action="append", default=[], metavar="FILE", help="an image; repeat it for several, in their order")
    add("--instruct", action="store_true", help="put the training's instruction (think, then box) after the question")
    add("--max_new_tokens", type=int, default=256, metavar="N", help="the longest answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T",
        help="0 (default) always takes the likeliest token, 1 samples as training does")  # fmt: skip
    add("--top_p", type=float, default=1.0, metavar="P",
        help="sample only from the likeliest tokens of this probability (default: %(default)s, all)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: %(default)s)")
    add("--min_pixels", type=int, default=0, metavar="N", help="enlarge smaller images (0: the checkpoint's bound)")
    add("--max_pixels", type=int, default=0, metavar="N", help="shrink larger images (0: the checkpoint's bound)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="type of parameters and computation (default: float32 on a CPU, else bfloat16)")  # fmt: skip
    add("--json", action="store_true",
        help="print one JSON line instead: prompt_ids (image tokens expanded), ids (with the end token where it came), "
        "logprobs (at the sampling temperature; at 1 where that is 0), text")  # fmt: skip
    return parser.parse_args(arguments)


def question(options: argparse.Namespace) -> Problem:
    """The options' question, as a row of data would hold it. Raises InputError for what such a row may not hold."""
    text, images = options.prompt, tuple(options.image)
    if not text.strip():
        raise InputError("--prompt is empty; give the question")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError("--prompt is not UTF-8; check the terminal's encoding")
    marks = text.count(IMAGE_MARK)
    if marks not in (0, len(images)):
        raise InputError(
            f"--prompt has {marks} {IMAGE_MARK} marks for {len(images)} images; give one mark an image, or no mark"
        )
    return Problem("--prompt", text, answer="unknown", images=images)  # no answer would mean no instruction


def text_pieces(tokens: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of the tokens, each piece as soon as it is sure; joined, the pieces are the text of all tokens.

    A character may take several tokens of a byte-level tokenizer. Its first bytes decode to U+FFFD, so what ends with
    one is held back until more comes.
    """
    held: list[int] = []
    for token in tokens:
        held.append(token)
        text = decode(held)
        if not text.endswith("\ufffd"):
            yield text
            held.clear()
    yield decode(held)


def build(options: argparse.Namespace, processor: Processor) -> Prompt:
    """The options' prompt, rendered and its images loaded as in training. Raises InputError."""
    problem = question(options)
    from capcur_jax.data.prompts import PromptBuilder
    from capcur_jax.models.inputs import BadInput

    builder = PromptBuilder(processor, "suffix" if options.instruct else "none", sys.maxsize, sys.maxsize)
    published = processor.config.published
    context = {**published, **published.get("text_config", {})}.get("max_position_embeddings", sys.maxsize)
    try:
        tokens = builder.measure(problem).tokens  # before any pixel is decoded
        if tokens + options.max_new_tokens > context:
            raise InputError(
                f"{tokens} prompt tokens and --max_new_tokens={options.max_new_tokens} exceed the checkpoint's "
                f"{context} positions; shorten the prompt, or lower --max_new_tokens or --max_pixels"
            )
        return builder.build(problem)
    except BadInput as error:
        raise InputError(str(error).replace("take the row out", "give another --image")) from None


def answer(options: argparse.Namespace) -> None:
    """Prints the answer. Raises InputError."""
    question(options)
    for name in ("min_pixels", "max_pixels"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name} is below 0; give a number of pixels, or 0 for the checkpoint's own")
    checkpoint = download.checkpoint(options.checkpoint, "--checkpoint")
    if not checkpoint.is_dir():
        raise InputError(
            f"--checkpoint={checkpoint}: no such directory; give a Hugging Face checkpoint directory "
            "(config.json, *.safetensors, tokenizer files, preprocessor_config.json), or OWNER/NAME of one on the Hub"
        )
    import jax
    import jax.numpy as jnp

    from capcur_jax.devices import drivers
    from capcur_jax.models import huggingface
    from capcur_jax.models.batching import Buckets, PromptSize
    from capcur_jax.models.inputs import Processor
    from capcur_jax.rollout.engine import Sampling
    from capcur_jax.rollout.local.engine import LocalEngine

    try:
        sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    drivers.without_drivers_cpu()
    drivers.keep_programs()
    _tell(f"reading {checkpoint}")
    processor = Processor.from_directory(checkpoint, options.min_pixels, options.max_pixels)
    prompt = build(options, processor)
    tokens, images = len(prompt), PromptSize.of(prompt).images
    dtype = jnp.dtype(options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    engine = LocalEngine(
        huggingface.load(checkpoint, dtype=dtype, param_dtype=dtype),
        processor,
        slots=1,
        buckets=Buckets(()).holding([PromptSize.of(prompt)], 1, processor.config.vision, dtype),
    )
    device = jax.devices()[0].device_kind
    _tell(f"{tokens} prompt tokens, {sum(images)} image patches, {dtype.name} on {device}; compiling")

    ids: list[int] = []
    logprobs: list[float] = []
    times: list[float] = []

    def drawn() -> Iterator[int]:
        for token, logprob in engine.stream(prompt, sampling, options.seed):
            ids.append(token)
            logprobs.append(logprob)
            times.append(time.monotonic())
            yield token

    text = ""
    for piece in text_pieces(drawn(), processor.decode):
        text += piece
        if not options.json:
            print(piece, end="", flush=True)
    done = {"prompt_ids": prompt.tokens.tolist(), "ids": ids, "logprobs": logprobs, "text": text}
    print(to_json(done) if options.json else "", flush=True)
    rate = f", {(len(ids) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(ids) > 1 else ""
    cut = "" if ids[-1] in processor.end_tokens else f"; cut off at --max_new_tokens={sampling.max_new_tokens}"
    _tell(f"{len(ids)} tokens{rate}{cut}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line. Exits with a line on stderr where something that it was given can't be used."""
    options = parse(arguments)
    try:
        answer(options)
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    streams.prepare()
    main()
