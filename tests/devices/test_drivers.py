"""Every command that computes spares JAX the accelerators that cannot be there."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from capcur_jax import presets
from capcur_jax.devices import drivers

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("driver", "platforms"), [("null", None), ("no such device", "cpu")])
def test_without_any_driver_jax_asks_no_accelerator(driver, platforms):
    code = f"""if True:
        import jax
        from capcur_jax.devices import drivers
        drivers.DRIVERS = ({driver!r},)
        drivers.without_drivers_cpu()
        assert jax.config.jax_platforms == {platforms!r}
    """
    bare = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=bare, check=True)


class Asked(Exception):
    pass


def a_run(directory):
    from capcur_jax import main

    main._take_devices(presets.get("laptop"))


def a_question(directory):
    from capcur_jax import generate

    generate.main(["--prompt=What?"])


def pass_rates(directory):
    from capcur_jax.curation.commands import difficulty

    file = directory / "rows.jsonl"
    file.write_text("")
    given = {"input": str(file), "output": str(directory / "out.jsonl"), "config": "configs/staged.py", "overrides": []}
    kinds = {"samples": 1, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1, "seed": 0, "limit": 0}
    difficulty.run(types.SimpleNamespace(**given, **kinds))


def a_filter_model(directory):
    from capcur_jax.curation import filter_models

    with filter_models.LocalModel(presets.TINY_CHECKPOINT, filter_models.How()):
        pass


@pytest.mark.parametrize("command", [a_run, a_question, pass_rates, a_filter_model])
def test_every_command_that_computes_asks_for_drivers_first(command, tmp_path, monkeypatch):
    def asked():
        raise Asked

    monkeypatch.setattr(drivers, "without_drivers_cpu", asked)
    for name in ("default_backend", "devices", "local_devices"):
        monkeypatch.setattr(f"jax.{name}", lambda *_, name=name: pytest.fail(f"jax.{name} came first"))
    with pytest.raises(Asked):
        command(tmp_path)


KEPT = """
import jax, jax.monitoring, sys
from capcur_jax.devices import drivers
drivers.keep_programs()
hits = []
jax.monitoring.register_event_listener(lambda event, **kinds: hits.append(event) if "cache_hits" in event else None)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))).block_until_ready()
print(len(hits), jax.config.jax_compilation_cache_dir)
"""


def kept(home, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION") and k != "XDG_CACHE_HOME"}
    return subprocess.Popen(
        [sys.executable, "-c", KEPT], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        env={**inherited, "HOME": str(home), "JAX_PLATFORMS": "cpu", **environment},
    )  # fmt: skip


def test_a_second_start_reads_what_the_first_one_compiled(tmp_path):
    both = [kept(tmp_path), kept(tmp_path)]  # two at once share the folder
    folder = both[0].communicate(timeout=120)[0].split()[1]
    assert both[0].returncode == both[1].wait(120) == 0
    assert folder.startswith(str(tmp_path / ".cache" / "capcur_jax" / "programs-"))
    assert int(kept(tmp_path).communicate(timeout=120)[0].split()[0]) > 0
    other = kept(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")).communicate(timeout=120)[0].split()
    assert other == ["0", str(tmp_path / "mine")]


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"JAX_NUM_CPU_DEVICES": "8"}, "64"),
        ({"JAX_NUM_CPU_DEVICES": "8", "PJRT_NPROC": "3"}, "3"),
        ({"JAX_NUM_CPU_DEVICES": "8", "NPROC": "3"}, None),
        ({}, None),
    ],
)
def test_devices_that_wait_for_each_other_have_threads_to_wait_in(variables, threads):
    """With two threads for eight devices, collectives of one program hung in one try of a few."""
    code = f"""if True:
        import os
        from capcur_jax.devices import cluster
        cluster.initialize()
        assert os.environ.get("PJRT_NPROC") == {threads!r}, os.environ.get("PJRT_NPROC")
    """
    names = ("JAX_NUM_CPU_DEVICES", "PJRT_NPROC", "NPROC")
    bare = {name: value for name, value in os.environ.items() if name not in names}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=bare | variables, check=True)
