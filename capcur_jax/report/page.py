"""HTML of `report.html`: the page's frame and style, and helpers that make untrusted text and odd numbers safe."""

import html
import math
import re
from collections.abc import Sequence
from typing import Any

MAX_CHARACTERS = 3000  # of one text; the middle of a longer one is left out

# Control characters, line separators, text-direction overrides, zero-width spaces and half surrogate pairs.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff0-\ufffb\ufffe\uffff]"
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str = "") -> str:
    """A table: `head` is text, `rows` are safe HTML already."""
    header = "".join(f"<th>{text(cell).replace('after ', 'after<br>', 1)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{name}"><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>'


def text(value: Any, limit: int | None = MAX_CHARACTERS) -> str:
    """Safe HTML text or attribute value: escaped, invisible characters visible, the middle of a long one left out."""
    shown = "" if value is None else str(value)
    if limit is not None and len(shown) > limit:
        left_out = len(shown) - limit
        head, tail = shown[: limit - limit // 3], shown[-(limit // 3) :]  # the answer is at the end
        shown = f"{head}\n[... {left_out:,} characters left out ...]\n{tail}"
    return html.escape(visible(shown))


def visible(text: str) -> str:
    """Invisible characters as escapes: they could hide text or turn its direction."""
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: Any, form: str, unit: str = "") -> str:
    """The formatted number, or "" where there is none."""
    return f"{value:{form}}{unit}" if is_number(value) else ""


def points(value: Any, base: Any) -> str:
    """Difference in percentage points as colored HTML."""
    if not (is_number(value) and is_number(base)):
        return ""
    difference = 100 * (value - base)
    color = "good" if difference > 0 else "bad" if difference < 0 else "even"
    return f'<span class="{color}">{difference:+.1f}</span>'


def duration(seconds: Any) -> str:
    """Seconds in words, or "" where there are none."""
    if not is_number(seconds):
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--panel:#f7f8fa;--ink:#1d2129;--dim:#667085;--rule:#d5dae1;
--good:#17803d;--goodbg:#e9f7ee;--bad:#c03221;--badbg:#fdeeec;--evenbg:#f1f3f6;
--c1:#2563c9;--c2:#d9730d;--c3:#1a8a5c;--c4:#8b46c4;--c5:#8a94a3;--c6:#c22f6b}
@media(prefers-color-scheme:dark){:root{--bg:#14171c;--panel:#1c2027;--ink:#e4e7ec;--dim:#98a2b3;--rule:#39414d;
--good:#5fd38a;--goodbg:#16301f;--bad:#ff8f80;--badbg:#3a1d1a;--evenbg:#232830;
--c1:#6ea3f7;--c2:#f2a154;--c3:#55c795;--c4:#bd8bea;--c5:#8d97a6;--c6:#f07fae}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1.25rem 4rem;max-width:1280px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;margin:.2rem 0;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2.4rem 0 .6rem;
border-bottom:1px solid var(--rule);padding-bottom:.25rem}h3{margin:1.6rem 0 .4rem}
.note,small,.tiles div,.stages small{color:var(--dim);font-size:.85rem}.note{margin:.3rem 0 .7rem}
.chip{white-space:nowrap;font-size:.8rem;font-weight:600;padding:.15rem .6rem;border-radius:1rem;vertical-align:middle}
.chip.good{background:var(--goodbg)}.chip.bad{background:var(--badbg)}
.good{color:var(--good)}.bad{color:var(--bad)}.even{color:var(--dim)}
.stages{margin:.2rem 0 1rem;font-weight:500}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem}.tiles div{background:var(--panel);border-radius:.5rem;padding:.5rem .9rem}
.tiles b{display:block;font-size:1.15rem;color:var(--ink)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .6rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th{max-width:8rem;overflow-wrap:break-word;font-size:.85rem;color:var(--dim);font-weight:600;white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0}
.headline td:first-child{font-weight:600}.headline td{font-size:1.02rem}
.lead{display:flex;flex-wrap:wrap;gap:1.5rem;align-items:center;overflow-x:auto}
.lead figure{flex:1 1 22rem;max-width:34rem}
.scroll{overflow-x:auto}.scroll td:nth-child(2),.scroll th:nth-child(2){text-align:left}
figure{margin:0}svg{width:100%;height:auto;display:block;overflow:visible;stroke-linejoin:round}
svg text{font-family:inherit!important}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(350px,1fr));gap:1.2rem 1.4rem}
article{display:flex;flex-wrap:wrap;gap:1rem;background:var(--panel);border-radius:.6rem;padding:.9rem;margin:.7rem 0}
.prompt{flex:1 1 15rem;min-width:0;max-width:21rem}.prompt img{display:block;max-width:100%;
border-radius:.3rem;margin:.3rem 0;background:#fff}.prompt p{margin:.3rem 0}
.prompt .enlarged{image-rendering:pixelated}
.responses{flex:3 1 24rem;min-width:0;display:grid;gap:.45rem;align-content:start}
.response{border-left:4px solid currentColor;border-radius:.25rem;padding:.35rem .7rem;background:var(--evenbg)}
.response.good{background:var(--goodbg)}.response.bad{background:var(--badbg)}
.response p{margin:0;font-size:.83rem}.response em{font-style:normal}.response pre,.prompt pre{color:var(--ink)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.25rem 0;unicode-bidi:isolate;
font:.87rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.response pre{max-height:22rem;overflow:auto}.prompt pre{font-family:inherit;font-size:.95rem}
.missing{color:var(--bad);border:1px dashed;border-radius:.3rem;padding:.5rem;font-size:.85rem;overflow-wrap:anywhere}
summary{cursor:pointer;font-weight:600;margin:.4rem 0}details:not(.period) pre{background:var(--panel);padding:.8rem;
border-radius:.5rem}footer{margin-top:3rem;color:var(--dim);font-size:.85rem}
@media print{details{break-inside:avoid}}
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{style}</style></head>
<body>
{body}
<footer>{footer}</footer>
</body></html>
"""
