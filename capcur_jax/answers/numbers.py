r"""Plain numbers as people write them, read exactly: 1,000, 1 1/2, 3 \times 10^8, 0.\overline{3}, 1.2 million, 五.

English number words are text2num's, Chinese numerals cn2an's and Unicode's; what is ours is the grammar around digits.
"""

import contextlib
import decimal
import functools
import re
import struct
import unicodedata
from fractions import Fraction
from typing import NamedTuple


class Number(NamedTuple):
    """A plain number and how it was written.

    `form` is "integer", "decimal" or "fraction". `step` is the value of the last digit that a decimal shows, 0 where
    the number is exact. `digits` are the significant digits that it shows.
    """

    value: Fraction
    form: str
    percent: bool = False
    step: Fraction = Fraction(0)
    digits: int = 0


_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "k": 10**3, "million": 10**6, "mln": 10**6,
    "m": 10**6, "billion": 10**9, "bn": 10**9, "b": 10**9, "trillion": 10**12, "tn": 10**12, "dozen": 12,
    "lakh": 10**5, "lac": 10**5, "crore": 10**7, "十": 10, "百": 100, "千": 1000, "万": 10**4, "萬": 10**4,
    "亿": 10**8, "億": 10**8,
}  # fmt: skip
_ATTACHED = "k", "m", "b"  # "5k", "5M", "5B" are numbers; "5 m" is a length
_GROUPS = r"(?:\d{1,3}(?:(?P<mark>[, '])\d{3})(?:(?P=mark)\d{3})*|\d{1,2}(?:,\d{2})+,\d{3}|\d+)"
_DECIMAL = rf"(?:{_GROUPS}(?:\.\d*)?|\.\d+)"
_TEN = r"10 ?\^ ?(?:\{ ?(?P<%s>[-+]?\d{1,3}) ?\}|(?P<%s>[-+]?\d{1,3}))"
_SIGNED = r"(?:\{ ?(?P<%s>[-+]?\d+) ?\}|(?P<%s>\d))"
_BODY = (
    r"(?P<sign>[-+]?) ?(?:"
    rf"(?P<whole>\d+)? ?\\frac ?{_SIGNED % ('top', 'top_1')} ?{_SIGNED % ('bottom', 'bottom_1')}"
    r"|(?:(?P<whole_2>\d+)(?: |-| and ))?(?P<top_2>\d+) ?(?:/|:|\\div) ?(?P<bottom_2>-?\d+)"
    r"|(?P<start>\d*\.\d*)"
    r"(?:\\overline ?\{ ?(?P<cycle>\d+) ?\}|\\(?:dot|bar) ?\{? ?(?P<cycle_1>\d+) ?\}?|\((?P<cycle_2>\d+)\))"
    rf"|(?P<decimal>{_DECIMAL})"
    rf"(?:(?: ?(?:\\times|\\cdot|\*|x) ?{_TEN % ('power', 'power_2')})|[eE](?P<exponent>[-+]?\d{{1,3}}))?"
    rf"|{_TEN % ('power_3', 'power_4')}"
    r")"
)
_PLAIN = re.compile(rf"(?:{_BODY})(?: ?(?P<scale>[A-Za-z]+|[十百千万萬亿億]+))? ?(?P<percent>%)?", re.ASCII)
PREFIX = re.compile(_BODY, re.ASCII)  # the number that a text begins with
_DOTS = re.compile(r"(?P<start>-?\d*\.\d*?)(?P<cycle>\d+?)(?P=cycle)+(?: ?\\ldots|\.\.+)")
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10,
}  # fmt: skip
_CHINESE = re.compile(r"[零〇一二两三四五六七八九十百千万亿点]+")
_SPELLED = re.compile(r"(?:minus |negative )?[a-z]{2,}(?:[ -][a-z]+){0,11}")
_NOT_ALONE = {"hundred", "thousand", "million", "billion", "trillion", "and", "a", "an", "point", "second"}


@functools.lru_cache(4096)
def plain_number(text: str) -> Number | None:
    r"""The exact value of a normalized answer that is one number, else None.

    Integers and decimals ("1,000", "-.5", "1e-05"), fractions (`3/2`, `3:2`, `\frac{3}{2}`, `1\frac{1}{2}`, "1 1/2"),
    repeating decimals, powers of ten (`3 \times 10^8`), with a scale ("1.2 million", "5k") or a percent sign or none;
    number words, English and Chinese.
    """
    if (minus := re.match(r"(?:minus|negative) (?=\d)", text, re.IGNORECASE)) is not None:
        text = "-" + text[minus.end() :]
    if text[:1] in "([" and text[-1:] in ")]":
        text = text[1:-1].strip()
    if cycle := _DOTS.fullmatch(text):  # 0.333...
        text = rf"{cycle['start']}\overline{{{cycle['cycle']}}}"
    match = _PLAIN.fullmatch(text)
    if match:
        return _of_match(match)
    return _spelled(text)


def _of_match(match: re.Match) -> Number | None:
    scale = 1
    if word := match["scale"]:
        attached = match.string[match.start("scale") - 1] != " "
        key = word.casefold()
        if key not in _SCALES or (key in _ATTACHED and (not attached or word == "m")):
            return None
        scale = _SCALES[key]
    number = read(match)
    if number is None:
        return None
    value, step = number.value * scale, number.step * scale
    form = "integer" if scale > 1 and value.denominator == 1 and not step else number.form
    return number._replace(value=value, step=step, form=form, percent=bool(match["percent"]))


def read(match: re.Match) -> Number | None:
    """The number of a match of PREFIX."""
    group = {name: value for name, value in match.groupdict().items() if value}

    def first(*names: str) -> str | None:
        return next((group[name] for name in names if name in group), None)

    negative = group.get("sign") == "-"
    if (top := first("top", "top_1", "top_2")) is not None:
        bottom = int(first("bottom", "bottom_1", "bottom_2"))
        if bottom == 0:
            return None
        value = int(first("whole", "whole_2") or 0) + Fraction(int(top), bottom)
        return Number(-value if negative else value, "fraction")
    if (cycle := first("cycle", "cycle_1", "cycle_2")) is not None:
        start = group["start"]
        digits = len(start.partition(".")[2])
        value = Fraction(f"0{start}0") + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10**digits)
        return Number(-value if negative else value, "fraction")
    power = int(first("power", "power_2", "power_3", "power_4", "exponent") or 0)
    digits = _without_noise(re.sub("[, ']", "", group.get("decimal", "1")), power)
    value = Fraction(digits) * Fraction(10) ** power
    whole, point, places = digits.partition(".")
    step = Fraction(10) ** (power - len(places)) if point and places else Fraction(0)
    form = "decimal" if point or value.denominator != 1 else "integer"
    shown = (whole + places).lstrip("0")
    return Number(-value if negative else value, form, False, step, len(shown))


def _without_noise(digits: str, power: int) -> str:
    """Without digits that a computer's float can't have meant: "3.299999952316284" is the 32-bit float of 3.3.

    Of a number with 14 digits or more that is a 32-bit float seven are left, of any other with 16 or more fifteen. Both
    sides of a comparison are read so, where data/golds.py changes what a row says, and has to be sure: 1/3 stays there.
    """
    shown = digits.replace(".", "").lstrip("0")
    if len(shown) < 14 or "." not in digits:
        return digits
    value, kept = float(f"{digits}e{power}"), 15 if len(shown) >= 16 else len(shown)
    with contextlib.suppress(OverflowError):
        kept = 7 if struct.unpack("f", struct.pack("f", value))[0] == value else kept
    return format(decimal.Context(prec=kept).create_decimal(digits), "f")


def _spelled(text: str) -> Number | None:
    """Number words."""
    if text.startswith("负") and (number := plain_number(text[1:])):
        return number._replace(value=-number.value)
    if _CHINESE.fullmatch(text):
        return _chinese(text)
    if "分之" in text:  # 三分之一, 百分之五十
        bottom, _, top = text.partition("分之")
        top = plain_number(top)
        bottom = Number(Fraction(100), "integer") if bottom == "百" else plain_number(bottom)
        if not top or not bottom or not bottom.value:
            return None
        return Number(top.value / bottom.value, "fraction") if bottom.value != 100 else top._replace(percent=True)
    words = text.casefold()
    if fraction := _spelled_fraction(words):
        return fraction
    if len(words) > 120 or not _SPELLED.fullmatch(words) or words in _NOT_ALONE:
        return None
    negative = words.startswith(("minus ", "negative "))
    words = words.split(" ", 1)[1] if negative else words
    from text_to_num import text2num  # here: most answers need none

    words, point, places = words.partition(" point ")
    try:
        value = Fraction(text2num(words, "en"))
        if point:
            places = "".join(str(text2num(place, "en")) for place in places.split())
            return Number(
                (-1 if negative else 1) * (value + Fraction(f"0.{places}")), "decimal", digits=len(places) + 1
            )
    except ValueError:
        return None
    return Number(-value if negative else value, "integer", digits=len(str(abs(value))))


def _spelled_fraction(words: str) -> Number | None:
    """ "half", "two thirds", "a dozen"."""
    if words in ("a dozen", "one dozen", "dozen"):
        return Number(Fraction(12), "integer", digits=2)
    count, _, part = words.replace("-", " ").rpartition(" ")
    bottom = _PARTS.get(part) or _PARTS.get(part.removesuffix("s"))
    if not bottom or (not count and bottom != 2):
        return None
    top = Number(Fraction(1), "integer") if count in ("", "a", "one") else plain_number(count)
    return Number(top.value / bottom, "fraction") if top and top.form == "integer" else None


def _chinese(text: str) -> Number | None:
    if len(text) == 1 and text not in "点":
        value = unicodedata.numeric("二" if text == "两" else text, None)
        return None if value is None or text in "百千万亿" else Number(Fraction(int(value)), "integer", digits=1)
    import cn2an

    try:
        value = Fraction(str(cn2an.cn2an(text, "smart")))
    except (ValueError, TypeError):
        return None
    return Number(value, "integer" if value.denominator == 1 else "decimal", digits=len(text))


def rounded(value: Fraction, step: Fraction) -> set[Fraction]:
    """`value` rounded to a multiple of `step`: both ways of rounding a tie, to even and away from zero."""
    scaled = value / step
    away = Fraction(int(abs(scaled) + Fraction(1, 2))) * (1 if scaled >= 0 else -1)
    return {round(scaled) * step, away * step}


def equal_numbers(predicted: Number, gold: Number) -> bool:
    """Whether a number meets a gold one.

    - An integer gold wants a finished number: 10/2 is not 5 yet.
    - A gold with a decimal point is met to its last digit: \\pi, 3.14159 and 22/7 meet 3.14.
    - An exact gold (1/7) is met by its equal, or by its rounding to the digits shown, six significant ones at least.
    - A percentage is the number with or without the sign, and the share it is: 50% is 50 and 0.5.
    """
    if gold.form == "integer" and predicted.form == "fraction" and not gold.percent:
        return False
    if predicted.percent == gold.percent:
        return meets(predicted, gold)
    if predicted.percent:
        return meets(predicted, gold) or meets(_hundredth(predicted), gold)
    return meets(predicted, gold) or meets(predicted, _hundredth(gold))


def _hundredth(number: Number) -> Number:
    return number._replace(value=number.value / 100, step=number.step / 100)


def meets(predicted: Number, gold: Number) -> bool:
    """`equal_numbers` of two numbers without a percent sign."""
    if predicted.value == gold.value:
        return True
    if gold.step:
        return gold.value in rounded(predicted.value, gold.step)
    if predicted.step and predicted.digits >= 6 and gold.form == "fraction":
        return predicted.value in rounded(gold.value, predicted.step)
    return False
