"""Pictures for people: stored images side by side."""

from __future__ import annotations

import math

import numpy as np


def grid(images: np.ndarray, *, levels: int = 256, columns: int | None = None) -> np.ndarray:
    """Stored images [N, C, H, W] as one picture, uint8 [H', W'] or [H', W', 3], enlarged to be seen.

    Whole multiples only, so that every pixel stays a square.
    """
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
