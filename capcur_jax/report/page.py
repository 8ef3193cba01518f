"""The HTML pages of this room: templates/ filled in.

Their text is untrusted. Whatever a template shows passes `text` and is then escaped; what is HTML itself (a chart, the
piece of another macro) says so, by the filter `safe` where it stands.
"""

import pathlib
from typing import Any

import jinja2

from capcur_jax.records.text import is_number, number, visible

MAX_CHARACTERS = 3000  # of one text; the middle of a longer one is left out


def render(template: str, **values: Any) -> str:
    """A file of templates/ filled in. A name that it uses and that `values` lacks is an error."""
    return _TEMPLATES.get_template(template).render(values)


def text(value: Any, limit: int = MAX_CHARACTERS) -> Any:
    """Text to be shown: None is empty, invisible characters are visible, the middle of a long text is left out.

    HTML that jinja2 knows as such comes back as it is.
    """
    if hasattr(value, "__html__"):
        return value
    shown = "" if value is None else str(value)
    if len(shown) > limit:
        left_out = len(shown) - limit
        head, tail = shown[: limit - limit // 3], shown[-(limit // 3) :]  # the answer is at the end
        shown = f"{head}\n[... {left_out:,} characters left out ...]\n{tail}"
    return visible(shown)


def duration(seconds: Any) -> str:
    """Seconds in words, or "" where there are none."""
    if not is_number(seconds):
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


_TEMPLATES = jinja2.Environment(
    autoescape=True,
    finalize=text,
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).with_name("templates")),
)
_TEMPLATES.filters |= {"text": text, "number": number, "visible": visible}
_TEMPLATES.tests["finite"] = is_number
