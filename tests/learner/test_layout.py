"""Declared shapes of packed rows, config.packing.shapes: which there are, and which a row takes."""

import itertools
import re
from types import SimpleNamespace

import pytest
from jax.sharding import AbstractMesh

from capcur_jax import presets, schedule
from capcur_jax.errors import InputError
from capcur_jax.learner.layout import Layout, declared
from capcur_jax.models.batching import Buckets
from capcur_jax.models.packed_rows import RowShape

SHAPES = ((1216, 8, 64), (960, 3, 64), (960, 8, 64), (1216, 5, 64))


def layout(shapes=SHAPES, images=True) -> Layout:
    """A stage of the laptop run with these shapes."""
    config = presets.get("laptop")
    config.packing.shapes, config.order = shapes, ("visual",)
    processor = SimpleNamespace(config=SimpleNamespace(vision=SimpleNamespace(merge_size=2, patch_size=8)))
    mesh = AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    return Layout.of(schedule.stages(config)[0], config, Buckets((96,), ((1, 64),)), processor, mesh, images)


def test_shapes_rise_whole_tiles_and_once():
    assert declared(SHAPES, images=True) == tuple(sorted(SHAPES))
    assert declared(SHAPES, images=True, tile=128) == ((1024, 3, 64), (1024, 8, 64), (1280, 5, 64), (1280, 8, 64))
    assert declared(((130, 1, 64), (250, 1, 64)), images=True, tile=128) == ((256, 1, 64),)
    assert declared(SHAPES, images=False) == ((960, 0, 0), (1216, 0, 0))


def test_a_row_takes_the_smallest_shape_of_its_length_that_has_its_patches():
    made = layout()
    assert made.lengths == (960, 1216) and made.patches.declared == ((3, 64), (5, 64), (8, 64))
    for length, rows in itertools.product(made.lengths, range(1, 9)):
        chosen = made.shape(length, (rows, 64))
        assert chosen == min(shape for shape in made.shapes if shape.length == length and shape.patch_rows >= rows)
        assert isinstance(chosen, RowShape)
    assert made.shape(960, (5, 64)) == (960, 8, 64) and made.shape(1216, (3, 64)) == (1216, 5, 64)
    assert layout(images=False).shape(1216, (0, 0)) == (1216, 0, 0)


def test_texts_need_no_patches():
    assert layout(((1216, 0, 0),), images=False).shapes == ((1216, 0, 0),)
    with pytest.raises(InputError, match=r"an image may have 64 patches"):
        layout(((1216, 0, 0),))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((960, 1216), "= (960, 1216): give (tokens, rows of patches, patches of a row) of each"),
        ((1216, 8, 64), "= (1216, 8, 64): give (tokens, rows of patches, patches of a row) of each"),
        (((960, 8),), "= ((960, 8),): give (tokens, rows of patches, patches of a row) of each"),
        (((0, 8, 64),), "or of a single one, as ((1280, 8, 64),)"),
        ((("1216", 8, 64),), "= (('1216', 8, 64),): give (tokens"),
        (((1216.0, 8, 64),), "= ((1216.0, 8, 64),): give (tokens"),
        (
            ((960, 8, 64), (1216, 5, 64), (1024, 5, 64)),
            "each length must be declared with the most patches, too, which its images may need: add (1024, 8, 64), "
            "(1216, 8, 64)",
        ),
        (((1216, 2, 64), (960, 1, 128)), "rows of patches must be single ones, of any length, as in"),
        ((), "the longest row has 0 tokens, and must hold a prompt and a response, 144 "),
    ],
)
def test_what_can_t_be_declared_is_explained(shapes, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        layout(shapes)
    assert "config.packing.shapes" in str(error.value)


def test_presets_declare_what_their_settings_of_prompts_allow():
    laptop, large = presets.get("laptop").packing.shapes, presets.get("qwen3_vl_8b").packing.shapes
    assert len(layout(laptop).shapes) == 5 and len(layout(laptop, images=False).shapes) == 2
    assert len(large) == len(set(large)) == 28 and all(tokens % 128 == 0 for tokens, _, _ in large)
