r"""Numbers with a unit: 5 cm, $5, 9.8 m/s^2, 37 ^\circ C, 5米, 3 apples, 1 h 30 min."""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import NamedTuple

from capcur_jax.answers import numbers
from capcur_jax.answers.numbers import Number
from capcur_jax.answers.units import ANGLE, Unit, units_of


class Quantity(NamedTuple):
    """A number and the units that it may be in ("pounds" are money or mass); `unit` as it was written."""

    number: Number
    units: tuple[Unit, ...]
    unit: str


_MONEY_FIRST = re.compile(
    r"(?P<sign>[-+]?) ?(?P<unit>(?:[A-Z]{1,3} ?)?[^\w\s\\^{}()\[\]<>=*/+.,;:!?'\"|&%#@~_-]|[A-Z]{3}|Rs\.?) ?"
    r"(?=[-+]?[\d.])"
)
_MINUTES = re.compile(r"(\d+) ?\^\\circ ?(\d+)' ?(?:(\d+)(?:\"|''))?")
_SCALE = re.compile(
    r"(?: ?(?P<scale>hundred|thousand|million|billion|trillion|dozen|lakh|crore|bn|"
    r"[十百千万萬亿億]+(?<!千(?=[米克瓦卡帕]))(?<!百(?=帕)))(?![a-z])"
    r"|[kKMB](?![a-zA-Z\\]))"
)


_UNIT_TEXT = re.compile(r"(?:\^ ?\{? ?-?\d ?\}?|(?<=[a-zA-Z])[23](?![\d.])|\{ ?-?\d ?\}|[^\d])*")


@functools.lru_cache(4096)
def quantity(text: str) -> Quantity | None:
    """A normalized answer that is one number with a unit, or several of one measure ("5 ft 3 in"), else None."""
    if minutes := _MINUTES.fullmatch(text):  # 45 degrees 30 minutes
        whole, first, second = (Fraction(part or 0) for part in minutes.groups())
        if first < 60 and second < 60:
            return Quantity(Number(whole + first / 60 + second / 3600, "decimal"), (ANGLE,), "^\\circ")
        return None
    money = _MONEY_FIRST.match(text)
    if money:
        units = units_of(money["unit"].strip())
        number = numbers.plain_number(money["sign"] + text[money.end() :].strip())
        if not (units and number and units[0].measures[0] == "currency"):
            return None
        return Quantity(number, tuple(unit for unit in units if unit.measures[0] == "currency"), money["unit"])
    if text[:1].isalpha():
        text = _with_digits(text)
    parts, place = [], 0
    while place < len(text):
        part = _part(text, place)
        if part is None:
            return None
        one, place = part
        parts.append(one)
        if len(parts) > 3:
            return None
    return _sum(parts)


_FORMULA_UNIT = re.compile(
    r"(?P<formula>.*?(?:[\d})\]!]|\\pi|[a-z]))(?P<space>\s*)"
    r"(?P<unit>(?:square |sq\.? |cubic )?[a-zA-Z\u4e00-\u9fff]{1,12}"
    r"(?:\s*/\s*[a-zA-Z]{1,6})?(?: ?\^ ?\{?[23]\}?)?)"
)


_ROOTED, _COMPARED = re.compile(r"\\(?:sqrt|pi|frac|ln|log)"), re.compile(r"\\(?:le|ge|ne|in|cup|cap)(?![a-z])|[<>]")


def split_unit(text: str) -> tuple[str, tuple[Unit, ...]]:
    r"""A formula and the known unit behind it: of `2\sqrt{3} cm` both, of `2x` the whole and ()."""
    match = _FORMULA_UNIT.fullmatch(text)
    formula = match["formula"] if match else ""
    if not match or not _ROOTED.search(formula) or _COMPARED.search(formula):
        return text, ()
    units = (
        units_of(match["unit"])
        if match["space"] or match["formula"].endswith("}") or not match["unit"].isascii()
        else ()
    )
    name = match["unit"].casefold()
    known = [
        one
        for one in units
        if one.measures[0] != "noun" or name.removesuffix("s") in ("unit", "square unit", "cubic unit")
    ]
    if not known or (len(name) == 1 and name.isascii() and not match["space"]):
        return text, ()
    return match["formula"].strip(), tuple(known)


def _with_digits(text: str) -> str:
    """Of "three apples" it is "3 apples", of 三个 3个."""
    if (chinese := re.match("[零一二两三四五六七八九十百千万]+", text)) and chinese.end() < len(text):
        number = numbers.plain_number(chinese[0])
        return text if number is None else f"{number.value}{text[chinese.end() :]}"
    words = text.split(" ")
    for count in range(min(4, len(words) - 1), 0, -1):
        number = numbers.plain_number(" ".join(words[:count]).rstrip("-"))
        if number is not None and number.value.denominator == 1:
            return f"{number.value} {' '.join(words[count:])}"
    return text


def _part(text: str, place: int) -> tuple[Quantity, int] | None:
    """One number and the text up to the next number."""
    match = numbers.PREFIX.match(text, place)
    if not match or match.end() == place:
        return None
    number, end = numbers.read(match), match.end()
    scale = _SCALE.match(text, end)
    if scale and number:
        number = numbers.plain_number(text[place : scale.end()].strip())
        end = scale.end()
    if number is None:
        return None
    following = _UNIT_TEXT.match(text, end)
    unit = re.sub(r"(?:,| and)\s*\Z", "", text[end : following.end()]).strip()
    units = units_of(unit, text[end : end + 1] != " ")
    if not units or (unit.startswith("^") and not unit.startswith("^\\circ")):
        return None
    return Quantity(number, units, unit), following.end()


def _sum(parts: list[Quantity]) -> Quantity | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    first = parts[0]
    unit = first.units[0]
    value = first.number.value
    for part, before in zip(parts[1:], parts, strict=False):
        same = [other for other in part.units if other.measures == unit.measures and not other.offset]
        if not same or same[0].factor >= before.units[0].factor or unit.measures[0] == "noun":
            return None
        value += part.number.value * same[0].factor / unit.factor
    return Quantity(Number(value, "decimal"), (unit,), first.unit)


def same_quantity(predicted: Quantity, gold: Quantity) -> bool:
    """Whether both are equal, in one unit or after conversion."""
    for mine in predicted.units:
        for other in gold.units:
            if mine.measures != other.measures:
                continue
            if mine == other:
                equal = numbers.equal_numbers(predicted.number, gold.number)
            else:
                value = (predicted.number.value * mine.factor + mine.offset - other.offset) / other.factor
                step = predicted.number.step * mine.factor / other.factor
                equal = numbers.meets(predicted.number._replace(value=value, step=step), gold.number)
            if equal:
                return True
    return False
