r"""LaTeX whose backslash JSON ate: "\frac" with one backslash is a form feed and "rac" to every JSON reader.

Repaired is what can be nothing else: a control character whose letters make a LaTeX command and no word of their own.
"""

from __future__ import annotations

import re

from capcur_jax.data.problem import BadRow, short

# By control character: what is left of commands behind it, and of those the ones that may be text behind white space.
_LETTER = {"\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_CERTAIN = {
    "\b": "ar egin eta ecause ig igcap igcup igl igr inom mod oldsymbol ot owtie ox oxed oxtimes ullet",
    "\f": "box lat orall rac rown",
    "\n": "abla eg eq geq leq ot otin subseteq",
    "\r": "ceil ho ight ightarrow ightharpoonup moustache",
    "\t": "anh au binom frac heta herefore hickapprox ilde imes extbf extit extrm extsf extstyle exttt riangle "
          "riangleq woheadrightarrow",
}  # fmt: skip
_BRACED = {"\t": "ext ag", "\b": "f", "\r": "m", "\n": "ewcommand"}  # commands where a brace follows
_UNCERTAIN = {"\n": "e u i exists less mid parallel subset", "\r": "angle floor m", "\t": "an o op iny"}
_LOST = re.compile(r"([\b\f\n\r\t])([A-Za-z]+)(?=(\s*\{)?)")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_CERTAIN_OF, _BRACED_OF, _UNCERTAIN_OF = (
    {control: frozenset(rests.split()) for control, rests in table.items()} for table in (_CERTAIN, _BRACED, _UNCERTAIN)
)


def restored(text: str, key: str, gold: bool = False) -> str:
    r"""The text with its backslashes back.

    Args:
      key: of the row, for messages.
      gold: whether it is an answer: there no doubt is left standing.

    Raises:
      BadRow: there are signs of a lost backslash that can't be repaired for certain; a gold holds a control character.
    """
    if not any(control in text for control in _LETTER) and not (gold and _CONTROL.search(text)):
        return text
    doubtful: list[str] = []

    def back(match: re.Match) -> str:
        control, rest, brace = match[1], match[2], match[3]
        if rest in _CERTAIN_OF[control] or (brace and rest in _BRACED_OF.get(control, ())):
            return f"\\{_LETTER[control]}{rest}"
        if control == "\b" or rest in _UNCERTAIN_OF.get(control, ()) or (gold and control == "\f"):
            doubtful.append(f"\\{_LETTER[control]}{rest}")
        return match[0]

    found = _LOST.sub(back, text)
    # White space before a word is only white space, unless the text has lost other backslashes.
    if doubtful and (gold or found != text or any(lost[1] == "b" for lost in doubtful)):
        detail = f"`{key}` may have lost the backslash of {short(doubtful[0])}; in JSON write it as two backslashes"
        raise BadRow("lost backslash" if gold else "lost backslash or line break", detail)
    if gold and _CONTROL.search(found):
        raise BadRow("control character", f"`{key}` holds a control character; write the text anew")
    return found
