"""The client of OpenAI-compatible servers: patience, bounds, and what never reaches a message."""

import functools
import socket
import threading
import time

import pytest
from PIL import Image

from capcur_jax.errors import InputError, RolloutError
from capcur_jax.rollout import chat as chat_lib
from capcur_jax.rollout.chat import Chat, Failed, Reply, ask_all, image_part
from tests.rollout.scripted_server import Raw, ScriptedServer, completion, has_image, turn_text

SECRET = "sk-verysecret"
BASE64 = "iVBORw0KGgo" * 30


def dead_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def ask(addresses, items, **kinds):
    """(replies or failures by item, requests)"""
    kinds = {"concurrency": 4, "timeout_s": 5.0, "retries": 3, "pause_s": 0.01} | kinds
    found = {}
    one = lambda client, item: client.ask([{"role": "user", "content": str(item)}], max_tokens=7)  # noqa: E731
    requests = ask_all(functools.partial(Chat, addresses, "m", **kinds), items, one, found.__setitem__)
    return found, requests


def test_every_item_is_answered_once_and_so_many_at_a_time():
    running, most, lock = 0, 0, threading.Lock()

    def reply(body):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return f"re {turn_text(body)}"

    with ScriptedServer(reply) as server:
        found, requests = ask([server.address + "/v1/"], range(30))
    assert found == {i: Reply(f"re {i}", "stop") for i in range(30)} and requests == 30
    assert 1 < most <= 4
    body = server.requests[0]
    assert (body["path"], body["model"], body["max_tokens"], body["temperature"]) == ("/v1/chat/completions", "m", 7, 0)


def test_items_are_drawn_as_they_are_needed():
    drawn = []

    def items():
        for i in range(20):
            drawn.append(i)
            yield i

    seen = []
    one = lambda client, item: client.ask([{"role": "user", "content": "q"}], max_tokens=1)  # noqa: E731
    with ScriptedServer(lambda body: "yes") as server:
        ask_all(lambda: Chat([server.address], "m", concurrency=2), items(), one, lambda *_: seen.append(len(drawn)))
    assert seen[0] <= 2


def test_a_bare_text_goes_to_completions():
    found = {}
    with ScriptedServer(lambda body: " B") as server:
        one = lambda client, item: client.complete(item, max_tokens=8)  # noqa: E731
        ask_all(lambda: Chat([server.address], "m"), ["text"], one, found.__setitem__)
    assert found == {"text": Reply(" B", "stop")}
    assert server.requests[0]["path"] == "/v1/completions" and server.requests[0]["prompt"] == "text"
    assert "messages" not in server.requests[0]


PASSING = {
    "500": Raw(500, b"boom"),
    "503": Raw(503, b'{"error": {"message": "loading"}}'),
    "429": Raw(429, b"slow down", {"Retry-After": "0.02"}),
    "429 with a date": Raw(429, b"", {"Retry-After": "Mon, 23 Nov 2026 01:00:00 GMT"}),
    "hung up": Raw(0),
    "no HTTP length": Raw(200, b"", {"Content-Length": "50"}),
    "garbage": Raw(200, b"\xff\x00\x9b garbage"),
    "another JSON": Raw(200, b'{"choices": []}'),
    "no text": Raw(200, b'{"choices": [{"message": {"content": 5}}]}'),
    "a list": Raw(200, b"[1]"),
    "deep": Raw(200, b"[" * 100_000),
    "huge": Raw(200, b" " * (chat_lib.MAX_BODY + 1)),
    "slow": Raw(200, completion("late"), delay_s=1.5),
}


@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_is_tried_again(kind):
    tries = []

    def reply(body):
        tries.append(1)
        return PASSING[kind] if len(tries) == 1 else "good"

    with ScriptedServer(reply) as server:
        found, requests = ask([server.address], [0], timeout_s=0.4 if kind in ("slow", "no HTTP length") else 5.0)
    assert found == {0: Reply("good", "stop")} and requests == len(tries) == 2


@pytest.mark.parametrize("kind", ["500", "garbage", "huge"])
def test_one_question_without_an_answer_does_not_stop_the_others(kind):
    with ScriptedServer(lambda body: PASSING[kind] if turn_text(body) == "3" else "good") as server:
        found, _ = ask([server.address], range(6), retries=1)
    failure = found.pop(3)
    assert isinstance(failure, Failed) and failure.reason == "no answer from the server" and len(failure.detail) < 400
    assert all(reply.text == "good" for reply in found.values()) and len(found) == 5


def test_a_refused_question_is_not_asked_again():
    with ScriptedServer(lambda body: Raw(400, b"too long") if turn_text(body) == "1" else "good") as server:
        found, requests = ask([server.address], range(3))
    assert requests == 3 and found[1].reason == "refused by the server" and "too long" in found[1].detail


def test_a_reply_that_is_cut_off_or_missing_is_told():
    with ScriptedServer(lambda body: ("half", "length") if turn_text(body) == "0" else Raw(200, completion(None))) as s:
        found, _ = ask([s.address], range(2))
    assert found == {0: Reply("half", "length"), 1: Reply("", "stop")}


def test_another_address_takes_over():
    with ScriptedServer(lambda body: "good") as server:
        found, _ = ask([dead_address(), server.address], range(10))
    assert len(found) == 10 and {reply.text for reply in found.values()} == {"good"}


def test_two_addresses_share_the_work():
    def slow(body):
        time.sleep(0.01)
        return "good"

    with ScriptedServer(slow) as one, ScriptedServer(slow) as two:
        ask([one.address, two.address], range(20))
    assert min(len(one.requests), len(two.requests)) >= 5


def test_no_server_at_all_is_the_users_to_mend():
    address = dead_address()
    with pytest.raises(InputError) as error:
        ask([address], range(100), retries=1)
    assert address in str(error.value) and "--address" in str(error.value)


def test_a_server_that_goes_away_ends_the_job():
    server = ScriptedServer(lambda body: "good").__enter__()
    found, gone = {}, []

    def done(item, result):
        found[item] = result
        if not gone:
            gone.append(server.__exit__())

    one = lambda client, item: client.ask([{"role": "user", "content": "q"}], max_tokens=1)  # noqa: E731
    make = functools.partial(Chat, [server.address], "m", concurrency=1, retries=1, pause_s=0.01)
    with pytest.raises(RolloutError, match="it goes on"):
        # Its open connection may live on; connections expire, so that the second second finds nobody.
        ask_all(make, _slowly(3, 2.2), one, done)
    assert 0 in found


def _slowly(count, pause_s):
    for i in range(count):
        yield i
        time.sleep(pause_s)


def test_a_server_that_fails_at_everything_ends_the_job():
    with ScriptedServer(lambda body: Raw(500, b"broken")) as server, pytest.raises(InputError, match="broken"):
        ask([server.address], range(10_000), retries=0)
    assert len(server.requests) < 60


@pytest.mark.parametrize("status, said", [(401, "--api_key_variable"), (404, "--address"), (307, "--address")])
def test_what_no_question_will_mend_ends_the_job(status, said):
    answer = Raw(status, b"no", {"Location": "http://127.0.0.1:1/"})
    with ScriptedServer(lambda body: answer) as server, pytest.raises(InputError, match=said):
        ask([server.address], range(10))
    assert len(server.requests) <= 4


def test_the_key_comes_from_the_environment_and_is_in_no_message(monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", SECRET + "\n")
    caplog.set_level("DEBUG")
    answer = Raw(401, f'{{"error": {{"message": "bad key {SECRET}"}}}}'.encode())
    with ScriptedServer(lambda body: answer) as server, pytest.raises(InputError) as error:
        ask([server.address], [0], key_variable="MY_KEY")
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in str(error.value) and "bad key ***" in str(error.value)
    assert SECRET not in caplog.text


def test_a_key_that_a_server_repeats_is_in_no_part_of_the_reply(monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    said = Raw(200, completion(f"my key is {SECRET}", f"stop {SECRET}", thinking=f"The key {SECRET} ..."))
    with ScriptedServer(lambda body: said) as server:
        found, _ = ask([server.address], [0], key_variable="MY_KEY")
    assert found[0][:2] == ("my key is ***", "stop ***") and found[0].thinking == "The key *** ..."


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with ScriptedServer(lambda body: "good") as server:
        ask([server.address], [0])
    assert "Authorization" not in server.requests[0]["headers"]


def test_a_key_in_the_place_of_its_variables_name_is_not_repeated():
    with pytest.raises(InputError) as error:
        Chat(["http://127.0.0.1:1"], "m", key_variable=SECRET)
    assert SECRET not in str(error.value)


def test_images_go_out_whole_and_are_in_no_message(caplog):
    caplog.set_level("DEBUG")
    found = {}

    def one(client, item):
        content = [image_part(Image.new("RGB", (8, 8), "red")), {"type": "text", "text": "q"}]
        return client.ask([{"role": "user", "content": content}], max_tokens=1)

    echo = f'{{"detail": "bad url data:image/png;base64,{BASE64} and {BASE64}\\u001b[31m"}}'.encode()
    with ScriptedServer(lambda body: Raw(422, echo)) as server:
        ask_all(functools.partial(Chat, [server.address], "m"), [0], one, found.__setitem__)
    assert has_image(server.requests[0])
    url = server.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    assert "bad url" in found[0].detail
    for text in (found[0].detail, caplog.text):
        assert "iVBORw0KGgo" not in text and "\x1b" not in text


@pytest.mark.parametrize(
    "address", ["localhost:8000", "ftp://host", "http://", "", "http://host:99999", "http://h/?k=v"]
)
def test_no_address(address):
    with pytest.raises(InputError, match="--address"):
        Chat([address], "m")


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(InputError) as error:
        Chat([f"http://me:{SECRET}@127.0.0.1:1"], "m")
    assert SECRET not in str(error.value) and "--api_key_variable" in str(error.value)
