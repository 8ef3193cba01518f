r"""Whether two sets, intervals, equations or formulas are equal: what runs in the grader's workers.

Sets and their algebra are sympy's, formulas are formulas.py's. Ours is the structure: a set is no tuple, a pair keeps
its order, and a chain holds as a whole (math-verify takes the last side of `3x = 2x`).
"""

from __future__ import annotations

import itertools
import re
from fractions import Fraction
from typing import Any

from capcur_jax.answers import numbers, structure
from capcur_jax.answers.structure import Node, is_name
from capcur_jax.rewards.formulas import equal_values, fraction, leaf_equal, number_at, points, read, same_marks

_ORDER = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_MOST = 24  # members of a set that are matched


def equal(predicted: str, gold: str) -> bool:
    """Whether two normalized answers are equal. Raises whatever sympy raises on odd input."""
    p, g = structure.parse(predicted), structure.parse(gold)
    if p.sort == "set" and len(p.items) == 1 and g.sort in ("text", "tuple") and not g.is_collection_name:
        p = p.items[0]
    elif g.sort == "set" and len(g.items) == 1 and p.sort in ("text", "tuple") and not p.is_collection_name:
        g = g.items[0]
    return _same(p, g)


def _compact(text: str) -> str:
    text = re.sub(r"(\\[a-zA-Z]+) (?=[a-zA-Z])", r"\1~", text)
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"(?<!\d)\s+|\s+(?!\d)|\\cdot(?=\\)", "", text))


def _same(p: Node, g: Node) -> bool:
    if _compact(p.text) == _compact(g.text):
        return True
    if g.sort == "chain":
        return _same_chain(p, g)
    if p.sort == "chain":
        return _claims(p, g)
    if "ratio" in (p.sort, g.sort):
        return p.sort == g.sort and _in_order(p.items, g.items)
    if "text" in (p.sort, g.sort):
        if p.sort == g.sort and not (p.text.startswith(r"\mathbb") or g.text.startswith(r"\mathbb")):
            return leaf_equal(p.text, g.text)
        return _same_set(p, g)
    if g.sort in ("list", "set") or p.sort in ("list", "set"):
        return _same_values(p, g)
    if "union" in (p.sort, g.sort):
        return (p.sort == g.sort and _matched(p.items, g.items)) or _same_set(p, g)
    if p.marks != g.marks and (len(g.items) == 2 or "half" in (p.sort, g.sort)):
        return False
    return _in_order(p.items, g.items)


def _same_values(p: Node, g: Node) -> bool:
    """Of which at least one is a bare list or a set."""
    if _inequalities(p) or _inequalities(g):
        return (p.sort == g.sort and _matched(p.items, g.items)) or _same_set(p, g)
    (mine, names), (expected, known) = _values(p), _values(g)
    if "set" in (p.sort, g.sort):
        mine, expected = _distinct(mine), _distinct(expected)
    if len(mine) != len(expected) or len(mine) > _MOST:
        return False
    if p.sort == "tuple" and len(set(known)) == 1 and known[0]:  # x = -1, x = 2 are no point
        return False
    if len(set(filter(None, known))) > 1 or len(set(filter(None, names))) > 1:  # x = 1, y = 2
        if all(names) and all(known):
            order = sorted(range(len(names)), key=names.__getitem__), sorted(range(len(known)), key=known.__getitem__)
            if [names[i] for i in order[0]] != [known[i] for i in order[1]]:
                return False
            return _in_order([mine[i] for i in order[0]], [expected[i] for i in order[1]])
        return "set" not in (p.sort, g.sort) and _in_order(mine, expected)
    if {p.sort, g.sort} <= {"list", "set"}:
        return _matched(mine, expected)
    if "set" in (p.sort, g.sort):  # a set is no tuple
        return False
    if "half" in (p.sort, g.sort) or ("bracket" in (p.sort, g.sort) and len(mine) == 2):
        return False
    return _in_order(mine, expected)


def _distinct(values: list[Node]) -> list[Node]:
    kept: list[Node] = []
    for value in values[:_MOST]:
        if not any(_same(value, other) for other in kept):
            kept.append(value)
    return kept


def _is_named(chain: Node) -> bool:
    """Whether the first member of `x = 5` only names the others: x = x + 1 names nothing."""
    name = chain.items[0].text
    letter = re.match(r"\\?[A-Za-z]+", name)
    if not is_name(name):
        return False
    token = re.compile(rf"(?<![a-zA-Z\\]){re.escape(letter[0] if letter else name)}(?![a-zA-Z])")
    return not any(token.search(item.text) for item in chain.items[1:])


def _values(node: Node) -> tuple[list[Node], list[str]]:
    """The members of a collection, and the names that they are given ("x" of "x = 1"), "" of none."""
    values, names = [], []
    for item in _flat(node):
        if item.sort == "chain" and set(item.marks) == {"="} and len(item.items) == 2 and is_name(item.items[0].text):
            values.append(item.items[1])
            names.append(re.sub(r"_\{?\d+\}?\Z", "", _compact(item.items[0].text)))
        else:
            values.append(item)
            names.append("")
    return values, names


def _flat(node: Node) -> list[Node]:
    """The members, with both values of "0, \\pm 1"."""
    return [one for item in node.items for one in (item.items if item.sort == "list" and "pm" in item.text else [item])]


def _in_order(mine: Any, expected: Any) -> bool:
    return len(mine) == len(expected) and all(map(_same, mine, expected))


def _matched(mine: Any, expected: Any) -> bool:
    """Whether the members can be paired, each with one of its own."""
    if len(mine) != len(expected) or len(mine) > _MOST:
        return False
    left = list(mine)
    for one in expected:
        found = next((place for place, other in enumerate(left) if _same(other, one)), None)
        if found is None:
            return False
        left.pop(found)
    return True


# ------------------------------------------------------------------------------------------------ relations


def _claims(p: Node, g: Node) -> bool:
    """A chain, compared with a gold that is none: `x = 5`, `y = 2x + 1`, `x \\in S`, `1 < x < 2`."""
    if set(p.marks) <= {"=", r"\approx"}:
        values = list(zip(p.items, ("=", *p.marks), strict=True))
        if _is_named(p) and p.marks[0] == "=":
            values = values[1:]
        exact = [value for value, mark in values if mark == "="]
        return (
            bool(exact)
            and all(_same(value, g) for value in exact)
            and all(_is_rounding(value.text, g.text) for value, mark in values if mark != "=")
        )
    if p.marks == (r"\in",) and is_name(p.items[0].text):
        return _same(p.items[1], g)
    return _same_set(p, g)


def _is_rounding(text: str, gold: str) -> bool:
    number, value = numbers.plain_number(text), fraction(gold)
    return (
        number is not None and value is not None and number.value in numbers.rounded(value, number.step or Fraction(1))
    )


def _same_chain(p: Node, g: Node) -> bool:
    if g.marks == (r"\in",) and is_name(g.items[0].text):
        if p.sort == "chain" and p.marks == (r"\in",):
            return _compact(p.items[0].text) == _compact(g.items[0].text) and _same(p.items[1], g.items[1])
        return _same(p, g.items[1])
    if set(g.marks) <= {"=", r"\approx"}:
        if p.sort == "chain":
            return set(p.marks) <= {"=", r"\approx"} and _same_equation(p, g)
        return is_name(g.items[0].text) and g.marks[0] == "=" and _same(p, g.items[-1 if g.marks[-1] == "=" else 1])
    if p.sort == "chain" and p.marks == g.marks and _in_order(p.items, g.items):
        return True
    turned = tuple(_ORDER.get(mark, mark) for mark in p.marks[::-1])
    if p.sort == "chain" and turned == g.marks and _in_order(p.items[::-1], g.items):  # c > b > a
        return True
    if p.sort == "chain" and p.marks == g.marks and len(g.marks) == 1 and g.marks[0] not in _ORDER:
        return _in_order(p.items[::-1], g.items)  # AB is parallel to CD, 2 is not x
    return _same_set(p, g)


def _same_equation(p: Node, g: Node) -> bool:
    names = [node.items[0].text if is_name(node.items[0].text) else "" for node in (p, g)]
    if all(names):
        if _compact(names[0]) == _compact(names[1]) or {re.sub(r"\(\w\)", "", name) for name in names} == {"f", "y"}:
            return all(_same(value, g.items[1]) for value in p.items[1:])
        if not any(character.isalpha() for character in p.items[-1].text + g.items[-1].text):
            return False  # x = 5 is not y = 5
    if len(p.items) != 2 or len(g.items) != 2 or not same_marks(p.text, g.text):
        return False
    mine, expected = (read(a.text) - read(b.text) for a, b in (p.items, g.items))
    return _is_constant(mine, expected)


def _is_constant(mine: Any, expected: Any) -> bool:
    """Whether one formula is a number other than 0 times the other, so that both are 0 together."""
    ratios = []
    for point in points(mine, expected):
        a, b = (number_at(one, point) for one in (mine, expected))
        if a is None or b is None or abs(b) < 1e-20 or abs(a) < 1e-20:
            continue
        ratios.append(a / b)
    return len(ratios) >= 2 and all(abs(ratio - ratios[0]) <= abs(ratios[0]) * 1e-20 for ratio in ratios)


# ------------------------------------------------------------------------------------------------ sets and intervals


def _inequalities(node: Node) -> bool:
    return node.sort == "list" and any(
        item.sort == "chain" and not set(item.marks) <= {"=", r"\approx"} for item in node.items
    )


def _same_set(p: Node, g: Node) -> bool:
    """Whether both are one set of numbers, written as interval, inequality or otherwise."""
    (mine, name), (expected, known) = _set(p), _set(g)
    if mine is None or expected is None or (name and known and name != known):
        return _same_inequality(p, g)
    if mine == expected:
        return True
    ends, others = _ends(mine), _ends(expected)
    if ends and others and len(ends) == len(others):
        return all(a[:2] == b[:2] and equal_values(a[2], b[2]) for a, b in zip(ends, others, strict=True))
    return bool(mine.symmetric_difference(expected).is_empty)


def _ends(value: Any) -> list[tuple[str, bool, Any]]:
    """The ends of an interval or of a union of some, in order: which, whether it is open, where; [] of other sets."""
    import sympy

    parts = value.args if isinstance(value, sympy.Union) else (value,)
    if not all(isinstance(part, sympy.Interval) for part in parts):
        return []
    found = []
    for part in sorted(parts, key=lambda part: float(part.start.evalf())):
        found += [("start", bool(part.left_open), part.start), ("end", bool(part.right_open), part.end)]
    return found


def _same_inequality(p: Node, g: Node) -> bool:
    """Of several variables: the same order between formulas that differ by a positive factor."""
    if p.sort != "chain" or g.sort != "chain" or len(p.items) != 2 or len(g.items) != 2:
        return False
    sides = []
    for node in (p, g):
        (first, second), mark = node.items, node.marks[0]
        if mark not in _ORDER:
            return False
        if mark in (">", r"\ge"):
            first, second, mark = second, first, _ORDER[mark]
        sides.append((read(first.text) - read(second.text), mark))
    (mine, mark), (expected, known) = sides
    if mark != known or not _is_constant(mine, expected):
        return False
    point = next(iter(points(mine, expected)))
    a, b = number_at(mine, point), number_at(expected, point)
    return a is not None and b is not None and complex(a / b).real > 0


def _set(node: Node) -> tuple[Any, str]:
    """The set of real numbers that a node stands for, and the variable that it names; (None, "") of others."""
    import sympy

    if node.sort in ("tuple", "bracket", "half") and len(node.items) == 2:
        low, high = (read(item.text) for item in node.items)
        if not (low.is_number and high.is_number):
            return None, ""
        return sympy.Interval(low, high, node.marks[0] == "(", node.marks[1] == ")"), ""
    if node.sort in ("union", "list"):
        parts = [_set(item) for item in node.items]
        names = {name for _, name in parts if name}
        if any(part is None for part, _ in parts) or len(names) > 1:
            return None, ""
        either = node.sort == "union" or re.search(r"(?<![a-z])or(?![a-z])", node.text) or _all_intervals(node)
        # x < -1, x > 1 can't hold together
        either = either or (" and " not in node.text and sympy.Intersection(*(part for part, _ in parts)).is_empty)
        joined = sympy.Union if either else sympy.Intersection
        return joined(*(part for part, _ in parts)), next(iter(names), "")
    if node.sort == "set":
        return sympy.FiniteSet(*(read(item.text) for item in node.items)), ""
    if node.sort == "chain":
        return _solutions(node)
    if node.sort == "text":
        whole, _, out = re.sub(r"(?<=\}) ?- ?(?=\\\{)", r"\\setminus", node.text).partition("\\setminus")
        whole = {r"\mathbb{R}": sympy.S.Reals, r"\emptyset": sympy.S.EmptySet}.get(whole.strip())
        if whole is not None and out:
            out, _ = _set(structure.parse(out))
            whole = None if out is None else whole - out
        return whole, ""
    return None, ""


def _all_intervals(node: Node) -> bool:
    return all(item.sort in ("tuple", "bracket", "half") for item in node.items)


def _solutions(node: Node) -> tuple[Any, str]:
    """The numbers that meet a chain of relations in one variable."""
    import sympy

    if node.marks == (r"\in",):
        inner, _ = _set(node.items[1])
        return inner, _compact(node.items[0].text)
    formulas = [read(item.text) for item in node.items]
    symbols = set().union(*(formula.free_symbols for formula in formulas))
    relations = {"<": sympy.Lt, ">": sympy.Gt, r"\le": sympy.Le, r"\ge": sympy.Ge, r"\ne": sympy.Ne, "=": sympy.Eq}
    if len(symbols) != 1 or not set(node.marks) <= relations.keys():
        return None, ""
    (symbol,) = symbols
    real = sympy.Symbol("x", real=True)
    found = sympy.S.Reals
    for mark, (a, b) in zip(node.marks, itertools.pairwise(formulas), strict=True):
        relation = relations[mark](a.subs(symbol, real), b.subs(symbol, real))
        found = found.intersect(sympy.solveset(relation, real, sympy.S.Reals))
    return found, str(symbol)
