"""SGLang's servers keep the contract, for both families."""

import pytest

from tests.rollout.contract import Contract


class TestSGLangEngine(Contract):
    @pytest.fixture(scope="class", params=["qwen3_vl", "qwen2_5_vl"])
    def scene(self, request, served):
        return served[request.param]
