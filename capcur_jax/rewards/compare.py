"""Whether an answer meets a gold one, by the gold's kind; what only sympy can tell is left to the workers.

Predictions are untrusted. What is decided here works on at most ANSWER_LENGTH characters with linear rules and exact
fractions of bounded size; sympy, which hangs on `9^{9^{9^9}}`, only ever sees a prediction in a worker. docs/rewards.md
has the rules in a table with examples, which the tests read.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from capcur_jax.answers import codes, letters, numbers, quantities, structure, units
from capcur_jax.answers.kinds import Gold, answer_type_of, labelled
from capcur_jax.answers.spelling import ANSWER_LENGTH, long_words, normalize, words

Job = tuple[str, str]  # predicted and gold, normalized: formulas for a worker to compare
Verdict = bool | list[tuple[Job, ...]]  # right or wrong, or right if all jobs of one of these turn out equal

_EQUAL = re.compile(r"=|\\approx(?![a-z])")
_CONSTANT = re.compile(r"\\(?:pi|sqrt|ln|log|exp|sin|cos|tan)(?![a-z])|(?<![a-zA-Z])e(?![a-zA-Z])")
_CHOSEN = re.compile(r"(?:(?:answer|option|choice|select)s?|both|选项?|选择|答案)", re.IGNORECASE)
_NOT = re.compile(r"not |isn't |不是|不|非", re.IGNORECASE)
_NUMERO = re.compile(r"\A(?:no\.|number|nr\.|#|№) ?(?=\d)", re.IGNORECASE)
_PRODUCT = re.compile(r"\w(?:(?: | ?\\(?:cdot|times) ?| ?\* ?)\w)+")
_LABEL = re.compile(r"(?<![A-Za-z])([A-J])[)\].:](?=\s*\S)")
_PRIME = re.compile("[A-Z]'+")
_SAID = re.compile(
    r"\s*(?:\\text\s*\{)?\s*(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?"
    r"(?:answer(?: is\b ?:?| ?:)|答案[是为]?[:：]?)"
    r"|\s*(?:(?:about|around|approximately|approx\.?|roughly|约|大约)(?= ?[\d$\\])|\\approx(?![a-z])|[≈=](?!=))",
    re.IGNORECASE,
)
_SETS = {
    "empty set": r"\emptyset", "the empty set": r"\emptyset", "空集": r"\emptyset", "all real numbers": r"\mathbb{R}",
    "all reals": r"\mathbb{R}", "全体实数": r"\mathbb{R}",
}  # fmt: skip
_GREEK = re.compile(r"(?<![a-zA-Z\\])(alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|sigma|omega)(?![a-zA-Z])")
_WORDLIKE = frozenset(re.findall(r"\w+", "no on in is it an as at be by do go he if me my of or so to up us we"))


def decide(predicted: str | None, gold: str | Gold) -> Verdict:
    """The verdict where the rules of this process reach one, else what the workers have to compare.

    Nothing, blanks and more than ANSWER_LENGTH characters are wrong. Of several accepted golds one suffices.
    """
    gold = Gold((gold,)) if isinstance(gold, str) else gold
    if not predicted or len(predicted) > ANSWER_LENGTH:
        return False
    whole = normalize(predicted)
    if predicted.strip() in gold.texts or (whole and whole in map(normalize, gold.texts)):
        return True
    if not whole or (_NOT.match(whole) and not any(map(_NOT.match, gold.texts))):
        return False
    text = normalize(_unannounced(predicted)) or whole
    open_: list[tuple[Job, ...]] = []
    for place, accepted in enumerate(gold.texts):
        if not accepted or len(accepted) > ANSWER_LENGTH:
            continue
        kind = (gold.kind if not place else "") or answer_type_of(accepted, gold.question)
        verdict = _by_kind(text, normalize(accepted), kind, gold)
        if verdict is True:
            return True
        open_ += verdict or []
    return open_ or False


def _unannounced(text: str) -> str:
    """Without "The answer is" and "about" before it."""
    said = _SAID.match(text)
    if not said:
        return text
    return text[said.end() :].strip("} ") if "{" in said[0] else text[said.end() :]


def _by_kind(text: str, gold: str, kind: str, row: Gold) -> Verdict:
    if not gold:
        return False
    text, gold = _SETS.get(text.casefold(), text), _SETS.get(gold.casefold(), gold)
    if text == gold:
        return True
    options = dict(row.options)
    if kind == "letter":
        return _letter(text, gold, options)
    if kind == "letters":
        return _letters(text, gold, row)
    if options:
        named = [letter for letter, option in options.items() if _same_text(option, gold)]
        if len(named) == 1 and letters.letter_in(text, "".join(options)) == named[0] and not _same_text(text, gold):
            return True
        if (label := labelled(text)) and label[0] in options and not labelled(gold):
            text = normalize(label[1])
    if kind == "number":
        return _number(text, gold)
    if kind == "quantity":
        return _quantity(text, gold, row.unit)
    if kind == "code":
        code = codes.read(gold)
        return _squeezed(text) == _squeezed(gold) or (code is not None and codes.same(text, code))
    if kind == "word":
        return _word(text, gold)
    return _formula(text, gold)


# ------------------------------------------------------------------------------------------------ choices


def _letter(text: str, gold: str, options: dict[str, str]) -> Verdict:
    """A gold "B" or "B. cat" takes the letter, with or without a text, and the text of the option."""
    label = labelled(gold)
    bare = gold.strip("()[].: ")
    if label:
        letter, option = label
    elif len(bare) == 1:
        letter, option = bare, options.get(bare, "")
    else:  # declared a letter, written as the option's text
        named = [letter for letter, option in options.items() if _same_text(option, gold)]
        if len(named) != 1:
            return _word(text, gold)
        letter, option = named[0], gold
    if option and _same_text(text, option):
        return True
    others = [label[1] for label in _LABEL.finditer(text) if label[1] != letter]
    if others or _PRIME.fullmatch(text):
        return False
    said = labelled(text) if label else None
    if said and said[0] == letter and _simple(said[1]) and _simple(option):
        return _same_text(said[1], option)  # B. dog is not B. cat
    return letters.boxed_letter(text, "".join(options or letters.LETTERS) + letter) == letter


def _letters(text: str, gold: str, row: Gold) -> bool:
    """Several letters, in any order where they are written as a list or the question asks for all."""
    text = re.sub(r"\)\s*\(", ",", _CHOSEN.sub("", text).replace("/", ",")).strip(" :")
    text = text.upper() if re.fullmatch(r"[a-j](?:[ ,;]*[a-j])*", text) else text
    found, expected = letters.letters_of(text), letters.letters_of(gold)
    if not found and row.any_order and re.fullmatch("[A-Z]{2,10}", text) and len(set(text)) == len(text):
        found = tuple(text)
    if found == expected:
        return True
    return sorted(found) == sorted(expected) and (row.any_order or not re.fullmatch("[A-Z]+", text))


def _simple(text: str) -> bool:
    """Whether it is a number or words, which `_same_text` compares."""
    text = normalize(text)
    return numbers.plain_number(text) is not None or words(text) is not None


@functools.lru_cache(4096)
def _same_text(a: str, b: str) -> bool:
    """Whether two short texts are one answer without a look at letters and formulas."""
    a, b = normalize(a), normalize(b)
    if a == b or a.casefold() == b.casefold():
        return True
    if (number := numbers.plain_number(b)) is not None:
        other = numbers.plain_number(a)
        return other is not None and numbers.equal_numbers(other, number)
    first, second = quantities.quantity(a), quantities.quantity(b)
    if first and second:
        return quantities.same_quantity(first, second)
    return words(a) is not None and words(a) == words(b)


# ------------------------------------------------------------------------------------------------ numbers


def _claim(text: str) -> tuple[str, list[str], list[str]]:
    """What `x = 2 + 3 = 5 \\approx 5.0` claims, the other formulas that it says are equal, and its approximations."""
    parts = structure.split(text, _EQUAL)
    values, marks = [part.strip() for part in parts[::2]], [mark.strip() for mark in parts[1::2]]
    if not marks or not all(values) or structure.parse(text).sort != "chain":
        return text, [], []
    if structure.is_name(values[0]) and marks[0] == "=":
        values, marks = values[1:], marks[1:]
    exact = [values[0], *(value for value, mark in zip(values[1:], marks, strict=True) if mark == "=")]
    rounded = [value for value, mark in zip(values[1:], marks, strict=True) if mark != "="]
    finished = [value for value in exact if numbers.plain_number(value) or quantities.quantity(value)]
    if finished:
        claim = finished[-1]
        return claim, [value for value in exact if value is not claim], rounded
    if rounded and structure.is_name(values[0]):
        exact = exact[1:]
    return (rounded[-1], exact, rounded[:-1]) if rounded else (exact[-1], exact[:-1], [])


def _number(text: str, gold: str) -> Verdict:
    """A finished number, with or without a unit; `2+3`, `10/2` and `\\sqrt{25}` leave the work undone."""
    expected = numbers.plain_number(gold)
    if expected is None:  # declared a number
        return _formula(text, gold) if quantities.quantity(gold) is None else _quantity(text, gold, False)
    text = _NUMERO.sub("", text)
    if ":" in gold:
        text = re.sub(r"(\d) to (\d)", r"\1:\2", text)
    if "." in gold and re.fullmatch(r"-?\d+,\d{1,2}", text):  # a decimal comma
        text = text.replace(",", ".")
    text = text[2:-2] if text.startswith("\\{") and text.endswith("\\}") else text
    claim, others, rounded = _claim(text)
    number = _amount(claim)
    if expected.percent and number is not None and numbers.plain_number(claim) is None:
        return False  # 60 cm are no 60 %
    if number is None and expected.step and _CONSTANT.search(claim):
        return [((claim, gold),)]  # 3.14 is met by \pi
    if number is None or not numbers.equal_numbers(number, expected):
        return False
    return _consistent(expected, others, rounded, gold)


def _amount(text: str) -> numbers.Number | None:
    """The number that a text is, with a unit or without."""
    quantity = quantities.quantity(text) if numbers.plain_number(text) is None else None
    return quantity.number if quantity else numbers.plain_number(text)


def _consistent(expected: numbers.Number, others: list[str], rounded: list[str], gold: str) -> Verdict:
    """Whether what stands beside a right number says the same: "3 = 5" does not claim 5."""
    jobs: list[Job] = []
    for other in others:
        number = _amount(other)
        if number is None:
            jobs.append((other, gold))
        elif not numbers.equal_numbers(number._replace(form="decimal"), expected._replace(form="decimal")):
            return False
    for other in rounded:
        number = _amount(other)
        if number is None or number.value not in numbers.rounded(expected.value, number.step or Fraction(1)):
            return False
    return [tuple(jobs)] if jobs else True


def _quantity(text: str, gold: str, unit_asked: bool) -> Verdict:
    """The same amount: in the gold's unit, in one that converts, or without a unit unless the question asks for it."""
    expected = quantities.quantity(gold)
    if expected is None:  # declared a quantity
        return _formula(text, gold)
    claim, others, _ = _claim(text)
    found = quantities.quantity(claim)
    for other in others:  # 5 cm = 6 cm
        amount, number = quantities.quantity(other), numbers.plain_number(other)
        if amount and not quantities.same_quantity(amount, expected):
            return False
        if number and not numbers.equal_numbers(number._replace(form="decimal"), expected.number):
            return False
        if not amount and not number and not re.search(r"[-+*/^\\]", other):
            return False
    if found:
        return quantities.same_quantity(found, expected) or _same_degrees(found, expected)
    number = numbers.plain_number(claim)
    if number is not None:
        return not unit_asked and not number.percent and numbers.equal_numbers(number, expected.number)
    if any(unit.measures == ("angle",) for unit in expected.units) and "\\pi" in claim:
        return [((quantities.split_unit(claim)[0], _radians(expected)),)]
    return False


def _same_degrees(found: quantities.Quantity, expected: quantities.Quantity) -> bool:
    """Whether "30 degrees" are said of 30 °C."""
    temperature = any(unit.measures[0] == ("[temperature]", 1) for unit in expected.units)
    return temperature and found.units == (units.ANGLE,) and numbers.equal_numbers(found.number, expected.number)


def _radians(angle: quantities.Quantity) -> str:
    value = angle.number.value
    return rf"\frac{{{value.numerator} \pi}}{{{value.denominator * 180}}}"


# ------------------------------------------------------------------------------------------------ words, formulas


def _word(text: str, gold: str) -> bool:
    said, expected = words(text), words(gold)
    if expected is None:
        return _squeezed(text) == _squeezed(gold)
    if said == expected:
        return True
    code = codes.read(gold)
    if code is not None and codes.same(text, code):  # the third, 3rd
        return True
    if "." in text + gold and _unpointed(text) == _unpointed(gold):  # J. K. Rowling, J.K. Rowling
        return True
    # "a b c" is the product abc, letters in the order of the alphabet; "n o" is not "no".
    product = gold not in _WORDLIKE and list(gold) == sorted(gold) and _PRODUCT.fullmatch(text)
    return bool(product) and re.sub(r"\\(?:cdot|times)|[* ]", "", text) == gold


def _unpointed(text: str) -> str:
    return re.sub(r"[.\s]", "", text).casefold()


def _squeezed(text: str) -> str:
    return "".join(text.casefold().split())


def _formula(text: str, gold: str) -> Verdict:
    """For a worker, unless both contain words and these differ, or a unit of one is not the other's."""
    text, gold = _GREEK.sub(r"\\\1 ", text), _GREEK.sub(r"\\\1 ", gold)
    node = structure.parse(gold)
    if node.sort == "chain" and node.marks == ("=",) and structure.is_name(node.items[0].text):
        value, claim = node.items[1].text, structure.parse(text)
        if claim.sort != "chain" and quantities.quantity(value):
            return _quantity(text, value, False)
        if claim.sort != "chain" and numbers.plain_number(value):
            return _number(text, value)
    (text, mine), (gold, its) = quantities.split_unit(text), quantities.split_unit(gold)
    if mine and its and not set(mine) & set(its):
        return False
    if any(text.count(mark) > 40 for mark in "({[|^"):
        return False  # the parser takes seconds for what no answer holds
    said, expected = long_words(text), long_words(gold)
    if said and expected and said != expected:
        return False
    angle = quantities.quantity(text)
    if angle and any(unit.measures == ("angle",) for unit in angle.units) and "\\pi" in gold:
        text = _radians(angle)
    return [((text, gold),)]
