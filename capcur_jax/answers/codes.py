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
_ISO_MONTH = re.compile(r"(?P<year>(?:19|20)\d{2})-(?P<month>0\d|1[0-2])")
_CHINESE = re.compile(r"(?:(?P<year>\d{2,4})年)?(?P<month>\d{1,2})月(?:(?P<day>\d{1,2})[日号])?")
_NUMERIC = re.compile(r"(?P<a>\d{1,2})(?P<mark>[-/.])(?P<b>\d{1,2})(?P=mark)(?P<year>\d{4}|\d{2})")
_TIME = re.compile(
    r"(?P<hour>\d{1,2})(?:[:.](?P<minute>\d{2})(?::(?P<second>\d{2}))?)? ?(?P<half>[ap])\.? ?m\.?|"
    r"(?P<hour_2>\d{1,2}):(?P<minute_2>\d{2})(?::(?P<second_2>\d{2}))?(?: ?(?:h|hrs?|hours|o'clock))?|"
    r"(?P<hour_3>\d{1,2}) ?o'?clock(?: ?(?P<half_3>[ap])\.?m\.?)?|"
    r"(?P<hour_4>\d{1,2})[点时](?:(?P<minute_4>\d{1,2})分?|整|(?P<late>半))?",
)
_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_RANGE = re.compile(
    rf"(?P<unit_1>[$€£¥₹]?)(?P<low>-?{_NUMBER}) ?(?P<scale>%|[a-zA-Z]+)? ?"
    r"(?:-|--|~|\\approx|\\sim|to|through|\\to|至|到) ?"
    rf"[$€£¥₹]?(?P<high>-?{_NUMBER}) ?(?P<unit>%|[^\W\d].*)?"
)
_BETWEEN = re.compile(r" ?(?:-|~|\bto\b|\bthrough\b|\band\b|至|到) ?")
_SIZE = re.compile(rf"{_NUMBER}(?: ?[^\W\dx_]+)?(?: ?(?:x|\\times|\*|by) ?{_NUMBER}(?: ?[^\W\dx_]+)?)+")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?: ?: ?\d+(?:\.\d+)?)+")
_DIGIT_GROUPS = re.compile(r"\+?\(?\d+\)?(?:[-. ]\(?\d+\)?)+")
_LABEL = re.compile(r"(?=.*\d)(?=.*(?:[^\W\d_]|#))[\w#&'.:/@?=~%\-+(), ]+", re.ASCII)
_MARKED = re.compile(r"[A-Za-z]+(?:\+\+|#)|\d+\+|[A-F][+-]|\d+(?:\.\d+){2,}")
_ALGEBRA = re.compile(r"[+*/()_]|\d ?[a-zA-Z]\Z|\A\d+[a-z]\b|[a-z] ?- ?\d|\d ?- ?[a-z]")
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
_ERA = re.compile(r"\d+ ?(?:bce?|b\.c\.?)")
_POINT = re.compile(r"(?<=[^\W\d_])\.(?=[^\W\d_]|\s|\Z)")
_WEB = re.compile(r"(?:https?://|www\.)\S+|\S+@\S+\.\w+")


def read(text: str) -> Code | None:
    """The code that a normalized answer is, or None where it is none."""
    return next(_readings(text), None)


def is_era(text: str) -> bool:
    """Whether it is a year with its era, "500 BC"."""
    return bool(_ERA.fullmatch(text.casefold()))


def _readings(text: str) -> Iterator[Code]:
    """All that it may be: 3:30 is a time and a ratio."""
    plain = text.replace("\\cdot", ".").replace("{", "").replace("}", "").strip(" .")
    lower = " ".join(plain.casefold().split())
    for reader in (_date, _time, _range, _size, _groups, _label):
        if code := reader(lower, plain):
            yield code


def _date(text: str, _: str) -> Code | None:
    for pattern in (*_NAMED, _ISO, _ISO_MONTH, _CHINESE):
        if match := pattern.fullmatch(text):
            group = match.groupdict()
            month = group["month"]
            year, day = group.get("year") or group.get("year_2"), group.get("day")
            year = year or None
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
    if (a > 12) != (b > 12) and max(a, b) <= 31:
        return Code("date", (int(match["year"]), min(a, b), max(a, b)))
    return Code("date", ("digits", a, b, int(match["year"]) % 100))


def _time(text: str, _: str) -> Code | None:
    for word, half in (("上午", "am"), ("早上", "am"), ("下午", "pm"), ("晚上", "pm")):
        if text.startswith(word) and (time := _time(text.removeprefix(word), "")):
            hour = time.parts[0] % 12 + (12 if half == "pm" else 0)
            return Code("time", (hour, *time.parts[1:3], True))
    text = {"noon": "12:00 pm", "midnight": "12:00 am"}.get(text, text.removesuffix(" noon"))
    match = _TIME.fullmatch(text)
    if not match:
        return None
    group = {name: value for name, value in match.groupdict().items() if value}
    hour = int(group.get("hour") or group.get("hour_2") or group.get("hour_3") or group.get("hour_4"))
    minute = int(group.get("minute") or group.get("minute_2") or group.get("minute_4") or 30 * ("late" in group))
    second = int(group.get("second") or group.get("second_2") or 0)
    half = group.get("half") or group.get("half_3")
    if hour > 24 or minute > 59 or second > 59 or (half and not 1 <= hour <= 12):
        return None
    if half:
        hour = hour % 12 + (12 if half == "p" else 0)
    return Code("time", (hour, minute, second, bool(half) or hour > 12))


def _range(text: str, plain: str) -> Code | None:
    ends = _BETWEEN.split(text.removeprefix("from ").removeprefix("between "))
    times = [_time(end.strip(), "") for end in ends] if len(ends) == 2 else []
    if times and all(times):
        return Code("times", tuple(part for time in times if time for part in time.parts[:3]))
    plain = re.sub(r"\A(?:from|between) ", "", plain)
    plain = plain.replace(" and ", " to ") if text.startswith("between ") else plain
    match = _RANGE.fullmatch(plain)
    if not match or (match["unit"] and not units.units_of(match["unit"]) and match["unit"] != "%"):
        return None
    if match["scale"] and not (match["unit"] or "").casefold().startswith(match["scale"].casefold()[:1]):
        return None
    low, high = (float(match[name].replace(",", "")) for name in ("low", "high"))
    if re.fullmatch(r"\d{4}", match["low"]) and re.fullmatch(r"\d{2}", match["high"]):  # 1990-95
        high += low - low % 100
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
    text = text.removeprefix("the ")
    if decade := re.fullmatch(r"(\d{2,3}0)'?s", text):
        return Code("ordinal", (decade[1], "s"))
    if _WEB.fullmatch(plain) or _MARKED.fullmatch(plain) or _ERA.fullmatch(text):
        return Code("label", (text.rstrip("/"),))
    if text in _ORDINALS:
        return Code("ordinal", (str(_ORDINALS.index(text) + 1), "th"))
    if ordinal := re.fullmatch(r"(\d+)(?:st|nd|rd|th)", text):
        return Code("ordinal", (ordinal[1], "th"))
    if re.fullmatch(r"(?=.*\d)[0-9a-f]{1,4}(?:[-:./][0-9a-f]{1,4}){2,}", text):
        return Code("label", tuple(re.split(r"[-:./]", text)))
    if not _LABEL.fullmatch(plain) or re.search(r"[=<>^]|\\", plain):
        return None
    text = _POINT.sub("", text)
    text = re.sub(r"\A(?:no\.?|number|nr\.?|№|#) ?(?=\d)", "#", text)
    text = re.sub(r"\Av(?:er(?:sion|\.)? ?)?(?=\d+\.)", "", text)
    tokens = re.findall(r"[^\W\d_]+|\d+(?:\.\d+)*|[+#%&@]", text)
    words = [token for token in tokens if token.isalpha()]
    # A product of single letters and numbers ("2x", "3a + 4b", "x_1") is algebra; so is a sum of them.
    if re.fullmatch(r"\d+[a-z]{2,3}", plain):
        return None
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
    if any(_equal(reading, gold) for reading in _readings(predicted)):
        return True
    digits = [part for part in gold.parts if str(part).removesuffix(".0").isdigit()]
    if len(digits) >= 2 and gold.sort in ("label", "range"):  # a telephone number without its hyphens
        joined = "".join(str(part).removesuffix(".0") for part in digits)
        return len(joined) >= 7 and predicted == joined
    return gold.sort == "label" and predicted.casefold() == gold.parts[-1] and gold.parts[:-1] == ("#",)


def _same_unit(a: str, b: str) -> bool:
    return a == b or bool(set(units.units_of(a)) & set(units.units_of(b)))


def _same_date(predicted: tuple, gold: tuple) -> bool:
    """Whether two dates are one. Digits in an unknown order are read month first beside a named date."""
    if (predicted[0] == "digits") != (gold[0] == "digits"):
        named, digits = (gold, predicted) if predicted[0] == "digits" else (predicted, gold)
        _, a, b, year = digits
        return (
            named[0] is not None
            and named[0] % 100 == year
            and named[1:] in ((a, b), (b, a)[: 2 * (digits is predicted)])
        )
    if predicted[0] is None or gold[0] is None or predicted[0] == "digits":
        return predicted == gold
    short = min(predicted[0], gold[0]) < 100
    return predicted[1:] == gold[1:] and (predicted[0] - gold[0]) % (100 if short else 10**6) == 0


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
    if gold.sort == "date":
        return _same_date(a, b)
    if gold.sort == "range":
        return a[:2] == b[:2] and (not a[2] or not b[2] or _same_unit(a[2], b[2]))
    return a == b
