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
