"""Which way attention takes, and the reason that is given where no kernel does."""

import jax.numpy as jnp
import pytest

from capcur_jax.models import packed_gpu, packed_tpu, ways

SHAPE = (1, 1024, 32, 128)


def test_each_accelerator_has_its_kernels():
    assert ways.of("cuda", SHAPE, jnp.bfloat16).kernels is packed_gpu
    assert ways.of("tpu", SHAPE, jnp.bfloat16).kernels is packed_tpu
    assert str(ways.of("cuda", SHAPE, jnp.bfloat16)) == "cuDNN's packed segments"


@pytest.mark.parametrize(
    "platform, shape, dtype, implementation, reason",
    [
        ("cpu", SHAPE, jnp.bfloat16, "auto", "no kernel for cpu"),
        ("cuda", SHAPE, jnp.float32, "auto", "kernels take 16-bit floats, not float32"),
        ("tpu", SHAPE, jnp.bfloat16, "xla", "config.model.attention is xla"),
        ("tpu", (1, 96, 32, 128), jnp.bfloat16, "auto", "rows of 96 tokens are short"),
        ("cuda", (1, 1024, 2, 12), jnp.bfloat16, "auto", "heads of a multiple of 8"),
    ],
)
def test_what_no_kernel_takes_is_xla_s_and_the_reason_is_told(platform, shape, dtype, implementation, reason):
    way = ways.of(platform, shape, dtype, implementation)
    assert way.kernels is None
    assert reason in str(way) and str(way).startswith("group after group (")


def test_another_jax_without_the_private_functions_is_refused(monkeypatch):
    monkeypatch.delattr(packed_gpu.cudnn, "_dot_product_attention_bwd_p")
    monkeypatch.delattr(packed_tpu.splash, "_splash_attention_bwd_dq")
    for platform in ("cuda", "tpu"):
        assert "has no" in ways.of(platform, SHAPE, jnp.bfloat16).reason
