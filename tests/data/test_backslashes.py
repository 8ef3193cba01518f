"""Backslashes that JSON ate: put back where nothing else can be meant, white space elsewhere."""

import pytest

from capcur_jax.data.backslashes import restored
from capcur_jax.data.problem import BadRow

EATEN = r"""\frac{1}{2} \forall x \times \theta \tau \triangle \text{cm} \therefore \beta \binom{n}{k} \begin{cases}
\bar{x} \nabla \neq \notin \rho \right) \rightarrow \rceil \mathrm{x} \alpha 5\% \tfrac{1}{2} \bf{x} \boxed{4}"""


@pytest.mark.parametrize("latex", EATEN.split())
@pytest.mark.parametrize("gold", [False, True])
def test_commands_come_back(latex, gold):
    for text in (latex, f"$x {latex} y$", f"2{latex}"):
        eaten = text
        for escape, control in (("\\f", "\f"), ("\\t", "\t"), ("\\b", "\b"), ("\\n", "\n"), ("\\r", "\r")):
            eaten = eaten.replace(escape, control)
        assert restored(eaten, "problem", gold) == text


@pytest.mark.parametrize("text", [
    "First line\nu is a number\n\tan apple\n\tor two\r\nno more\r\n", "a\tb\tc", "\f\n\fPage two",
    "x\nequals\nexists\n", "one\ntext\n\textra", "\nthe\n\ttable\ttop\tto\trial",
])  # fmt: skip
def test_white_space_stays(text):
    assert restored(text, "problem") == text


@pytest.mark.parametrize(("text", "gold"), [
    ("\nu", True), ("\tan x", True), ("\bla", True), ("\bla", False), ("2\times 3\tan x", False), ("a\x00b", True),
    ("\x1b[0m", True), ("\foo", True),
])  # fmt: skip
def test_what_is_in_doubt_is_refused(text, gold):
    with pytest.raises(BadRow) as caught:
        restored(text, "answer", gold)
    assert "; " in caught.value.args[1]


def test_a_question_that_may_only_have_line_breaks_is_counted_by_itself():
    with pytest.raises(BadRow) as caught:
        restored("Let x = 2\times y.\nu is a number.", "problem")
    assert caught.value.args[0] == "lost backslash or line break"
