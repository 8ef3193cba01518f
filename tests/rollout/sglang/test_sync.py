"""Servers at the run's weights, whatever becomes of an update: scripted, in milliseconds."""

import pytest

from capcur_jax.errors import RolloutError
from capcur_jax.rollout.sglang import checks
from tests.rollout.sglang.scripted import wait_for


def test_an_update_goes_on_even_if_it_fails_and_the_server_gets_everything(engine, servers, prompt, weights):
    pool = engine()
    pool.call(pool.sync.update(weights(1)))
    servers[0].broken["/update_weights_from_disk"] = (400, {"success": False, "message": "no room"})
    pool.call(pool.sync.update(weights(2, names=[], sums={})))
    assert pool.fleet.servers[0].up  # nothing changed: the weights that it has got a new name
    assert servers[1].sent("/update_weight_version") == [{"new_version": "2", "abort_all_requests": False}]
    pool.call(pool.sync.update(weights(3)))
    assert not pool.fleet.servers[0].up and not servers[0].paused
    groups = pool.generate([prompt] * 4)
    assert {sample.version for group in groups for sample in group} == {3}
    assert {int(sample.tokens[0]) for group in groups for sample in group} == {50}
    servers[0].broken.clear()
    wait_for(lambda: pool.fleet.servers[0].up)
    assert servers[0].version == "3"
    assert servers[0].sent("/update_weights_from_disk")[-1]["model_path"].endswith("3-complete")


def test_weights_that_reach_nobody_are_an_error(engine, servers, weights):
    pool = engine(start_timeout_s=0.5)
    for one in servers:
        one.broken["/update_weights_from_disk"] = (400, {"success": False, "message": "no room"})
    with pytest.raises(RolloutError, match=r"version 1 reached no server(.|\n)*no room"):
        pool.call(pool.sync.update(weights(1)))


def test_a_server_that_says_success_with_another_version_is_taken_out(engine, servers, weights):
    pool = engine()
    servers[0].broken["/model_info"] = (200, {"weight_version": "default"})
    pool.call(pool.sync.update(weights(1)))
    assert [one.up for one in pool.fleet.servers] == [False, True]
    assert "weights of version default, not 1" in pool.fleet.servers[0].reason


def test_servers_that_hold_different_weights_do_not_both_stay(engine, servers, weights):
    pool = engine()
    servers[0].parameters = {**servers[0].parameters, "lm_head.weight": "other"}
    servers[1].parameters = {**servers[1].parameters, "lm_head.weight": "one"}
    pool.call(pool.sync.update(weights(1)))
    assert sorted(one.up for one in pool.fleet.servers) == [False, True]


def test_a_tensor_that_changed_and_did_not_arrive_is_noticed(engine, servers, processor, weights):
    names = list(checks.declared(processor.config))[:2]
    pool = engine()
    pool.call(pool.sync.update(weights(1)))
    for one in servers[1:]:
        one.parameters = {**one.parameters, **{checks.served_name(name): "1" for name in names}}
    pool.call(pool.sync.update(weights(2, names, {name: 1 for name in names})))
    assert [one.up for one in pool.fleet.servers] == [False, True]
    assert "2 tensors didn't arrive" in pool.fleet.servers[0].reason


def test_memory_is_released_after_whatever_runs_is_aborted_and_needs_a_whole_update_after(
    engine, servers, prompt, weights
):
    pool = engine()
    pool.call(pool.sync.update(weights(1)))
    for one in servers:
        one.calls.clear()
    pool.call(pool.fleet.release())
    pool.call(pool.sync.resume())
    with pytest.raises(RolloutError, match="update_weights comes before generate"):
        pool.generate([prompt])
    pool.call(pool.sync.update(weights(2, names=[], sums={})))
    for one in servers:
        paths = [path for path, _ in one.calls if path != "/health"]
        assert paths[:3] == ["/abort_request", "/release_memory_occupation", "/resume_memory_occupation"]
        assert one.sent("/update_weights_from_disk")[-1]["model_path"].endswith("2-complete")
    assert len(pool.generate([prompt])[0]) == 3


def test_a_sleeping_server_is_not_asked_for_its_health(engine, servers):
    pool = engine()
    pool.call(pool.fleet.release())
    servers[0].calls.clear()

    async def look():
        pool.fleet.doubt(pool.fleet.servers[0])

    pool.call(look())
    wait_for(lambda: not pool.fleet.servers[0].doubted)
    assert servers[0].calls == [] and pool.fleet.servers[0].up
