"""Low-rank adaptation: the base until it is trained, the chain rule's gradients, merged in what is saved."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoModelForImageTextToText

from capcur_jax.errors import InputError
from capcur_jax.learner.learner import frozen_paths
from capcur_jax.models import huggingface, lora, names
from capcur_jax.models.inputs import Processor
from capcur_jax.models.lora import LoRA, LoRALinear
from capcur_jax.models.qwen_vl import QwenVL
from tests.decoding import decoder
from tests.packed import lengths_of, of_responses, packed, padded

SETTINGS = LoRA(rank=3, alpha=5.0)
TOKENS = 64


class Scene(NamedTuple):
    """One family's checkpoint, its batch of a prompt with an image and one without, and a model with A and B drawn."""

    directory: Any
    processor: Processor
    prompts: list
    batch: Any
    base: QwenVL
    adapted: QwenVL


def drawn(model: QwenVL, seed: int = 0) -> QwenVL:
    """The model with every factor drawn anew: B, too, is no longer 0."""
    graph, state = nnx.split(model)
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        if not lora.is_factor(".".join(path)):
            return leaf
        return leaf.replace(jnp.asarray(0.2 * random.standard_normal(leaf.shape), leaf.dtype))

    flat = nnx.to_flat_state(state)
    return nnx.merge(graph, nnx.from_flat_state([(path, draw(path, leaf)) for path, leaf in flat]))


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def scene(request, make_image):
    name = {"qwen3_vl": "tied_checkpoint", "qwen2_5_vl": "windowed_untied_checkpoint"}[request.param]
    directory = request.getfixturevalue(name)
    processor = Processor.from_directory(directory)
    prompts = [
        processor.prepare(processor.render([None, "circle?"]), [make_image(23, 37)]),
        processor.prepare(processor.render(["What is 3 x 4?"])),
    ]
    batch = padded(prompts, processor, TOKENS, (4, 64))
    adapted = drawn(huggingface.load(directory, lora=SETTINGS))
    return Scene(directory, processor, prompts, batch, huggingface.load(directory), adapted)


@pytest.fixture(scope="module")
def logits(scene):
    """`logits(model)`: [B, T, V] of the scene's batch."""

    def run(model: QwenVL) -> np.ndarray:
        graph, state = nnx.split(model)
        return np.asarray(
            jax.jit(lambda p: nnx.merge(graph, p).logits(nnx.merge(graph, p).prefill(scene.batch)[0]))(state)
        )

    return run


@pytest.fixture(scope="module")
def merged(scene, tmp_path_factory):
    """What `save` writes of the adapted model."""
    directory = tmp_path_factory.mktemp("merged") / scene.processor.config.family
    huggingface.save(
        directory, nnx.state(scene.adapted), scene.adapted.config, scene.directory, jnp.float32, lora=SETTINGS
    )
    return directory


def by_path(state: nnx.State) -> dict[str, np.ndarray]:
    return {".".join(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


# --- one layer --------------------------------------------------------------------------------------------------------


def test_a_layer_and_its_gradients_equal_numpy_s():
    random = np.random.default_rng(0)
    layer = LoRALinear(6, 9, lora=LoRA(rank=2, alpha=3.0), dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.lora_b[...] = jnp.asarray(random.standard_normal((2, 9)), jnp.float32)
    layer.bias[...] = jnp.asarray(random.standard_normal(9), jnp.float32)
    x, g = random.standard_normal((4, 6)).astype(np.float32), random.standard_normal((4, 9)).astype(np.float32)
    graph, state = nnx.split(layer)
    y, back = jax.vjp(lambda p, x: nnx.merge(graph, p)(x), state, x)
    gradient, into_x = back(jnp.asarray(g))
    a, b, w, scale = *(np.asarray(v[...]) for v in (layer.lora_a, layer.lora_b, layer.kernel)), 1.5
    np.testing.assert_allclose(y, x @ (w + scale * a @ b) + np.asarray(layer.bias[...]), atol=1e-5)
    np.testing.assert_allclose(gradient["lora_a"][...], scale * x.T @ (g @ b.T), atol=1e-5)
    np.testing.assert_allclose(gradient["lora_b"][...], scale * (x @ a).T @ g, atol=1e-5)
    np.testing.assert_allclose(into_x, g @ (w + scale * a @ b).T, atol=1e-5)
    # A B itself, [6, 9], is made neither forwards nor backwards once W is not differentiated.
    factors = nnx.State({"lora_a": state["lora_a"], "lora_b": state["lora_b"]})
    loss = lambda f, x: (nnx.merge(graph, nnx.merge_state(state, f))(x) * g).sum()  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(factors, x)
    products = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) >= 7 and (6, 9) not in products and (9, 6) not in products


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_computes_in_its_own_dtype(param_dtype):
    layer = LoRALinear(6, 9, lora=LoRA(rank=2), dtype=jnp.bfloat16, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    assert layer.lora_a.dtype == layer.lora_b.dtype == param_dtype
    assert layer(jnp.ones((4, 6))).dtype == jnp.bfloat16


# --- the model --------------------------------------------------------------------------------------------------------


def test_rank_0_and_none_are_the_model_without(scene):
    for nothing in (None, LoRA(), LoRA(rank=0, targets=("q",))):
        model = huggingface.load(scene.directory, lora=nothing)
        assert nnx.graphdef(model) == nnx.graphdef(scene.base)
        assert by_path(nnx.state(model)).keys() == by_path(nnx.state(scene.base)).keys()


def test_factors_lie_beside_the_targets_kernels_stacked(scene):
    base = by_path(nnx.state(scene.base))
    for targets in (lora.TARGETS, ("q", "down")):
        model = huggingface.load(scene.directory, lora=LoRA(rank=3, targets=targets))
        found = {path: leaf for path, leaf in by_path(nnx.state(model)).items() if path not in base}
        assert found.keys() == {f"text.layers.{target}.lora_{side}" for target in targets for side in "ab"}
        for target in targets:
            depth, wide, out = base[f"text.layers.{target}.kernel"].shape
            a, b = (found[f"text.layers.{target}.lora_{side}"] for side in "ab")
            assert (a.shape, b.shape) == ((depth, wide, 3), (depth, 3, out))
            assert not b.any()
            # Uniform in +-1 / sqrt(D_in), in every layer.
            bound = wide**-0.5
            assert 0.9 * bound < np.abs(a).max() <= bound
            assert np.abs(a).mean((1, 2)) == pytest.approx(bound / 2, rel=0.25)
            assert len(np.unique(a)) == a.size
        starts = [leaf.tobytes() for path, leaf in found.items() if path.endswith("lora_a")]
        assert len(set(starts)) == len(targets)


def test_before_training_it_is_the_base_exactly(scene, logits):
    start = huggingface.load(scene.directory, lora=SETTINGS, seed=4)
    text = padded(scene.prompts[1:], scene.processor, TOKENS)
    with jax.disable_jit():  # compiled, a longer program may sum in another order
        ours, base = (model.logits(model.prefill(text)[0]) for model in (start, scene.base))
    np.testing.assert_array_equal(ours, base)
    np.testing.assert_allclose(logits(start), logits(scene.base), atol=1e-5)
    assert np.abs(logits(scene.adapted) - logits(scene.base)).max() > 0.1


def test_the_start_depends_on_the_seed_alone(scene):
    one, again, other = (
        by_path(nnx.state(huggingface.load(scene.directory, lora=SETTINGS, seed=s))) for s in (1, 1, 2)
    )
    for path, leaf in one.items():
        assert np.array_equal(leaf, again[path])
        assert np.array_equal(leaf, other[path]) == (not path.endswith(".lora_a"))


def test_a_new_model_has_factors_too(scene):
    model = huggingface.create(scene.base.config, 0, lora=SETTINGS)
    state = by_path(nnx.state(model))
    assert state.keys() == by_path(nnx.state(scene.adapted)).keys()
    assert not state["text.layers.q.lora_b"].any() and state["text.layers.q.lora_a"].std() > 0


def test_gradients_of_the_factors_follow_from_pytorch_s_of_the_merged_weights(scene, merged, transformers_inputs):
    """transformers differentiates by W + A B x scale, which the chain rule takes to A and B. Under remat, too."""
    theirs = AutoModelForImageTextToText.from_pretrained(str(merged), dtype=torch.float32, attn_implementation="eager")
    inputs = transformers_inputs(scene.prompts, scene.processor)
    mask = inputs["attention_mask"].bool().numpy()
    weights = np.zeros((*scene.batch.tokens.shape, scene.base.config.text.vocabulary), np.float32)
    weights[:, : mask.shape[1]][mask] = np.random.default_rng(2).standard_normal((mask.sum(), weights.shape[-1]))
    (theirs(**inputs).logits * torch.tensor(weights[:, : mask.shape[1]])).sum().backward()
    table = names.table(scene.base.config)
    tensors = {name.replace("model.language_model.", "model."): p.grad for name, p in theirs.named_parameters()}

    remade = huggingface.load(scene.directory, lora=SETTINGS, remat="full")
    state, graph = nnx.state(scene.adapted), nnx.graphdef(remade)

    def loss(parameters):
        model = nnx.merge(graph, parameters)
        return (model.logits(model.prefill(scene.batch)[0]) * weights).sum()

    ours, values = by_path(jax.jit(jax.grad(loss))(state)), by_path(state)
    for target in lora.TARGETS:
        root = f"text.layers.{target}"
        a, b = values[f"{root}.lora_a"], values[f"{root}.lora_b"]
        for layer in range(len(a)):
            name = table[f"{root}.kernel"].format(layer).replace("model.language_model.", "model.")
            into_w = tensors[name].numpy().T * SETTINGS.alpha / SETTINGS.rank
            for side, want in (("a", into_w @ b[layer].T), ("b", a[layer].T @ into_w)):
                error = np.linalg.norm(ours[f"{root}.lora_{side}"][layer] - want) / np.linalg.norm(want)
                assert error < 1e-4, (target, layer, side)


def test_a_response_and_decoding_equal_full_sequences(scene, logits):
    """The learner's pass and decoding with factors that are not 0, against one causal pass over prompt and response."""
    graph, state = nnx.split(scene.adapted)
    tokens = np.random.default_rng(3).integers(10, 300, (2, 5)).astype(np.int32)
    rows = []
    for prompt, own in zip(scene.prompts, tokens, strict=True):
        positions = np.broadcast_to(prompt.next_position + np.arange(5, dtype=np.int32), (3, 5))
        rows.append(
            dataclasses.replace(
                prompt,
                tokens=np.concatenate([prompt.tokens, own]),
                positions=np.concatenate([prompt.positions, positions], axis=1),
                visual_index=np.concatenate([prompt.visual_index, np.full(5, -1, np.int32)]),
            )
        )
    whole = padded(rows, scene.processor, TOKENS, (4, 64))
    model_of = lambda p: nnx.merge(graph, p)  # noqa: E731
    full = np.asarray(jax.jit(lambda p: model_of(p).logits(model_of(p).prefill(whole)[0]))(state))
    _, prompt = jax.jit(lambda p: model_of(p).prefill(scene.batch))(state)
    together = packed(scene.prompts, tokens, scene.processor)
    states = jax.jit(lambda p, together: of_responses(model_of(p).predicting(together), together))(state, together)
    predicting = np.asarray(scene.adapted.logits(states))
    lengths = lengths_of(scene.batch)
    decoded = decoder(scene.adapted)(prompt, tokens, lengths, [prompt.next_position for prompt in scene.prompts])
    np.testing.assert_allclose(decoded[:, :-1], predicting[:, 1:], atol=2e-5)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(predicting[row], full[row, length - 1 : length + 4], atol=2e-5)
        np.testing.assert_allclose(decoded[row], full[row, length : length + 5], atol=2e-5)


# --- out and back -----------------------------------------------------------------------------------------------------


def test_the_export_is_the_adapted_model_without_factors(scene, merged, logits):
    plain = huggingface.load(merged)
    np.testing.assert_allclose(logits(plain), logits(scene.adapted), atol=2e-5)
    before, after = load_file(scene.directory / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    # Each target's kernel is W + A B x scale, everything else what it was, bit for bit.
    values, table = by_path(nnx.state(scene.adapted)), names.table(scene.base.config)
    for path, template in table.items():
        if path not in values:
            continue
        stacked = "{}" in template
        for layer in range(len(values[path]) if stacked else 1):
            name = template.format(layer)
            root = path.removesuffix(".kernel")
            if root != path and f"{root}.lora_a" in values:
                change = values[f"{root}.lora_a"][layer] @ values[f"{root}.lora_b"][layer] * (5.0 / 3)
                np.testing.assert_allclose(after[name], before[name] + change.T, atol=1e-6, err_msg=name)
                assert not np.array_equal(after[name], before[name])
            else:
                np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_transformers_loads_the_export(scene, merged, logits, transformers_inputs):
    theirs, info = AutoModelForImageTextToText.from_pretrained(
        str(merged), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    assert {key: value for key, value in info.items() if value} == {}
    inputs = transformers_inputs(scene.prompts, scene.processor)
    with torch.no_grad():
        expected = theirs.eval()(**inputs).logits.numpy()
    mask = inputs["attention_mask"].bool().numpy()
    np.testing.assert_allclose(logits(scene.adapted)[:, : mask.shape[1]][mask], expected[mask], atol=1e-4)


def test_the_export_adapted_again_saves_the_same_bits(scene, merged, tmp_path):
    again = huggingface.load(merged, lora=SETTINGS)
    huggingface.save(tmp_path / "out", nnx.state(again), again.config, merged, jnp.float32, 50_000, lora=SETTINGS)
    found = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    want = load_file(merged / "model.safetensors")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 and found.keys() == want.keys()
    assert all(np.array_equal(found[name], tensor) for name, tensor in want.items())


def test_bfloat16_weights_are_merged_in_float32(scene):
    """W + A B x scale is rounded once, at its end."""
    model = drawn(huggingface.load(scene.directory, param_dtype=jnp.bfloat16, lora=SETTINGS))
    values, table = by_path(nnx.state(model)), names.table(model.config)
    out = dict(huggingface.published_tensors(nnx.state(model), model.config, lora=SETTINGS))
    kernel, a, b = (values[f"text.layers.up.{kind}"].astype(np.float32) for kind in ("kernel", "lora_a", "lora_b"))
    want = (kernel + a @ b * np.float32(5 / 3)).astype(jnp.bfloat16)
    got = np.stack([out[table["text.layers.up.kernel"].format(layer)].T for layer in range(len(a))])
    assert got.dtype == jnp.bfloat16
    # The last bit of a float32 sum may round over a half-way point now and then.
    assert np.mean(got == want) > 0.999


def test_saving_factors_without_their_settings_is_refused(scene, tmp_path):
    for model, given in ((scene.adapted, None), (scene.base, SETTINGS)):
        with pytest.raises(ValueError, match="is not what the parameters were made with"):
            huggingface.save(tmp_path / "out", nnx.state(model), model.config, scene.directory, lora=given)
        assert not (tmp_path / "out").exists()


SHARDED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from safetensors.numpy import load_file
from capcur_jax.devices import sharding
from capcur_jax.models import huggingface
from capcur_jax.models.lora import LoRA

source, out = map(Path, sys.argv[1:])
settings = LoRA(rank=4, alpha=8.0)
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("first", "last"))

def place(mesh, path, shape):
    axes = [None] * len(shape)
    for side, axis in ((-2, "first"), (-1, "last")):
        if len(shape) > 1 and shape[side] % mesh.shape[axis] == 0:
            axes[side] = axis
    return NamedSharding(mesh, P(*axes))

saved = []
for on in (None, mesh):
    if on:
        sharding.of_parameter = place
    model = huggingface.load(source, lora=settings, seed=3, mesh=on)
    graph, state = nnx.split(model)
    flat = list(nnx.to_flat_state(state))
    for number, (path, leaf) in enumerate(flat):
        if on:
            assert leaf[...].sharding == place(mesh, ".".join(path), leaf.shape)
        if path[-1] == "lora_b":
            new = jnp.asarray(np.random.default_rng(number).standard_normal(leaf.shape), jnp.float32)
            flat[number] = path, leaf.replace(jax.device_put(new, leaf[...].sharding))
    name = out / ("sharded" if on else "whole")
    huggingface.save(name, nnx.from_flat_state(flat), model.config, source, dtype=np.float32, lora=settings)
    saved.append(load_file(name / "model.safetensors"))
assert not all(np.array_equal(saved[0][k], v) for k, v in load_file(source / "model.safetensors").items())
for name, tensor in saved[0].items():
    np.testing.assert_allclose(saved[1][name], tensor, atol=1e-6, err_msg=name)
"""


def test_any_mesh_starts_and_saves_the_same(checkpoint, tmp_path):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", SHARDED, str(checkpoint), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_pattern_freezes_all_but_the_factors(scene):
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(scene.adapted))}
    factors = {path for path in paths if path.endswith((".lora_a", ".lora_b"))}
    assert factors and frozen_paths(nnx.state(scene.adapted), lora.pattern()) == paths - factors
    with pytest.raises(InputError, match="nothing is left to train"):
        frozen_paths(nnx.state(scene.base), lora.pattern())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": -1}, r"config\.model\.lora\.rank = -1; choose 1 or more"),
        ({"rank": 4, "targets": ("q", "head")}, r"config\.model\.lora\.targets = \('q', 'head'\); choose some of q, k"),
        ({"rank": 4, "targets": ()}, r"config\.model\.lora\.targets = \(\); choose some of"),
    ],
)
def test_impossible_settings_name_their_key(given, message):
    with pytest.raises(InputError, match=message):
        LoRA(**given)
