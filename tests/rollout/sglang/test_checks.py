"""Which weight files a server may see, and whether it took them."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from capcur_jax.errors import RolloutError
from capcur_jax.rollout.sglang import checks


@pytest.mark.parametrize("fault", ["unknown", "shape", "missing", "too many", "cut", "twice", "integers"])
def test_files_that_a_server_must_not_see_are_refused(processor, tmp_path, fault):
    shapes = checks.declared(processor.config)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    name = sorted(shapes)[3]
    wanted = None
    if fault == "unknown":
        tensors[name + "x"] = tensors[name]
    elif fault == "shape":
        tensors[name] = np.zeros((*shapes[name], 2), np.float32)
    elif fault == "missing":
        del tensors[name]
    elif fault == "too many":
        wanted = shapes.keys() - {name}
    elif fault == "integers":
        tensors[name] = np.zeros(shapes[name], np.int32)
    save_file(tensors, tmp_path / "a.safetensors")
    if fault == "cut":
        data = (tmp_path / "a.safetensors").read_bytes()
        (tmp_path / "a.safetensors").write_bytes(data[:-5])
    if fault == "twice":
        save_file({name: tensors[name]}, tmp_path / "b.safetensors")
    with pytest.raises(RolloutError, match="not told of it"):
        checks.files(tmp_path, processor.config, wanted)


def test_files_of_a_whole_checkpoint_and_of_a_part_are_right(processor, checkpoint, tmp_path):
    assert set(checks.files(checkpoint, processor.config)) == set(checks.declared(processor.config))
    assert checks.files(tmp_path, processor.config, ()) == ()


def test_the_checks_of_a_server_that_renamed_its_parameters(processor):
    now = [{"visual.new_name": "1"}]
    assert "no parameter" in checks.arrived(None, now, ["model.visual.patch_embed.proj.weight"], ())
    before = [{"a": "0", "b": "0"}]
    assert "weren't sent, first b" in checks.arrived(before, [{"a": "1", "b": "1"}], ["a"], ["a"])
    assert checks.arrived(before, [{"a": "1", "b": "0"}], ["a"], ["a"]) == ""
    assert checks.arrived(before, [{"a": "0", "b": "0"}], ["a"], []) == ""
    assert "didn't arrive, first a" in checks.arrived(before, before, ["a"], ["a"])
