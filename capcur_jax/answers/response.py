"""The end of a response: its final answer, and whether the whole has the required form.

Responses are untrusted. Both functions take the whole of one and run in time linear in its length, whatever it holds.
"""

import re

from capcur_jax.answers.brackets import closing

_BOX = re.compile(r"\\boxed\s*\{")
# White space inside a tag is allowed, which is what the release does by removing it around <, > and / everywhere first.
_THINK_TAG = re.compile(r"<\s*(?P<close>/\s*)?think\s*>")


def last_boxed(text: str) -> str | None:
    r"""Contents of the last `\boxed{...}` of `text`, or None.

    The last occurrence decides: where its braces never close (a response cut off in its answer) the result is None,
    not an earlier box, which the response has gone on from. Of nested boxes the innermost last one counts.
    """
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    end = None if start is None else closing(text, start)
    return None if end is None else text[start : end.start()]


def is_formatted(text: str) -> bool:
    r"""Whether the response as a whole is `<think>...</think> ... \boxed{...}`.

    As in the release (EasyR1's `<think>.*</think>.*\\boxed\{.*\}.*` over the whole response): nothing but white space
    may come before the block, white space inside the tags is ignored, the block may be empty, and text may follow the
    box. Stricter than the release in two ways, so that neither earns the reward: there is exactly one think block, and
    the last box after it closes and is not blank.
    """
    tags = list(_THINK_TAG.finditer(text))
    if len(tags) != 2 or tags[0]["close"] is not None or tags[1]["close"] is None:
        return False
    if text[: tags[0].start()].strip():
        return False
    answer = last_boxed(text[tags[1].end() :])
    return answer is not None and bool(answer.strip())


def boxed_response(reasoning: str, answer: str) -> str:
    """The response that the format reward wants: reasoning inside <think></think>, then the boxed answer."""
    return f"<think>{reasoning}</think> \\boxed{{{answer}}}"
