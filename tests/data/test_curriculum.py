"""The order of a small set under every curriculum, by hand; restored, sharded and repeated."""

import collections

import pytest

from capcur_jax import presets, schedule
from capcur_jax.data.curriculum import Curriculum
from capcur_jax.data.problem import Problem
from capcur_jax.errors import InputError

# Eight perception and four text problems; the digit is the pass rate in quarters.
PERCEPTION = [Problem(f"p{i}-{rate}", "?", "1", pass_rate=rate / 4) for i, rate in enumerate((2, 4, 0, 1, 4, 3, 0, 2))]
TEXT = [Problem(f"t{i}-{rate}", "?", "1", pass_rate=rate / 4) for i, rate in enumerate((3, 0, 2, 4))]
SETS = (PERCEPTION, TEXT)
EPOCH = len(PERCEPTION) + len(TEXT)


def ids(problems):
    return [problem.id for problem in problems]


def order(curriculum, count=EPOCH, sets=SETS, seed=0, prompts=5):
    arranged = curriculum.arrange([curriculum.select(problems, "set") for problems in sets], seed, prompts)
    return ids(arranged[i] for i in range(count))


def rates(names):
    return [int(name[-1]) for name in names]


def kinds(names):
    return "".join(name[0] for name in names)


def test_shuffled_is_merged_training():
    """One pool, each problem once an epoch, the sets mixed, anew in each epoch and for each seed."""
    names = order(Curriculum(), 4 * EPOCH)
    epochs = [names[at : at + EPOCH] for at in range(0, 4 * EPOCH, EPOCH)]
    assert all(sorted(epoch) == sorted(ids(PERCEPTION + TEXT)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert names == order(Curriculum(), 4 * EPOCH) != order(Curriculum(), 4 * EPOCH, seed=1)
    assert kinds(epochs[0]) not in ("p" * 8 + "t" * 4, "t" * 4 + "p" * 8)


def test_file_order_is_as_it_comes():
    assert order(Curriculum(order="file"), 2 * EPOCH) == 2 * ids(PERCEPTION + TEXT)


def test_easy_to_hard_and_hard_to_easy_with_ties_kept_in_capability_order():
    easy = order(Curriculum(order="easy_to_hard", ties="kept"), 2 * EPOCH)
    assert easy[:EPOCH] == [
        "p1-4", "p4-4", "t3-4", "p5-3", "t0-3", "p0-2", "p7-2", "t2-2", "p3-1", "p2-0", "p6-0", "t1-0",
    ]  # fmt: skip
    assert easy[EPOCH:] == easy[:EPOCH]
    hard = order(Curriculum(order="hard_to_easy", ties="kept"))
    assert hard == [
        "p2-0", "p6-0", "t1-0", "p3-1", "p0-2", "p7-2", "t2-2", "p5-3", "t0-3", "p1-4", "p4-4", "t3-4",
    ]  # fmt: skip


def test_ties_are_shuffled_by_the_seed():
    many = [[Problem(f"p{i}-{i % 2}", "?", "1", pass_rate=i % 2 / 1) for i in range(20)]]
    curriculum = Curriculum(order="easy_to_hard")
    one, again, other = (order(curriculum, 20, many, seed) for seed in (1, 1, 2))
    assert one == again and one != other and rates(one) == rates(other) == [1] * 10 + [0] * 10
    assert one[:10] != [f"p{i}-1" for i in range(1, 20, 2)]


def test_capability_order_takes_set_after_set_in_every_epoch():
    names = order(Curriculum(by_set=True), 3 * EPOCH)
    assert kinds(names) == 3 * ("p" * 8 + "t" * 4)
    epochs = [names[at : at + EPOCH] for at in range(0, 3 * EPOCH, EPOCH)]
    assert all(sorted(epoch) == sorted(ids(PERCEPTION + TEXT)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert kinds(order(Curriculum(by_set=True), sets=(TEXT, PERCEPTION))) == "t" * 4 + "p" * 8


def test_capability_x_difficulty_in_one_stage():
    names = order(Curriculum(order="easy_to_hard", by_set=True, ties="kept"), 2 * EPOCH)
    assert names == 2 * [
        "p1-4", "p4-4", "p5-3", "p0-2", "p7-2", "p3-1", "p2-0", "p6-0", "t3-4", "t0-3", "t2-2", "t1-0",
    ]  # fmt: skip


def test_capability_x_difficulty_in_stages():
    """configs/capability_x_difficulty.py: true stages, each from easy to hard; configs/difficulty.py: one pool."""
    from configs import capability_x_difficulty, difficulty

    stages = schedule.stages(capability_x_difficulty.get_config())
    assert [stage.name for stage in stages] == ["perception", "text", "visual"]
    assert {stage.curriculum.order for stage in stages} == {"easy_to_hard"}
    (merged,) = schedule.stages(difficulty.get_config("qwen3_vl_8b"))
    assert merged.data == presets.CAPABILITIES and merged.curriculum.order == "easy_to_hard" and merged.steps == 930


@pytest.mark.parametrize(
    ("kinds", "left"),
    [
        ({"pass_rates": (0.25, 0.75)}, {1, 2, 3}),
        ({"drop_all_right": True}, {0, 1, 2, 3}),
        ({"drop_all_wrong": True}, {1, 2, 3, 4}),
        ({"drop_all_right": True, "drop_all_wrong": True, "pass_rates": (0.3, 1.0)}, {2, 3}),
    ],
)
def test_windows_leave_out_what_is_outside(kinds, left):
    curriculum = Curriculum(**kinds)
    kept = curriculum.select(PERCEPTION, "set")
    assert kept == [problem for problem in PERCEPTION if problem.pass_rate * 4 in left]
    names = order(curriculum, 30)
    assert set(rates(names)) == left


def test_mixed_by_weights_for_ever():
    curriculum = Curriculum(weights=(3.0, 1.0), order="easy_to_hard", ties="kept")
    names = order(curriculum, 80)
    for at in range(0, 80, 8):
        assert collections.Counter(kinds(names[at : at + 8])) == {"p": 6, "t": 2}
    # Each set goes its own way, epoch after epoch.
    assert [name for name in names if name[0] == "t"][:8] == 2 * ["t3-4", "t0-3", "t2-2", "t1-0"]
    assert [name for name in names if name[0] == "p"][:9] == [
        "p1-4", "p4-4", "p5-3", "p0-2", "p7-2", "p3-1", "p2-0", "p6-0", "p1-4",
    ]  # fmt: skip


def test_the_last_partial_batch_is_left_out_or_filled():
    assert order(Curriculum(order="file", drop_last=True), 20) == 2 * ids(PERCEPTION + TEXT[:2])
    names = order(Curriculum(drop_last=True), 100)
    assert all(len(set(names[at : at + 10])) == 10 for at in range(0, 100, 10))
    assert set(names) == set(ids(PERCEPTION + TEXT))  # others are left out in each epoch
    with pytest.raises(InputError, match="12 rows make no step of 13"):
        order(Curriculum(drop_last=True), prompts=13)


def test_epochs_become_steps():
    assert Curriculum().steps([8, 4], 5, 3, "here") == 36 // 5
    assert Curriculum(drop_last=True).steps([8, 4], 5, 3, "here") == 6
    with pytest.raises(InputError, match="here: 3 rows make no step of 5"):
        Curriculum().steps([3], 5, 1, "here")
    with pytest.raises(InputError, match="no epochs; give steps"):
        Curriculum(weights=(1.0, 2.0)).steps([8, 4], 5, 1, "here")


@pytest.mark.parametrize(
    "curriculum",
    [
        Curriculum(), Curriculum(order="easy_to_hard"), Curriculum(order="hard_to_easy", by_set=True),
        Curriculum(weights=(1.0, 2.0)), Curriculum(by_set=True, drop_last=True), Curriculum(order="file"),
    ],
)  # fmt: skip
def test_any_number_gives_its_problem_without_those_before(curriculum):
    """What a restored run and every process of several rely on."""
    whole = order(curriculum, 60)
    arranged = curriculum.arrange(SETS, 0, 5)
    assert [arranged[i].id for i in (59, 0, 31, 7)] == [whole[i] for i in (59, 0, 31, 7)]


def test_missing_pass_rates_and_empty_windows_are_errors_with_a_remedy():
    problems = [*TEXT, Problem("new", "?", "1")]
    with pytest.raises(InputError, match=r"sets\.text\.train: 1 of 5 rows have no pass_rate.*'new'.*data difficulty"):
        Curriculum(order="easy_to_hard").select(problems, "config.data.sets.text.train")
    assert Curriculum().select(problems, "here") == problems
    with pytest.raises(InputError, match="here: the stage's curriculum leaves none of 4 rows"):
        Curriculum(pass_rates=(0.8, 0.9)).select(TEXT, "here")


MISTAKES = {
    "order": ({"order": "easy"}, r"curriculum\.order = 'easy'; choose one of shuffled, easy_to_hard"),
    "ties": ({"ties": "random"}, r"curriculum\.ties = 'random'; choose one of shuffled, kept"),
    "window": ({"pass_rates": (0.8, 0.2)}, r"curriculum\.pass_rates"),
    "weights": ({"weights": (1.0,)}, r"curriculum\.weights.*3 sets"),
    "no weight": ({"weights": (1.0, 0.0, 2.0)}, r"curriculum\.weights"),
    "both": ({"weights": (1.0, 1.0, 2.0), "by_set": True}, r"by_set.*weights"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_the_key(mistake):
    values, message = MISTAKES[mistake]
    config = presets.get("laptop", order=("merged",))
    config.stages.merged.curriculum.update(values)
    with pytest.raises(InputError, match=message):
        schedule.stages(config)
