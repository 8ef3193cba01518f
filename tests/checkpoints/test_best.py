"""The best validation of a run: which step it is, that its checkpoint stays, that its export is of the same step."""

from __future__ import annotations

import signal

import pytest
from safetensors.numpy import load_file

from capcur_jax import train as loop
from capcur_jax.checkpoints.store import Store
from capcur_jax.errors import InputError
from capcur_jax.records.jsonl import read_jsonl
from tests import tiny

pytestmark = pytest.mark.e2e

STEPS = 3
FINAL = "checkpoints/final/model.safetensors"
NORM = "model.language_model.norm.weight"


@pytest.fixture
def config(checkpoint, sets):
    return tiny.config(
        checkpoint,
        sets,
        ("text",),
        **{
            "stages.text.steps": STEPS, "validation.every": 1, "validation.questions": 2, "evaluation.questions": 2,
            "evaluation.sets": ("perception",), "reward.function": "tests.own_rewards:equal_validations",
            "export.dtype": "float32", "checkpointing.keep": 1,
        },
    )  # fmt: skip


def kept(workdir) -> list[int]:
    """The numbers of the checkpoints that stay: that of the best validation and the last."""
    store = Store(workdir / "state", None, 60)
    try:
        return store.all()
    finally:
        store.close()


def validations(workdir) -> list[str]:
    return sorted(path.name for path in (workdir / "evaluation").glob("validation-*"))


def arrays(workdir, step) -> set[bytes]:
    return {array.tobytes() for array in Store(workdir / "state", None, 60).arrays(step).values()}


def test_of_equal_validations_the_first_is_the_best_in_the_store_and_in_the_export(config, tmp_path):
    summary = loop.train(config, tmp_path, quiet=True)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["accuracy"] for record in records if record["type"] == "validation"] == [1.0] * STEPS
    assert summary["best_validation"] == 1.0 and kept(tmp_path) == [1, STEPS]
    assert validations(tmp_path) == ["validation-1", f"validation-{STEPS}"]
    for name, step, other in (("best", 1, STEPS), ("final", STEPS, 1)):
        exported = load_file(tmp_path / "checkpoints" / name / "model.safetensors")[NORM].tobytes()
        assert exported in arrays(tmp_path, step) and exported not in arrays(tmp_path, other)


def test_a_resumed_run_that_stops_or_fails_before_its_first_step_forgets_nothing(config, tmp_path, monkeypatch):
    real = loop.stopping_here

    def stop(run):
        """A signal that comes when one step is done, before the next one begins."""
        if run.progress.step == 1:
            run.interruption._remember(signal.SIGTERM, None)
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "stopping_here", stop)
        for _ in range(2):  # the second goes on from the checkpoint of the first, and stops at once
            assert loop.train(config, tmp_path, quiet=True)["status"] == "interrupted"
            assert kept(tmp_path) == [1]
    stopped = {name: (tmp_path / name).read_bytes() for name in ("summary.json", FINAL)}
    (tmp_path / "state" / "reference").rename(tmp_path / "lost")
    with pytest.raises(InputError, match=r"state.reference.*can't be read"):
        loop.train(config, tmp_path, quiet=True)
    assert stopped == {name: (tmp_path / name).read_bytes() for name in stopped}, "the base overwrote what was learned"
    (tmp_path / "lost").rename(tmp_path / "state" / "reference")
    assert validations(tmp_path) == ["validation-1"]
    (tmp_path / "evaluation" / "validation-77").mkdir()  # of a step that the run had reached before it was killed
    summary = loop.train(config, tmp_path, quiet=True)
    assert (summary["status"], summary["steps"], summary["best_validation"]) == ("finished", STEPS, 1.0)
    assert kept(tmp_path) == [1, STEPS] and validations(tmp_path) == ["validation-1", f"validation-{STEPS}"]
