"""The axes that public functions declare are checked in the tests, and each letter is in the legend."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from capcur_jax import axes
from capcur_jax.devices import sharding
from capcur_jax.learner import objectives
from capcur_jax.learner.packing import Responses
from capcur_jax.models.attention import Packed, Places, attend
from capcur_jax.models.decoding import DecodingModel
from capcur_jax.models.logprobs import token_logprobs
from capcur_jax.models.paged import Tables
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.rollout.engine import Sample, Sampling
from capcur_jax.rollout.local.sampling import sample_tokens
from tests.packed import padded

PACKAGE = Path(axes.__file__).parent
ROOMS = ("devices", "learner", "models", "rollout")
B, C, D, G, K, H, N, R, S, T, V = 2, 7, 8, 3, 1, 4, 2, 6, 9, 5, 11


def zeros(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


RxT, MASK, TOKENS = zeros(R, T), np.ones((R, T), bool), zeros(R, T, dtype=np.int32)
COUNTED = {"total_tokens": 1, "total_rows": 1, "constant_length": 1}
PROMPTS = Packed(Places(*(zeros(B, n, dtype=np.int32) for n in (1, 1, 0, 0))), prompt=T, response=0)
WEIGHED = {"mode": "mask", "cap": 2.0}

# A function, arguments that it takes, and the same with a shape or a type that is wrong.
BORDERS = {
    "group_advantages": (objectives.group_advantages, (zeros(B, G),), (zeros(R),)),
    "policy_terms": (objectives.policy_terms, (RxT, RxT, zeros(R), MASK), (RxT, RxT, zeros(T), MASK)),
    "divergence": (objectives.divergence, ("k3", RxT, RxT), ("k3", RxT, RxT.T)),
    "importance_weights": (
        lambda *given: objectives.importance_weights(*given, **WEIGHED), (RxT, RxT, MASK), (RxT, RxT, MASK[:, :1])
    ),
    "row_weights": (
        lambda *given: objectives.row_weights(*given, "token", **COUNTED),
        (zeros(R, dtype=np.int32), MASK[:, 0]), (zeros(R, dtype=np.int32), MASK[:1, 0]),
    ),
    "masked_sum": (objectives.masked_sum, (RxT, MASK), (RxT, RxT)),
    "response_mask": (objectives.response_mask, (zeros(R, dtype=np.int32), T), (TOKENS, T)),
    "token_logprobs": (
        token_logprobs, (zeros(R, T, D), zeros(D, V), TOKENS), (zeros(R, T, D), zeros(D, V), TOKENS[:1])
    ),
    "token_logprobs, width": (
        token_logprobs, (zeros(R, T, D), zeros(D, V), TOKENS), (zeros(R, T, D), zeros(D + 1, V), TOKENS)
    ),
    "attend": (
        lambda q, k, v: attend(q, k, v, PROMPTS, sharding.single()),
        (zeros(B, T, N, H), zeros(B, T, K, H), zeros(B, T, K, H)),
        (zeros(B, T, N, H), zeros(B, T, K, H), zeros(B, T, N, H)),
    ),
    "Responses.of": (
        Responses.of, (zeros(R), zeros(R), RxT, RxT), (zeros(R), zeros(R), RxT, RxT[:, 1:])
    ),
    "sample_tokens": (
        lambda logits: sample_tokens(logits, jax.random.split(jax.random.key(0), C), Sampling(1)),
        (zeros(C, V),), (zeros(C + 1, V),),
    ),
    "Sample.whole": (
        Sample.whole, (TOKENS[0], RxT[0], "stop", 0), (TOKENS[0], RxT[0, 1:], "stop", 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("border", BORDERS)
def test_a_wrong_shape_fails_at_the_border(border):
    function, right, wrong = BORDERS[border]
    function(*right)
    with pytest.raises(TypeCheckError, match="parameter"):
        function(*wrong)


def test_a_wrong_shape_fails_at_the_model_s_borders(model, processor):
    prompt = processor.prepare(processor.render(["3 x 4"]))
    batch = padded([prompt], processor, 32)
    with pytest.raises(TypeCheckError, match="h_AxWxD"):
        QwenVL.last(zeros(T, D), batch)
    decoding, one = DecodingModel(model, gathered=False), zeros(C, dtype=np.int32)
    weights, pages = decoding.abstract_weights(nnx.state(model)), decoding.empty_pages(C, S)
    tables = Tables(np.arange(C, dtype=np.int32)[:, None], own=True)
    step = lambda positions: jax.eval_shape(  # noqa: E731
        lambda weights: decoding.step(weights, pages, one, positions, one, np.ones(C, bool), tables), weights
    )
    assert step(one)[0].shape == (C, model.config.text.vocabulary)
    with pytest.raises(TypeCheckError, match="positions_C"):
        step(one[1:])


def test_nothing_is_checked_outside_the_tests(monkeypatch):
    monkeypatch.delenv("CAPCUR_CHECK_SHAPES")
    assert axes.checked(len) is len


def declared(code: str) -> set[str]:
    """The axes in names (`q_AxTxH`) and in the annotations of arrays."""
    letters = set()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.NAME and (found := re.search(r"_((?:[A-Z]|\d)(?:x(?:[A-Z]|\d))*)$", token.string)):
            letters |= set(found[1])
    for _, shape in re.findall(r"\b(Float|Int|Bool|Key)\[[\w.]+, \"(.*?)\"\]", code):
        letters |= set(shape)
    return {letter for letter in letters if letter.isupper()}


def test_each_letter_is_in_the_legend_once():
    legend = re.findall(r"^    ([A-Z])  ", axes.__doc__, re.MULTILINE)
    assert legend == sorted(set(legend)) and declared("q_AxT: Float[Array, 'Q']; x_Z = 1") == {"A", "T", "Z"}
    unknown = {}
    for file in (file for room in ROOMS for file in (PACKAGE / room).rglob("*.py")):
        for letter in declared(file.read_text()) - set(legend):
            unknown.setdefault(letter, []).append(str(file.relative_to(PACKAGE)))
    assert not unknown
