"""Asking a checkpoint: what is printed, what it equals, and what is said when something is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import ExifTags, Image

from capcur_jax import generate
from capcur_jax.data.prompts import INSTRUCTION
from capcur_jax.errors import InputError
from capcur_jax.models.batching import Buckets
from capcur_jax.models.inputs import Processor
from capcur_jax.presets import TINY_CHECKPOINT
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.local.engine import LocalEngine
from tests.conftest import random_image

SIGHT = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Paths of two images of different size."""
    folder = tmp_path_factory.mktemp("images")
    random_image(23, 37).save(folder / "one.png")
    random_image(50, 20, seed=1).save(folder / "two.png")
    return [str(folder / "one.png"), str(folder / "two.png")]


@pytest.fixture
def ask(capsys):
    """`ask(*arguments)`: what main prints on stdout; its stderr is in `ask.said`."""

    def call(*arguments: str) -> str:
        generate.main(arguments)
        printed = capsys.readouterr()
        call.said = printed.err
        return printed.out

    return call


def built(processor, *arguments):
    return generate.build(generate.parse(arguments), processor)


def shown(processor, prompt):
    """The prompt as text, each image's tokens as one."""
    text = processor.tokenizer.decode(prompt.tokens)
    while "<|image_pad|><|image_pad|>" in text:
        text = text.replace("<|image_pad|><|image_pad|>", "<|image_pad|>")
    return text


def user(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


# ---------------------------------------------------------------------- the answer


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("checkpoint", ""),
        ("windowed_checkpoint", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),  # its template's own
    ],
)
def test_json_equals_transformers_greedy_generation(
    ask, request, images, transformers_model, transformers_inputs, name, system
):
    checkpoint = request.getfixturevalue(name)
    processor = Processor.from_directory(checkpoint)
    arguments = [f"--image={image}" for image in images] + ["--prompt=What shape is <image> and <image>?"]
    out = ask(f"--checkpoint={checkpoint}", *arguments, "--max_new_tokens=24", "--temperature=0", "--json")
    assert out.count("\n") == 1 and out.endswith("\n")
    ours = json.loads(out)
    assert list(ours) == ["prompt_ids", "ids", "logprobs", "text"]

    prompt = built(processor, *arguments)
    inputs = transformers_inputs([prompt], processor)
    theirs = transformers_model(checkpoint).generate(
        **inputs,
        do_sample=False,
        max_new_tokens=24,
        suppress_tokens=list(processor.banned_tokens),
        output_scores=True,
        return_dict_in_generate=True,
    )
    sequence = theirs.sequences[0].tolist()
    assert ours["prompt_ids"] + ours["ids"] == sequence
    logprobs = [float(s[0].log_softmax(-1)[token]) for s, token in zip(theirs.scores, ours["ids"], strict=True)]
    np.testing.assert_allclose(ours["logprobs"], logprobs, atol=1e-4)
    assert ours["text"] == processor.tokenizer.decode(ours["ids"], skip_special_tokens=True)
    sight = f"What shape is {SIGHT} and {SIGHT}?"
    assert shown(processor, prompt) == system + user(sight)
    assert (inputs["input_ids"][0] == processor.config.image_token).sum() == len(prompt.patches) // 4 > 20


def test_rows_of_patches_are_no_longer_than_an_image_on_a_cpu(ask, checkpoint, tmp_path, monkeypatch):
    """Its scores are of all patches of a row: one row of three images would have nine times those of an image."""
    made, begin = [], LocalEngine.__init__

    def watched(self, *arguments, buckets, **settings):
        made.append(buckets)
        begin(self, *arguments, buckets=buckets, **settings)

    monkeypatch.setattr(LocalEngine, "__init__", watched)
    random_image(64, 64).save(tmp_path / "image.png")
    given = [f"--image={tmp_path / 'image.png'}"] * 3
    ask(f"--checkpoint={checkpoint}", *given, "--prompt=?", "--max_new_tokens=1")
    (buckets,) = made
    assert {length for _, length in buckets.patches} == {256} and buckets.images.bucket([(256,) * 3]) == (3, 256)


def test_text_is_printed_as_it_comes(checkpoint, processor, images, monkeypatch, capsys):
    """Sampled at a temperature: random bytes, most of them no characters."""
    stream, tokens, printed = LocalEngine.stream, [], []

    def watched(*arguments):
        for token, logprob in stream(*arguments):
            tokens.append(token)
            yield token, logprob
            printed.append(capsys.readouterr().out)

    monkeypatch.setattr(LocalEngine, "stream", watched)
    arguments = [f"--checkpoint={checkpoint}", f"--image={images[0]}", "--prompt=3 x 4", "--max_new_tokens=40"]
    generate.main([*arguments, "--temperature=0.7", "--seed=6"])
    end = capsys.readouterr()
    assert len(tokens) == 40 and not set(tokens) & set(processor.banned_tokens)
    assert "".join(printed) + end.out == processor.decode(tokens) + "\n"
    assert "40 tokens" in end.err and "cut off at --max_new_tokens=40" in end.err
    for count, text in enumerate(itertools.accumulate(printed), start=1):
        assert text == processor.decode(tokens[:count]) or processor.decode(tokens[:count]).endswith("�")
    assert sum(map(bool, printed)) > 10 and "�" in "".join(printed)


def test_the_shipped_checkpoint_answers_and_ends(ask, tmp_path):
    """All defaults. It was trained to think, then box, then end."""
    image = Image.new("RGB", (64, 64), "white")
    image.paste("red", (4, 4, 24, 24))
    image.save(tmp_path / "red.png")
    arguments = ["--prompt=What color is the shape?", f"--image={tmp_path / 'red.png'}", "--instruct"]
    ours = json.loads(ask(*arguments, "--json"))
    processor = Processor.from_directory(TINY_CHECKPOINT)
    assert ours["ids"][-1] in processor.end_tokens and not set(ours["ids"][:-1]) & set(processor.end_tokens)
    assert ours["text"].startswith("<think>") and ours["text"].endswith("}") and "<|" not in ours["text"]
    assert "cut off" not in ask.said
    assert ours["prompt_ids"] == built(processor, *arguments).tokens.tolist()


# ---------------------------------------------------------------------- the stream


def test_a_stream_gives_the_tokens_of_generate(model, processor):
    """With so many end tokens that some answers end early."""
    known = Processor(processor.tokenizer, processor.images, processor.config)
    known.end_tokens = tuple(range(0, 320, 8))
    prompt = known.prepare(known.render([None, "The shape is"]), [random_image(20, 30)])
    engine = LocalEngine(model, known, slots=1, buckets=Buckets((48,), ((1, 64),)))
    finishes = set()
    for seed in range(12):
        [[whole]] = engine.generate([prompt], Sampling(12), n=1, seed=seed)
        tokens, logprobs = zip(*engine.stream(prompt, Sampling(12), seed), strict=True)
        assert list(tokens) == whole.tokens.tolist()
        np.testing.assert_allclose(logprobs, whole.logprobs, atol=1e-5)
        finishes.add(whole.finish)
    assert finishes == {"stop", "length"}


def test_a_character_of_many_tokens_is_printed_whole(processor):
    text = "aé€😀中文 a red circle é"
    tokens = processor.tokenizer(text)["input_ids"]
    assert len(tokens) > len(text)  # bytes
    pieces = list(generate.text_pieces(iter(tokens), processor.decode))
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece][:6] == ["a", "é", "€", "😀", "中", "文"]


def test_pieces_come_as_soon_as_they_are_sure(processor):
    tokens = processor.tokenizer("é€ x")["input_ids"]
    taken = []

    def coming():
        for token in tokens:
            taken.append(token)
            yield token

    for piece in generate.text_pieces(coming(), processor.decode):
        if piece:
            assert processor.decode(taken).endswith(piece)
    first = next(generate.text_pieces(coming(), processor.decode))
    assert first == "é"


def test_pieces_of_any_tokens_make_their_text(processor):
    random = np.random.default_rng(0)
    size = len(processor.tokenizer)
    for tokens in [random.integers(0, size, random.integers(0, 30)).tolist() for _ in range(300)]:
        assert "".join(generate.text_pieces(tokens, processor.decode)) == processor.decode(tokens)
    # What is no character at the very end is shown all the same.
    tokens = processor.tokenizer("x€")["input_ids"][:-1]
    assert "".join(generate.text_pieces(tokens, processor.decode)) == "x�"


def test_special_tokens_are_not_shown(processor):
    tokens = processor.tokenizer("<think>4</think> 12<|im_end|>")["input_ids"]
    assert tokens[-1] in processor.end_tokens
    assert "".join(generate.text_pieces(tokens, processor.decode)) == "<think>4</think> 12"


# ---------------------------------------------------------------------- the prompt


def test_the_instruction_comes_only_when_asked_for_and_no_system_turn(processor):
    plain = built(processor, "--prompt=What is 3 x 4?")
    assert shown(processor, plain) == user("What is 3 x 4?")
    instructed = built(processor, "--prompt=What is 3 x 4?", "--instruct")
    assert shown(processor, instructed) == user(f"What is 3 x 4? {INSTRUCTION}")


def test_marks_place_the_images_in_their_order(processor, images):
    one, two = (f"--image={image}" for image in images)
    first = built(processor, one, two, "--prompt=Same?")
    assert shown(processor, first) == user(f"{SIGHT}{SIGHT}Same?")
    marked = built(processor, one, two, "--prompt=Is <image> like <image>?")
    assert shown(processor, marked) == user(f"Is {SIGHT} like {SIGHT}?")
    turned = built(processor, two, one, "--prompt=Is <image> like <image>?")
    assert marked.grids == first.grids == turned.grids[::-1] and marked.grids[0] != marked.grids[1]


def test_an_image_is_loaded_as_in_training(processor, tmp_path):
    """Transparent, and lying on its side by its EXIF."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = random_image(60, 23).convert("RGBA")
    image.save(tmp_path / "lying.png", exif=exif)
    prompt = built(processor, f"--image={tmp_path / 'lying.png'}", "--prompt=x")
    upright = image.rotate(-90, expand=True).convert("RGB")
    np.testing.assert_array_equal(prompt.patches, processor.prepare(processor.render([None, "x"]), [upright]).patches)


# ---------------------------------------------------------------------- what is wrong


@pytest.fixture(scope="module")
def broken(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("broken") / "cut.png"
    with open(images[0], "rb") as file:
        path.write_bytes(file.read()[:300])
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image=/nowhere.png", "--prompt=x"], ["/nowhere.png", "no such image", "give another --image"]),
        (["--image={broken}", "--prompt=x"], ["cut.png", "not a readable image", "give another --image"]),
        (["--image={good}", "--prompt=<image> or <image>?"], ["2 <image> marks for 1 images", "one mark an image"]),
        (["--prompt=<image>?"], ["1 <image> marks for 0 images"]),
        (["--prompt=Is it \ufdd0?"], ["U+FDD0", "take it out"]),
        (["--prompt= "], ["--prompt is empty"]),
        (["--prompt=\udcff"], ["--prompt is not UTF-8"]),
        (["--prompt=" + "word " * 300], ["prompt tokens", "--max_new_tokens=256", "512 positions", "shorten"]),
        (["--prompt=x", "--max_new_tokens=600"], ["--max_new_tokens=600 exceed", "512 positions"]),
        (["--prompt=x", "--max_new_tokens=0"], ["--max_new_tokens = 0; it must be at least 1"]),
        (["--prompt=x", "--temperature=-1"], ["--temperature = -1.0", "0 (greedy)"]),
        (["--prompt=x", "--temperature=nan"], ["--temperature = nan"]),
        (["--prompt=x", "--top_p=0"], ["--top_p = 0.0"]),
        (["--prompt=x", "--max_pixels=-1"], ["--max_pixels is below 0"]),
        (["--prompt=x", "--checkpoint=/nowhere"], ["--checkpoint=/nowhere: no such directory", "Hugging Face"]),
        (["--prompt=x", "--checkpoint={folder}"], ["config.json does not exist"]),
    ],
    ids=lambda value: value[-1][:30] if isinstance(value, list) else None,
)
def test_mistakes_get_one_clear_line(arguments, words, checkpoint, images, broken, tmp_path, capsys):
    given = [a.format(broken=broken, good=images[0], folder=tmp_path) if "{" in a else a for a in arguments]
    with pytest.raises(SystemExit) as caught:
        generate.main([f"--checkpoint={checkpoint}", *given])
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message, message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: --prompt"),
        (["--prompt=x", "--temperature=warm"], "invalid float value: 'warm'"),
        (["--prompt=x", "--dtype=int8"], "'float32', 'bfloat16'"),
        (["--prompt=x", "--max_new=3"], "unrecognized arguments: --max_new=3"),
    ],
)
def test_unreadable_options_get_the_usage(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        generate.main(arguments)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and words in said and said.startswith("usage: python -m capcur_jax.generate")


def test_the_context_is_found_in_flat_configs_too(processor):
    """Qwen2.5-VL's published config.json has no text_config."""
    known = Processor(processor.tokenizer, processor.images, processor.config)
    known.config = dataclasses.replace(processor.config, published={"max_position_embeddings": 300})
    with pytest.raises(InputError, match="300 positions"):
        built(known, "--prompt=" + "word " * 20)
