"""What the SGLang engine does about servers and answers that fail: scripted, in milliseconds."""

import concurrent.futures
import threading
import types

import pytest

from capcur_jax.errors import InputError, RolloutError
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.sglang import pool as pool_lib
from capcur_jax.rollout.sglang.engine import SGLangEngine
from capcur_jax.rollout.sglang.settings import Settings
from tests.rollout.sglang.scripted import ScriptedEngine, wait_for

# ---------------------------------------------------------------------- prompts


def test_groups_come_in_the_prompts_order_and_no_server_gets_more_than_its_share(engine, servers, processor):
    prompts = [processor.prepare(processor.render(["x" * number])) for number in range(1, 21)]
    for one in servers:
        one.delay_s = 0.02
    pool = engine()
    groups = pool.generate(prompts, 4)
    assert [len(group) for group in groups] == [4] * 20
    assert [one.most for one in servers] == [2, 2]
    asked = [len(body["input_ids"]) for one in servers for body in one.sent("/generate")]
    assert sorted(asked) == sorted(map(len, prompts))
    assert pool.pool.progress.running == pool.pool.progress.queued == 0
    assert pool.pool.progress.tokens == 20 * 4 * 2 and pool.pool.progress.tokens_per_second > 0


@pytest.mark.parametrize(
    ("fault", "counter"),
    [
        (lambda body, right: (500, {"error": {"message": "out of luck"}}), "refused"),
        (lambda body, right: (400, {"error": {"message": "out of luck"}}), "refused"),
        (lambda body, right: None, "unreachable"),
        (lambda body, right: (200, "no samples"), "refused"),
        (lambda body, right: (200, right[:1]), "refused"),
        (lambda body, right: (200, right + right[:1]), "refused"),
        (lambda body, right: (200, [{**right[0], "output_ids": [1, 2, 3]}, *right[1:]]), "refused"),
    ],
)
def test_what_a_server_does_wrong_another_one_does_again(engine, servers, prompt, fault, counter):
    servers[0].faults = [fault]
    servers[1].faults = [fault]
    pool = engine()
    (group,) = pool.generate([prompt])
    assert len(group) == 3 and len({int(sample.tokens[0]) for sample in group}) == 1
    first, second, *_ = sorted(servers, key=lambda one: -len(one.sent("/generate")))
    assert len(first.sent("/generate")) + len(second.sent("/generate")) == 3  # two faults, one answer
    assert abs(len(first.sent("/generate")) - len(second.sent("/generate"))) == 1  # in turn
    assert pool.fleet.counters[counter] == 2 and pool.fleet.counters["retries"] == 2


def test_what_an_aborted_try_brought_is_kept_and_counted_once(engine, servers, prompt):
    def half(body, right):
        if body["sampling_params"]["n"] < 4:
            return 200, right
        aborted = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}}}
        return 200, [right[0], right[1], aborted, aborted]

    servers[0].faults, servers[1].faults = [half], [half]
    pool = engine()
    (group,) = pool.generate([prompt], 4)
    assert sorted(int(sample.tokens[0]) for sample in group) == [40, 40, 50, 50]
    asked = [body["sampling_params"]["n"] for one in servers for body in one.sent("/generate")]
    assert sorted(asked) == [2, 4]
    assert pool.fleet.counters["aborted"] == 2


def test_an_answer_that_comes_after_its_time_is_not_counted_again(engine, servers, prompt):
    late = threading.Event()

    def slow(body, right):
        late.wait(10)
        return 200, right

    for one in servers:
        one.faults = [slow]
    pool = engine(request_timeout_s=0.2)
    (group,) = pool.generate([prompt])
    late.set()
    wait_for(lambda: not any(one.held for one in servers))
    assert len(group) == 3 and pool.fleet.counters["timeouts"] == 2
    wait_for(lambda: all(one.sent("/abort_request") for one in servers))
    for one in servers:
        (aborted,) = one.sent("/abort_request")
        assert aborted["rid"] == one.sent("/generate")[0]["rid"]


def test_a_prompt_that_nothing_answers_ends_the_call_with_the_reason(engine, servers, prompt):
    for one in servers:
        one.faults = [lambda body, right: (500, {"error": {"message": "out of luck"}})] * 50
    with pytest.raises(RolloutError, match=r"3 tries .*retries.* 0 of 3 responses.*HTTP 500.*out of luck"):
        engine(retries=2).generate([prompt])
    assert sum(len(one.sent("/generate")) for one in servers) == 3


def test_why_a_prompt_was_refused_is_known_after_others_took_its_place(engine, servers, prompt):
    for one in servers:
        one.faults = [lambda body, right: (400, {"error": {"message": "not to my taste"}})] * 3
    pool = engine(retries=2)
    assert pool.generate([prompt]) == [[]] and "not to my taste" in pool.pool.progress.refusal
    for one in servers:
        one.faults = []
    (group,) = pool.generate([prompt])
    assert len(group) == 3 and "not to my taste" in pool.pool.progress.refusal


def test_a_group_is_told_while_another_is_sampled_and_a_refused_one_never(engine, servers, prompt):
    told, other = [], threading.Event()

    def later(body, right):
        assert other.wait(20)
        return 200, right

    def done(number, samples):
        told.append((number, len(samples)))
        other.set()

    servers[0].faults = [later]
    assert [len(group) for group in engine().generate([prompt] * 4, done=done)] == [3] * 4
    assert sorted(told) == [(number, 3) for number in range(4)]
    for one in servers:
        one.faults = [lambda body, right: (400, {"error": {"message": "not to my taste"}})] * 3
    told.clear()
    assert engine(retries=0).generate([prompt], done=done) == [[]] and not told


def test_another_prompt_in_the_server_ends_the_call_at_once(engine, servers, prompt):
    def another(body, right):
        for one in right:
            one["meta_info"] = {**one["meta_info"], "prompt_tokens": 99}
        return 200, right

    for one in servers:
        one.faults = [another] * 9
    with pytest.raises(RolloutError, match=rf"counts 99 tokens in a prompt that has {len(prompt)}"):
        engine().generate([prompt])
    assert sum(len(one.sent("/generate")) for one in servers) == 1


def test_an_error_message_does_not_repeat_the_request(engine, servers, prompt):
    detail = [{"msg": "Input should be a list", "input": "iVBOR" * 1000}]
    for one in servers:
        one.faults = [lambda body, right: (422, {"detail": detail})] * 9
    asked = engine(retries=0)
    assert asked.generate([prompt]) == [[]]
    refusal = asked.pool.progress.refusal
    assert "Input should be a list" in refusal and "iVBOR" not in refusal


def test_a_prompt_that_every_server_refuses_gets_no_group_and_the_others_theirs(engine, servers, prompt, processor):
    poisoned = processor.prepare(processor.render(["What shape? Hugo"]))

    for one in servers:
        one.faults = [lambda body, right: (400, {"error": {"message": "not to my taste"}})] * 3
    asked = engine(retries=5)
    assert asked.generate([poisoned]) == [[]]
    assert asked.fleet.counters["refused_prompts"] == 1 and asked.fleet.counters["retries"] == 5
    assert "HTTP 400" in asked.pool.progress.refusal and "not to my taste" in asked.pool.progress.refusal
    assert [len(group) for group in asked.generate([prompt, poisoned])] == [3, 3]  # servers that are well again


# ---------------------------------------------------------------------- servers


@pytest.mark.parametrize(("status", "asked"), [(400, False), (500, True)])
def test_a_server_that_says_what_it_dislikes_is_not_asked_for_its_health(engine, servers, prompt, status, asked):
    pool = engine()
    for one in servers:
        one.calls.clear()
        one.faults = [lambda body, right: (status, {"error": {"message": "out of luck"}})]
    pool.generate([prompt])
    wait_for(lambda: not any(one.doubted for one in pool.fleet.servers))
    assert [bool(one.sent("/health")) for one in servers] == [asked] * 2


def test_a_server_that_goes_is_not_asked_until_it_is_back_with_the_weights(engine, servers, prompt, weights):
    pool = engine()
    pool.call(pool.sync.update(weights(7)))
    servers[0].stop()
    groups = pool.generate([prompt] * 12)
    assert [len(group) for group in groups] == [3] * 12
    assert {int(sample.tokens[0]) for group in groups for sample in group} == {50}
    wait_for(lambda: not pool.fleet.servers[0].up)
    servers[0].calls.clear()
    servers[0].version = "-1"
    servers[0].start()
    wait_for(lambda: pool.fleet.servers[0].up)
    paths = [path for path, _ in servers[0].calls if path not in ("/health", "/abort_request")]
    assert paths == [
        "/pause_generation", "/update_weights_from_disk", "/model_info", "/weights_checker", "/continue_generation",
    ]  # fmt: skip
    (loaded,) = servers[0].sent("/update_weights_from_disk")
    assert loaded["model_path"].endswith("7-complete") and loaded["weight_version"] == "7"


def test_a_call_that_runs_ends_when_the_engine_is_closed(processor, servers, prompt, checkpoint, tmp_path):
    """As a batch does that was drawn ahead when a run stops: a thread that waits for ever would keep the process."""
    for one in servers:
        one.delay_s = 60
    settings = Settings.from_config({"addresses": [one.address for one in servers]})
    engine = SGLangEngine(processor, checkpoint, tmp_path, settings)
    engine._sync.version = 0
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        drawn = threads.submit(engine.generate, [prompt], Sampling(2), 2, 0)
        wait_for(lambda: any(one.held for one in servers))
        engine.close()
        with pytest.raises(concurrent.futures.CancelledError):
            drawn.result(20)


@pytest.mark.parametrize("has", ["-1", "4"])
def test_a_server_of_other_weights_is_taken_out_where_nobody_sends_any(engine, servers, prompt, has):
    """One of several processes that ask: it isn't told that a server was started again, or missed an update."""
    servers[0].version, servers[1].version = has, "5"
    pool = engine(manages=False, retries=2)
    pool.sync.version = 5
    groups = pool.generate([prompt] * 12)
    assert {sample.version for group in groups for sample in group} == {5}
    assert [one.up for one in pool.fleet.servers] == [False, True]
    assert f"weights of version {has}" in pool.fleet.servers[0].reason
    servers[0].version = "5"
    wait_for(lambda: pool.fleet.servers[0].up)


def test_a_server_that_lost_its_weights_gets_them_again(engine, servers, prompt, weights):
    """It was started again by whoever it belongs to, while nothing was asked of it."""
    pool = engine()
    pool.call(pool.sync.update(weights(3)))
    servers[0].version = "2"
    groups = pool.generate([prompt] * 12)
    assert {sample.version for group in groups for sample in group} == {3}
    wait_for(lambda: servers[0].version == "3" and pool.fleet.servers[0].up)


def test_what_began_before_an_update_may_end_under_either_weights(engine, servers, prompt, weights):
    pool = engine([servers[0]])
    pool.call(pool.sync.update(weights(3)))
    old = threading.Event()

    def slow(body, right):
        old.wait(10)
        return 200, right

    servers[0].faults = [slow]
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        drawn = threads.submit(pool.generate, [prompt])
        wait_for(lambda: servers[0].held)
        pool.call(pool.sync.update(weights(4)))
        old.set()
        (group,) = drawn.result(20)
    assert {sample.version for sample in group} == {3} and pool.fleet.servers[0].up


def test_half_loaded_weights_have_no_version_that_anybody_takes(engine, servers, weights):
    """A server that failed an update goes on, and other processes ask it until they notice."""
    pool = engine()
    pool.call(pool.sync.update(weights(1)))
    servers[0].broken["/update_weights_from_disk"] = (400, {"success": False, "message": "half"})
    pool.call(pool.sync.update(weights(2)))
    assert servers[0].version == "-1" and not servers[0].paused and servers[1].version == "2"


def test_without_any_server_for_too_long_the_call_ends_naming_them(engine, servers, prompt):
    pool = engine(start_timeout_s=1.0)
    for one in servers:
        one.stop()
    with pytest.raises(RolloutError, match=f"no SGLang server is left(.|\n)*{servers[0].address}"):
        pool.generate([prompt])


def test_patience_begins_anew_when_a_server_was_there_in_between(engine, servers, prompt, weights, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pool_lib, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    pool = engine([servers[0]], start_timeout_s=60.0, retries=1)
    pool.call(pool.sync.update(weights(1)))
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        for _ in range(2):
            now[0] += 40
            servers[0].stop()
            drawn = threads.submit(pool.generate, [prompt])
            wait_for(lambda: pool.pool._dark_since is not None)
            now[0] += 40
            servers[0].start()
            assert len(drawn.result(20)[0]) == 3


def test_what_nobody_thought_of_while_a_server_is_brought_back_ends_the_call(engine, servers, prompt, weights):
    pool = engine([servers[0]])
    pool.call(pool.sync.update(weights(1)))

    async def broken(server):
        raise KeyError("unthought of")

    pool.fleet._wait_for = broken
    servers[0].stop()
    with pytest.raises(RolloutError, match=r"no SGLang server is left(.|\n)*unthought of"):
        pool.generate([prompt])


def test_servers_that_never_answer_are_an_error_at_the_start(processor, servers):
    address = servers[0]
    address.broken["/health"] = (503, {})
    with pytest.raises(InputError, match=r"didn't start.*start_timeout_s = 0.3"):
        ScriptedEngine(processor, [address], start_timeout_s=0.3)


def test_an_address_that_drops_the_ban_of_tokens_is_refused(processor, servers):
    """As that of sglang-router 0.3.2 does."""
    servers[1].obeys = False
    with pytest.raises(InputError, match=rf"{servers[1].address} ignores logit_bias.*name servers, not a router, in"):
        ScriptedEngine(processor, servers)
