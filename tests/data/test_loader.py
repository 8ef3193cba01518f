"""Which problem is which example of a step, in one process or several, and what takes the place of a broken one."""

import dataclasses
import types

import numpy as np
import pytest

from capcur_jax import presets, schedule
from capcur_jax.data.curriculum import Curriculum
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.errors import InputError
from capcur_jax.train import Maker, usable, with_steps
from tests.conftest import random_image

PROMPTS, BATCHES = 16, 5


def stage_of(objective="grpo"):
    config = presets.laptop()
    config.order = ("perception",)
    config.stages.perception.update({"prompts": PROMPTS, "objective": objective})
    return schedule.stages(config)[0]


def makers(monkeypatch, processes, updates, run=None, order=None, stage=None):
    """One for each process."""
    monkeypatch.setattr("jax.process_count", lambda: processes)
    made = []
    for process in range(processes):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        made.append(Maker(run, stage or stage_of(), order, updates))
    monkeypatch.undo()
    return made


@pytest.mark.parametrize("updates", [1, 2, 4])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_problem_comes_once_and_in_the_same_update_whatever_the_processes(monkeypatch, processes, updates):
    made = makers(monkeypatch, processes, updates)
    assert {maker.local for maker in made} == {PROMPTS // processes}
    numbers = np.array([[maker.number(i) for i in range(BATCHES * maker.local)] for maker in made])
    assert sorted(numbers.ravel().tolist()) == list(range(BATCHES * PROMPTS))
    # A process's batch is cut into its updates in order (minibatches.minibatches), and so is that of a single process.
    cut = numbers.reshape(processes, BATCHES, updates, -1)
    alone = np.arange(BATCHES * PROMPTS).reshape(BATCHES, updates, -1)
    for batch in range(BATCHES):
        for update in range(updates):
            assert sorted(cut[:, batch, update].ravel().tolist()) == alone[batch, update].tolist()


@pytest.fixture
def run(processor):
    """What a Maker uses of a run."""
    builder = PromptBuilder(processor, "suffix", 256, 64)
    settings = types.SimpleNamespace(rollout=types.SimpleNamespace(max_new_tokens=8))
    return types.SimpleNamespace(builder=builder, processor=processor, config=settings, measured={})


@pytest.fixture
def problems(tmp_path):
    """Number 3 has a file whose header is sound: only decoding it shows that the rest is missing."""
    found = []
    for number in range(8):
        path = tmp_path / f"{number}.jpg"
        random_image(32, 24, seed=number).save(path)
        found.append(Problem(str(number), f"What is {number}?", "red", (str(path),), response="a"))
    path = tmp_path / "3.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    return found


def test_a_broken_image_is_counted_once_and_another_problem_takes_its_place(monkeypatch, run, problems):
    stage = stage_of()
    run.selected = lambda stage: [problems]
    assert usable(run, stage)[0] == [problems] and not run.builder.counts
    order = Curriculum().arrange([problems], 5, PROMPTS)
    (maker,) = makers(monkeypatch, 1, 1, run, order, stage)
    examples = [maker(i) for i in range(24)]
    assert run.builder.counts == {"images": 1} and [p.id for p in run.builder.skipped] == ["3"]
    for number, example in enumerate(examples):
        wanted = order[number].id
        assert example.problem.id == wanted if wanted != "3" else example.problem.id != "3"
        assert len(example.prompt.grids) == 1 and example.target is None
    # A function of the number alone: asked again, in another order, by a run that has not seen the others.
    run.builder = PromptBuilder(run.processor, "suffix", 256, 64)
    for number in (23, 5, 11, 0):
        again = maker(number)
        assert again.problem == examples[number].problem
        np.testing.assert_array_equal(again.prompt.tokens, examples[number].prompt.tokens)


@pytest.mark.parametrize("curriculum", [Curriculum(order="file"), Curriculum(order="file", drop_last=True)])
@pytest.mark.parametrize("count", [4, 8])
def test_one_broken_image_does_not_end_a_run_whose_epoch_divides_its_steps(
    monkeypatch, run, problems, curriculum, count
):
    """In a fixed order the same problem comes a step later, and a step after that."""
    pool = problems[:count]
    stage = dataclasses.replace(stage_of(), prompts=count)
    (maker,) = makers(monkeypatch, 1, 1, run, curriculum.arrange([pool], 0, count), stage)
    found = [maker(i).problem.id for i in range(2 * count)]
    assert "3" not in found and set(found) == {problem.id for problem in pool} - {"3"}


def test_what_another_stage_could_not_use_comes_in_this_one(monkeypatch, run, problems):
    """Else a run that is resumed in this stage, which has not seen the other, would draw other problems."""
    unlearnable = [Problem("caption", "What?", "red"), *problems[:2]]
    run.selected = lambda stage: [unlearnable]
    assert usable(run, stage_of("sft"))[0] == [problems[:2]] and run.builder.counts == {"prompts": 1}
    assert usable(run, stage_of())[0] == [unlearnable]
    (maker,) = makers(monkeypatch, 1, 1, run, unlearnable, stage_of())
    assert [maker(i).problem for i in range(3)] == unlearnable


def test_data_that_is_broken_throughout_ends_the_run(monkeypatch, run, problems):
    broken = [problems[3]]
    (maker,) = makers(monkeypatch, 1, 1, run, Curriculum().arrange([broken], 0, PROMPTS))
    with pytest.raises(InputError, match=r"stage perception: no problem can be used: .*3\.jpg"):
        maker(0)
    assert run.builder.counts == {"images": 1}


def test_sft_examples_have_their_target(monkeypatch, run, problems):
    (maker,) = makers(monkeypatch, 1, 1, run, problems[:2], stage_of("sft"))
    example = maker(1)
    assert example.target[-1] == run.processor.end_tokens[0] and len(example.target) >= 2
    run.selected = lambda stage: [[*problems[:2], Problem("none", "What?", "red")], problems[2:3]]
    found, sizes = usable(run, stage_of("sft"))
    assert found == [problems[:2], problems[2:3]] and run.builder.counts == {"prompts": 1}
    assert [size.images for size in sizes] == [run.builder.measure(problem).images for problem in problems[:3]]


@pytest.mark.parametrize(("drop_last", "epochs", "steps"), [(False, 1, 2), (False, 3, 8), (True, 3, 6)])
def test_epochs_count_the_problems_that_fit(run, problems, drop_last, epochs, steps):
    """Eleven of twenty: an epoch of all of them would see each twice."""
    long = [Problem(f"long {number}", "word " * 900, "red") for number in range(9)]
    short = [Problem(f"short {number}", "What?", "red") for number in range(3)]
    run.selected = lambda stage: [problems + long, short]
    curriculum = Curriculum(drop_last=drop_last)
    stage = dataclasses.replace(stage_of(), steps=0, epochs=epochs, prompts=4, curriculum=curriculum)
    assert with_steps(run, stage) == dataclasses.replace(stage, steps=steps)
    assert with_steps(run, stage_of()) == stage_of()


def test_problems_without_use_end_the_run_before_it_starts(run):
    run.selected = lambda stage: [[Problem("long", "word " * 900, "red")]]
    with pytest.raises(InputError, match=r"stage perception: no problem can be used: .*max_tokens = 256"):
        usable(run, stage_of())
