"""The local engine keeps the contract, for both families."""

import pytest

from capcur_jax.models import huggingface
from capcur_jax.models.batching import Buckets
from capcur_jax.models.inputs import Processor
from capcur_jax.rollout.local.engine import LocalEngine
from tests.rollout.contract import Contract
from tests.rollout.sglang.conftest import Served


class TestLocalEngine(Contract):
    @pytest.fixture(scope="class", params=["checkpoint", "windowed_untied_checkpoint"])
    def scene(self, request):
        """Three slots for a dozen responses."""
        path = request.getfixturevalue(request.param)
        processor, model = Processor.from_directory(path), huggingface.load(path)
        buckets = Buckets((96, 192), ((1, 128), (3, 128), (12, 128)), longest=96)
        return Served(path, processor, model, LocalEngine(model, processor, slots=3, buckets=buckets))
