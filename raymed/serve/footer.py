"""A footer below a picture that a model has made: RESEARCH USE ONLY, model, version, what lies over the image.

It is part of the picture, so that it is seen wherever the picture goes.
"""

from textwrap import wrap
from typing import Any

import numpy as np

RESEARCH_ONLY = "RESEARCH USE ONLY"
_SMALLEST = 384
"""Pixels across; a smaller picture is enlarged, so that its footer can be read."""
_ABOUT = "where the network looks, no evidence of a finding"


def marked(
    picture: np.ndarray, model: str, version: str, method: str, research_only: bool, finding: str = ""
) -> np.ndarray:
    """(H, W, 3) uint8 -> the same, `times` larger, above its footer. method: how what lies over the image was made.
    finding: what it shows; "" of a heat map."""
    several = times(picture.shape[1])
    enlarged = picture.repeat(several, axis=0).repeat(several, axis=1)
    lines = [f"{model} {version}, {method}", f"where the model sees: {finding}" if finding else _ABOUT]
    return np.concatenate([enlarged, _footer(enlarged.shape[1], [RESEARCH_ONLY] * research_only + lines)])


def times(width: int) -> int:
    """How much larger a picture is drawn."""
    return -(-_SMALLEST // width)


def _footer(width: int, lines: list[str]) -> np.ndarray:
    """A black strip with the lines; those that are too long for it go on below."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(width // 28)
    columns = int((width - 8) / font.getlength("m"))
    text = "\n".join(part for line in lines for part in _wrapped(line, columns, width - 8, font))
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    height = int(measure.multiline_textbbox((0, 0), text, font, spacing=4)[3]) + 8
    strip = Image.new("RGB", (width, height))
    ImageDraw.Draw(strip).multiline_text((4, 2), text, "white", font, spacing=4)
    return np.asarray(strip)


def _wrapped(line: str, columns: int, width: int, font: Any) -> list[str]:
    return [line] if font.getlength(line) <= width else wrap(line, columns)
