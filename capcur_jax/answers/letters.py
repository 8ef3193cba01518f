"""Letters of multiple-choice questions: the options of a question, and the letter, or letters, that a reply names.

The one reader for the reward, the perception filter and evaluation.
"""

from __future__ import annotations

import re
import unicodedata

LETTERS = "ABCDEFGHIJ"  # that options may have
_LONGEST = 1000  # characters that are looked at; a reply of a few tokens has fewer
_WORD = r"A-Za-z0-9\u00c0-\u024f\u0370-\u052f"  # not Chinese or Japanese characters: they need no space before a letter
# Not in a word, and no term of a formula or beginning of an equation ("A + B", "C = 5").
_ALONE = (
    rf"(?<![{_WORD}^\\])(?<![{_WORD})}}]_)(?<![{_WORD}][-'’])(?<!\d )([A-Za-z])"
    rf"(?![{_WORD}+#^]|_[{_WORD}{{]|['’-][{_WORD}]|\s*[+=^<>≤≥×·]\s*[{_WORD}\\(]|-\Z|\s?\*\s?[{_WORD}])"
)
_CANDIDATE = re.compile(_ALONE)
_OPEN, _CLOSE = r"[\s(\[{<*_\"'`“‘$]*", r"[\s)\]}>*_\"'`”’$]*"
_MARK = r"\s?[.):\]、．：）】]"
_FIRST_TWO = re.compile(rf"[Aa]{_MARK}"), re.compile(rf"[Bb]{_MARK}")  # a quick look: most questions have no options
_OPTION = re.compile(r"(?<![A-Za-z0-9_])[(（\[【]?(?P<letter>[A-Za-z])\s?[.):\]、．：）】]\**[ \t]*(?=\S)")

# What may stand before a letter that is the answer, besides nothing.
_KEYWORD = re.compile(
    r"(?:\b(?:answers?|options?|choices?|letters?|correct|right|is|be|choose|select|pick)|\b(?:it|that)['’]s|答案(?:是|为)?|选项?|选择|是"
    r"|\\boxed|\\text)\s*[:：=→]?" + _OPEN + r"\Z|[:：=→]" + _OPEN + r"\Z",
    re.IGNORECASE,
)
_SENTENCE = re.compile(rf"[.!?。！]\s+{_OPEN}\Z")
_LINE = re.compile(rf"\n{_OPEN}\Z")
_NOTHING = re.compile(rf"{_OPEN}\Z")
# What may stand after it.
_END = re.compile(r"\W*\Z")
_LABEL = re.compile(r"[*_]*[.):、]")
_DENIED = re.compile(
    r"[\s,]+(?:(?:is|was|can)(?:\s+not\b|n['’]t\b|not\b)|(?:is|was)\s+(?:wrong|incorrect|false)\b)", re.IGNORECASE
)
_WORDY = re.compile(r" +(?!(?:is|was|because|since|as)\b)[^\W\d_]{2,}")
_NEGATED = re.compile(r"\bnot\b|n['’]t\b|不|非|\bexcept\b", re.IGNORECASE)
_JOINED = re.compile(
    rf"{_CLOSE},?\s*(?:(?:or|and|nor|not|vs)\b|[或和及与∪?]|-+>|→)|{_CLOSE}[,;/&|]?{_OPEN}(?:(?:or|maybe|perhaps)\s+)*{_ALONE}",
    re.IGNORECASE,
)
# "A" (and "I") before a word is an article, unless the word says something of the letter itself.
_NOUN = re.compile(r"[ \t]+(?!(?:or|and|nor|is|was|because|since|as|but|if|vs|not)\b)[^\W\d_]{2}")
_PAIRS = {"(": ")", "[": "]", "{": "}", ">": "<", "*": "*", "_": "_", '"': '"', "'": "'", "`": "`", "“": "”", "$": "$"}


def letter_in(text: str, letters: str = "ABCD") -> str | None:
    """The letter, in upper case, that `text` gives as its answer.

    "B", "(b)", "B.", "**B**", "Answer: B", "The answer is B", "B. red", "\\boxed{B}" name B. A letter counts at the
    start, after words like "answer" and "option", and in brackets; not inside a sentence ("vitamin C"), not as an
    article ("A cat is ...") and not where it is denied. Lower case counts only where it can't be a word of a sentence.
    None where no letter counts, or where there is a choice of several ("A or B", "(A), (C)").
    """
    text = unicodedata.normalize("NFKC", text.rpartition("</think>")[2].strip()[:_LONGEST]).strip()
    found: set[str] = set()
    for match in _CANDIDATE.finditer(text):
        letter = match[1].upper()
        before, after = text[: match.start()], text[match.end() :]
        if letter not in letters.upper() or not _counts(match[1], before, after) or _DENIED.match(after):
            continue
        joined = _JOINED.match(after)
        if joined and (joined[1] or "").upper() != letter and not _is_article(joined[1], after[joined.end() :]):
            return None
        found.add(letter)
    return found.pop() if len(found) == 1 else None


def boxed_letter(text: str, letters: str) -> str | None:
    """`letter_in` of an answer that should be a letter and little more: "B", "(B) 5", not "P(B)", "5 (B)", "B cat"."""
    letter = letter_in(text, letters)
    if letter is None:
        return None
    for match in _CANDIDATE.finditer(text):
        before = text[: match.start()]
        if match[1].upper() == letter and (_NOTHING.fullmatch(before) or _KEYWORD.search(before)):
            after = " " + text[match.end() :].lstrip(")]} ")
            wordy = _WORDY.match(text, match.end())
            return None if _NEGATED.search(before) or _DENIED.match(after) or wordy else letter
    return None


def _counts(letter: str, before: str, after: str) -> bool:
    """Whether a letter that stands alone is given as an answer, by what is around it."""
    enclosed = bool(before) and bool(after) and _PAIRS.get(before[-1]) == after[0]
    first, last = bool(_NOTHING.fullmatch(before)), bool(_END.match(after))
    if letter.islower():
        whole = last and (first or bool(re.search(r"\b(?:answer|option)\s*[:：]\s*\Z", before, re.IGNORECASE)))
        return whole or (enclosed and before[-1] in "([{") or (first and bool(_LABEL.match(after)))
    if enclosed:
        return True
    if _is_article(letter, after):
        return False
    own_line = bool(_LINE.search(before)) and (last or bool(_LABEL.match(after)))
    return first or bool(_KEYWORD.search(before)) or own_line or (last and bool(_SENTENCE.search(before)))


def _is_article(letter: str | None, after: str) -> bool:
    """Whether it begins "A cat", "I think"."""
    return letter in ("A", "I") and bool(_NOUN.match(after))


def options_of(text: str) -> dict[str, str]:
    """The options of a multiple-choice question, letter -> its whole text: the longest run A, B, ... in the text.

    An option ends where the next one begins, the last one at the end of its line.
    """
    run = _labels(text)
    ends = [match.start() for match in run[1:]]
    last = text.find("\n", run[-1].end()) if run else -1
    ends.append(len(text) if last < 0 else last)
    texts = [text[match.end() : end].strip().rstrip(",;，；").strip() for match, end in zip(run, ends, strict=False)]
    return {match["letter"].upper(): text for match, text in zip(run, texts, strict=True)}


def option_starts(text: str) -> list[int]:
    """Where each option of `options_of` begins in the text, at its letter or the bracket before it."""
    return [match.start() for match in _labels(text)]


def _labels(text: str) -> list[re.Match]:
    longest: list[re.Match] = []
    run: list[re.Match] = []
    if not all(label.search(text) for label in _FIRST_TWO):
        return []
    for match in _OPTION.finditer(text):
        letter = match["letter"].upper()
        if letter == "A":
            run = []
        elif ord(letter) != ord("A") + len(run):
            continue
        run.append(match)
        longest = max(longest, run, key=len).copy()
    return longest if len(longest) > 1 else []


def option_letters(problem: str) -> str:
    """The letters of a problem's options, "ABCD" where it lists none."""
    return "".join(options_of(problem)) or "ABCD"


def letters_of(text: str) -> tuple[str, ...]:
    """The different letters that a text consists of: of "ACD", "A, C and D", "(A), (C)"; () where it holds more.

    Joined letters are a list of choices only in the order of the alphabet: CAD is a word, ACD are three letters.
    """
    text = unicodedata.normalize("NFKC", text).replace("、", ",").replace("和", ",").strip(" .,;[](){}\"'")
    text = re.sub(r"['\"\[\]{}]", "", text)
    if re.fullmatch("[A-Z]{2,10}", text) and list(text) == sorted(set(text)):
        return tuple(text)
    parts = re.split(r"(?: ?[,;] ?(?:and |or )?| and | & | )", text)
    parts = [re.sub(r"\A\(?([A-Z])[).]?\Z", r"\1", part) for part in parts]
    if len(parts) < 2 or len(set(parts)) < len(parts) or not all(re.fullmatch("[A-Z]", part) for part in parts):
        return ()
    return tuple(parts)
