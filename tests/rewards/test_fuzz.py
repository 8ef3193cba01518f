"""Answers made from gold ones, equal or unequal by the way they were made: no rule of the grader makes them."""

import random
from fractions import Fraction

from capcur_jax.answers.kinds import gold_of
from capcur_jax.rewards import grade

CASES = 2000
WORDS = [
    "cat",
    "dog",
    "left",
    "red",
    "blue",
    "circle",
    "triangle",
    "north",
    "summer",
    "bottle",
    "kitchen",
    "yellow",
    "seven-up",
    "Paris",
]
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
# Units of one measure, each as its names and how many of the first one it is.
MEASURES = (
    ((("m", "meters", "metre", "米"), Fraction(1)), (("cm", "centimeters", "厘米"), Fraction(1, 100)),
     (("km", "kilometers"), Fraction(1000)), (("mm", "millimeters"), Fraction(1, 1000))),
    ((("kg", "kilograms", "公斤"), Fraction(1)), (("g", "grams", "克"), Fraction(1, 1000)),
     (("mg", "milligrams"), Fraction(1, 10**6))),
    ((("s", "seconds", "sec", "秒"), Fraction(1)), (("min", "minutes", "分钟"), Fraction(60)),
     (("h", "hours", "hrs", "小时"), Fraction(3600))),
    ((("L", "liters"), Fraction(1)), (("mL", "milliliters"), Fraction(1, 1000)), (("cm^3", "cm³"), Fraction(1, 1000))),
    ((("m^2", "m²", "square meters", "平方米"), Fraction(1)), (("cm^2", "sq cm"), Fraction(1, 10**4))),
    ((("m/s", "meters per second"), Fraction(1)), (("km/h", "kilometers per hour", "kmh"), Fraction(1000, 3600))),
    ((("Pa", "pascals"), Fraction(1)), (("kPa", "kilopascals"), Fraction(1000))),
    ((("W", "watts"), Fraction(1)), (("kW", "kilowatts"), Fraction(1000)), (("MW", "megawatts"), Fraction(10**6))),
)  # fmt: skip


def _digits(value):
    """A number whose denominator divides a power of ten, in plain digits."""
    if value.denominator == 1:
        return str(value.numerator)
    places = next(n for n in range(1, 40) if (value * 10**n).denominator == 1)
    text = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return "-" * (value < 0) + text[:-places] + "." + text[-places:]


def _wrapped(rng, text):
    return rng.choice(
        [text] * 4
        + [f"${text}$", rf"\text{{{text}}}", f"**{text}**", f" {text}. ", rf"\({text}\)", rf"\mathbf{{{text}}}"]
    )


def _number(rng):
    value = Fraction(rng.randint(1, 10 ** rng.randint(1, 7)), 10 ** rng.choice((0, 0, 0, 1, 2, 3)))
    value *= rng.choice((1, 1, 1, -1))
    gold = _digits(value)
    ways = [gold, gold, "x = " + gold, gold.translate(str.maketrans("0123456789-", "０１２３４５６７８９−"))]
    whole, _, places = gold.lstrip("-").partition(".")
    grouped = f"{int(whole):,}" + (f".{places}" if places else "")
    ways += ["-" * (value < 0) + grouped, gold + ("0" if places else ".0")]
    shift = rng.randint(1, 4)
    ways.append(rf"{_digits(value / 10**shift)} \times 10^{{{shift}}}")
    ways.append(f"{_digits(value / 10**shift)}e{shift}")
    if places:
        ways.append(f"{value.numerator}/{value.denominator}")
    step = Fraction(1, 10 ** len(places))
    other = rng.choice((value + step, value - step, -value, value * 10, value + 7 * step, value + 1))
    return gold, _wrapped(rng, rng.choice(ways)), _wrapped(rng, _digits(other))


def _fraction(rng):
    bottom = rng.choice((3, 6, 7, 9, 11, 13, 17, 21, 23))
    top = rng.choice([n for n in range(1, 4 * bottom) if Fraction(n, bottom).denominator > 2])
    value = Fraction(top, bottom)
    times = rng.randint(2, 5)
    equal = [
        rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac{{{top * times}}}{{{bottom * times}}}", f"{top}/{bottom}",
        f"{float(value):.8g}", f"{top * times}/{bottom * times}",
    ]  # fmt: skip
    if top > bottom:
        equal.append(rf"{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}")
    unequal = [f"{top + 1}/{bottom}", f"{bottom}/{top}" if top != bottom else "2", f"{float(value) * 1.0001:.8g}",
               f"-{top}/{bottom}", f"{top}/{bottom + 1}"]  # fmt: skip
    return rng.choice((equal[0], equal[2])), _wrapped(rng, rng.choice(equal)), _wrapped(rng, rng.choice(unequal))


def _quantity(rng):
    place = rng.randrange(len(MEASURES))
    measure = MEASURES[place]
    (names, factor), (others, scale) = rng.choice(measure), rng.choice(measure)
    value = Fraction(rng.randint(2, 900))
    name = rng.choice(names)
    converted = value * factor / scale
    equal = f"{_digits(converted)} {rng.choice(others)}" if _is_short(converted) else f"{value} {rng.choice(names)}"
    foreign = rng.choice([one for i, one in enumerate(MEASURES) if i != place])
    unequal = rng.choice([
        f"{value} {rng.choice(rng.choice(foreign)[0])}",
        f"{value + 1} {name}",
        next((f"{value} {rng.choice(ns)}" for ns, f in measure if f != factor), f"{2 * value} {name}"),
    ])  # fmt: skip
    if place == 3 and "^" in unequal + name:  # litres and cubic centimetres are one measure; square metres are not
        unequal = f"{value + 1} {name}"
    return f"{value} {name}", rng.choice([equal, equal, str(value)]), unequal


def _is_short(value):
    return (value * 10**8).denominator == 1


def _money(rng):
    value = rng.randint(2, 900)
    gold, equal = rng.choice((
        (f"${value}", [f"{value} dollars", f"${value}.00", f"{value}", rf"\${value}", f"USD {value}"]),
        (f"€{value}", [f"{value} euros", f"{value} EUR", f"{value}"]),
        (f"{value}元", [f"{value} yuan", f"{value}", f"¥{value}"]),
    ))  # fmt: skip
    return (
        gold,
        rng.choice(equal),
        rng.choice((f"{value} cents", f"£{value}", gold.replace(str(value), str(value + 1)))),
    )


def _date(rng):
    year, month, day = rng.randint(1900, 2030), rng.randint(1, 12), rng.randint(1, 28)
    ways = [f"{year}-{month:02d}-{day:02d}", f"{MONTHS[month - 1]} {day}, {year}", f"{day} {MONTHS[month - 1]} {year}",
            f"{MONTHS[month - 1][:3]} {day}, {year}", f"{year}年{month}月{day}日", f"{year}/{month}/{day}"]  # fmt: skip
    other = rng.choice(((year + 1, month, day), (year, month % 12 + 1, day), (year, month, day % 28 + 1)))
    if day <= 12 and day != month and rng.random() < 0.5:
        other = year, day, month
    return rng.choice(ways), rng.choice(ways), f"{other[0]}-{other[1]:02d}-{other[2]:02d}"


def _time(rng):
    hour, minute = rng.randint(1, 11), rng.randint(0, 59)
    gold = f"{hour}:{minute:02d} pm"
    equal = [f"{hour}:{minute:02d} p.m.", f"{hour + 12}:{minute:02d}", f"{hour}:{minute:02d} PM"]
    unequal = [f"{hour}:{minute:02d} am", f"{hour}:{(minute + 1) % 60:02d} pm", f"{hour % 11 + 1}:{minute:02d} pm"]
    return gold, rng.choice(equal), rng.choice(unequal)


def _range(rng):
    low = rng.randint(1, 2000)
    high = low + rng.randint(1, 50)
    unit = rng.choice(("", "", " cm", " years", "%"))
    gold = f"{low}-{high}{unit}"
    equal = [f"{low}–{high}{unit}", f"{low} to {high}{unit}", f"{low} - {high}{unit}"]
    unequal = [f"{low + 1}-{high + 1}{unit}", f"{low - high}", f"{low}-{high + 1}{unit}", f"{high}-{low}{unit}"]
    return gold, rng.choice(equal), rng.choice(unequal)


def _label(rng):
    number, letter = rng.randint(2, 98), rng.choice("BCDFGHKMNPQRST")
    gold, other = rng.choice((
        ("Room {}", "Room {}"), ("COVID-{}", "COVID-{}"), ("192.168.0.{}", "192.168.0.{}"), ("v2.{}", "v2.{}"),
        (f"{letter}{{}}{letter}1", f"{letter}{{}}{letter}1"), ("#{}", "#{}"), ("No. {}", "No. {}"),
        ("555-12{}", "555-12{}"), ("Figure {}a", "Figure {}b"), ("Q1 20{}", "Q2 20{}"),
    ))  # fmt: skip
    gold = gold.format(number)
    return gold, rng.choice((gold, gold.lower(), f" {gold}. ", rf"\text{{{gold}}}")), other.format(number + 1)


def _letter(rng):
    letters = "ABCDE"
    gold = rng.choice(letters)
    wrong = rng.choice([letter for letter in letters if letter != gold])
    form = rng.choice(("{}", "({})", "{}.", "{}. cat", "({}) cat", r"\text{{{}}}", "option {}", "Answer: {}", "**{}**",
                       r"\textbf{{({})}}\ 5", "选{}", "{}。", "The answer is {}"))  # fmt: skip
    unequal = [form.format(wrong), f"{gold} or {wrong}", f"{gold}, {wrong}", f"{wrong} and {gold}"]
    return rng.choice((gold, f"({gold})")), form.format(gold), rng.choice(unequal)


def _letters(rng):
    chosen = sorted(rng.sample("ABCDEF", rng.randint(2, 4)))
    ways = ["".join(chosen), ", ".join(chosen), "、".join(chosen), ", ".join(chosen[:-1]) + " and " + chosen[-1]]
    other = sorted(set(chosen) ^ {rng.choice("ABCDEF")})
    return rng.choice(ways), rng.choice(ways), ", ".join(other) if other else "F"


def _word(rng):
    gold = " ".join(rng.sample(WORDS, rng.randint(1, 2)))
    other = " ".join(rng.sample([word for word in WORDS if word not in gold], 1))
    equal = [gold.upper(), gold.capitalize(), f"the {gold}", f'"{gold}"', rf"\text{{{gold}}}", f"{gold}."]
    return gold, rng.choice(equal), rng.choice((other, f"{gold} or {other}", f"{gold} {other}"))


def _values(rng):
    values = rng.sample(range(-20, 60), rng.randint(2, 4))
    mixed = rng.sample(values, len(values))
    other = [*values[:-1], values[-1] + 1] if values[-1] + 1 not in values else values[:-1]
    kind = rng.choice(("bare", "set", "tuple", "named"))
    text = ", ".join(map(str, values))
    if kind == "tuple":
        swapped = [values[1], values[0], *values[2:]]
        unequal = [f"({', '.join(map(str, swapped))})", rf"\{{{text}\}}", f"({', '.join(map(str, other))})"]
        return f"({text})", f"( {' , '.join(map(str, values))} )", rng.choice(unequal)
    gold = {"bare": text, "set": rf"\{{{text}\}}", "named": " or ".join(f"x = {value}" for value in values)}[kind]
    shuffled = ", ".join(map(str, mixed))
    equal = [shuffled, rf"\{{{shuffled}\}}", ", ".join(f"x={value}" for value in mixed), " or ".join(map(str, mixed))]
    return gold, rng.choice(equal), rng.choice((", ".join(map(str, other)), str(values[0]), f"{text}, 99"))


def _interval(rng):
    low = rng.randint(-20, 20)
    high = low + rng.randint(1, 20)
    left, right = rng.choice("(["), rng.choice(")]")
    first, last = "<" if left == "(" else r"\le", "<" if right == ")" else r"\le"
    ways = [f"{left}{low}, {high}{right}", f"{low} {first} x {last} {high}", rf"x \in {left}{low},{high}{right}"]
    unequal = [f"{'[' if left == '(' else '('}{low}, {high}{right}", f"{left}{low}, {high + 1}{right}",
               f"{low + 1 if low + 1 < high else low - 1} {first} x {last} {high}"]  # fmt: skip
    return rng.choice(ways), rng.choice(ways), rng.choice(unequal)


def _ray(rng):
    end, open_ = rng.randint(-20, 20), rng.random() < 0.5
    sign, back = (">", "<") if open_ else (r"\ge", r"\le")
    ways = [f"x {sign} {end}", f"{end} {back} x", rf"{'(' if open_ else '['}{end}, \infty)"]
    unequal = [f"x {back} {end}", rf"{'[' if open_ else '('}{end}, \infty)", f"x {sign} {end + 1}"]
    return rng.choice(ways), rng.choice(ways), rng.choice(unequal)


def _polynomial(rng):
    a, b = rng.randint(1, 9), rng.choice([n for n in range(-9, 10) if n])
    expanded = f"x^2 {a + b:+d}x {a * b:+d}"
    factored = f"(x+{a})(x{b:+d})"
    ways = [
        expanded,
        factored,
        f"x**2 {a + b:+d}*x {a * b:+d}",
        f"{a * b:+d}+x^2{a + b:+d}x".lstrip("+"),
        f"y = {factored}",
    ]
    unequal = [f"x^2 {a + b:+d}x {a * b + 1:+d}", f"(x-{a})(x{b:+d})", f"2x^2 {a + b:+d}x {a * b:+d}"]
    return rng.choice(ways[:2]), rng.choice(ways), rng.choice(unequal)


def _root(rng):
    outer, inner = rng.randint(2, 9), rng.choice((2, 3, 5, 6, 7, 10))
    ways = [rf"{outer}\sqrt{{{inner}}}", rf"\sqrt{{{outer**2 * inner}}}", f"{outer}*sqrt({inner})", f"{outer}√{inner}",
            f"{outer * inner**0.5:.9g}"]  # fmt: skip
    unequal = [rf"{outer}\sqrt{{{inner + 1}}}", rf"\sqrt{{{outer * inner}}}", f"-{outer}*sqrt({inner})",
               f"{outer * inner**0.5:.3g}", f"{outer * inner**0.5 * 1.00001:.9g}"]  # fmt: skip
    return rng.choice(ways[:2]), rng.choice(ways), rng.choice(unequal)


def _power(rng):
    base, power = rng.choice((2, 3, 7)), rng.randint(30, 400)
    gold = rf"\frac{{1}}{{{base}^{{{power}}}}}"
    return (
        gold,
        f"{base}^{{-{power}}}",
        rng.choice((f"{base}^{{-{power + 1}}}", "0", rf"\frac{{1}}{{{base}^{{{power - 1}}}}}")),
    )


def _pi(rng):
    top, bottom = rng.choice([(a, b) for a in range(1, 6) for b in (2, 3, 4, 5, 6) if Fraction(a, b).denominator == b])
    ways = [rf"\frac{{{top}\pi}}{{{bottom}}}", f"{top}pi/{bottom}", f"{top}*pi/{bottom}", f"{top}π/{bottom}"]
    unequal = [rf"\frac{{{top + 1}\pi}}{{{bottom}}}", f"{top}/{bottom}", f"{top * 3.14 / bottom:.3g}"]
    return rng.choice(ways[:2]), rng.choice(ways), rng.choice(unequal)


def _line(rng):
    a, b, c = (rng.choice([n for n in range(-9, 10) if n]) for _ in range(3))
    times = rng.choice((2, 3, -1))
    gold = f"{a}x {b:+d}y {c:+d} = 0"
    equal = [
        f"{a * times}x {b * times:+d}y {c * times:+d} = 0",
        f"{a}x {b:+d}y = {-c}",
        rf"y = \frac{{{-a}}}{{{b}}}x + \frac{{{-c}}}{{{b}}}",
    ]
    unequal = [f"{a}x {b:+d}y {c + 1:+d} = 0", f"{a}x {-b:+d}y {c:+d} = 0", f"{a + 10}x {b:+d}y = {-c}"]
    return gold, rng.choice(equal), rng.choice(unequal)


MAKERS = (
    _number, _number, _fraction, _quantity, _quantity, _money, _date, _time, _range, _label, _letter, _letters, _word,
    _values, _interval, _ray, _polynomial, _root, _power, _pi, _line,
)  # fmt: skip


def cases(seed, count):
    """(how it was made, gold, predicted, whether they are equal)."""
    rng = random.Random(seed)
    for number in range(count):
        make = MAKERS[number % len(MAKERS)]
        gold, equal, unequal = make(rng)
        right = rng.random() < 0.5
        yield make.__name__, gold, equal if right else unequal, right


def test_answers_that_were_made_equal_or_unequal():
    made = list(cases(0, CASES))
    with grade.Grader(workers=2, timeout_s=20.0) as grader:
        verdicts = grader.grade([(predicted, gold_of(gold)) for _, gold, predicted, _ in made])
        assert grader.timeouts == grader.failures == 0
    wrong = [case for case, verdict in zip(made, verdicts, strict=True) if verdict != case[-1]]
    assert not wrong, "\n".join(map(str, wrong[:20]))
