"""How chat models are spoken to over HTTP: OpenAI's interface (SGLang, vLLM, most hosted models) and Anthropic's.

A conversation is OpenAI's list of messages in both; a dialect writes the request and reads the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

MAX_TEXT = 100_000  # characters of a reply that are kept
_DATA = re.compile(r"data:(image/[\w.+-]+);base64,(.*)", re.DOTALL)


class Reply(NamedTuple):
    """What a model said."""

    text: str
    finish: str  # "stop", "length" (cut off at max_tokens), or the server's own word
    tokens: int | None = None  # of the reply, as the server counts them; None: it does not say
    prompt_tokens: int | None = None
    thinking: str = ""  # what the server keeps apart from the text


class Unreadable(ValueError):
    """An answer that is none of the interface."""


class Dialect(NamedTuple):
    """An interface.

    path: of a conversation.
    headers: the API key or "" -> those of every request.
    body: (messages, max_tokens, temperature, further fields) -> the request without its model.
    read: the answer's bytes -> what it says. Raises Unreadable.
    """

    name: str
    path: str
    headers: Callable[[str], dict[str, str]]
    body: Callable[[Sequence[dict], int, float, Mapping[str, Any]], dict[str, Any]]
    read: Callable[[bytes | bytearray], Reply]


def _openai_body(messages: Sequence[dict], limit: int, temperature: float, more: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages), "max_tokens": limit, "temperature": temperature, **more, "stream": False}


def read_openai(raw: bytes | bytearray) -> Reply:
    """Of a conversation or of a bare text. Raises Unreadable."""
    try:
        answer = json.loads(raw)
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        finish = choice.get("finish_reason") or ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Unreadable("an answer that is none of this interface (no choices[0] with a text)") from None
    if text is None:  # all its tokens went into reasoning, which servers keep apart
        text = ""
    said = choice.get("message") or {}
    thinking = said.get("reasoning_content") or said.get("reasoning") or ""
    if not isinstance(text, str) or not isinstance(finish, str):
        raise Unreadable("an answer that is none of this interface (its text is no text)")
    counts = _count(answer, "completion_tokens"), _count(answer, "prompt_tokens")
    return Reply(text[:MAX_TEXT], finish, *counts, str(thinking)[:MAX_TEXT])


def _anthropic_body(messages: Sequence[dict], limit: int, temperature: float, more: Mapping[str, Any]) -> dict:
    system = "\n\n".join(str(turn["content"]) for turn in messages if turn["role"] == "system")
    turns = [{**turn, "content": _anthropic_content(turn["content"])} for turn in messages if turn["role"] != "system"]
    body = {"messages": turns, "max_tokens": limit, "temperature": min(1.0, temperature), **more, "stream": False}
    return body | ({"system": system} if system else {})


def _anthropic_content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [_anthropic_image(part) if part["type"] == "image_url" else part for part in content]


def _anthropic_image(part: dict) -> dict:
    found = _DATA.fullmatch(part["image_url"]["url"])
    if not found:
        raise ValueError("an image of a conversation is a data: URL")
    return {"type": "image", "source": {"type": "base64", "media_type": found[1], "data": found[2]}}


def read_anthropic(raw: bytes | bytearray) -> Reply:
    """Raises Unreadable. Parts that are no text (thoughts) are left out."""
    try:
        answer = json.loads(raw)
        texts = [part["text"] for part in answer["content"] if part["type"] == "text"]
        text, stop = "".join(texts), answer.get("stop_reason") or ""
        finish = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}.get(stop, stop)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Unreadable("an answer that is none of this interface (no content with texts)") from None
    return Reply(text[:MAX_TEXT], str(finish), _count(answer, "output_tokens"), _count(answer, "input_tokens"))


def _count(answer: dict, name: str) -> int | None:
    usage = answer.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _x_api_key(key: str) -> dict[str, str]:
    return {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key else {})


OPENAI = Dialect("openai", "/v1/chat/completions", _bearer, _openai_body, read_openai)
ANTHROPIC = Dialect("anthropic", "/v1/messages", _x_api_key, _anthropic_body, read_anthropic)
