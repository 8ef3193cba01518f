r"""One spelling for answers that mean the same: Unicode, LaTeX, Markdown and program style in, plain LaTeX out.

An answer is at most ANSWER_LENGTH characters here; each function makes a bounded number of passes over it.
"""

import functools
import re
import unicodedata

from capcur_jax.answers.brackets import closing

ANSWER_LENGTH = 512  # characters; a longer answer can't be graded

_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "’": "'", "‘": "'", "“": '"', "”": '"', "′": "'",
    "″": '"', "°": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "×": r"\times ", "·": r"\cdot ",
    "⋅": r"\cdot ", "÷": r"\div ", "≈": r"\approx ", "≤": r"\le ", "≥": r"\ge ", "≦": r"\le ", "≧": r"\ge ",
    "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "±": r"\pm ", "∓": r"\mp ", "∈": r"\in ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∠": r"\angle ", "∥": r"\parallel ", "⊥": r"\perp ",
    "△": r"\triangle ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "√": r"\sqrt",
    "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "∧": r"\land ", "∨": r"\lor ", "≡": r"\equiv ", "⁄": "/", "∶": ":",
    "µ": r"\mu ", "Ω": r"\Omega ", "。": ".", "、": ",", "【": "(", "】": ")", "「": '"', "」": '"', "『": '"',
    "』": '"', "《": '"', "》": '"', "〈": "<", "〉": ">", "…": r"\ldots ", "⋯": r"\ldots ", "∕": "/", "﹣": "-",
    "∙": r"\cdot ", "•": r"\cdot ", "≅": r"\cong ", "≌": r"\cong ", "∽": r"\sim ", "⌊": r"\lfloor ",
    "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∴": "", "⇒": r"\Rightarrow ", "→": r"\to ", "～": "~",
}  # fmt: skip


def _greek() -> dict[str, str]:
    """Letters that LaTeX has a command for: "θ" is \\theta."""
    found = {}
    for code in range(0x391, 0x3CA):
        _, _, name = unicodedata.name(chr(code), "").partition(" LETTER ")
        name = {"LAMDA": "LAMBDA"}.get(name, name)
        capital = unicodedata.name(chr(code), "").startswith("GREEK CAPITAL")
        distinct = ["GAMMA", "DELTA", "THETA", "LAMBDA", "XI", "PI", "SIGMA", "UPSILON", "PHI", "PSI", "OMEGA"]
        if name.isalpha() and name != "OMICRON" and (not capital or name in distinct):
            found[chr(code)] = f"\\{name.capitalize() if capital else name.lower()} "
    return found


_TABLE = str.maketrans({0xFF01 + i: 0x21 + i for i in range(94)} | _greek() | _SYMBOLS)  # "５", "（Ｂ）"
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n", strict=True))
_RAISED_RUN, _LOWERED_RUN = re.compile(f"[{''.join(_RAISED)}]+"), re.compile(f"[{''.join(_LOWERED)}]+")

_DOUBLED = re.compile(r"\\\\(?=(?:[dtc]?frac|sqrt|text|math|pi|cdot|times|left|right|circ|boxed|begin)(?![a-z]))")
_SPACE = re.compile(r"(?<!\\)(?:\\[,;: >]|\\q?quad(?![a-z])|~(?!\d)|(?<!\d)~)")
_MATH_MARK = re.compile(r"(?<!\\)\\[()\[\]]")
_SWITCH = re.compile(
    r"\\(?:(?:display|text|script)style|(?:tiny|scriptsize|footnotesize|small|normalsize|[lL]arge|LARGE|[hH]uge)"
    r"|(?:rm|bf|it|sf|tt|bfseries|itshape|boldmath|limits|nolimits|strut)|[bB]igg?[lrm]?)(?![a-zA-Z])\s*"
)
_SIDE = re.compile(r"\\(?:left|right)(?![a-z])\s*(?:\.(?!\d))?")
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|md|up)?|math(?:bf|it|rm|sf|tt|normal)|mbox|hbox|ce|boxed|fbox|emph|underline"
    r"|boldsymbol|bm|ensuremath|phantom|(?:text)?color\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}(?=\s*\{))\s*\{"
)
_COLOR_SWITCH = re.compile(r"\\color\s*\{[^{}]*\}")
_FRACTION = re.compile(r"\\(?:[dtc]frac|[sn]frac|nicefrac)(?![a-z])")
_OVER = re.compile(r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}")
_SIMPLE_OVER = re.compile(r"^([^{}=,]*)\\over(?![a-z])([^{}=,]*)$")
_DEGREE = re.compile(r"\s*(?:\^ ?\{? ?\\circ(?![a-z]) ?\}?|\\degree(?![a-z])|\\textdegree(?![a-z]))\s*")
_RELATIONS = (
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"(?<=\d) !"), "!"),
    (re.compile(r"\+ ?/ ?-|\+-(?=\s*\d)"), r"\\pm "),
)
_SAME = (
    (re.compile(r"\\(?:leqslant|leqq|leq)(?![a-z])"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geqq|geq)(?![a-z])"), r"\\ge "),
    (re.compile(r"\\neq(?![a-z])|\\not\s*="), r"\\ne "),
    (re.compile(r"\\lt(?![a-z])"), "<"),
    (re.compile(r"\\gt(?![a-z])"), ">"),
    (re.compile(r"\\varnothing(?![a-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\lbrace(?![a-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-z])"), r"\\}"),
    (re.compile(r"\\(?:lg)(?![a-z])"), r"\\log_{10}"),
    (re.compile(r"\\(?:dots|cdots|dotsc)(?![a-z])"), r"\\ldots "),
    (re.compile(r"\\(?:ast)(?![a-z])"), "*"),
    (re.compile(r"\\(?:mid|vert|lvert|rvert)(?![a-z])"), "|"),
    (re.compile(r"\\(?:colon)(?![a-z])"), ":"),
    (re.compile(r"\\langle(?![a-z])"), "("),
    (re.compile(r"\\rangle(?![a-z])"), ")"),
    (re.compile(r"\\backslash(?![a-z])"), r"\\setminus "),
    (re.compile(r"\\surd(?![a-z])"), r"\\sqrt "),
    (re.compile(r"\\bigtriangleup(?![a-z])"), r"\\triangle "),
    (re.compile(r"\\rightarrow(?![a-z])"), r"\\to "),
    (re.compile(r"\\p?mod\s*\{(\w+)\}"), r"(mod \1)"),
    (re.compile(r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"\\var(epsilon|phi|theta|rho|sigma)(?![a-z])"), r"\\\1 "),
    (re.compile(r"\\log_\{?e\}?(?![a-z])"), r"\\ln "),
    (re.compile(r"\\(?:therefore|because)(?![a-z])|&(?=\s*=)|\\(?=[&#_])"), ""),
    (re.compile(r"\A(?:\s*\\\\)+(?=[\s\d])|(?:\\\\\s*)+\Z"), ""),
    (re.compile(r"\\sim(?:eq)?(?![a-z])|\\thickapprox(?![a-z])"), r"\\approx "),
    (re.compile(r"\\operatorname\*?\s*\{(sin|cos|tan|log|ln|exp|arcsin|arccos|arctan)\}"), r"\\\1 "),
    (re.compile(r"\\(?:overline|overrightarrow|overleftrightarrow|vec|widehat|bar)\s*\{\s*([A-Z]{2,4})\s*\}"), r"\1"),
)
# "x**2", "sqrt(2)", "pi/2", "inf"
_PROGRAM = (
    (re.compile(r"(?<=[\w)\]}])\s?\*\*\s?(?=[\w({\\+-])"), "^"),
    (re.compile(r"(?<![a-zA-Z\\])sqrt(?=\s*[({\d])"), r"\\sqrt"),
    (re.compile(r"(?<![a-zA-Z\\])cbrt(?=\s*[({\d])"), r"\\sqrt[3]"),
    (
        re.compile(
            r"(?<![a-zA-Z\\])(exp|ln|log|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan)(?![a-zA-Z\d])"
            r"(?=\s*[({\\_]|\s*\d|\s+[a-z](?![a-z]))"
        ),
        r"\\\1",
    ),
    (re.compile(r"(?<![a-zA-Z\\])abs\s*\(([^()]*)\)"), r"|\1|"),
    (re.compile(r"(?<![a-zA-Z\\])frac(?=\{)"), r"\\frac"),
    (re.compile(r"(?<![a-zA-Z\\])a(sin|cos|tan)(?=\s*\()"), r"\\arc\1"),
    (re.compile(r"(?<![a-zA-Z\\])ln(?=\d)"), r"\\ln "),
    (re.compile(r"(?<![a-zA-Z])C_\{?(\w+)\}?\^\{?(\w+)\}?(?!\w)"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?<=[\d*)])\s?\*?\s?I(?![a-zA-Z])"), "i"),
    (re.compile(r"\^ ?\( ?(-?\w+) ?\)"), r"^{\1}"),
    (re.compile(r"(?<=[A-Z]) ?// ?(?=[A-Z])"), r"\\parallel "),
    (re.compile(r"(?<![\^_\w}])\{(\d+)\} ?/ ?\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"(?<=[\d)}\]])\s*[或和及]\s*(?=[-\d(\[\\a-z])"), r", "),
    (re.compile(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"(?<![a-zA-Z\\])(?:inf|infinity|oo)(?![a-zA-Z])", re.IGNORECASE), r"\\infty "),
)
_ROOT = re.compile(r"\\sqrt\s*(\[\d+\])?\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[a-z](?![a-z])))")
_PERCENT = re.compile(r"\s*\\?%|(?<=[\d} ])\s*(?:percent|per cent|pct)\b\.?(?! ?age)", re.IGNORECASE)
_EMPTY = re.compile(r"(?<!\\)\{\s*\}")


@functools.lru_cache(4096)
def normalize(text: str) -> str:
    r"""`text` in one spelling: no wrappers, sizes, colours, math marks or final period; ASCII digits and signs; single
    spaces; `\frac`, `\le`, `^\circ` for their synonyms. A currency's dollar stays, math's dollars go."""
    if not text.isascii():
        text = _ascii(text)
    if "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    text = text.replace("{,}", ",").replace(r"\!", "")
    text = _undollared(text)
    if "\\" in text:
        text = _one_latex(text)
    text = re.sub(r"\.{3,}", r"\\ldots ", text)
    for pattern, new in _RELATIONS:
        text = pattern.sub(new, text)
    text = _PERCENT.sub("%", text)
    text = " ".join(_SPACE.sub(" ", text).split())
    text = _trimmed(text)
    for pattern, new in _PROGRAM:
        text = pattern.sub(new, text)
    if "sqrt" in text:
        text = _ROOT.sub(lambda root: rf"\sqrt{root[1] or ''}{{{root[2] or root[3] or ''}}}", text)
    text = _trimmed(" ".join(text.split()))
    return "" if set(text.replace("\\ldots", "")) <= set("$.,;:*% ") else text


def _ascii(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    text = _RAISED_RUN.sub(lambda run: _script("^", "".join(_RAISED[c] for c in run[0])), text)
    text = _LOWERED_RUN.sub(lambda run: _script("_", "".join(_LOWERED[c] for c in run[0])), text)
    text = text.translate(_TABLE)
    return "".join(c if c.isascii() else _character(c) for c in text)


def _script(mark: str, text: str) -> str:
    return mark + (text if len(text) == 1 else f"{{{text}}}")


def _character(character: str) -> str:
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    kind, _, parts = unicodedata.decomposition(character).partition(" ")
    if kind == "<fraction>":  # "¾"
        top, _, bottom = "".join(chr(int(code, 16)) for code in parts.split()).partition("⁄")
        return rf"\frac{{{top}}}{{{bottom}}}" if bottom else character
    if kind == "<circle>" or "\u3300" <= character <= "\u33ff":  # "②", "Ⓑ", "㎡"
        return unicodedata.normalize("NFKC", character)
    return character


def _undollared(text: str) -> str:
    r"""Without math's dollars. One of a currency stays, as "$": `\$5`, "$5", "US$ 500"."""
    text = text.replace(r"\$", "\0").replace("$$", "$")
    count = text.count("$")
    math = count % 2 == 0 and not re.search(r"\$\s?\d[^$]*\$\s?\d", text)
    if math:
        text = text.replace("$", " " if count > 2 else "")
    return text.replace("\0", "$")


def _one_latex(text: str) -> str:
    text = _MATH_MARK.sub(" ", text)
    text = _SIDE.sub("", _SWITCH.sub("", text))
    text = _unwrapped(text)
    text = _COLOR_SWITCH.sub("", text)
    text = _FRACTION.sub(r"\\frac", text)
    for _ in range(3):
        text = _OVER.sub(_fraction, text)
    text = _SIMPLE_OVER.sub(_fraction, text)
    text = _DEGREE.sub(r"^\\circ ", text)
    for pattern, new in _SAME:
        text = pattern.sub(new, text)
    return _EMPTY.sub(" ", text)


def _fraction(over: re.Match) -> str:
    return rf"\frac{{{over[1].strip()}}}{{{over[2].strip()}}}"


def _unwrapped(text: str) -> str:
    r"""Without `\text{...}` and its kin, whose contents stay."""
    start = 0
    while match := _WRAPPER.search(text, start):
        end = closing(text, match.end())
        if end is None:
            start = match.end()
            continue
        inner = text[match.end() : end.start()]
        before, after = text[: match.start()], text[end.end() :]
        joined = bool(re.search(r"\\[a-zA-Z]+\Z", before)) and inner[:1].isalpha()
        text = before + " " * joined + inner + after
        start = match.start()
    return text


def _trimmed(text: str) -> str:
    """Without bold marks, bare braces around the whole, and what ends a sentence."""
    while True:
        stripped = text.strip("* `").rstrip(
            ".,;: !！" if not text.endswith("!") or not _is_factorial(text) else ".,;: "
        )
        if stripped.endswith(")") and "(" not in stripped and "[" not in stripped:
            stripped = stripped[:-1]
        if stripped.startswith('"') and stripped.endswith('"') and stripped.count('"') == 2:
            stripped = stripped[1:-1]
        if stripped.startswith("{") and (end := closing(stripped, 1)) and end.end() == len(stripped):
            stripped = stripped[1:-1]
        if stripped == text:
            return text
        text = stripped


def _is_factorial(text: str) -> bool:
    """Whether what the mark at the end stands behind is no word."""
    return not re.search(r"(?:(?<![\\a-zA-Z])[A-Za-z]{2,}|[\u4e00-\u9fff])[!！ ]+\Z", text)


# ------------------------------------------------------------------------------------------------ words

_LONG_WORD = re.compile(r"[^\W\d_]{3,}")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-zA-Z*]+\}|\\[a-zA-Z]+")
_WORDS = re.compile(r"[^\W\d_]+(?:(?: ?[,;&/] ?|[ '\-])[^\W\d_]+)*")
_ARTICLE = re.compile(r"\A(?:the (?=\w)|an? (?=\w{2}))")
_INITIALS = re.compile(r"(?<=\b[A-Z])/(?=[A-Z]\b)|(?<=\bn)/(?=a\b)")  # "N/A"
_POINT = re.compile(r"(?<=[^\W\d_])\.(?=[^\W\d_]|\s|\Z)")


def words(text: str) -> tuple[str, ...] | None:
    """The case-folded words of a normalized answer that is made of nothing else ("(B)", "top-left"), or None.

    Without a leading article and the points of abbreviations; "," stands between the items of a list, for "and" too.
    """
    if re.search(r"(?<![^\W\d_])[^\W\d_]!", text):
        return None  # a factorial
    text = _INITIALS.sub("", text).replace("{", "").replace("}", "").strip('()[]<>"`*.,:;!? ').casefold()
    if text.startswith("'") and text.endswith("'"):
        text = text[1:-1]
    text = _ARTICLE.sub("", _POINT.sub("", text), count=1).strip(' "')
    if not _WORDS.fullmatch(text):
        return None
    items = [tuple(filter(None, re.split(r"[ /\-]+", item))) for item in re.split(r" ?[,;&] ?(?:and )?| and ", text)]
    parts = [word.replace("'", "") for item in items for word in (*item, ",")][:-1]
    if len(parts) > 1 and all(len(part) == 1 for part in parts):
        return None if "-" in text or "/" in text else tuple(parts)  # x-y is a difference
    return tuple(parts)


def long_words(text: str) -> set[str]:
    """Words of three letters and more that are no LaTeX commands: text such as "apples", not a product of symbols."""
    return set(_LONG_WORD.findall(_COMMAND.sub(" ", text).casefold()))
