"""What goes to an SGLang server and comes back from it, without one."""

import base64
import copy
import io
import json

import numpy as np
import pytest
from PIL import Image

from capcur_jax.errors import RolloutError
from capcur_jax.models.inputs import Processor
from capcur_jax.rollout.engine import Sampling, Span
from capcur_jax.rollout.sglang import wire
from tests.conftest import random_image

SIZES = [(23, 37), (8, 8), (90, 11), (64, 64), (41, 130)]


@pytest.fixture(params=["checkpoint", "windowed_checkpoint", "nine_checkpoint"], scope="module")
def any_processor(request):
    return Processor.from_directory(request.getfixturevalue(request.param))


def prepare(processor, *sizes, text="What shape is in the image?"):
    images = [random_image(*size, seed=number) for number, size in enumerate(sizes)]
    return processor.prepare(processor.render([None] * len(images) + [text]), images)


# ---------------------------------------------------------------------- images


def test_images_come_out_of_patches_as_they_went_in(any_processor):
    """Through PNG and the processor again: the same patches, bit for bit, whatever the image was."""
    random = np.random.default_rng(0)
    noise = [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]
    text = any_processor.render([None] * len(noise) + ["x"])
    prompt = any_processor.prepare(text, noise)
    vision = any_processor.config.vision
    decoded = [
        Image.open(io.BytesIO(base64.b64decode(wire.png(image)))) for image in wire.images(prompt, any_processor)
    ]
    sides = [(w * vision.patch_size, h * vision.patch_size) for _, h, w in prompt.grids]
    assert [image.size for image in decoded] == sides
    again = any_processor.prepare(text, decoded)
    assert again.grids == prompt.grids
    np.testing.assert_array_equal(again.patches, prompt.patches)


def test_an_image_that_needs_no_resizing_is_the_very_image(any_processor):
    side = any_processor.config.vision.patch_size * any_processor.config.vision.merge_size
    pixels = np.random.default_rng(1).integers(0, 256, (3 * side, 4 * side, 3), dtype=np.uint8)
    prompt = any_processor.prepare(any_processor.render([None, "x"]), [Image.fromarray(pixels)])
    (image,) = wire.images(prompt, any_processor)
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_a_prompt_without_images_has_none(any_processor):
    assert wire.images(prepare(any_processor), any_processor) == []


# ---------------------------------------------------------------------- token ids


@pytest.mark.parametrize("sizes", [(), SIZES[:1], SIZES[:3]])
def test_each_image_leaves_one_placeholder_and_the_rest_stays(any_processor, sizes):
    prompt = prepare(any_processor, *sizes)
    known = any_processor.config
    ids = wire.contract(prompt, known.image_token, known.vision.merge_size)
    rendered = any_processor.render([None] * len(sizes) + ["What shape is in the image?"])
    assert ids == any_processor.tokenize(rendered, len(sizes)).tolist()


def test_a_prompt_whose_tokens_do_not_fit_its_grids_is_refused(processor):
    prompt = prepare(processor, (23, 37), (40, 40))
    image, merge = processor.config.image_token, processor.config.vision.merge_size
    at = int(np.flatnonzero(prompt.tokens == image)[3])
    for tokens in (np.delete(prompt.tokens, at), np.insert(prompt.tokens, at, image), prompt.tokens[: at + 1]):
        bad = copy.copy(prompt)
        object.__setattr__(bad, "tokens", tokens)
        with pytest.raises(ValueError, match="image tokens"):
            wire.contract(bad, image, merge)


# ---------------------------------------------------------------------- the request


def test_the_request_says_everything_that_a_default_could_change(processor):
    prompt = prepare(processor, (23, 37))
    body = wire.payload(prompt, processor, Sampling(9, 0.7, 0.9, 40), 5, "name", ["aW1hZ2U="])
    sent = body["sampling_params"]
    assert (sent["n"], sent["max_new_tokens"], sent["temperature"], sent["top_p"], sent["top_k"]) == (
        5,
        9,
        0.7,
        0.9,
        40,
    )
    assert sent["stop_token_ids"] == list(processor.end_tokens) and len(processor.end_tokens) == 2
    assert {int(token) for token in sent["logit_bias"]} == set(processor.banned_tokens)
    assert all(np.exp(np.float32(bias)) == 0 for bias in sent["logit_bias"].values())
    assert body["return_logprob"] is True and body["rid"] == "name" and body["image_data"] == [["aW1hZ2U="]]
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert wire.payload(prompt, processor, Sampling(9), 1, "name", ["aW1hZ2U="])["image_data"] == ["aW1hZ2U="]
    assert "image_data" not in wire.payload(prepare(processor), processor, Sampling(9), 5, "name")


@pytest.mark.parametrize(
    ("sampling", "want"), [(Sampling(4), (1.0, 1.0, -1)), (Sampling(4, 0.0, 0.5, 0), (0.0, 1.0, -1))]
)
def test_no_limit_and_greedy(processor, sampling, want):
    sent = wire.parameters(sampling, processor)
    assert (sent["temperature"], sent["top_p"], sent["top_k"]) == want


def test_seeds_make_a_request_for_each_sample(processor):
    prompt = prepare(processor, (23, 37), (40, 40))
    body = wire.payload(prompt, processor, Sampling(9), 3, "name", ["a", "b"], [4, 5, 6])
    assert [one["sampling_seed"] for one in body["sampling_params"]] == [4, 5, 6]
    assert all("n" not in one for one in body["sampling_params"])
    assert len({tuple(ids) for ids in body["input_ids"]}) == 1 and len(body["input_ids"]) == 3
    assert body["image_data"] == [["a", "b"]] * 3 and len(set(body["rid"])) == 3


# ---------------------------------------------------------------------- the answer

SAMPLING = Sampling(4)


def answer(processor, prompt, tokens=(40, 41, 42, 43), finish="length", spans=((7, 0, 4),), **meta):
    return {
        "output_ids": list(tokens),
        "meta_info": {
            "finish_reason": {"type": finish},
            "prompt_tokens": len(prompt),
            "output_token_logprobs": [[-0.5 - number, token, None] for number, token in enumerate(tokens)],
            "weight_version": str(spans[-1][0]),
            "weight_versions": [dict(version=str(v), start=a, end=b) for v, a, b in spans],
            **meta,
        },
    }


def test_samples_are_what_the_server_gave(processor):
    prompt, end = prepare(processor, (23, 37)), processor.end_tokens[1]
    answers = [
        answer(processor, prompt, spans=((7, 0, 1), (8, 1, 4))),
        answer(processor, prompt, (40, end), "stop", ((8, 0, 2),)),
    ]
    full, stopped = wire.samples(answers, prompt, processor, SAMPLING, 2)
    assert full.tokens.tolist() == [40, 41, 42, 43] and full.tokens.dtype == np.int32 and full.finish == "length"
    np.testing.assert_array_equal(full.logprobs, np.float32([-0.5, -1.5, -2.5, -3.5]))
    assert full.spans == (Span(7, 0, 1), Span(8, 1, 4)) and full.version == 7
    assert stopped.tokens.tolist() == [40, end] and stopped.finish == "stop" and stopped.version == 8


def test_one_sample_comes_without_a_list(processor):
    prompt = prepare(processor)
    assert len(wire.samples(answer(processor, prompt), prompt, processor, SAMPLING, 1)) == 1


def test_without_spans_the_version_is_that_of_all_tokens(processor):
    prompt = prepare(processor)
    given = answer(processor, prompt, spans=((9, 0, 4),))
    del given["meta_info"]["weight_versions"]
    assert wire.samples(given, prompt, processor, SAMPLING, 1)[0].spans == (Span(9, 0, 4),)


def test_an_abort_is_no_sample_and_costs_no_other(processor):
    prompt = prepare(processor)
    aborted = {"output_ids": [40], "meta_info": {"finish_reason": {"type": "abort", "message": "why"}}}
    answers = [aborted, answer(processor, prompt), aborted]
    assert len(wire.samples(answers, prompt, processor, SAMPLING, 3)) == 1


def test_another_number_of_prompt_tokens_is_an_error_with_both_numbers_and_the_remedy(processor):
    prompt = prepare(processor, (23, 37))
    given = answer(processor, prompt, prompt_tokens=len(prompt) + 3)
    with pytest.raises(RolloutError, match=f"counts {len(prompt) + 3} tokens.*has {len(prompt)}.*preprocessor_config"):
        wire.samples(given, prompt, processor, SAMPLING, 1)


def spoil(change):
    def spoilt(given):
        change(given, given["meta_info"])

    return spoilt


BAD = {
    "a log-prob too few": spoil(lambda a, m: m["output_token_logprobs"].pop()),
    "log-probs of other tokens": spoil(lambda a, m: m["output_token_logprobs"].reverse()),
    "a token too many": spoil(lambda a, m: a["output_ids"].append(44)),
    "no tokens": spoil(lambda a, m: (a["output_ids"].clear(), m["output_token_logprobs"].clear())),
    "not finite": spoil(lambda a, m: m["output_token_logprobs"][0].__setitem__(0, float("nan"))),
    "minus infinity": spoil(lambda a, m: m["output_token_logprobs"][0].__setitem__(0, -np.inf)),
    "null": spoil(lambda a, m: m["output_token_logprobs"][0].__setitem__(0, None)),
    "above 0": spoil(lambda a, m: m["output_token_logprobs"][0].__setitem__(0, 0.5)),
    "stop without an end": spoil(lambda a, m: m["finish_reason"].update(type="stop")),
    "another reason": spoil(lambda a, m: m["finish_reason"].update(type="matched")),
    "weights of no version of ours": spoil(lambda a, m: m["weight_versions"][0].update(version="default")),
    "a gap between versions": spoil(lambda a, m: m["weight_versions"][0].update(end=3)),
    "no meta": spoil(lambda a, m: a.pop("meta_info")),
    "no ids": spoil(lambda a, m: a.pop("output_ids")),
}


@pytest.mark.parametrize("fault", BAD)
def test_an_answer_that_can_not_be_trained_on_is_refused(processor, fault):
    prompt = prepare(processor)
    given = answer(processor, prompt)
    BAD[fault](given)
    with pytest.raises(wire.BadAnswer):
        wire.samples([given, answer(processor, prompt)], prompt, processor, SAMPLING, 2)


@pytest.mark.parametrize("which", ["negative", "beyond", "banned", "end in the middle"])
def test_tokens_that_may_not_be_there_are_refused(processor, which):
    prompt = prepare(processor)
    token = {
        "negative": -1, "beyond": processor.config.text.vocabulary, "banned": processor.banned_tokens[0],
        "end in the middle": processor.end_tokens[0],
    }[which]  # fmt: skip
    with pytest.raises(wire.BadAnswer):
        wire.samples(answer(processor, prompt, (40, token, 42, 43)), prompt, processor, SAMPLING, 1)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_responses_is_refused(processor, count):
    prompt = prepare(processor)
    with pytest.raises(wire.BadAnswer, match=f"{count} responses instead of 2"):
        wire.samples([answer(processor, prompt)] * count, prompt, processor, SAMPLING, 2)
