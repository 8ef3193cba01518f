"""Our model against transformers' PyTorch one, float32, both read from the same checkpoint directory."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from capcur_jax.models import huggingface
from capcur_jax.models.batching import Buckets
from capcur_jax.models.inputs import Processor, Prompt, mrope_positions
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.models.weight_files import neutral
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.local.engine import LocalEngine
from tests.packed import lengths_of, padded

ROWS, TOKENS, PATCHES = 4, 96, (4, 288)


class Pair(NamedTuple):
    ours: QwenVL
    theirs: Any
    processor: Processor
    step: Any  # (parameters, batch) -> (loss, logits), gradient


def next_token_loss(logits, batch):
    """Mean cross-entropy over all next tokens of the prompts."""
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(logprobs, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    mask = (jnp.arange(batch.tokens.shape[1]) < lengths_of(batch)[:, None])[:, 1:]
    return -jnp.where(mask, chosen, 0).sum() / mask.sum()


@pytest.fixture(scope="module", params=["tied", "untied", "nine", "windowed", "windowed untied", "windowed nine"])
def pair(request, transformers_model):
    name = "checkpoint" if request.param == "tied" else request.param.replace(" ", "_") + "_checkpoint"
    directory = request.getfixturevalue(name)
    ours = huggingface.load(directory)
    graph = nnx.graphdef(ours)

    def loss(parameters, batch):
        model = nnx.merge(graph, parameters)
        logits = model.logits(model.prefill(batch)[0])
        return next_token_loss(logits, batch), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return Pair(ours, transformers_model(directory), Processor.from_directory(directory), step)


@pytest.fixture(scope="module")
def make_prompts(make_image):
    """Prompts by name, made with a processor; sizes are odd on purpose."""
    sizes = [(37, 50), (64, 20), (23, 41), (50, 37)]
    images = [make_image(*size, seed=seed) for seed, size in enumerate(sizes)]

    def make(processor: Processor, kind: str) -> list[Prompt]:
        one = processor.prepare(processor.render([None, "What shape is in the image?"]), images[:1])
        text = [
            processor.prepare(processor.render([question], system=system))
            for question, system in (("What is 3 x 4?", ""), ("The shape is a red circle.", "boxed{}"))
        ]
        two = processor.prepare(processor.render(["Red", None, "or circle", None, "?"]), images[1:3])
        last = processor.prepare(processor.render(["What is 12 = 3 x 4 in", None]), images[3:])
        return {"text": text, "one image": [one], "batch": [one, text[0], two, last]}[kind]

    return make


def batch_of(prompts: list[Prompt], processor: Processor):
    """A row for each prompt; those that are left hold one pad token, which predicts nothing."""
    config, pad = processor.config, processor.pad_token
    blank = Prompt(
        tokens=np.array([pad], np.int32),
        positions=np.zeros((3, 1), np.int32),
        next_position=1,
        visual_index=np.array([-1], np.int32),
        patches=np.zeros((0, config.vision.patch_bytes), np.uint8),
        grids=(),
    )
    rows, patches = (ROWS, PATCHES) if any(prompt.grids for prompt in prompts) else (2, (0, 0))
    return padded(prompts + [blank] * (rows - len(prompts)), processor, TOKENS, patches)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("kind", ["text", "one image", "batch"])
def test_logits_and_gradients_equal_transformers(pair, make_prompts, transformers_inputs, record_property, kind):
    prompts = make_prompts(pair.processor, kind)
    (loss, logits), gradient = pair.step(nnx.state(pair.ours), batch_of(prompts, pair.processor))

    inputs = transformers_inputs(prompts, pair.processor)
    pair.theirs.zero_grad(set_to_none=True)
    their_logits = pair.theirs(**inputs).logits
    mask = inputs["attention_mask"].bool()
    targets = torch.where(mask, inputs["input_ids"], -100)[:, 1:]
    their_loss = torch.nn.functional.cross_entropy(their_logits[:, :-1].flatten(0, 1), targets.flatten())
    their_loss.backward()

    here = mask.numpy()
    difference = np.abs(np.asarray(logits)[: len(prompts), : here.shape[1]] - their_logits.detach().numpy())[here].max()
    assert difference < 1e-4
    assert float(loss) == pytest.approx(their_loss.item(), abs=1e-5)

    # transformers' names in memory are those of another era than the published files' of Qwen2.5-VL.
    ours = {neutral(name): value for name, value in huggingface.published_tensors(gradient, pair.ours.config)}
    theirs = {neutral(name): value for name, value in pair.theirs.named_parameters()}
    assert set(ours) == set(theirs)
    # The vision tower is the one part that a loss over text alone does not reach.
    unused = {name for name in ours if "visual." in name} if kind == "text" else set()
    for name in unused:
        assert theirs[name].grad is None
        assert not ours[name].any(), name
    errors = {name: relative(ours[name], theirs[name].grad.numpy()) for name in set(ours) - unused}
    assert all(ours[name].any() for name in errors)
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-3, worst
    record_property("logits", f"{difference:.1e}")
    record_property("gradient", f"{errors[worst]:.1e} ({worst})")


@pytest.mark.parametrize("sizes", [[], [(37, 50)], [(64, 20), (23, 41)], [(16, 16), (120, 24), (9, 100)]], ids=str)
def test_positions_equal_transformers(pair, make_image, transformers_inputs, sizes):
    parts = ["boxed{}", *[part for _ in sizes for part in (None, "12")]]
    long = pair.processor.prepare(pair.processor.render(parts), [make_image(*size) for size in sizes])
    short = pair.processor.prepare(pair.processor.render(["What is 3 x 4?"]))
    prompts = [long, short]
    inputs = transformers_inputs(prompts, pair.processor)
    kinds = inputs.get("mm_token_type_ids", torch.zeros_like(inputs["input_ids"]))
    theirs, deltas = pair.theirs.model.get_rope_index(
        inputs["input_ids"], kinds, inputs.get("image_grid_thw"), attention_mask=inputs["attention_mask"]
    )
    batch = padded(prompts, pair.processor, 512, (2, 2016))
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(batch.positions[row, :, : len(prompt)], theirs[:, row, : len(prompt)].numpy())
        assert prompt.next_position == deltas[row].item() + len(prompt)
    # What a decode position counts is not tokens: an image is worth its longer side.
    assert (long.next_position < len(long)) == bool(sizes)


def test_positions_of_a_hand_made_prompt():
    tokens = np.array([1, 9, 9, 9, 9, 9, 9, 2, 9, 9, 3])
    positions, following = mrope_positions(tokens, [(1, 4, 6), (1, 4, 2)], image_token=9, merge=2)
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 5, 7],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 5, 7],
    ]
    assert following == 8


def test_greedy_generation_equals_transformers(pair, make_prompts, transformers_inputs, record_property):
    """Image and text prompts in one packed row, two responses each. On both sides one token is banned that greedy
    decoding likes best, and one ends a response that it comes to late."""
    prompts, n, length = make_prompts(pair.processor, "batch")[:3], 2, 32
    known = copy.copy(pair.processor)

    def reference():
        out = pair.theirs.generate(
            **transformers_inputs(prompts, known, side="left"),
            do_sample=False,
            max_new_tokens=length,
            suppress_tokens=list(known.banned_tokens),
            eos_token_id=list(known.end_tokens),
            pad_token_id=known.pad_token,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return out.sequences[:, -len(out.scores) :].numpy(), torch.stack(out.scores, dim=1).log_softmax(-1).numpy()

    known.banned_tokens += (int(np.bincount(reference()[0].ravel()).argmax()),)
    free, _ = reference()
    late = [int(token) for row in free for token in row[16:] if token not in row[:16]]
    known.end_tokens += (late[0],)
    tokens, logprobs = reference()

    buckets = Buckets((2 * TOKENS,), (PATCHES,), longest=TOKENS)
    assert sum(map(len, prompts)) <= buckets.row and max(map(len, prompts)) <= TOKENS
    engine = LocalEngine(pair.ours, known, slots=n * len(prompts), buckets=buckets, prefill=len(prompts))
    groups = engine.generate(prompts, Sampling(length, temperature=0.0), n=n)
    for row, samples in enumerate(groups):
        ends = np.flatnonzero(np.isin(tokens[row], known.end_tokens))
        expected = tokens[row, : ends[0] + 1] if len(ends) else tokens[row]
        for sample in samples:
            assert sample.tokens.tolist() == expected.tolist()
            assert sample.finish == ("stop" if len(ends) else "length")
            chosen = logprobs[row, np.arange(len(expected)), expected]
            np.testing.assert_allclose(sample.logprobs, chosen, atol=1e-4)
    assert max(len(samples[0].tokens) for samples in groups) >= 16
    assert any(samples[0].finish == "stop" for samples in groups)
    record_property("lengths", [len(samples[0].tokens) for samples in groups])
