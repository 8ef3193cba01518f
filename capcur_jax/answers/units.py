r"""Units: what the text behind a number measures, and on which scale.

Units and their factors are pint's, exact in fractions. Names in English and Chinese and the currencies are CLDR's
(Babel). What is no unit of theirs and reads as a noun is a unit by its name: three apples are not three oranges.
"""

import functools
import re
import threading
from fractions import Fraction
from typing import Any, NamedTuple

from capcur_jax.answers.unit_names import (
    ANY_CASE,
    ATTACHED,
    BOTH,
    COUNTERS,
    HUNDREDTHS,
    KNOWN,
    MONEY,
    MORE,
    NO_NOUN,
    PINT_NAMES,
    PREFIXES,
)


class Unit(NamedTuple):
    """What a unit measures, and the scale on which: value in base units = value * factor + offset."""

    measures: tuple
    factor: Fraction = Fraction(1)
    offset: Fraction = Fraction(0)


ANGLE = Unit(("angle",))
_RADIAN = Unit(("radian",))
_ANGLES = {"^\\circ", "degree", "degrees", "deg", "degs", "angle"}
_ASKING = threading.RLock()  # pint's registry is one thread's at a time
_SINGLE = frozenset("mgshLlNJWVAKCFTtd")  # letters that are units; another after a number is a variable
_SHORT = re.compile(r"[a-z]{2,4}(?: ?\^ ?\{?\d\}?|[23])?")
_TAIL = re.compile(r" (?:AD|CE|old|long|tall|high|wide|deep|away|in (?:total|all|length|area))\Z")
_NOUN = re.compile(r"(?:[^\W\d_]{3,}|[\u4e00-\u9fff])(?:[ '-][^\W\d_]{1,}){0,4}")
_FACTOR = re.compile(
    r"\s*(?P<over>/)?\s*(?P<name>[^\W\d_]+|[\"'°$])\s*(?:(?:\^|\*\*)?\s*\{?(?P<power>-?[1-9])\}?(?!\d))?"
)
_NO_MONEY = re.compile("[a-z]{1,2}|min|sec|all|top|cup|try|bob|mop|gel|pen|lac")
_POWERED = re.compile(r"\b(?P<power>(?:square|cubic)(?= )|(?:sq|cu)\b\.?) ?(?P<name>[a-zA-Z]+)")
_AFTER = re.compile(r"(?P<name>[a-zA-Z]+) (?P<power>squared|cubed)\b")


@functools.cache
def _registry() -> Any:
    import pint  # here: it takes half a second, and many runs read no unit

    return pint.UnitRegistry(non_int_type=Fraction)


@functools.cache
def _cldr() -> dict[str, str]:
    """CLDR's names of units in English and Chinese, as pint's expressions."""
    from babel import Locale

    found: dict[str, str] = {}
    for language in ("en", "zh"):
        for key, widths in Locale(language)._data["unit_patterns"].items():
            expression = _pint_name(key.partition("-")[2])
            for width in ("long", "short"):
                patterns = dict(widths.get(width, {})) if expression else {}
                for pattern in patterns.values():
                    if isinstance(pattern, str) and pattern.count("{0}") == 1:
                        name = pattern.replace("{0}", "").strip()  # short names keep their case: mW is not MW
                        found.setdefault(name.casefold() if width == "long" else name, expression)
    return {name: expression for name, expression in found.items() if len(name) > 1 or not name.isascii()}


def _pint_name(cldr: str) -> str:
    """Of "square-meter" it is "meter^2"; "" where pint has no such unit among the known ones."""
    cldr = PINT_NAMES.get(cldr, cldr)
    parts = []
    for part in cldr.split("-per-"):
        power = {"square": "^2", "cubic": "^3"}.get(part.partition("-")[0], "")
        names = part.partition("-")[2] if power else part
        parts.append("*".join(name + power for name in names.split("-")))
    expression = "/".join(parts)
    return expression if expression == "angle" or _unit(expression) else ""


@functools.cache
def _money() -> dict[str, tuple[str, ...]]:
    """Names, codes and symbols of currencies -> their codes."""
    from babel import Locale

    found = {name: codes for name, codes in MONEY.items()}
    for language in ("en", "zh"):
        data = Locale(language)._data
        for code, symbol in data["currency_symbols"].items():
            found.setdefault(symbol.casefold(), (code,))
        for code, name in data["currency_names"].items():
            found.setdefault(name.casefold(), (code,))
            found.setdefault(code.casefold(), (code,))
        for code, names in data["currency_names_plural"].items():
            for name in dict(names).values():
                found.setdefault(str(name).casefold(), (code,))
    return {name: codes for name, codes in found.items() if len(name) > 1 or not name.isalpha() or not name.isascii()}


@functools.lru_cache(1024)
def _unit(expression: str) -> Unit | None:
    """The unit of a product of pint's names with powers ("kilogram*meter/second^2"), or None where one is unknown."""
    try:
        return _product(expression)
    except Exception:  # pint raises its own and more on odd products, such as squares of degrees Celsius
        return None


def _product(expression: str) -> Unit | None:
    if temperature := _temperature(expression):
        return temperature
    total, byte = _registry().Quantity(Fraction(1), ""), False
    for place, product in enumerate(expression.split("/")):
        for factor in product.split("*"):
            name, _, power = factor.partition("^")
            if name.isdigit():
                scale = Fraction(int(name))
            else:
                known = _known(name)
                one = _in_base_units(known) if known else None
                if one is None:
                    return None
                scale = one ** int(power or 1)
                byte |= known.endswith(("byte", "bit"))
            total = total / scale if place else total * scale
    total = total.to_base_units()
    measures = tuple(sorted((str(name), Fraction(power)) for name, power in total.dimensionality.items()))
    if not measures and not byte:
        return None
    return Unit(measures or ("information",), Fraction(total.magnitude))


def _in_base_units(name: str) -> Any:
    """A quantity of pint's, or None of a unit whose scale is no number (decibels)."""
    try:
        return _registry().Quantity(Fraction(1), name).to_base_units()
    except (AttributeError, TypeError, ValueError):
        return None


def _known(name: str) -> str:
    """pint's whole name of a unit, "" of one that is not read. Of short names the case counts: mW is not MW."""
    for case_sensitive in (True, False)[: 1 + (len(name) > 3 or name.casefold() in ANY_CASE)]:
        for prefix, base, _ in _registry().parse_unit_name(name, case_sensitive=case_sensitive):
            if base in KNOWN and prefix in PREFIXES:
                return prefix + base
    return ""


def _temperature(name: str) -> Unit | None:
    """A scale of temperature, which has a zero of its own."""
    if not name.startswith("degree_"):
        return None
    zero, one = (_registry().Quantity(Fraction(value), name).to("kelvin").magnitude for value in (0, 1))
    return Unit((("[temperature]", Fraction(1)),), one - zero, zero)


@functools.lru_cache(2048)
def units_of(text: str, attached: bool = False) -> tuple[Unit, ...]:
    """What the text after (or before) a number may be as a unit: () where it is none.

    Args:
      attached: it follows the number without a space, as variables do: "2xy" are no two of something.
    """
    with _ASKING:
        return _units_of(text, attached)


def _units_of(text: str, attached: bool) -> tuple[Unit, ...]:
    text = text.strip(" .").replace("\\mu ", "µ").replace("\\mu", "µ").replace("\\Omega", "ohm").strip()
    text = _TAIL.sub("", re.sub(r"\\frac ?\{([a-zA-Z]+)\} ?\{([a-zA-Z]+(?:\^\d)?)\}", r"\1/\2", text))
    text = text[1:-1].strip() if text.startswith("(") and text.endswith(")") else text
    if text in COUNTERS:
        return (Unit(("noun", "counter")),)
    if not text or len(text) > 60:
        return ()
    name = text.casefold()
    if text in _ANGLES or name in _ANGLES:
        return (ANGLE,)
    if name in ("rad", "radian", "radians", "弧度"):
        return (_RADIAN,)
    if attached and _SHORT.fullmatch(text) and re.sub(r" ?\^.*|[23]\Z", "", name) not in ATTACHED:
        return ()
    if len(text) == 1 and text.isascii() and text.isalpha() and text not in _SINGLE:
        return ()
    found = [Unit(("currency", code)) for code in _money_codes(name)]
    found += [Unit(("currency", code), Fraction(1, 100)) for code in HUNDREDTHS.get(_singular(name), ())]
    if text in BOTH:
        return (*found, *filter(None, map(_unit, BOTH[text])))
    expression = _expression(text)
    known = _unit(expression) if expression and expression != "angle" else None
    if expression == "angle":
        found.append(ANGLE)
    elif known:
        found.append(known)
    elif not found and (attached is False or len(name) > 3 or not name.isascii()) and (noun := _noun(name)):
        found.append(Unit(("noun", noun)))
    return tuple(found)


def _money_codes(name: str) -> tuple[str, ...]:
    """Codes of the currencies that a name may mean. Some codes are words or units: "min", "top"."""
    name = name if name in MONEY else _singular(name) if _singular(name) in MONEY else name
    return MONEY.get(name, ()) or (() if _NO_MONEY.fullmatch(name) else _money().get(name, ()))


def _expression(text: str) -> str:
    """A unit's text as pint's names, joined by * and /, with powers: "sq cm" -> "cm^2"; "" where it is no such."""
    name = text.casefold()
    if text in MORE or (name in MORE and len(name) > 1):
        return MORE.get(text, MORE.get(name, ""))
    celsius = re.fullmatch(
        r"\^\\circ ?([CFKcf])|(?:degrees?|deg) ?(c|f|celsius|fahrenheit|centigrade)", text, re.IGNORECASE
    )
    if celsius:
        return "degree_Fahrenheit" if (celsius[1] or celsius[2]).casefold().startswith("f") else "degree_Celsius"
    if found := _cldr().get(text) or (_cldr().get(name) if len(name) > 3 or not name.isascii() else None):
        return found
    text = text.replace("\\cdot", "*").replace("\\times", "*").replace(" per ", "/").replace("每", "/")
    text = _POWERED.sub(lambda match: f"{match['name']}^{'2' if match['power'].startswith('sq') else '3'}", text)
    text = _AFTER.sub(lambda match: f"{match['name']}^{'2' if match['power'] == 'squared' else '3'}", text)
    above, below = [], []
    place = 0
    text = re.sub(r"\s*[*()]\s*", " ", text).strip()
    while place < len(text):
        match = _FACTOR.match(text, place)
        if not match or len(above) + len(below) > 5:
            return ""
        one = match["name"]
        one = MORE.get(one, MORE.get(one.casefold(), one) if len(one) > 1 else one)
        if (
            one == "angle"
            or not one
            or _unit(one) is None
            or (
                len(match["name"]) == 1
                and match["name"].isascii()
                and match["name"].isalpha()
                and match["name"] not in _SINGLE
            )
        ):
            return ""
        power = match["power"]
        if power and "^" in one:
            return ""
        side, other = (below, above) if match["over"] else (above, below)
        if power and int(power) < 0:
            side, power = other, power[1:]
        if "/" in one:  # km/h of "kmh"
            top, _, bottom = one.partition("/")
            above.append(top)
            below.append(bottom)
        else:
            side.append(one + (f"^{power}" if power else ""))
        place = match.end()
    return ("*".join(above) or "1") + "".join(f"/{one}" for one in below) if above or below else ""


def _noun(name: str) -> str:
    """The name of what is no unit of pint's, in the singular, with its power: "unit^2" of "square units"."""
    power = re.search(r" ?\^ ?\{? ?([23]) ?\}?\Z", name)
    name = re.sub(r"\A(?:of|the|a|an) ", "", name[: power.start()] if power else name)
    square = re.match(r"(square|sq\.?|cubic) (?=\w)", name)
    name = name[square.end() :] if square else name
    words = name.split()
    if not _NOUN.fullmatch(name) or any(word in NO_NOUN for word in words):
        return ""
    raised = power[1] if power else "" if not square else "3" if square[1] == "cubic" else "2"
    return " ".join(_singular(word) for word in words) + ("^" + raised if raised else "")


def _singular(name: str) -> str:
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("s", "")):
        if name.endswith(ending) and len(name) > len(ending) + 2 and not name.endswith("ss"):
            return name[: -len(ending)] + instead
    return {"feet": "foot", "men": "man", "women": "woman", "children": "child", "people": "person"}.get(name, name)
