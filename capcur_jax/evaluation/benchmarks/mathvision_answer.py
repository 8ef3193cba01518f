r"""MathVision's own reading of replies: the final answer by phrases and boxes, and when two answers are equal.

It is what the published scorer does, step by step and with its oddities (`sqrt` decides whether `\frac12` is mended),
so that its verdicts come out; values are computed by a grammar (arithmetic.py) where it evaluates text.
"""

from __future__ import annotations

import re

from capcur_jax.evaluation import arithmetic

LONGEST = 100_000  # characters of a reply that are read, from its end
_PHRASES = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_BOXED = re.compile(r"oxed{(.*)}", re.DOTALL)
_FIRST = (  # what is replaced in an answer, in this order
    (" ", ""), (r"\,", ""), ("∞", r"\infty"), (r"+\infty", r"\infty"), ("\\\\", "\\"), ("\n", ""), (r"\text", ""),
    (r"\mbox", ""), ("bmatrix", "pmatrix"), (r"\left", ""), (r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""),
    ("{m}^3", ""), ("m^3", ""), ("{units}", ""), ("units", ""), ("{km}", ""), ("km", ""),
)  # fmt: skip
_THEN = (
    (r"\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), (r"\left", ""), (r"\right", ""),
    (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", ""), ("$", ""), (r"\%", ""), ("{.", "{0."),
)  # fmt: skip
_BARE_ROOT = re.compile(r"\\sqrt(?!\\sqrt)([^{])", re.DOTALL)
# What the scorer's parser, or its evaluation of what comes out, does not know.
_UNKNOWN = re.compile(
    r"[π√×÷·−|]|\*\*|(?<!\\)(?:pi|sqrt)|\d\.?e(?!\^)|\\(?:ln|exp|arc\w+)|\\[dt]?frac\s*[^\s{]|\\sqrt\s*[^\s{\[]"
)
# Where the parser stops without an error, whatever follows: "5.**", "5.</answer>".
_END = re.compile(r"\.(?!\d)|[_&]|\\\\")
_FRACTION = re.compile(r"(-?\d+)/(-?\d+)")


def final_answer(reply: str) -> str:
    """The answer that the scorer compares, in lower case."""
    answer = reply.strip()[-LONGEST:]
    for letter in "ABCDE":
        ends, starts = (f" {letter}.", f" ({letter})."), (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if answer.endswith(ends) or answer.startswith(starts):
            answer = letter
    tail = answer.rpartition("is ")[2].rstrip(".")
    answer = tail if _is_number(tail) else answer
    if "oxed{" not in answer:
        for phrase in (spelled for lower in _PHRASES for spelled in (lower, lower.replace("the", "The"))):
            if phrase in answer:
                answer = answer.rpartition(phrase)[2].strip().partition("\n")[0].partition(". ")[0]
            answer = answer.strip()
    elif answer.count("oxed{") > 1:
        answer = "\\boxed{" + answer.rpartition("oxed{")[2]
    answer = _normalized(answer.lower().replace("{}", ""))
    for opening, closing in ("()", "{}"):
        for letter in "abcde":
            answer = answer.replace(f"{opening}{letter}{closing}", letter)
    return answer.rstrip(".").lstrip(":").strip()


def _normalized(answer: str) -> str:
    box = _BOXED.findall(answer)
    answer = box[-1] if box else answer
    close, opening = answer.find("}"), answer.find("{")
    if close != -1 and (opening == -1 or close < opening):
        answer = answer[:close]
    answer = answer.rpartition("=")[2].rpartition(r"\approx")[2]
    for old, new in (*_FIRST, *_THEN):
        answer = answer.replace(old, new)
    answer = f"0{answer}" if answer.startswith(".") else answer
    if "sqrt" in answer:
        answer = _with_braces(_BARE_ROOT.sub(r"\\sqrt{\1}", answer))
    answer = r"\frac{1}{2}" if answer == "0.5" else answer
    over = _FRACTION.fullmatch(answer)
    if over and all(str(int(part)) == part for part in over.groups()):
        return rf"\frac{{{over[1]}}}{{{over[2]}}}"
    return answer


def _with_braces(answer: str) -> str:
    r"""`\frac12` as `\frac{1}{2}`; the text as it was where one has too few characters behind it."""
    head, *parts = answer.split(r"\frac")
    for part in parts:
        if part.startswith("{"):
            head += rf"\frac{part}"
        elif len(part) < 2:
            return answer
        else:
            second = part[1] if part[1] == "{" else f"{{{part[1]}}}"
            head += rf"\frac{{{part[0]}}}{second}{part[2:]}"
    return head


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def equal(first: str, second: str) -> bool:
    """Whether two answers are the same text, the same tuple, or the same value to two decimals."""
    first, second = first.lower(), second.lower()
    if not first.replace(" ", "") or not second.replace(" ", ""):
        return False
    if first.strip() == second.strip() or _tuple(first) == _tuple(second):
        return True
    values = _value(first), _value(second)
    return None not in values and round(values[0], 2) == round(values[1], 2)


def _value(text: str) -> float | None:
    text = _END.split(text.strip(), maxsplit=1)[0]
    return None if _UNKNOWN.search(text) else arithmetic.value(text)


def _tuple(text: str) -> str:
    """A tuple or list of several values with each value to two decimals; any other text as it is."""
    parts = text[1:-1].split(",")
    if len(parts) < 2 or text[0] + text[-1] not in ("()", "[]"):
        return text
    found = []
    for part in parts:
        value = _value(part)
        if "infty" in part or part in ("a", "-a"):
            found.append(part)
        elif value is None:
            return text
        else:
            found.append(str(round(value, 2)))
    return f"{text[0]}{','.join(found)}{text[-1]}"
