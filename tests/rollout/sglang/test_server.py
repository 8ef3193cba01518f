"""The SGLang engine with real servers, against the trainer's own model."""

import dataclasses
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from capcur_jax.errors import InputError, RolloutError
from capcur_jax.models.batching import Buckets, PromptSize
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.local.engine import LocalEngine
from capcur_jax.rollout.sglang import wire
from capcur_jax.rollout.sglang.engine import SGLangEngine
from tests.rollout.sglang.conftest import changed

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
CLOSE = 1e-3


@pytest.fixture(params=FAMILIES)
def one(request, served):
    found = served[request.param]
    found.engine.update_weights(found.parameters, found.engine.health().version + 1)
    return found


def wait_for(condition, seconds=120):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.1)


def loads(engine):
    """How many requests each server has, as it says."""
    infos = [engine._call(server.client.call("GET", "/v1/loads", None, 10)) for server in engine._fleet.servers]
    return [load for info in infos for load in info["loads"]]


def difference(served, parameters, prompts, groups, sampling):
    return max(
        np.abs(served.logprobs(parameters, prompt, sample, sampling) - sample.logprobs).max()
        for prompt, group in zip(prompts, groups, strict=True)
        for sample in group
    )


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, 0.7, top_p=0.8, top_k=50), Sampling(12, 0.0)])
def test_logprobs_are_the_trainers_own(one, sampling):
    prompts, version = one.prompts(), one.engine.health().version
    groups = one.engine.generate(prompts, sampling, 3, 0)
    assert [len(group) for group in groups] == [3] * 3
    assert {sample.spans for group in groups for sample in group if len(sample.tokens) == 12} == {((version, 0, 12),)}
    assert difference(one, one.parameters, prompts, groups, sampling) < CLOSE
    ends = one.processor.end_tokens
    for sample in (sample for group in groups for sample in group):
        assert (sample.finish == "stop") == (sample.tokens[-1] in ends) and len(sample.tokens) <= 12
        assert not np.isin(sample.tokens[:-1], ends).any()


def test_greedy_tokens_are_the_local_engines(one):
    prompts, sampling = one.prompts(), Sampling(12, 0.0)
    local = LocalEngine(
        one.model, one.processor, slots=3, buckets=Buckets((96, 192), ((4, 128),), longest=96), prefill=3
    )
    for ours, theirs in zip(
        local.generate(prompts, sampling, 1), one.engine.generate(prompts, sampling, 1, 0), strict=True
    ):
        np.testing.assert_array_equal(ours[0].tokens, theirs[0].tokens)
        np.testing.assert_allclose(ours[0].logprobs, theirs[0].logprobs, atol=CLOSE)


def test_both_end_tokens_end_a_response_and_belong_to_it(one):
    groups = one.engine.generate(one.prompts(), Sampling(200), 8, 0)
    stopped = [sample for group in groups for sample in group if sample.finish == "stop"]
    assert {int(sample.tokens[-1]) for sample in stopped} == set(one.processor.end_tokens)


@pytest.mark.parametrize("only", ["", "visual", "text"])
def test_new_weights_are_those_that_answer(one, only):
    """Vision alone too: image features of the weights before must not come back."""
    prompts, sampling = one.prompts(), Sampling(12)
    new, version = changed(one.parameters, only=only), one.engine.health().version + 1
    seconds = one.engine.update_weights(new, version)
    assert set(seconds) >= {"gather", "write", "load"} and seconds["load"] > 0
    groups = one.engine.generate(prompts, sampling, 3, 0)
    assert {sample.version for group in groups for sample in group} == {version}
    assert difference(one, new, prompts, groups, sampling) < CLOSE
    shown = [1, 2] if only == "visual" else [0, 1, 2]
    for number in shown:
        assert difference(one, one.parameters, [prompts[number]], [groups[number]], sampling) > 10 * CLOSE


def test_what_was_begun_before_an_update_goes_on_under_the_new_weights(pair):
    prompts, sampling = [pair.prompt(text, (2.2, 3.4)) for text in "abcd"], Sampling(360)
    engine, before = pair.engine, pair.engine.health().version
    new, found = changed(pair.parameters), []
    thread = threading.Thread(target=lambda: found.extend(engine.generate(prompts, sampling, 8, 0)))
    thread.start()
    wait_for(lambda: any(load["num_running_reqs"] for load in loads(engine)))  # their first tokens are there
    engine.update_weights(new, before + 1)
    thread.join()
    both = [(p, s) for p, group in zip(prompts, found, strict=True) for s in group if len(s.spans) > 1]
    assert both
    for prompt, sample in both[:4]:
        assert [span.version for span in sample.spans] == [before, before + 1] and sample.version == before
        for span, parameters in zip(sample.spans, (pair.parameters, new), strict=True):
            ours = pair.logprobs(parameters, prompt, sample, sampling)[span.start : span.end]
            np.testing.assert_allclose(ours, sample.logprobs[span.start : span.end], atol=CLOSE)


@pytest.mark.parametrize("fault", ["name", "shape", "cut"])
def test_files_that_would_crash_a_server_are_refused_before_it_reads_them(one, fault, monkeypatch):
    engine, prompts, sampling = one.engine, one.prompts(), Sampling(8)
    version, write = engine.health().version, engine._store.write

    def spoilt(parameters, version):
        update = write(parameters, version)
        file = sorted(update.directory.glob("*.safetensors"))[-1]
        tensors = load_file(file)
        name = sorted(tensors)[0]
        if fault == "name":
            tensors[name.replace("model", "modle").replace("visual", "visaul")] = tensors.pop(name)
        elif fault == "shape":
            tensors[name] = np.concatenate([tensors[name], tensors[name]])
        save_file(tensors, file)
        if fault == "cut":
            file.write_bytes(file.read_bytes()[:-7])
        return update

    monkeypatch.setattr(engine._store, "write", spoilt)
    with pytest.raises(RolloutError, match=r"told of it|half written"):
        engine.update_weights(changed(one.parameters), version + 1)
    groups = engine.generate(prompts, sampling, 2, 0)
    assert {sample.version for group in groups for sample in group} == {version}
    assert difference(one, one.parameters, prompts, groups, sampling) < CLOSE
    monkeypatch.undo()
    engine.update_weights(one.parameters, version + 2)
    assert engine.health().alive == engine.health().servers


def test_a_server_killed_in_mid_rollout_loses_nothing_and_comes_back_with_the_weights(pair):
    engine, sampling = pair.engine, Sampling(40)
    before, new = engine.counters(), changed(pair.parameters)
    engine.update_weights(new, engine.health().version + 1)
    prompts = [pair.prompt(str(number), (2.2, 3.4)) for number in range(40)]
    victim = engine._fleet.servers[0]

    def kill():
        wait_for(lambda: engine._pool.progress.tokens > 0 and victim.busy)
        os.killpg(victim.process.group, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    groups = engine.generate(prompts, sampling, 4, 0)
    thread.join()
    assert [len(group) for group in groups] == [4] * 40
    assert len({id(sample) for group in groups for sample in group}) == 160
    assert difference(pair, new, prompts[:6], groups[:6], sampling) < CLOSE
    assert engine.counters()["retries"] > before["retries"]
    wait_for(lambda: engine.health().alive == 2)
    assert engine.counters()["restarts"] == before["restarts"] + 1
    assert victim.checksums == engine._fleet.servers[1].checksums
    assert "starts" in victim.process.log.read_text(errors="replace")
    other = engine._fleet.servers[1]
    other.limit, limit = 0, other.limit  # so that the restarted one answers
    try:
        groups = engine.generate(prompts[:2], sampling, 2, 0)
    finally:
        other.limit = limit
    assert difference(pair, new, prompts[:2], groups, sampling) < CLOSE


def test_a_request_that_hangs_is_asked_again_and_holds_up_no_update(served, monkeypatch):
    """A Qwen2.5-VL prompt with expanded placeholders hangs in the server for ever."""
    one = served["qwen2_5_vl"]
    engine, prompts, sampling = one.engine, one.prompts(), Sampling(8)
    engine.generate(prompts, sampling, 2, 0)  # whatever the server compiles for images
    payload, before, sent = wire.payload, engine.counters(), []

    def expanded(prompt, *rest):
        body = payload(prompt, *rest)
        if prompt.grids and not sent:
            sent.append(body)
            body["input_ids"] = prompt.tokens.tolist()
        return body

    monkeypatch.setattr(wire, "payload", expanded)
    monkeypatch.setattr(engine._pool, "_settings", dataclasses.replace(engine._settings, request_timeout_s=10))
    groups = engine.generate(prompts, sampling, 2, 0)
    assert sent and [len(group) for group in groups] == [2] * 3
    assert engine.counters()["timeouts"] > before["timeouts"]
    assert engine.counters()["restarts"] == before["restarts"]
    new = changed(one.parameters)
    engine.update_weights(new, engine.health().version + 1)
    assert difference(one, new, prompts, engine.generate(prompts, sampling, 2, 0), sampling) < CLOSE


def test_a_request_that_takes_too_long_is_aborted_in_the_server(pair, monkeypatch):
    engine, prompts = pair.engine, [pair.prompt("long")]
    monkeypatch.setattr(
        engine._pool, "_settings", dataclasses.replace(engine._settings, request_timeout_s=0.2, retries=0)
    )
    with pytest.raises(RolloutError, match=r"no answer within 0\.2 s"):
        engine.generate(prompts, Sampling(490), 8, 0)

    wait_for(lambda: not any(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads(engine)), 30)


def test_what_no_server_can_hold_is_an_error_of_the_config_and_what_it_just_holds_works(pair):
    engine, prompt = pair.engine, pair.prompt("x")
    just = Sampling(512 - len(prompt))
    engine.warm_up([PromptSize(len(prompt))], just, 2)
    with pytest.raises(InputError, match=r"can be 513 tokens.*holds 512: raise --context-length"):
        engine.warm_up([PromptSize(len(prompt) + 1)], just, 2)
    assert len(engine.generate([prompt], just, 2, 0)[0]) == 2


def test_an_engine_joins_servers_that_run_and_gives_them_its_weights(lent, settings, tmp_path):
    new = changed(lent.parameters, seed=5)
    joined = dataclasses.replace(settings, python="", addresses=lent.addresses)
    guest = SGLangEngine(lent.processor, "unused", tmp_path, joined)
    try:
        guest.update_weights(new, 500)
        groups = guest.generate(lent.prompts(), Sampling(8), 2, 0)
    finally:
        guest.close()
    assert difference(lent, new, lent.prompts(), groups, Sampling(8)) < CLOSE
    assert {sample.version for group in groups for sample in group} == {500}
    assert all(server.process.ended() is None for server in lent.engine._fleet.servers)


def test_a_ban_of_tokens_that_a_server_would_not_hear_of_is_noticed(pair):
    """The question at the start, to a server that hears it."""
    client = pair.engine._fleet.servers[0].client
    assert pair.engine._call(client.obeys())


def test_memory_is_released_and_taken_back_in_turn(pair):
    engine, version = pair.engine, pair.engine.health().version
    engine.release()
    engine.resume()
    with pytest.raises(RolloutError, match="update_weights comes before"):
        engine.generate(pair.prompts(), Sampling(4), 2, 0)
    # The same weights, which lie elsewhere now: as at a stage's start, when the trainer has left the devices.
    elsewhere = jax.tree.map(lambda leaf: leaf + 0, pair.parameters)
    seconds = engine.update_weights(elsewhere, version)
    assert seconds["write"] == 0 and seconds["load"] > 0
    groups = engine.generate(pair.prompts(), Sampling(4), 2, 0)
    assert difference(pair, pair.parameters, pair.prompts(), groups, Sampling(4)) < CLOSE
