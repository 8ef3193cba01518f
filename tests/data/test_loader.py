"""Which problem is which example of a step, in one process or several, and what takes the place of a broken one."""

import collections
import dataclasses

import numpy as np
import pytest

from capcur_jax import presets, schedule
from capcur_jax.data import loader
from capcur_jax.data.curriculum import Curriculum
from capcur_jax.data.loader import Maker, no_target
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.errors import InputError
from capcur_jax.train import with_steps
from tests.conftest import random_image

PROMPTS, BATCHES = 16, 5


def makers(monkeypatch, processes, updates, builder=None, order=None, prompts=PROMPTS, target=no_target):
    """One for each process."""
    monkeypatch.setattr("jax.process_count", lambda: processes)
    made = []
    for process in range(processes):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        made.append(Maker(order, builder, target, prompts, updates, "stage perception"))
    monkeypatch.undo()
    return made


@pytest.mark.parametrize("updates", [1, 2, 4])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_problem_comes_once_and_in_the_same_update_whatever_the_processes(monkeypatch, processes, updates):
    made = makers(monkeypatch, processes, updates)
    assert {maker.local for maker in made} == {PROMPTS // processes}
    numbers = np.array([[maker.number(i) for i in range(BATCHES * maker.local)] for maker in made])
    assert sorted(numbers.ravel().tolist()) == list(range(BATCHES * PROMPTS))
    # A process's batch is cut into its updates in order (learner/minibatches.py), and so is that of a single process.
    cut = numbers.reshape(processes, BATCHES, updates, -1)
    alone = np.arange(BATCHES * PROMPTS).reshape(BATCHES, updates, -1)
    for batch in range(BATCHES):
        for update in range(updates):
            assert sorted(cut[:, batch, update].ravel().tolist()) == alone[batch, update].tolist()


@pytest.fixture
def builder(processor):
    return PromptBuilder(processor, "suffix", 256, 64)


def usable(sets, builder, target=no_target):
    return loader.usable(sets, builder, target, "stage perception")


@pytest.fixture
def problems(tmp_path):
    """Number 3 has a file whose header is sound: only decoding it shows that the rest is missing."""
    found = []
    for number in range(8):
        path = tmp_path / f"{number}.jpg"
        random_image(32, 24, seed=number).save(path)
        found.append(Problem(str(number), f"What is {number}?", "red", (str(path),), response="a"))
    path = tmp_path / "3.jpg"
    path.write_bytes(path.read_bytes()[:-120])
    return found


def test_a_broken_image_is_counted_once_and_another_problem_takes_its_place(monkeypatch, builder, problems):
    assert usable([problems], builder)[0] == [problems] and not builder.counts
    tried, build = collections.Counter(), builder.build
    builder.build = lambda problem: tried.update([problem.id]) or build(problem)
    order = Curriculum().arrange([problems], 5, PROMPTS)
    (maker,) = makers(monkeypatch, 1, 1, builder, order)
    examples = [maker(i) for i in range(24)]
    assert builder.counts == {"images": 1} and [p.id for p in builder.skipped] == ["3"]
    assert tried["3"] == 1 and sum(tried.values()) == 25  # it is not read again
    for number, example in enumerate(examples):
        wanted = order[number].id
        assert example.problem.id == wanted if wanted != "3" else example.problem.id != "3"
        assert len(example.prompt.grids) == 1 and example.target is None
    # A function of the number alone: asked again, in another order, by a run that has not seen the others.
    (other,) = makers(monkeypatch, 1, 1, PromptBuilder(builder.processor, "suffix", 256, 64), order)
    for number in (23, 5, 11, 0):
        again = other(number)
        assert again.problem == examples[number].problem
        np.testing.assert_array_equal(again.prompt.tokens, examples[number].prompt.tokens)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_replace_a_broken_image_by_the_same_problem(monkeypatch, builder, problems, processes, updates):
    def steps(processes):
        order = Curriculum(order="file").arrange([problems], 0, 8)
        made = makers(monkeypatch, processes, updates, builder, order, prompts=8)
        return [
            sorted(maker(step * maker.local + i).problem.id for maker in made for i in range(maker.local))
            for step in range(6)
        ]

    assert steps(processes) == steps(1)


@pytest.mark.parametrize("curriculum", [Curriculum(order="file"), Curriculum(order="file", drop_last=True)])
@pytest.mark.parametrize("count", [4, 8])
def test_one_broken_image_does_not_end_a_run_whose_epoch_divides_its_steps(
    monkeypatch, builder, problems, curriculum, count
):
    """In a fixed order the same problem comes a step later, and a step after that."""
    pool = problems[:count]
    (maker,) = makers(monkeypatch, 1, 1, builder, curriculum.arrange([pool], 0, count), count)
    found = [maker(i).problem.id for i in range(2 * count)]
    assert "3" not in found and set(found) == {problem.id for problem in pool} - {"3"}


def test_what_another_stage_could_not_use_comes_in_this_one(monkeypatch, builder, problems):
    """Else a run that is resumed in this stage, which has not seen the other, would draw other problems."""
    unlearnable = [Problem("caption", "What?", "red"), *problems[:2]]
    imitated = loader.targets(builder.processor, 8)
    assert usable([unlearnable], builder, imitated)[0] == [problems[:2]] and builder.counts == {"prompts": 1}
    assert usable([unlearnable], builder)[0] == [unlearnable]
    (maker,) = makers(monkeypatch, 1, 1, builder, unlearnable)
    assert [maker(i).problem for i in range(3)] == unlearnable


def test_data_that_is_broken_throughout_ends_the_run(monkeypatch, builder, problems):
    broken = [problems[3]]
    (maker,) = makers(monkeypatch, 1, 1, builder, Curriculum().arrange([broken], 0, PROMPTS))
    with pytest.raises(InputError, match=r"stage perception: no problem can be used: .*3\.jpg"):
        maker(0)
    assert builder.counts == {"images": 1}


def test_sft_examples_have_their_target(monkeypatch, builder, problems):
    imitated = loader.targets(builder.processor, 8)
    (maker,) = makers(monkeypatch, 1, 1, builder, problems[:2], target=imitated)
    example = maker(1)
    assert example.target[-1] == builder.processor.end_tokens[0] and len(example.target) >= 2
    found, sizes = usable([[*problems[:2], Problem("none", "What?", "red")], problems[2:3]], builder, imitated)
    assert found == [problems[:2], problems[2:3]] and builder.counts == {"prompts": 1}
    assert [size.images for size in sizes] == [builder.measure(problem).images for problem in problems[:3]]


@pytest.mark.parametrize(("drop_last", "epochs", "steps"), [(False, 1, 2), (False, 3, 8), (True, 3, 6)])
def test_epochs_count_the_problems_that_fit(builder, problems, drop_last, epochs, steps):
    """Eleven of twenty: an epoch of all of them would see each twice."""
    long = [Problem(f"long {number}", "word " * 900, "red") for number in range(9)]
    short = [Problem(f"short {number}", "What?", "red") for number in range(3)]
    config = presets.laptop()
    config.order = ("perception",)
    config.stages.perception.update({"prompts": 4, "steps": 0, "epochs": epochs})
    config.stages.perception.curriculum.drop_last = drop_last
    (stage,) = schedule.stages(config)
    measured = {"perception": usable([problems + long, short], builder)}
    assert with_steps(stage, measured) == dataclasses.replace(stage, steps=steps)
    given = dataclasses.replace(stage, steps=5, epochs=0)
    assert with_steps(given, {}) == given


def test_problems_without_use_end_the_run_before_it_starts(builder):
    with pytest.raises(InputError, match=r"stage perception: no problem can be used: .*max_tokens = 256"):
        usable([[Problem("long", "word " * 900, "red")]], builder)
