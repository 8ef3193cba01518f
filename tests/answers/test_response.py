"""The last box and the required form, on ordinary and on hostile text."""

import time

import pytest

from capcur_jax.answers import response

LONG = 100_000


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        ("\\boxed{a\nb}", "a\nb"),
        ("no box", None),
        (r"as \boxed asks", None),
        ("", None),
        (r"\boxed{5", None),
        (r"\boxed{5} or \boxed{6", None),
        (r"\boxed{5\}", None),
        ("\\boxed{\ud800\x00}", "\ud800\x00"),
    ],
)
def test_last_boxed(text, expected):
    assert response.last_boxed(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"<think>so</think> \boxed{5}", True),
        ("\n <think>\nso\n</think>\nThe answer is \\boxed{5}.\n", True),
        (r"< think >so< / think >\boxed{5}", True),
        (r"<think></think>\boxed{5}", True),
        (r"<think>\boxed{4}?</think>\boxed{5}", True),
        (r"<think>so</think> 5", False),
        (r"<think>\boxed{5}</think>", False),
        (r"\boxed{5}", False),
        (r"Well <think>so</think>\boxed{5}", False),
        (r"<think>so\boxed{5}", False),
        (r"so</think>\boxed{5}", False),
        (r"</think>so<think>\boxed{5}", False),
        (r"<think>a</think><think>b</think>\boxed{5}", False),
        (r"<think>a<think>b</think>\boxed{5}", False),
        (r"<thinking>so</thinking>\boxed{5}", False),
        (r"<think>so</think>\boxed{ }", False),
        (r"<think>so</think>\boxed{5", False),
        (r"<th ink>so</think>\boxed{5}", False),
        ("", False),
    ],
)
def test_is_formatted(text, expected):
    assert response.is_formatted(text) is expected


@pytest.mark.parametrize(
    "piece", [r"\boxed{", "{", "}", "\\", r"\boxed", " ", "<", "< ", "<think>", "</think>", "< / ", "\x00", "\ud800"]
)
def test_hostile_text_takes_linear_time(piece):
    text = piece * (LONG // len(piece))
    start = time.thread_time()  # what this thread computes: company on the machine does not stretch it
    for hostile in (text, r"<think></think>\boxed{" + text, r"\boxed" + text + r"{5}", "<" + text + "think>"):
        response.last_boxed(hostile)
        response.is_formatted(hostile)
    # Linear is some 30 ms, quadratic more than ten seconds.
    assert time.thread_time() - start < 2.0
