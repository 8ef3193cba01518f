"""Run records: what is written can be read back by any strict JSON reader, and counters count what they say."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from capcur_jax.records import jsonl, metrics


def test_json_lines_round_trip_and_flush(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = jsonl.JsonLines(path)
    writer.write({"step": np.int32(1), "loss": np.float32(0.5), "ok": np.bool_(True), "tags": ("a", None), "at": path})
    # Read before closing: a killed run keeps what it wrote.
    assert jsonl.read_jsonl(path) == [{"step": 1, "loss": 0.5, "ok": True, "tags": ["a", None], "at": str(path)}]
    writer.close()
    with jsonl.JsonLines(path) as writer:
        writer.write({"step": 2})
    assert [record["step"] for record in jsonl.read_jsonl(path)] == [1, 2]


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.array(np.inf), ml_dtypes.bfloat16("nan")]
)
def test_non_finite_is_null_in_strict_json(tmp_path, value):
    with jsonl.JsonLines(tmp_path / "m.jsonl") as writer:
        writer.write({"kl": value, "nested": [{"x": value}]})

    def refuse(constant):
        raise AssertionError(f"{constant} is no strict JSON")

    record = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert record == {"kl": None, "nested": [{"x": None}]}


def test_scalars_of_numpy_and_jax():
    values = [np.float16(1.5), ml_dtypes.bfloat16(1.5), jnp.bfloat16(1.5), jnp.float32(1.5), np.array(1.5)]
    assert jsonl.to_jsonable(values) == [1.5] * 5
    whole = jsonl.to_jsonable([np.int64(3), jnp.int32(3), np.uint8(3)])
    assert whole == [3, 3, 3] and all(type(value) is int for value in whole)
    assert jsonl.to_jsonable(jnp.array(True)) is True


def test_what_is_no_record_is_an_error_that_names_the_key(tmp_path):
    with jsonl.JsonLines(tmp_path / "m.jsonl") as writer:
        with pytest.raises(TypeError, match=r"record\.samples\[1\]\.image: bytes"):
            writer.write({"samples": [{}, {"image": b"\x89PNG"}]})
        with pytest.raises(TypeError, match=r"record\.reward: ndarray"):
            writer.write({"reward": np.zeros(3)})
        with pytest.raises(TypeError, match="a record is a dict"):
            writer.write([1])
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_base64_images_never_reach_the_file(tmp_path):
    uri = "data:image/png;base64," + "iVBORw0KGgo" * 20
    with jsonl.JsonLines(tmp_path / "r.jsonl") as writer:
        writer.write({"images": [uri], "response": f"see {uri} there"})
    record = jsonl.read_jsonl(tmp_path / "r.jsonl")[0]
    assert record == {
        "images": ["data:image/png;base64,[omitted]"],
        "response": "see data:image/png;base64,[omitted] there",
    }


def test_odd_characters_stay_on_one_line(tmp_path):
    text = "a\u2028b\x85c\nd\x00\ud800<script>"
    with jsonl.JsonLines(tmp_path / "r.jsonl") as writer:
        writer.write({"response": text})
    content = (tmp_path / "r.jsonl").read_text()
    assert len(content.splitlines()) == 1 and content.isascii()
    assert jsonl.read_jsonl(tmp_path / "r.jsonl") == [{"response": text}]


def test_cut_last_line_is_left_out_and_mended(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert jsonl.read_jsonl(path) == [{"step": 1}]
    with jsonl.JsonLines(path) as writer:
        writer.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}')  # whole, but without its line ending
    with jsonl.JsonLines(path) as writer:
        writer.write({"step": 2})
    assert jsonl.read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"long": "' + "x" * 200_000)
    jsonl.JsonLines(path).close()
    assert path.read_text() == ""


def test_broken_line_in_the_middle_names_file_and_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:3: not a record"):
        jsonl.read_jsonl(path)


def test_write_json_atomic(tmp_path):
    path = tmp_path / "new" / "summary.json"
    jsonl.write_json_atomic(path, {"accuracy": np.float32(0.5), "kl": math.nan})
    assert json.loads(path.read_text()) == {"accuracy": 0.5, "kl": None}
    with pytest.raises(TypeError):
        jsonl.write_json_atomic(path, {"accuracy": object()})
    assert json.loads(path.read_text()) == {"accuracy": 0.5, "kl": None}, "a failed write keeps the old file"
    assert [entry.name for entry in path.parent.iterdir()] == ["summary.json"], "no temporary file is left"


def test_accuracy_of_evaluations():
    def record(capability, after, accuracy):
        return {"capability": capability, "after": after, "accuracy": accuracy}

    found = metrics.accuracy_of([record("text", "base", 0.4), record("text", "a", 0.5), record("text", "b", 0.7)])
    assert found == {"text": {"base": 0.4, "after_a": 0.5, "after_b": 0.7, "final": 0.7}}
    assert list(found["text"]) == ["base", "after_a", "after_b", "final"]
    assert metrics.accuracy_of([record("text", "base", 0.4)]) == {"text": {"base": 0.4}}  # nothing has ended


def test_phase_timer_adds_up_and_resets():
    timer = metrics.PhaseTimer()
    for _ in range(2):
        with timer("rollout"):
            pass
    with pytest.raises(RuntimeError), timer("update"):
        raise RuntimeError
    kept = timer.seconds
    assert list(kept) == ["rollout", "update"] and all(value >= 0 for value in kept.values())
    timer.reset()
    assert timer.seconds == {} and len(kept) == 2


def test_device_memory(monkeypatch):
    here = metrics.device_memory()
    assert 0.01 < here["host_rss_gib"] < 1000
    if jax.default_backend() == "cpu":
        assert here.keys() == {"host_rss_gib"}

    class Device:
        def __init__(self, **stats):
            self.memory_stats = lambda: {key: value * 2**30 for key, value in stats.items()} or None

    devices = [Device(bytes_in_use=2, peak_bytes_in_use=5, bytes_limit=8), Device(bytes_in_use=3, peak_bytes_in_use=4)]
    monkeypatch.setattr(jax, "local_devices", lambda: [*devices, Device()])
    found = metrics.device_memory()
    del found["host_rss_gib"]
    assert found == {"device_gib": 3, "device_peak_gib": 5, "device_limit_gib": 8}


def test_compilation_counter_counts_a_fresh_jit_and_not_a_cached_call():
    # Made before counting starts: even a constant can be a small compilation.
    x_4, x_5 = jnp.ones(4), jnp.ones(5)
    function = jax.jit(lambda x: jnp.sin(x) * 3.25)
    with metrics.CompilationCounter() as counter:
        function(x_4).block_until_ready()
        assert counter.count == 1
        function(x_4).block_until_ready()
        assert counter.count == 1
        function(x_5).block_until_ready()
        assert counter.count == 2
    jax.jit(lambda x: x + 7.5)(x_4)
    assert counter.count == 2, "a closed counter counts nothing"
    counter.close()


def test_compilation_counter_counts_the_same_with_a_persistent_cache(tmp_path):
    code = (
        "import jax, sys, numpy as np\n"
        "jax.config.update('jax_compilation_cache_dir', sys.argv[1])\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)\n"
        "from capcur_jax.records import metrics\n"
        "counter, events = metrics.CompilationCounter(), []\n"
        "jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **kinds: events.append(event))\n"
        "f = jax.jit(lambda x: x * 2 + 1)\n"
        "for n in (3, 3, 4): f(np.ones(n, np.float32))\n"
        "print(counter.count, events.count('/jax/compilation_cache/cache_retrieval_time_sec'))\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert runs == [["2", "0"], ["2", "2"]]


def test_versions_names_packages_and_commit():
    found = metrics.versions()
    assert {"python", "platform", "jax", "jaxlib", "flax", "optax", "transformers", "numpy", "commit"} <= set(found)
    assert found["jax"] == jax.__version__
    assert (found["commit"] is None) == (found["dirty"] is None)
    json.dumps(found)


def test_versions_of_a_checkout(tmp_path, monkeypatch):
    package = tmp_path / "capcur_jax" / "records"
    package.mkdir(parents=True)
    source = package / "metrics.py"
    source.write_text("")
    monkeypatch.setattr(metrics, "__file__", str(source))

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)

    git("init")
    assert metrics.versions()["commit"] is None, "inside a checkout that doesn't track the source"
    git("add", ".")
    git("commit", "--no-verify", "-m", "first")
    assert metrics.versions()["commit"] == git("rev-parse", "HEAD").stdout.strip()
    assert metrics.versions()["dirty"] is False
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "metrics.jsonl").write_text("{}")
    assert metrics.versions()["dirty"] is False, "what a run writes is no change of the source"
    (package / "new.py").write_text("")
    assert metrics.versions()["dirty"] is True
