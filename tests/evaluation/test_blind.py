"""The guessers without eyes: what they can guess on made-up sets, and how little that is on the real ones."""

import importlib.util

import pytest

from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import read_problems
from capcur_jax.data.sources import easy_vqa
from capcur_jax.evaluation.blind import blind_accuracy


def _rows(*pairs, kind="k", images=("a.png",)):
    return [Problem(str(i), text, answer, images, kind=kind) for i, (text, answer) in enumerate(pairs)]


def test_frequent_answer_of_a_kind():
    train = _rows(("a?", "x"), ("b?", "x"), ("c?", "y"))
    assert blind_accuracy(train, _rows(("new?", "x"), ("newer?", "y"))) == 0.5
    assert blind_accuracy(train, _rows(("new?", "x"), kind="unheard of")) == 1.0


def test_text_that_gives_the_answer_away():
    train = _rows(*[("is it red?", "yes")] * 6, *[("is it blue?", "no")] * 9)
    assert blind_accuracy(train, _rows(("is it red?", "yes"), ("is it blue?", "no"))) == 1.0


def test_arithmetic_with_an_unseen_constant():
    """A corner costs p: who bets on triangles answers 3 p, for prices never met in training too."""
    train = _rows(*[(f"A corner costs {p}.", str(3 * p)) for p in range(2, 9)], ("A corner costs 5.", "20"))
    assert blind_accuracy(train, _rows(("A corner costs 50.", "150"), ("A corner costs 70.", "280"))) == 0.5


def test_arithmetic_between_numbers_of_the_text():
    train = _rows(
        *[(f"A costs {a}, B {b}. How much are {n}?", str(n * b)) for a in (2, 5) for b in (3, 7) for n in (2, 4)]
    )
    assert blind_accuracy(train, _rows(("A costs 9, B 11. How much are 5?", "55"))) == 1.0


def test_in_texts_without_images_sums_are_no_guess():
    train = [(f"What is {a} + {b}?", str(a + b)) for a in range(9) for b in range(9)]
    asked = [("What is 70 + 20?", "90")]
    assert blind_accuracy(_rows(*train), _rows(*asked)) == 1.0
    assert blind_accuracy(_rows(*train, images=()), _rows(*asked, images=())) == 0.0


def test_empty_lists_are_an_error():
    with pytest.raises(ValueError, match="one of the lists is empty"):
        blind_accuracy([], _rows(("a", "b")))


@pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="pip install easy-vqa")
@pytest.mark.parametrize("capability", tuple(easy_vqa.KINDS))
def test_the_real_sets_need_their_images(tmp_path_factory, capability):
    files = easy_vqa.build(tmp_path_factory.getbasetemp() / "blind", capability)
    train, test = (read_problems(files[split])[0] for split in ("train", "test"))
    overall = blind_accuracy(train, test)
    print(f"\n{capability}: blind {overall:.3f}")
    assert overall < 0.40
    for kind in easy_vqa.KINDS[capability]:
        of_kind = blind_accuracy([r for r in train if r.kind == kind], [r for r in test if r.kind == kind])
        print(f"  {kind}: blind {of_kind:.3f}")
        assert of_kind < 0.45
