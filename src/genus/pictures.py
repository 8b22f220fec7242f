"""Pictures for people: stored images side by side, and documents on a page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np

SIZE, LINE, MARGIN = 15, 20, 16  # pixels of a page: letters, from line to line, around
COLUMNS, LONGEST = 96, 8  # letters a line, lines a document


def grid(images: np.ndarray, *, levels: int = 256, columns: int | None = None) -> np.ndarray:
    """Stored images [N, C, H, W] as one picture, uint8 [H', W'] or [H', W', 3], enlarged to be seen.

    Whole multiples only, so that every pixel stays a square. Pairs of numbers [N, 2, 1, 1] are points of a plane.
    """
    if images.shape[1:] == (2, 1, 1):
        return plane(images, levels=levels)
    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    images = (images.astype(np.uint16) * 255 // (levels - 1)).astype(np.uint8)
    sheet = np.zeros((rows * columns, channels, height, width), np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    picture = sheet.reshape(rows * height, columns * width, channels)
    zoom = max(1, 56 // height)
    picture = picture.repeat(zoom, 0).repeat(zoom, 1)
    return picture[..., 0] if channels == 1 else picture[..., :3]


def plane(points: np.ndarray, *, levels: int = 256) -> np.ndarray:
    """Stored pairs [N, 2, 1, 1] as how many lie in each cell, uint8 [H, W]: x to the right, y upwards."""
    x, y = points[:, :, 0, 0].astype(np.int64).T
    count = np.bincount(levels * x + y, minlength=levels**2).reshape(levels, levels).T[::-1]
    zoom = max(1, 256 // levels)
    return (count * 255 // max(1, count.max())).astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)


def page(documents: Sequence[str]) -> np.ndarray:
    """Documents as one picture of a printed page, uint8 [H, W], dark on white; long ones end in an ellipsis.

    Symbols that Pillow's own font lacks are boxes; so are control characters.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(SIZE)
    lines: list[str] = []
    for document in documents:
        shown = [part for line in document.splitlines() or [""] for part in textwrap.wrap(line, COLUMNS) or [""]]
        cut = [*shown[: LONGEST - 1], f"{shown[LONGEST - 1][: COLUMNS - 2]} …"] if len(shown) > LONGEST else shown
        lines += [*("".join(c if c.isprintable() else "\ufffd" for c in line) for line in cut), ""]
    width = 2 * MARGIN + max((math.ceil(font.getlength(line)) for line in lines), default=0)
    image = Image.new("L", (max(width, 640), 2 * MARGIN + LINE * max(1, len(lines) - 1)), 255)
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + LINE * number), line, fill=24, font=font)
    return np.asarray(image)
