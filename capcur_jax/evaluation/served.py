"""A model behind an OpenAI-compatible address, asked about a benchmark's rows."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from capcur_jax.data.image_files import FORMATS
from capcur_jax.evaluation.asking import Asked, Done, Said
from capcur_jax.rollout.chat import Chat, Failed, ask_all
from capcur_jax.rollout.dialects import OPENAI, Reply, Unreadable
from capcur_jax.rollout.engine import Sampling

ENCODING = "the file's own bytes, as a data URL"


class Served:
    """An `Answerer`. Images go out as they lie on the disk: no decoding, no other size, no other format.

    Args:
      addresses: of servers of the same model.
      model: the name under which they serve it.
      how: `Chat`'s further arguments: concurrency, timeout_s, retries, key_variable.
    """

    def __init__(self, addresses: Sequence[str], model: str, sampling: Sampling, **how: Any):
        # What the servers do with an image is theirs: it is not known here.
        self.settings: dict[str, Any] = {
            "engine": "served", "address": sorted(addresses), "model": model, "image_encoding": ENCODING,
            "min_pixels": "the server's", "max_pixels": "the server's", "template": "the server's",
        }  # fmt: skip
        dialect = OPENAI._replace(read=_with_text(OPENAI.read))
        self._chat = functools.partial(Chat, addresses, model, dialect=dialect, **how)
        self._sampling = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        if sampling.top_p < 1:
            self._sampling["top_p"] = sampling.top_p
        if sampling.top_k:
            self._sampling["top_k"] = sampling.top_k

    def check(self) -> None:
        """Raises InputError: an address is no address, or the key's variable is not set."""
        asyncio.run(self._chat().close())

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_) -> None:
        pass

    def prepare(self, questions: Iterable[Asked]) -> None:
        """Nothing is compiled here."""

    def answer(self, questions: Sequence[Asked], wanted: Sequence[bool], done: Done) -> None:
        """See `Answerer`."""

        def finished(question: Asked, said: Said | Failed) -> None:
            done([(question, Said("", failed=str(said)) if isinstance(said, Failed) else said)])

        waiting = (question for question, want in zip(questions, wanted, strict=True) if want)
        ask_all(self._chat, waiting, self._ask, finished)

    async def _ask(self, chat: Chat, question: Asked) -> Said:
        try:
            messages = messages_of(question)
        except (OSError, ValueError) as error:
            return Said("", failed=f"broken image: {error}"[:300])
        reply = await chat.ask(messages, **self._sampling)
        return Said(reply.text, reply.finish, reply.tokens, reply.thinking)


def messages_of(question: Asked) -> list[dict[str, Any]]:
    """The conversation. The images are read here, and are nowhere else in memory. Raises OSError, ValueError."""
    content: Any = [
        image_of(part) if isinstance(part, Path) else {"type": "text", "text": part} for part in question.parts
    ]
    if not question.images:
        content = "".join(map(str, question.parts))
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": content}]


def image_of(file: Path) -> dict[str, Any]:
    """A file of an image as a part of a turn, byte for byte. Raises OSError, ValueError: it is none."""
    data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            kind = Image.MIME[str(image.format)]
    except Exception as error:  # broken files make Pillow raise a dozen kinds
        raise ValueError(f"{file}: {type(error).__name__}; replace the file") from None
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def _with_text(read):
    """A reader for which an answer without text, thought and token is none: the question is asked again."""

    def checked(raw: bytes | bytearray) -> Reply:
        reply = read(raw)
        if not (reply.text or reply.thinking or reply.tokens or reply.finish == "length"):
            raise Unreadable("an answer without a text")
        return reply

    return checked
