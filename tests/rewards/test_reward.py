"""Rewards of whole responses: weights, the user's own function, and its failures."""

import gc
import importlib
import logging
import os
import sys
import textwrap
import time
import weakref
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from capcur_jax.data.problem import Problem
from capcur_jax.rewards import function, reward

FORMATTED = r"<think>so</think> \boxed{%s}"


def _config(**changes) -> ml_collections.ConfigDict:
    settings = {"accuracy_weight": 0.9, "format_weight": 0.1, "function": "", "workers": 1, "timeout_s": 2.0}
    return ml_collections.ConfigDict(settings | {"memory_mb": 512} | changes)


def _problems(*answers: str) -> list[Problem]:
    return [Problem(id=str(i), problem="?", answer=answer) for i, answer in enumerate(answers)]


@pytest.fixture
def own(monkeypatch, tmp_path):
    """Writes a module of the user's and returns its name."""
    (tmp_path / "own_rewards.py").write_text(
        textwrap.dedent("""
        import os, sys, time

        import numpy as np

        number = 5

        def length(problem, response):
            return np.float32(len(response))

        def parts(problem, response):
            return {"reward": 2.0, "accuracy": 1, "format": 0.5}

        def picky(problem, response):
            return {"crash": 1 / 0 if response == "crash" else 0, "nan": float("nan"), "text": "1.0",
                    "keys": {"reward": 1.0, "speed": 3}, "none": None}.get(response, 1.0)

        def slow(problem, response):
            while response == "hang":
                pass
            return float(problem.answer)

        def dead(problem, response):
            return os._exit(7) if response == "die" else 1.0

        def hungry(problem, response):
            return float(len(bytearray(2**30))) if response == "eat" else 1.0

        def process(problem, response):
            return os.getpid()

        def here(problem, response):
            return os.getpid()

        here.in_process = True

        def lists(problems, responses):
            assert isinstance(problems, list) and isinstance(responses, list)
            if "hang" in responses:
                time.sleep(60)
            if "crash" in responses:
                raise OSError("no server")
            return [{"reward": len(responses), "accuracy": float(p.answer) / 8} for p in problems]

        lists.batched = True

        def share(problem, response):
            return float(problem.answer)

        def wild(problem, response):
            return 10**400 if response == "big" else sys.exit("bye")

        def wild_here(problem, response):
            return wild(problem, response)

        wild_here.in_process = True

        def forks(problem, response):
            if response == "fork":
                os.fork()
            return float(problem.answer)

        def last_words(problem, response):
            print("the", response, file=sys.stderr, flush=True)
            return os._exit(7) if response == "end" else 1.0

        def too_few(problems, responses):
            return [1.0]

        too_few.batched = True

        def asks(problem, response):
            return float(eval(response, {"problem": problem, "os": os, "sys": sys}))
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


@pytest.fixture
def said(caplog, monkeypatch):
    """What is logged. absl's logger is not always a child of the root logger that caplog listens to."""
    logger = logging.getLogger("absl")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_weights():
    score = reward.make_reward(_config())
    responses = [FORMATTED % "5", r"\boxed{5}", FORMATTED % "6", "5"]
    results = score(_problems(*["5"] * 4), responses)
    assert [r.reward for r in results] == pytest.approx([1.0, 0.9, 0.1, 0.0])
    assert [r.accuracy for r in results] == [1.0, 1.0, 0.0, 0.0]
    assert [r.format for r in results] == [1.0, 0.0, 1.0, 0.0]
    assert [r.answer for r in results] == ["5", "5", "6", None]
    assert score.counters() == {"grader_timeouts": 0, "grader_failures": 0, "reward_errors": 0}
    score.close()


def test_other_weights():
    score = reward.make_reward(_config(accuracy_weight=0.5, format_weight=0.0))
    assert score(_problems("B"), [FORMATTED % "(B)"])[0].reward == 0.5


def test_hanging_response_is_counted():
    score = reward.make_reward(_config(timeout_s=1.5))
    results = score(_problems(r"\pi", r"\pi"), [FORMATTED % "9^{9^{9^9}}", FORMATTED % r"\frac{2\pi}{2}"])
    assert [r.reward for r in results] == pytest.approx([0.1, 1.0])
    assert score.counters()["grader_timeouts"] == 1
    score.close()


def test_each_response_needs_its_problem():
    with pytest.raises(ValueError, match="1 problems and 2 responses"):
        reward.make_reward(_config())(_problems("5"), ["a", "b"])


@pytest.mark.parametrize("name", ["accuracy_weight", "format_weight"])
@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_bad_weight(name, weight):
    with pytest.raises(ValueError, match=f"config.reward.{name}"):
        reward.make_reward(_config(**{name: weight}))


def test_own_function(own):
    responses = ["abc", FORMATTED % "5"]
    results = reward.make_reward(_config(function=f"{own}:length"))(_problems("5", "5"), responses)
    assert [r.reward for r in results] == [float(len(r)) for r in responses]
    assert [r.format for r in results] == [0.0, 1.0]
    assert results[1].answer == "5"
    (result,) = reward.make_reward(_config(function=f"{own}:parts"))(_problems("5"), ["abc"])
    assert (result.reward, result.accuracy, result.format) == (2.0, 1.0, 0.5)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("no_colon", "module:function"),
        (":f", "module:function"),
        ("own_rewards:", "module:function"),
        ("no_such_module_here:f", "importing no_such_module_here failed.*PYTHONPATH"),
        ("own_rewards:missing", "has no missing"),
        ("own_rewards:number", "it is a int"),
    ],
)
def test_bad_function(own, spec, message):
    with pytest.raises(ValueError, match=rf"config\.reward\.function is '{spec}': .*{message}"):
        reward.make_reward(_config(function=spec))


def test_failures_of_own_function_score_zero_and_are_counted(own, said):
    score = reward.make_reward(_config(function=f"{own}:picky"))
    results = score(_problems(*["5"] * 6), ["fine", "crash", "nan", "text", "keys", "none"])
    assert [r.reward for r in results] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert score.counters()["reward_errors"] == 5
    assert "ZeroDivisionError" in said.text and "own_rewards:picky" in said.text
    assert "TypeError" not in said.text  # only the first is logged
    assert score(_problems(), []) == []


def test_function_that_always_fails_ends_the_run(own):
    score = reward.make_reward(_config(function=f"{own}:picky"))
    with pytest.raises(RuntimeError, match=r"own_rewards:picky failed for all 2 responses.*finite"):
        score(_problems("5", "5"), ["crash", "nan"])


def test_a_group_whose_every_response_fails_is_not_a_batch(own):
    score = reward.make_reward(_config(function=f"{own}:picky"))
    failed, fine = score.score(_problems("5", "5"), ["crash", "nan"]), score.score(_problems("5"), ["5"])
    assert [one.reward for one in failed + fine] == [0.0, 0.0, 1.0] and "finite" in failed[1].error
    score.check(failed + fine)
    with pytest.raises(RuntimeError, match="failed for all 2 responses"):
        score.check(failed)


def test_who_may_ask_group_by_group(own):
    found = {name: reward.make_reward(_config(function=f"{own}:{name}", workers=3)).parallel
             for name in ("picky", "here", "lists")}  # fmt: skip
    assert found == {"picky": 3, "here": 0, "lists": 0} and reward.make_reward(_config(workers=2)).parallel == 2


def test_half_of_the_cores_grade_unless_a_number_is_given(monkeypatch):
    for cores, expected in ((1, 1), (2, 1), (7, 3), (64, 32)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)), raising=False)
        assert reward.workers(0) == expected == reward.make_reward(_config(workers=0)).parallel
        assert reward.workers(5) == 5


@pytest.mark.parametrize("value", [1, True, 0.5, np.float32(0.5), np.array(0.5)])
def test_numbers_of_any_kind(value):
    assert reward._read_result(value, 1.0, None).reward == float(value)


# ---------------------------------------------------------------------- in workers


def _scored(own, name, answers, responses, **changes):
    """Scores, and the counters that are not 0."""
    score = reward.make_reward(_config(function=f"{own}:{name}", **changes))
    try:
        return score(_problems(*answers), responses), {k: v for k, v in score.counters().items() if v}
    finally:
        score.close()


def test_a_response_that_hangs_an_own_function_costs_its_time_and_is_marked(own):
    started = time.monotonic()
    results, counted = _scored(own, "slow", "1234", ["a", "hang", "b", "c"], timeout_s=1.0, workers=2)
    assert time.monotonic() - started < 20
    assert [r.reward for r in results] == [1.0, 0.0, 3.0, 4.0]
    assert [r.timed_out for r in results] == [False, True, False, False]
    assert counted == {"reward_timeouts": 1}


def test_a_pair_that_hangs_the_grader_is_marked():
    score = reward.make_reward(_config(timeout_s=1.5))
    results = score(_problems(r"\pi", r"\pi", "5"), [FORMATTED % "9^{9^{9^9}}", FORMATTED % r"\frac{2\pi}{2}", ""])
    assert [r.timed_out for r in results] == [True, False, False]
    score.close()


@pytest.mark.parametrize(("name", "word"), [("dead", "die"), ("hungry", "eat")])
def test_a_response_that_ends_the_worker_scores_zero_alone(own, name, word):
    results, counted = _scored(own, name, "555", ["a", word, "b"], memory_mb=256)
    assert [r.reward for r in results] == [1.0, 0.0, 1.0] and not results[1].timed_out
    assert counted == {"reward_failures": 1, "reward_errors": 1}


def test_workers_are_several_processes_and_none_of_them_is_ours_unless_the_function_asks(own):
    results, _ = _scored(own, "process", ["5"] * 40, ["a"] * 40, workers=2, timeout_s=20.0)
    assert 1 <= len({r.reward for r in results}) <= 2 and os.getpid() not in {r.reward for r in results}
    results, _ = _scored(own, "here", "55", ["a", "b"])
    assert [r.reward for r in results] == [os.getpid()] * 2


def test_a_batched_function_gets_lists_one_for_each_worker(own):
    results, counted = _scored(own, "lists", "12345", ["a"] * 5, workers=2, timeout_s=20.0)
    assert [(r.reward, r.accuracy) for r in results] == [
        (3, 1 / 8),
        (3, 2 / 8),
        (3, 3 / 8),
        (2, 4 / 8),
        (2, 5 / 8),
    ] and not counted
    # A call that fails is repeated response by response: one of them costs no other its verdict.
    results, counted = _scored(own, "lists", "1234", ["a", "crash", "b", "hang"], workers=1, timeout_s=1.0)
    assert [r.accuracy for r in results] == [1 / 8, 0, 3 / 8, 0]
    assert counted == {"reward_timeouts": 1, "reward_errors": 1, "reward_batches_repeated": 1}


def test_a_batch_that_fails_where_each_response_alone_does_not_is_told_once_and_counted(own, said):
    score = reward.make_reward(_config(function=f"{own}:too_few"))
    for _ in range(2):
        assert [r.reward for r in score(_problems("1", "2"), ["a", "b"])] == [1, 1]
    assert score.counters()["reward_batches_repeated"] == 2 and not score.counters()["reward_errors"]
    assert said.text.count("1 results for 2 responses") == 1
    score.close()


def test_a_batch_whose_function_hangs_is_given_up_after_three_in_a_row(own):
    started = time.monotonic()
    responses = ["a", "hang", "b", *["hang"] * 40]
    results, counted = _scored(own, "lists", "1" * 43, responses, workers=1, timeout_s=0.5)
    assert time.monotonic() - started < 15  # six calls, not 43, and their workers
    assert [r.timed_out for r in results] == [False, True, False, *[True] * 40]
    assert counted == {"reward_timeouts": 41, "reward_batches_repeated": 1}


def test_golds_are_kept_by_their_texts_and_keep_no_problem():
    first, second = (Problem(str(i), "Which? A. x B. y", "B", metadata={"big": "x"}) for i in range(2))
    assert reward.gold_of(first) is reward.gold_of(second)
    held = weakref.ref(first)
    del first
    gc.collect()
    assert held() is None


def test_a_large_batch_goes_through_the_pipe_both_ways(own):
    results, _ = _scored(own, "lists", ["1"] * 3000, ["a" * 200] * 3000, workers=1, timeout_s=30.0)
    assert [r.accuracy for r in results] == [1 / 8] * 3000


def test_what_a_function_in_a_worker_sees(own, monkeypatch, tmp_path):
    """The problem as it is, the environment and the path of the trainer, and no accelerator."""
    monkeypatch.setenv("MY_KEY", "3")
    problem = Problem(
        "7", "?", "5", ("/a/\udcff.png",), "text", "kind", "response", source="s", pass_rate=0.5,
        pass_rate_by={"model": "m"}, predictions=("a",), correctness=(1.0,), metadata={"options": ["x", {"y": None}]},
    )  # fmt: skip
    file = tmp_path / "written"
    asked = {
        f"problem == __import__('capcur_jax.data.problem', fromlist=['Problem']).{problem!r}": 1.0,
        "isinstance(problem.images, tuple) and hash(problem) != 0": 1.0,
        "os.environ['MY_KEY']": 3.0,
        "(os.environ['JAX_PLATFORMS'], os.environ['CUDA_VISIBLE_DEVICES']) == ('cpu', '')": 1.0,
        f"{str(tmp_path)!r} in sys.path": 1.0,
        f"open({str(file)!r}, 'w').write('four')": 4.0,
    }
    score = reward.make_reward(_config(function=f"{own}:asks", timeout_s=20.0))
    results = score([problem] * len(asked), list(asked))
    score.close()
    assert dict(zip(asked, (r.reward for r in results), strict=True)) == asked
    assert file.read_text() == "four"


def test_what_an_own_function_started_ends_with_its_time(own, tmp_path):
    file = tmp_path / "pid"
    script = f"import os,time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    call = f"__import__('subprocess').call([sys.executable, '-c', {script!r}])"
    results, _ = _scored(own, "asks", "5", [call], timeout_s=3.0)
    assert results[0].timed_out
    for _ in range(100):
        try:
            os.kill(int(file.read_text()), 0)
        except ProcessLookupError:
            return
        if "Z" in Path(f"/proc/{file.read_text()}/stat").read_text().rpartition(")")[2].split()[0]:
            return  # whoever adopts it has not waited for it yet
        time.sleep(0.1)
    raise AssertionError("what the function started is still there")


def test_settings_of_workers_are_checked(own):
    for name, value in (("workers", -1), ("timeout_s", 0.0), ("memory_mb", 1)):
        with pytest.raises(ValueError, match=rf"config\.reward\.{name}"):
            reward.make_reward(_config(function=f"{own}:length", **{name: value}))


def test_a_module_that_only_the_trainer_can_import_is_an_error_with_the_remedy(own, monkeypatch):
    Path(importlib.import_module(own).__file__).unlink()
    with pytest.raises(ValueError, match=r"own_rewards:length .* can't start: .*own_rewards.* in_process = True"):
        reward.make_reward(_config(function=f"{own}:length"))


def test_a_module_that_reads_the_command_line_when_it_is_imported_is_named(monkeypatch, tmp_path):
    (tmp_path / "parses.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--config=a'])\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"config\.reward\.function is 'parses:f': .*SystemExit: 2.*__main__"):
        reward.make_reward(_config(function="parses:f"))


@pytest.mark.parametrize("name", ["wild", "wild_here"])
def test_what_no_program_expects_of_a_function_is_a_failure_of_its_response(own, name, said):
    score = reward.make_reward(_config(function=f"{own}:{name}", workers=1))
    for response, words in (("big", "OverflowError"), ("exit", "SystemExit: bye")):
        (outcome,) = score._function(_problems("5"), [response])
        assert outcome.values is None and words in outcome.error and "memory" not in outcome.error
    assert score(_problems("5"), ["exit"])[0].reward == 0
    assert score.counters()["reward_errors"] == 1 and score.counters()["reward_failures"] == 0
    score.close()


def test_an_interrupt_of_a_function_in_this_process_is_no_failure():
    def interrupted(problem, response):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        function.answers(interrupted, _problems("5"), ["a"])


def test_the_last_words_of_a_function_that_ends_its_worker_are_told(own):
    score = reward.make_reward(_config(function=f"{own}:last_words"))
    outcomes = score._function(_problems("5", "5"), ["start", "end"])
    assert outcomes[0].values and outcomes[1].error == "its worker exit status 7: the end"
    score.close()


def test_a_function_that_forks_gives_each_response_its_own_reward(own):
    results, counted = _scored(own, "forks", ["0", "0.25", "0.5", "0.75"], ["fork", "a", "fork", "b"], timeout_s=20.0)
    assert [r.reward for r in results] == [0, 0.25, 0.5, 0.75] and not counted


def test_a_reward_that_float32_does_not_hold_is_a_failure(own):
    results, counted = _scored(own, "share", ["1e39", "-1e39", "1e18", "1"], ["a"] * 4)
    assert [r.reward for r in results] == [0, 0, 1e18, 1] and counted == {"reward_errors": 2}


def test_a_reward_on_another_scale_is_no_accuracy_and_that_is_told_once(own, said):
    results, counted = _scored(own, "share", ["0", "0.5", "1.0000000001", "3.5", "-1"], ["a"] * 5)
    assert [r.accuracy for r in results] == pytest.approx([0, 0.5, 1, np.nan, np.nan], nan_ok=True) and not counted
    assert max(r.accuracy for r in results[:3]) == 1
    assert said.text.count("gave the reward 3.5 and no accuracy") == 1 and "reward -1" not in said.text


@pytest.mark.parametrize("key", ["accuracy", "format"])
def test_a_share_above_one_is_refused(key):
    with pytest.raises(ValueError, match=f"{key} is 4.5; return a share"):
        reward._read_result({"reward": 1.0, key: 4.5}, 1.0, None)
