"""Small pictures inside a page."""

import base64
import io
from typing import NamedTuple

import PIL.Image

SIDE = 320  # pixels of the longer side; larger images are scaled down
MOST = 4  # of one prompt


class Picture(NamedTuple):
    """An image as the macro `pictures` of templates/macros.html shows it, or what is wrong with it."""

    title: str = ""
    source: str = ""  # data URI
    width: int = 0  # pixels on the page
    enlarged: bool = False
    trouble: str = ""


def embedded(image: PIL.Image.Image, title: str, side: int = SIDE) -> Picture:
    """The image, shrunk in place to at most `side` pixels; JPEG where it is large enough to be a photo."""
    image.thumbnail((side, side))
    photo = image.mode == "RGB" and max(image.size) > 128
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if photo else "PNG", **({"quality": 80} if photo else {"optimize": True}))
    data = base64.b64encode(buffer.getvalue()).decode()
    enlarge = max(1, 160 // max(image.size))  # whole times, so that small pictures stay sharp
    return Picture(title, f"data:image/{'jpeg' if photo else 'png'};base64,{data}", image.width * enlarge, enlarge > 1)
