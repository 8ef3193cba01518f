"""What must hold of the model whatever its weights: causality, isolation of samples and images, padding, the layouts
that compute a prompt once, rematerialisation, number formats, DeepStack."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from capcur_jax.errors import InputError
from capcur_jax.models import huggingface, layers
from capcur_jax.models.attention import Packed
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.logprobs import ban, token_logprobs
from capcur_jax.models.qwen_vl import PackedBatch, QwenVL
from capcur_jax.models.rope import text_angles, vision_angles
from tests.decoding import decoder
from tests.packed import lengths_of, of_responses, packed, padded

TOKENS, PATCHES = 64, 64
RESPONSES, GROUP = 6, 2  # tokens of a response, responses a prompt


class Scene(NamedTuple):
    """Two prompts in one batch: the first with two images, the second with one."""

    processor: Processor
    parts: list[list[str | None]]
    images: list[list[Any]]

    def prepare(self, images=None) -> list[Prompt]:
        made = [self.processor.render(parts) for parts in self.parts]
        return [self.processor.prepare(text, of) for text, of in zip(made, images or self.images, strict=True)]

    def collate(self, prompts: list[Prompt], tokens: int = TOKENS, patches: int = PATCHES) -> PackedBatch:
        return padded(prompts, self.processor, tokens, (len(prompts), patches))


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(request, family):
    return request.getfixturevalue({"qwen3_vl": "tied_checkpoint", "qwen2_5_vl": "windowed_checkpoint"}[family])


@pytest.fixture(scope="module")
def headed_model(request, family):
    """With a head that is no embedding."""
    return request.getfixturevalue({"qwen3_vl": "untied_model", "qwen2_5_vl": "windowed_untied_model"}[family])


@pytest.fixture(scope="module")
def scene(processor, make_image):
    parts = [["Red", None, "or", None, "circle?"], [None, "What is 3 x 4?"]]
    sizes = [[(24, 16), (16, 24)], [(17, 31)]]
    images = [[make_image(*size, seed=7 * row + i) for i, size in enumerate(of)] for row, of in enumerate(sizes)]
    return Scene(processor, parts, images)


@pytest.fixture(scope="module")
def batch(scene):
    return scene.collate(scene.prepare())


@pytest.fixture(scope="module")
def parameters(model):
    return nnx.state(model)


@pytest.fixture(scope="module")
def forward(model):
    """Logits [B, T, V] of every prompt token."""
    graph = nnx.graphdef(model)

    def logits(parameters, batch):
        model: QwenVL = nnx.merge(graph, parameters)
        return model.logits(model.prefill(batch)[0])

    return jax.jit(logits)


@pytest.fixture(scope="module")
def responses(scene):
    """Tokens [R, T] of random responses, their lengths [R] and a weight for every response token."""
    random = np.random.default_rng(3)
    tokens = random.integers(10, 300, (len(scene.parts) * GROUP, RESPONSES)).astype(np.int32)
    lengths = np.array([6, 3, 5, 6])
    weights = random.standard_normal(tokens.shape) * (np.arange(RESPONSES) < lengths[:, None])
    return tokens, lengths, weights.astype(np.float32)


def spans(scene: Scene, prompt: Prompt) -> list[slice]:
    """Where the image tokens of each image lie in the prompt."""
    start = scene.processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    starts = np.flatnonzero(prompt.tokens == start) + 1
    merge = scene.processor.config.vision.merge_size**2
    return [slice(int(at), int(at) + np.prod(grid) // merge) for at, grid in zip(starts, prompt.grids, strict=True)]


def pixels_of(batch: PackedBatch) -> np.ndarray:
    """The bytes of all patches as numbers, by which one can differentiate."""
    return batch.vision.patches.astype(np.float32)


def patches_of(batch: PackedBatch, row: int, span: slice) -> np.ndarray:
    """[R, P], True at the patches of the image whose tokens lie at `span` of a prompt, wherever it was packed."""
    shown = np.zeros(batch.vision.segments.size // 4, bool)
    shown[batch.visual_index[row, span]] = True
    return np.repeat(shown, 4).reshape(batch.vision.segments.shape)


def replaced(parameters: nnx.State, change) -> nnx.State:
    """Parameters with `change(path, value)` in the place of every value."""
    flat = [(path, leaf.replace(change(path, leaf[...]))) for path, leaf in nnx.to_flat_state(parameters)]
    return nnx.from_flat_state(flat)


def worst_tensor(ours: nnx.State, reference: nnx.State) -> tuple[float, Any]:
    """The largest relative L2 difference of a tensor and its path."""
    pairs = zip(nnx.to_flat_state(ours), nnx.to_flat_state(reference), strict=True)
    return max((float(jnp.linalg.norm(a[...] - b[...]) / jnp.linalg.norm(b[...])), p) for (p, a), (_, b) in pairs)


# --- causality and isolation ------------------------------------------------------------------------------------------


def test_a_logit_depends_on_what_precedes_it_and_on_nothing_else(scene, batch, headed_model):
    """Derivatives of the logits at one token by the embedding of every token and by every patch, padding included."""
    graph, parameters = nnx.split(headed_model)  # its head is no embedding: one row a position, whatever the token
    rows, length = batch.tokens.shape
    each = dataclasses.replace(batch, tokens=np.arange(rows * length, dtype=np.int32).reshape(rows, length))
    mix = np.random.default_rng(0).standard_normal(headed_model.config.text.vocabulary).astype(np.float32)

    def logit(table, patches, row, at):
        state = replaced(parameters, lambda path, value: table if path[-2:] == ("embed", "embedding") else value)
        model: QwenVL = nnx.merge(graph, state)
        vision = dataclasses.replace(each.vision, patches=patches)
        h, _ = model.prefill(dataclasses.replace(each, vision=vision))
        return model.logits(h)[row, at] @ mix

    derivative = jax.jit(jax.grad(logit, argnums=(0, 1)))
    table = np.asarray(headed_model.text.embed.embedding[...])[batch.tokens.reshape(-1)]
    prompts = scene.prepare()
    first, second = spans(scene, prompts[0])
    points = [(0, first.start - 1), (0, first.start), (0, second.start - 1), (0, second.start + 2)]
    points += [(row, len(prompt) - 1) for row, prompt in enumerate(prompts)]
    for row, at in points:
        by_token, by_patch = derivative(table, pixels_of(batch), row, at)
        by_token = np.abs(by_token).sum(-1).reshape(rows, length)
        here = (np.arange(rows) == row)[:, None]
        text = batch.visual_index < 0  # an image token's embedding is not read
        assert np.array_equal(by_token > 0, here & text & (np.arange(length) <= at)), (row, at)

        seen = np.zeros(batch.vision.segments.shape, bool)
        for span in spans(scene, prompts[row]):
            # All of an image is seen from its first token on: the tower looks both ways.
            seen |= patches_of(batch, row, span) & (span.start <= at)
        assert np.array_equal(np.abs(by_patch).sum(-1) > 0, seen), (row, at)


def test_images_do_not_see_each_other_in_the_vision_tower(batch, model):
    graph, parameters = nnx.split(model.visual)

    def total(patches, weight_F):
        features, deep = nnx.merge(graph, parameters)(dataclasses.replace(batch.vision, patches=patches))
        total = (features @ jnp.arange(1.0, 1 + features.shape[-1])) @ weight_F
        return total if deep is None else total + deep.sum((0, 2)) @ weight_F

    derivative = jax.jit(jax.grad(total))
    segments = batch.vision.segments
    of_feature = segments.reshape(-1, 4)[:, 0] + 100 * np.repeat(np.arange(len(segments)), segments.shape[1] // 4)
    of_patch = segments + 100 * np.arange(len(segments))[:, None]
    for image in (1, 2, 101):
        touched = np.abs(derivative(pixels_of(batch), (of_feature == image).astype(np.float32))).sum(-1) > 0
        np.testing.assert_array_equal(touched, of_patch == image)


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("blocks", ["windows", "whole images"])
def test_windowed_blocks_see_their_window_and_full_blocks_their_image(batch, model, blocks):
    """The tower with blocks of one kind; windows are cut into blocks of patches, or masked where a row is short."""
    config = dataclasses.replace(
        model.config.vision, full_blocks=() if blocks == "windows" else tuple(range(model.config.vision.depth))
    )
    tower = nnx.clone(model.visual)
    tower.config = config
    graph, parameters = nnx.split(tower)

    def total(patches, weight_F, vision):
        features, _ = nnx.merge(graph, parameters)(dataclasses.replace(vision, patches=patches))
        return (features @ jnp.arange(1.0, 1 + features.shape[-1])) @ weight_F

    derivative = jax.jit(jax.grad(total))
    # In a row of all patches that is short against a window, the mask of the whole row is used.
    short = jax.tree.map(lambda x: x[:, : 3 * config.window_patches], batch.vision)
    assert short.patches.shape[1] < batch.vision.patches.shape[1]
    for vision in (batch.vision, short):
        ids = vision.windows if blocks == "windows" else vision.segments
        assert len(np.unique(vision.windows[0])) > len(np.unique(vision.segments[0])) >= 2
        for row, number in ((0, 1), (0, 2), (1, 1)):
            here = (ids == number) & (np.arange(len(ids)) == row)[:, None]
            weight = here.reshape(-1, 4)[:, 0].astype(np.float32)
            touched = np.abs(derivative(vision.patches.astype(np.float32), weight, vision)).sum(-1) > 0
            np.testing.assert_array_equal(touched, here)


@pytest.mark.parametrize(("row", "image"), [(0, 0), (0, 1), (1, 0)])
def test_a_changed_pixel_changes_its_sample_from_its_image_on(scene, batch, parameters, forward, row, image):
    images = [list(of) for of in scene.images]
    changed = images[row][image].copy()
    x, y = changed.width // 2, changed.height // 2
    changed.putpixel((x, y), tuple(255 - value for value in changed.getpixel((x, y))))
    images[row][image] = changed
    before = np.asarray(forward(parameters, batch))
    after = np.asarray(forward(parameters, scene.collate(scene.prepare(images))))

    prompt = scene.prepare()[row]
    start = spans(scene, prompt)[image].start
    differs = (before != after).any(-1)
    assert not differs[1 - row].any()
    assert not differs[row, :start].any()
    assert differs[row, start : len(prompt)].all()
    assert np.abs(before - after).max() > 1e-3


# --- padding ----------------------------------------------------------------------------------------------------------


def test_what_lies_in_the_padding_changes_nothing(scene, batch, parameters, forward):
    random = np.random.default_rng(1)
    padding = np.arange(TOKENS) >= lengths_of(batch)[:, None]
    nowhere = batch.vision.segments == 0
    assert padding.any() and nowhere.any()
    noise = random.integers(0, 256, batch.vision.patches.shape, np.uint8)
    vision = dataclasses.replace(
        batch.vision,
        patches=np.where(nowhere[..., None], noise, batch.vision.patches),
        coordinates=np.where(nowhere[..., None], 5, batch.vision.coordinates),
    )
    littered = dataclasses.replace(
        batch,
        tokens=np.where(padding, random.integers(0, 300, batch.tokens.shape), batch.tokens).astype(np.int32),
        positions=np.where(padding[:, None], 77, batch.positions).astype(np.int32),
        vision=vision,
    )
    ours, same = forward(parameters, batch), forward(parameters, littered)
    np.testing.assert_array_equal(np.asarray(ours)[~padding], np.asarray(same)[~padding])


@pytest.mark.parametrize("kind", ["larger token bucket", "larger patch bucket", "one row", "another prompt", "alone"])
def test_the_shape_of_the_batch_changes_nothing(scene, batch, parameters, forward, kind):
    prompts = scene.prepare()
    other = {
        "larger token bucket": lambda: scene.collate(prompts, tokens=TOKENS + 32),
        "larger patch bucket": lambda: scene.collate(prompts, patches=2 * PATCHES),
        "one row": lambda: padded(prompts, scene.processor, TOKENS, (1, 4 * PATCHES)),
        "another prompt": lambda: scene.collate([*prompts, prompts[0]]),
        "alone": lambda: scene.collate(prompts[:1]),
    }[kind]()
    expected, got = np.asarray(forward(parameters, batch)), np.asarray(forward(parameters, other))
    for row, prompt in enumerate(prompts[: len(got)]):
        np.testing.assert_allclose(got[row, : len(prompt)], expected[row, : len(prompt)], atol=1e-5)


# --- a prompt computed once, decoding, rematerialisation --------------------------------------------------------------


def logprobs_of(model: QwenVL, h: jax.Array, tokens, banned) -> jax.Array:
    kernel, axis = model.unembedding()
    return token_logprobs(h, kernel, tokens, vocabulary_axis=axis, temperature=0.8, banned=banned).logprobs


@pytest.fixture(scope="module")
def rows(scene, responses):
    """Both prompts and all their responses in one packed row."""
    return packed(scene.prepare(), responses[0], scene.processor, PATCHES)


@pytest.fixture(scope="module")
def grouped(scene, rows, responses, parameters):
    """`grouped(graph)`: the weighted sum of the responses' log-probs, [R, T] of them, and the gradient, each prompt
    computed once."""
    tokens, _, weights = responses
    banned = scene.processor.banned_tokens

    def run(graph):
        def loss(parameters, rows):
            model: QwenVL = nnx.merge(graph, parameters)
            logprobs = logprobs_of(model, of_responses(model.predicting(rows), rows), tokens, banned)
            return (logprobs * weights).sum(), logprobs

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return step(parameters, rows)

    return run


@pytest.fixture(scope="module")
def once(grouped, model):
    return grouped(nnx.graphdef(model))


@pytest.fixture(scope="module")
def whole(scene, responses):
    """One row for each response: prompt and response as one sequence, what follows the response left to padding."""
    tokens, lengths, _ = responses
    rows = []
    for number, prompt in enumerate(scene.prepare()):
        for row in range(number * GROUP, (number + 1) * GROUP):
            own = tokens[row, : lengths[row]]
            positions = np.broadcast_to(prompt.next_position + np.arange(len(own)), (3, len(own)))
            rows.append(
                dataclasses.replace(
                    prompt,
                    tokens=np.concatenate([prompt.tokens, own]),
                    positions=np.concatenate([prompt.positions, positions], axis=1),
                    visual_index=np.concatenate([prompt.visual_index, np.full(len(own), -1)]),
                )
            )
    return scene.collate(rows)


def own_slots(batch: PackedBatch) -> np.ndarray:
    """[R, T]: where full sequences predict their response tokens."""
    return np.repeat(lengths_of(batch), GROUP)[:, None] - 1 + np.arange(RESPONSES)


def test_a_prompt_computed_once_equals_full_sequences(
    scene, batch, responses, parameters, model, whole, once, record_property
):
    tokens, lengths, weights = responses
    graph = nnx.graphdef(model)

    def loss(parameters, whole):
        model: QwenVL = nnx.merge(graph, parameters)
        h, _ = model.prefill(whole)
        h = jnp.take_along_axis(h, own_slots(batch)[..., None], axis=1)
        logprobs = logprobs_of(model, h, tokens, scene.processor.banned_tokens)
        return (logprobs * weights).sum(), logprobs

    (_, expected), reference = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters, whole)
    (_, logprobs), gradient = once
    mask = np.arange(RESPONSES) < lengths[:, None]
    difference = np.abs(np.asarray(logprobs) - np.asarray(expected))[mask].max()
    assert difference < 1e-5
    worst, path = worst_tensor(gradient, reference)
    assert worst < 1e-4, path
    record_property("log-probs", f"{difference:.1e}")
    record_property("gradient", f"{worst:.1e}")


def test_decoding_token_by_token_equals_full_sequences(
    scene, batch, responses, parameters, model, forward, whole, once
):
    tokens, lengths, _ = responses
    graph = nnx.graphdef(model)
    _, prompt = jax.jit(lambda parameters: nnx.merge(graph, parameters).prefill(batch))(parameters)
    decode = decoder(model)
    counts, following = lengths_of(batch), np.array([prompt.next_position for prompt in scene.prepare()])
    logits = decode(prompt, tokens, counts, following)
    full = np.asarray(forward(parameters, whole))
    for row, length in enumerate(lengths):
        start = len(scene.prepare()[row // GROUP])
        np.testing.assert_allclose(logits[row, :length], full[row, start : start + length], atol=1e-5)
    # `predicting` gives the same, one slot later: its first column comes from the prompt.
    (_, extended), _ = once
    every = jax.nn.log_softmax(ban(logits[:, :-1] / 0.8, scene.processor.banned_tokens))
    chosen = np.take_along_axis(np.asarray(every), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, extended[:, 1:], atol=1e-5)

    # An image makes positions run slower than tokens: counting tokens would be another model.
    np.testing.assert_array_equal(following, [prompt.positions.max() + 1 for prompt in scene.prepare()])
    assert (following < counts).all()
    assert np.abs(decode(prompt, tokens, counts, counts) - logits).max() > 1e-2


def equations(jaxpr) -> Iterator[Any]:
    """Every equation of a jaxpr, those of scans and the like included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for one in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_neither_loss_nor_gradient(checkpoint, rows, parameters, grouped, once, remat):
    graph = nnx.graphdef(huggingface.load(checkpoint, remat=remat))
    (loss, _), gradient = grouped(graph)
    (expected, _), reference = once
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    worst, path = worst_tensor(gradient, reference)
    assert worst < 1e-5, path

    # It does something: the tower's layers and the decoder's, prompts and responses together, are recomputed.
    def recomputed(graph) -> int:
        jaxpr = jax.make_jaxpr(lambda p: nnx.merge(graph, p).predicting(rows))(parameters)
        return sum("remat" in e.primitive.name or "checkpoint" in e.primitive.name for e in equations(jaxpr.jaxpr))

    assert recomputed(graph) == recomputed(nnx.graphdef(huggingface.load(checkpoint))) + 2


def test_an_unknown_remat_names_the_key():
    with pytest.raises(InputError, match=r"config\.model\.remat = 'some'; choose one of none, full, dots"):
        layers.scan(nnx.Dict(), lambda *_: None, None, remat="some")


# --- number formats ---------------------------------------------------------------------------------------------------


def test_bfloat16_is_as_near_to_float32_as_transformers_is(
    checkpoint, scene, batch, parameters, forward, transformers_model, transformers_inputs, record_property
):
    """Root mean square over all logits of what bfloat16 costs, on both sides against float32."""
    prompts = scene.prepare()
    mask = np.arange(TOKENS) < lengths_of(batch)[:, None]
    exact = np.asarray(forward(parameters, batch))[mask]

    def cost(logits: np.ndarray) -> float:
        return float(np.sqrt(np.mean((logits - exact) ** 2)))

    inputs = transformers_inputs(prompts, scene.processor)
    with torch.no_grad():
        theirs = transformers_model(checkpoint, "bfloat16")(**inputs).logits.float()
    theirs = cost(theirs.numpy()[inputs["attention_mask"].bool().numpy()])
    for param_dtype in (jnp.bfloat16, jnp.float32):
        half = huggingface.load(checkpoint, dtype=jnp.bfloat16, param_dtype=param_dtype)
        graph, state = nnx.split(half)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(param_dtype)}
        logits = jax.jit(lambda p, b, g=graph: nnx.merge(g, p).logits(nnx.merge(g, p).prefill(b)[0]))(state, batch)
        assert logits.dtype == jnp.float32
        ours = cost(np.asarray(logits)[mask])
        record_property(f"ours, {param_dtype.__name__} parameters,", f"{ours:.4f}")
        assert 0 < ours < 1.05 * theirs
    record_property("transformers'", f"{theirs:.4f}")


def test_rotary_angles_are_float32_in_a_bfloat16_model(checkpoint, batch):
    half = huggingface.load(checkpoint, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    graph, state = nnx.split(half)

    def dtypes(function, *arguments) -> set:
        jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
        found = [e for e in equations(jaxpr) if e.primitive.name in ("cos", "sin")]
        assert found
        return {variable.aval.dtype for e in found for variable in (*e.invars, *e.outvars)}

    assert dtypes(lambda p, b: nnx.merge(graph, p).visual(b), state, batch.vision) == {jnp.dtype("float32")}
    assert dtypes(lambda p, b: nnx.merge(graph, p).prefill(b), state, batch) == {jnp.dtype("float32")}


def test_rotary_angles_at_large_positions(model):
    """Against float64: bfloat16 angles would be off by 0.1 rad at position 74."""
    at = np.arange(3000)
    vision, text = model.config.vision, model.config.text
    half = vision.head_dim // 2
    frequencies = vision.rope_theta ** -(np.arange(0, half, 2) / half)
    expected = np.concatenate([at[:, None] * frequencies, (2 * at)[:, None] * frequencies], axis=-1)
    np.testing.assert_allclose(vision_angles(jnp.stack([at, 2 * at], -1), vision), expected, rtol=1e-6)

    # Sections 4, 2, 2 interleave as t h w t h w t t; 2, 3, 3 in a row are t t h h h w w w. Every axis has the frequency
    # of its slot.
    axes = {"qwen3_vl": [1, 2, 3, 1, 2, 3, 1, 1], "qwen2_5_vl": [1, 1, 2, 2, 2, 3, 3, 3]}[model.config.family]
    frequencies = text.rope_theta ** -(np.arange(0, text.head_dim, 2) / text.head_dim)
    expected = np.array(axes) * at[:, None] * frequencies
    got = text_angles(jnp.stack([at, 2 * at, 3 * at])[:, None], text)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


# --- DeepStack --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_deepstack_features_matter(scene, batch, parameters, forward):
    def without(path, value):
        return 0 * value if path[:3] == ("visual", "deepstack", "down") else value

    logits, bare = forward(parameters, batch), forward(replaced(parameters, without), batch)
    changed = np.asarray(jnp.abs(logits - bare).max(-1))
    for row, prompt in enumerate(scene.prepare()):
        start = spans(scene, prompt)[0].start
        assert not changed[row, :start].any()
        assert (changed[row, start : len(prompt)] > 1e-3).all()


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_deepstack_features_are_added_after_their_layers_only(batch, model):
    """Three layers, n features: feature i first shows in the keys of layer i + 1, and none follows feature n - 1."""
    graph, parameters = nnx.split(model)
    random = np.random.default_rng(2)
    h = random.standard_normal((*batch.tokens.shape, model.config.text.width)).astype(np.float32)
    count = batch.visual_index.max() + 1

    @jax.jit
    def keys_and_output(deep):
        model: QwenVL = nnx.merge(graph, parameters)
        angles = text_angles(np.moveaxis(batch.positions, 1, 0), model.config.text)
        layout = Packed(batch.places, batch.prompt, batch.response)
        out, cache = model.text.prefill(h, angles, deep, batch.visual_index, layout)
        return cache.keys, out

    deep = random.standard_normal((2, count, h.shape[-1])).astype(np.float32)
    keys, _ = keys_and_output(deep)
    for changed in range(2):
        other, _ = keys_and_output(np.where(np.arange(2)[:, None, None] == changed, -deep, deep))
        differs = [bool((a != b).any()) for a, b in zip(keys, other, strict=True)]
        assert differs == [layer > changed for layer in range(3)]
    # One feature is the same as a second one of zeros: past the last nothing is added, to the last layer's output too.
    one, padded = keys_and_output(deep[:1]), keys_and_output(deep * np.array([1, 0], np.float32)[:, None, None])
    jax.tree.map(np.testing.assert_array_equal, one, padded)
    # Text tokens before any image are never touched.
    _, none = keys_and_output(0 * deep)
    first = int(np.flatnonzero(batch.visual_index[0] >= 0)[0])
    np.testing.assert_array_equal(keys_and_output(deep)[1][0, :first], none[0, :first])
