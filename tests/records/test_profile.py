"""--profile: the trace is one that Perfetto reads, of the chosen steps and no others."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from capcur_jax.errors import InputError
from capcur_jax.records import profile
from capcur_jax.records.metrics import PhaseTimer


@jax.jit
def train_step(x):
    with jax.named_scope("capcur_scope"):
        return jnp.sin(x @ x)


@pytest.fixture(scope="module")
def x():
    return train_step(jnp.ones((64, 64)))  # compiled before any trace


def run(tracer: profile.Profile, x, steps) -> None:
    timer = PhaseTimer()
    for step in steps:
        tracer.before(step)
        with jax.profiler.TraceAnnotation(f"own_{step}"), timer("update"):
            x = train_step(x)
        tracer.after(step)


def events(path) -> list[dict]:
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def test_chosen_steps_are_traced(tmp_path, x):
    tracer = profile.Profile(tmp_path, "2-3")
    run(tracer, x, [1])
    assert tracer.trace is None and not (tmp_path / "profile").exists()
    run(tracer, x, [2, 3, 4])
    tracer.close()
    assert tracer.trace == tmp_path / "profile" / "perfetto_trace.json.gz"
    found = events(tracer.trace)
    names = [event.get("name", "") for event in found]
    assert [name for name in names if name.startswith("own_")] == ["own_2", "own_3"]
    assert names.count("update") == 2, "the phases of PhaseTimer"
    steps = [event for event in found if event.get("name") == "step"]
    assert sorted(str(event["args"]["step_num"]) for event in steps) == ["2", "3"]
    assert sum("train_step" in str(event) for event in found) >= 2, "the calls are there too"


def test_run_that_ends_in_between_leaves_a_trace(tmp_path, x):
    tracer = profile.Profile(tmp_path, "1-9")
    run(tracer, x, [1])
    tracer.before(2)  # and the run is interrupted
    tracer.close()
    assert "own_1" in [event.get("name") for event in events(tracer.trace)]
    jax.profiler.start_trace(tmp_path / "next")  # the profiler is free again
    jax.profiler.stop_trace()


def test_resumed_run_traces_what_is_left(tmp_path, x):
    tracer = profile.Profile(tmp_path, "2-4")
    run(tracer, x, [4, 5])
    assert "own_4" in [event.get("name") for event in events(tracer.trace)]
    late = profile.Profile(tmp_path / "late", "2-4")
    run(late, x, [7])
    late.close()
    assert late.trace is None


def test_after_waits_for_the_devices(tmp_path):
    long = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda i, y: y @ x / 512, x))
    x = jnp.ones((512, 512))
    long.lower(x).compile()
    tracer = profile.Profile(tmp_path, "1-2")
    tracer.before(1)
    result = long(x)
    tracer.after(1)
    assert result.is_ready()
    tracer.close()


def test_failure_is_a_warning(tmp_path, x):
    warnings = []
    (tmp_path / "profile").write_text("a file, where the folder would go")
    tracer = profile.Profile(tmp_path, "1-2", warn=warnings.append)
    run(tracer, x, [1, 2])
    tracer.close()
    assert len(warnings) == 1 and "--profile couldn't" in warnings[0] and tracer.trace is None


@pytest.mark.parametrize("text", ["0", "3-2", "a", "1-", "-2", "1,2", "1-2-3", " 1", "0-4"])
def test_text_that_is_no_range(tmp_path, text):
    with pytest.raises(InputError, match="--profile="):
        profile.Profile(tmp_path, text)


def test_no_profile_does_nothing(tmp_path, x):
    tracer = profile.Profile(tmp_path, "")
    run(tracer, x, [1, 2])
    tracer.close()
    assert list(tmp_path.iterdir()) == []
