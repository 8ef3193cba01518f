"""What the SGLang engine does about servers and answers that fail: scripted, in milliseconds."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import threading
import time
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from capcur_jax.errors import InputError, RolloutError
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.sglang import checks, fleet
from capcur_jax.rollout.sglang import pool as pool_lib
from capcur_jax.rollout.sglang.client import Client, Refused
from capcur_jax.rollout.sglang.engine import SGLangEngine
from capcur_jax.rollout.sglang.fleet import Fleet
from capcur_jax.rollout.sglang.member import Server
from capcur_jax.rollout.sglang.pool import Pool
from capcur_jax.rollout.sglang.settings import Settings
from capcur_jax.rollout.sglang.sync import WeightSync
from capcur_jax.rollout.sglang.weights import File, Update
from tests.rollout.sglang.scripted import Scripted

TWO = Sampling(2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fleet, "PROBE_S", 0.05)
    monkeypatch.setattr(fleet, "WATCH_S", 0.05)


@pytest.fixture
def servers():
    made = [Scripted(40), Scripted(50)]
    yield made
    for one in made:
        with contextlib.suppress(OSError):
            one.stop()


@pytest.fixture(scope="module")
def prompt(processor):
    return processor.prepare(processor.render(["What shape?"]))


@pytest.fixture
def weights(processor, tmp_path):
    """Complete files of the table's names and shapes: a version after the other, of the same values."""
    shapes = checks.declared(processor.config)

    def make(version: int, names=None, sums=None) -> Update:
        directory, complete = tmp_path / f"{version}-update", tmp_path / f"{version}-complete"
        for path, chosen in ((directory, shapes if names is None else names), (complete, shapes)):
            path.mkdir()
            if chosen:
                save_file({name: np.zeros(shapes[name], np.float32) for name in chosen}, path / "a.safetensors")
        sums = dict.fromkeys(shapes, 0) if sums is None else sums
        return Update(version, directory, complete, (File("a.safetensors", 0, sums),), 0, {})

    return make


class Engine:
    """A pool in a loop of its own, as the engine has it, over stand-ins."""

    def __init__(self, processor, stand_ins, manages=True, **settings):
        settings = {"concurrency": 2, "request_timeout_s": 20.0, "start_timeout_s": 5.0, **settings}
        self.settings = Settings.from_config({"addresses": [one.address for one in stand_ins], **settings})
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

        async def begin():
            made = [Server(Client(one.address), self.settings.concurrency) for one in stand_ins]
            self.fleet = Fleet(self.settings, made)
            self.sync = WeightSync(self.fleet, processor.config, manages)
            self.pool = Pool(self.fleet, self.sync, processor)
            await self.fleet.start(self.sync.admit)
            self.sync.version = 0

        self.call(begin())

    def call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def generate(self, prompts, n=3):
        return self.call(self.pool.generate(prompts, TWO, n, 0))

    def close(self):
        self.call(self.fleet.close())
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture
def engine(processor, servers, monkeypatch):
    for one in servers:
        one.version = "0"
        # The parameters of a server that has all of the table's names.
        one.parameters = {checks.served_name(name): "0" for name in checks.declared(processor.config)}
    made = []

    def make(stand_ins=servers, **settings):
        made.append(Engine(processor, stand_ins, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def wait_for(condition):
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


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
    with pytest.raises(RolloutError) as caught:
        engine(retries=0).generate([prompt])
    assert "Input should be a list" in str(caught.value) and "iVBOR" not in str(caught.value)


# ---------------------------------------------------------------------- servers


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
        drawn = threads.submit(engine.generate, [prompt], TWO, 2, 0)
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
        Engine(processor, [address], start_timeout_s=0.3)


def test_an_address_that_drops_the_ban_of_tokens_is_refused(processor, servers):
    """As that of sglang-router 0.3.2 does."""
    servers[1].obeys = False
    with pytest.raises(InputError, match=rf"{servers[1].address} ignores logit_bias.*name servers, not a router, in"):
        Engine(processor, servers)


# ---------------------------------------------------------------------- weights


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


def test_the_checks_of_a_server_that_renamed_its_parameters(processor):
    now = [{"visual.new_name": "1"}]
    assert "no parameter" in checks.arrived(None, now, ["model.visual.patch_embed.proj.weight"], ())
    before = [{"a": "0", "b": "0"}]
    assert "weren't sent, first b" in checks.arrived(before, [{"a": "1", "b": "1"}], ["a"], ["a"])
    assert checks.arrived(before, [{"a": "1", "b": "0"}], ["a"], ["a"]) == ""
    assert checks.arrived(before, [{"a": "0", "b": "0"}], ["a"], []) == ""
    assert "didn't arrive, first a" in checks.arrived(before, before, ["a"], ["a"])


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


# ---------------------------------------------------------------------- files


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


def test_a_refusal_knows_its_status():
    assert Refused(404, "x").status == 404 and dataclasses.is_dataclass(Server)
