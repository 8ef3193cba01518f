r"""Texts with digits that are no arithmetic: dates, times, ranges, phone numbers, versions, scores, labels (H1N1).

Each is read into one form. Two are equal where their forms are. A date whose order of day and month can't be known
(5/12/1990) equals the same digits in the same order alone; month names are the calendar's, English and Chinese.
"""

import calendar
import re
from collections.abc import Iterator
from typing import NamedTuple

from capcur_jax.answers import units


class Code(NamedTuple):
    """What sort of text it is, and its parts in a form that is compared."""

    sort: str  # "date", "time", "range", "ratio", "size" or "label"
    parts: tuple


_MONTHS = {
    name.casefold(): i for names in (calendar.month_name, calendar.month_abbr) for i, name in enumerate(names) if i
}
_MONTHS["sept"] = 9
_MONTH = "|".join(sorted(_MONTHS, key=len, reverse=True))
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>\d{4})"
_NAMED = (
    re.compile(
        rf"(?:[a-z]+, ?)?(?P<month>{_MONTH})\.? {_DAY}(?:(?:,| ,)? {_YEAR}|, ?{_YEAR.replace('year', 'year_2')})?"
    ),
    re.compile(rf"(?:[a-z]+, ?)?(?:the )?{_DAY}(?: of)?[ -](?P<month>{_MONTH})\.?(?:,? ?-?{_YEAR})?"),
    re.compile(rf"(?P<month>{_MONTH})\.?,? {_YEAR}"),
)
_ISO = re.compile(r"(?P<year>\d{4}) ?[-/.年] ?(?P<month>\d{1,2}) ?[-/.月] ?(?P<day>\d{1,2})[日号]?")
_CHINESE = re.compile(r"(?:(?P<year>\d{2,4})年)?(?P<month>\d{1,2})月(?:(?P<day>\d{1,2})[日号])?")
_NUMERIC = re.compile(r"(?P<a>\d{1,2})(?P<mark>[-/.])(?P<b>\d{1,2})(?P=mark)(?P<year>\d{4}|\d{2})")
_TIME = re.compile(
    r"(?P<hour>\d{1,2})(?::(?P<minute>\d{2})(?::(?P<second>\d{2}))?)? ?(?P<half>[ap])\.? ?m\.?|"
    r"(?P<hour_2>\d{1,2}):(?P<minute_2>\d{2})(?::(?P<second_2>\d{2}))?(?: ?(?:h|hrs?|hours|o'clock))?|"
    r"(?P<hour_3>\d{1,2}) ?o'?clock(?: ?(?P<half_3>[ap])\.?m\.?)?",
)
_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_RANGE = re.compile(
    rf"(?P<unit_1>[$€£¥₹]?)(?P<low>{_NUMBER}) ?(?P<scale>%|[a-zA-Z]+)? ?(?:-|--|~|\\approx|\\sim|to|\\to|至|到) ?"
    rf"[$€£¥₹]?(?P<high>{_NUMBER}) ?(?P<unit>%|[^\W\d].*)?"
)
_SIZE = re.compile(rf"{_NUMBER} ?\w*(?: ?(?:x|\\times|\*|by) ?{_NUMBER} ?\w*)+")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?: ?: ?\d+(?:\.\d+)?)+")
_DIGIT_GROUPS = re.compile(r"\+?\(?\d+\)?(?:[-. ]\(?\d+\)?)+")
_LABEL = re.compile(r"(?=.*\d)(?=.*[^\W\d_])[\w#&'.:/@?=~%\-+(), ]+", re.ASCII)
_MARKED = re.compile(r"[#№] ?\d+|[A-Za-z]+(?:\+\+|#)|\d+\+|[A-F][+-]|\d+(?:\.\d+){2,}")
_ALGEBRA = re.compile(r"[+*/()_]|\d ?[a-zA-Z]\Z|\A\d+[a-z]\b|[a-z] ?- ?\d|\d ?- ?[a-z]")
_WEB = re.compile(r"(?:https?://|www\.)\S+|\S+@\S+\.\w+")


def read(text: str) -> Code | None:
    """The code that a normalized answer is, or None where it is none."""
    return next(_readings(text), None)


def _readings(text: str) -> Iterator[Code]:
    """All that it may be: 3:30 is a time and a ratio."""
    plain = text.replace("\\cdot", ".").replace("{", "").replace("}", "").strip(" .")
    lower = " ".join(plain.casefold().split())
    for reader in (_date, _time, _range, _size, _groups, _label):
        if code := reader(lower, plain):
            yield code


def _date(text: str, _: str) -> Code | None:
    for pattern in (*_NAMED, _ISO, _CHINESE):
        if match := pattern.fullmatch(text):
            group = match.groupdict()
            month = group["month"]
            year, day = group.get("year") or group.get("year_2"), group.get("day")
            number = _MONTHS.get(month) or int(month)
            if number > 12 or int(day or 1) > 31:
                return None
            return Code("date", (year and int(year), number, day and int(day)))
    match = _NUMERIC.fullmatch(text)
    if not match:
        return None
    a, b = int(match["a"]), int(match["b"])
    if match["mark"] == "." and len(match["year"]) == 2:
        return None  # a version
    if len(match["year"]) == 4 and (a > 12) != (b > 12) and max(a, b) <= 31:
        return Code("date", (int(match["year"]), min(a, b), max(a, b)))
    return Code("date", ("digits", a, b, int(match["year"])))


def _time(text: str, _: str) -> Code | None:
    match = _TIME.fullmatch(text)
    if not match:
        return None
    group = {name: value for name, value in match.groupdict().items() if value}
    hour = int(group.get("hour") or group.get("hour_2") or group.get("hour_3"))
    minute = int(group.get("minute") or group.get("minute_2") or 0)
    second = int(group.get("second") or group.get("second_2") or 0)
    half = group.get("half") or group.get("half_3")
    if hour > 24 or minute > 59 or second > 59 or (half and not 1 <= hour <= 12):
        return None
    if half:
        hour = hour % 12 + (12 if half == "p" else 0)
    return Code("time", (hour, minute, second, bool(half) or hour > 12))


def _range(text: str, plain: str) -> Code | None:
    match = _RANGE.fullmatch(plain)
    if not match or (match["unit"] and re.match(r"[-+*/^=]", match["unit"])):
        return None
    if match["scale"] and not (match["unit"] or "").casefold().startswith(match["scale"].casefold()[:1]):
        return None
    low, high = (float(match[name].replace(",", "")) for name in ("low", "high"))
    unit = " ".join((match["unit"] or match["unit_1"] or "").casefold().split()).rstrip(".")
    ratio = bool(re.search(r"\d ?\\?to ?\d", plain)) and not unit
    return Code("range", (low, high, unit, ratio))


def _size(text: str, _: str) -> Code | None:
    if not _SIZE.fullmatch(text) or re.search(r"\b10 ?\^", text):
        return None
    parts = re.split(r" ?(?:(?<=[\d ])x|\\times|\*|by) ?", text)
    return Code("size", tuple(" ".join(part.split()) for part in parts))


def _groups(text: str, _: str) -> Code | None:
    if _RATIO.fullmatch(text):
        parts = [float(part) for part in re.split(r" ?: ?", text)]
        if len(parts) < 3 or not parts[0]:
            return None
        return Code("ratio", tuple(round(part / parts[0], 9) for part in parts))
    if _DIGIT_GROUPS.fullmatch(text) and not re.fullmatch(r"\d+\.\d+|\d{1,3}(?: \d{3})+|\+?\d+ \d+", text):
        return Code("label", tuple(re.findall(r"\d+", text)))
    return None


def _label(text: str, plain: str) -> Code | None:
    if _WEB.fullmatch(plain) or _MARKED.fullmatch(plain):
        return Code("label", (text.removeprefix("http://").removeprefix("https://").rstrip("/"),))
    if not _LABEL.fullmatch(plain) or re.search(r"[=<>^]|\\", plain):
        return None
    tokens = re.findall(r"[^\W\d_]+|\d+(?:\.\d+)*|[+#%&@]", text)
    words = [token for token in tokens if token.isalpha()]
    # A product of single letters and numbers ("2x", "3a + 4b", "x_1") is algebra; so is a sum of them.
    single = all(len(word) == 1 for word in words)
    if single and _ALGEBRA.search(plain) and not re.fullmatch(r"\d[A-Z]|[A-Z]\d+(?:-[A-Z]\d+)*", plain):
        return None
    if re.search(r"\\|[(]", plain) and not any(len(word) > 2 for word in words):
        return None
    return Code("label", tuple(token for token in tokens if token not in ("the",)))


def same(predicted: str, gold: Code) -> bool:
    """Whether a normalized text is the same code."""
    if gold.sort == "range" and gold.parts[3] and _RATIO.fullmatch(predicted):  # "3 to 4" is 3:4 too
        return tuple(float(part) for part in predicted.split(":")) == gold.parts[:2]
    return any(_equal(reading, gold) for reading in _readings(predicted))


def _same_unit(a: str, b: str) -> bool:
    return a == b or bool(set(units.units_of(a)) & set(units.units_of(b)))


def _equal(predicted: Code, gold: Code) -> bool:
    if predicted.sort != gold.sort:
        return False
    a, b = predicted.parts, gold.parts
    if gold.sort == "time":  # a half of the day that one of them leaves out is no difference
        if a[:3] == b[:3]:
            return True
        known, bare = (a, b) if a[3] else (b, a)
        return (
            known[3]
            and not bare[3]
            and 1 <= bare[0] <= 12
            and (known[0] % 12, *known[1:3]) == (bare[0] % 12, *bare[1:3])
        )
    if gold.sort == "range":
        return a[:2] == b[:2] and (not a[2] or not b[2] or _same_unit(a[2], b[2]))
    return a == b
