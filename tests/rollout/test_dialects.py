"""Anthropic's interface beside OpenAI's: one conversation, two requests, one kind of reply."""

import functools
import json

import pytest

from capcur_jax.errors import InputError
from capcur_jax.rollout.chat import Chat, Failed, ask_all
from capcur_jax.rollout.dialects import ANTHROPIC, OPENAI, Reply, Unreadable, read_anthropic, read_openai
from tests.rollout.scripted_server import Raw, ScriptedServer

SECRET = "sk-ant-verysecret"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
TURNS = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": "hm"},
    {"role": "user", "content": "again"},
]


def message(text, stop="end_turn", **more):
    content = [{"type": "thinking", "thinking": "..."}, {"type": "text", "text": text}]
    return Raw(200, json.dumps({"type": "message", "content": content, "stop_reason": stop, **more}).encode())


def ask(server, dialect, key_variable="", temperature=1.5, **kinds):
    found = {}
    one = lambda client, turns: client.ask(TURNS, max_tokens=9, temperature=temperature)  # noqa: E731
    make = functools.partial(
        Chat, [server.address], "m", retries=2, pause_s=0.01, dialect=dialect, key_variable=key_variable, **kinds
    )
    ask_all(make, [0], one, found.__setitem__)
    return found[0]


def test_a_conversation_in_anthropics_interface(monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    usage = {"input_tokens": 12, "output_tokens": 3}
    with ScriptedServer(lambda body: message("yes", usage=usage)) as server:
        assert ask(server, ANTHROPIC, "MY_KEY") == Reply("yes", "stop", 3, 12)
    (request,) = server.requests
    headers = {name.lower(): value for name, value in request["headers"].items()}
    assert request["path"] == "/v1/messages" and headers["x-api-key"] == SECRET and "authorization" not in headers
    assert headers["anthropic-version"]
    assert (request["system"], request["model"], request["max_tokens"], request["temperature"]) == (
        "be short",
        "m",
        9,
        1,
    )
    assert [turn["role"] for turn in request["messages"]] == ["user", "assistant", "user"]
    source = {"type": "base64", "media_type": "image/png", "data": "aGk="}
    assert request["messages"][0]["content"] == [{"type": "image", "source": source}, {"type": "text", "text": "what?"}]


def test_the_same_conversation_in_openais_interface():
    body = {"choices": [{"message": {"content": "yes"}, "finish_reason": "length"}], "usage": {"completion_tokens": 3}}
    with ScriptedServer(lambda _: Raw(200, json.dumps(body).encode())) as server:
        assert ask(server, OPENAI) == Reply("yes", "length", 3, None)
    assert server.requests[0]["messages"] == TURNS and server.requests[0]["temperature"] == 1.5


@pytest.mark.parametrize("stop, finish", [("max_tokens", "length"), ("stop_sequence", "stop"), ("refusal", "refusal")])
def test_why_a_message_ended(stop, finish):
    assert read_anthropic(message("x", stop).body) == Reply("x", finish)


@pytest.mark.parametrize("first", [Raw(529, b'{"error": {"message": "overloaded"}}'), Raw(200, b"{}"), Raw(0)])
def test_what_passes_is_tried_again(first):
    tries = []
    with ScriptedServer(lambda body: tries.append(1) or (first if len(tries) == 1 else message("good"))) as server:
        assert ask(server, ANTHROPIC).text == "good"
    assert len(tries) == 2


def test_an_empty_message_is_an_empty_reply():
    assert read_anthropic(b'{"content": [], "stop_reason": "end_turn"}') == Reply("", "stop")


@pytest.mark.parametrize("read", [read_openai, read_anthropic])
@pytest.mark.parametrize("raw", [
    b"", b"[]", b"null", b'{"content": 5}', b'{"content": [{"type": "text", "text": 5}]}', b'{"choices": [5]}', b"\xff",
])  # fmt: skip
def test_what_is_no_answer(read, raw):
    with pytest.raises(Unreadable):
        read(raw)


def test_errors_name_the_options_of_who_asks_and_never_the_key(monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("MY_KEY", SECRET)
    options = {"options": ("--judge", "--judge_key")}
    refusal = Raw(401, json.dumps({"error": {"message": f"invalid {SECRET}"}}).encode())
    with ScriptedServer(lambda body: refusal) as server, pytest.raises(InputError, match="--judge_key") as error:
        ask(server, ANTHROPIC, "MY_KEY", **options)
    assert SECRET not in str(error.value) + caplog.text
    with pytest.raises(InputError, match="--judge 'nowhere'"):
        Chat(["nowhere"], "m", **options)
    with pytest.raises(InputError, match="--judge_key names no"):
        Chat(["http://h"], "m", key_variable="NOT_SET_AT_ALL", **options)


def test_a_server_that_repeats_the_key_gets_it_into_no_reply(monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    with ScriptedServer(lambda body: message(f"your key is {SECRET}")) as server:
        assert ask(server, ANTHROPIC, "MY_KEY").text == "your key is ***"
    with ScriptedServer(lambda body: Raw(400, f"no: {SECRET}".encode())) as server:
        failed = ask(server, ANTHROPIC, "MY_KEY")
    assert isinstance(failed, Failed) and SECRET not in str(failed)
