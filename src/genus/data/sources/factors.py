"""Shapes whose factors are known: what a code has in common with each factor can be measured.

Drawn here after the idea of dSprites (Matthey et al. 2017; Higgins et al. 2017, "beta-VAE", section 4.2): a shape, its
scale, its rotation, and where it is, each independent of the others, and every combination once: 14,112 images. Unlike
there no rotation of a shape looks like another one, so that a code can tell all five factors; and shapes move twice as
far across as down. Where two factors can be exchanged any mixture of them is as good a code as they are (Rolinek et al.
2019, arXiv:1812.06775: codes follow principal directions), and no model could be blamed for it.
An image is uint8 [1, 28, 28]: the share of each pixel that the shape covers, of 255.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from genus.config import Section
from genus.data.sources import About, Example
from genus.data.spec import DataSpec

SHAPES = ("rectangle", "ellipse", "heart")
SIZES = {"shape": len(SHAPES), "scale": 6, "rotation": 8, "x": 14, "y": 7}  # values of each factor: 0 … size - 1
COUNT = math.prod(SIZES.values())
SIDE, PATCH, TOP = 28, 15, 3  # pixels a side of an image and of the patch a shape turns in, and above the highest one
SCALES = (0.6, 1.0)  # from the least to the greatest
TURN = math.pi / 4  # the most, either way
FINE = 16  # points a side at which a pixel is tried
SAID = "shapes with known factors"  # of an ingested data set


class Factors(Section):
    """``count`` of the combinations, in an order drawn by ``seed``; ``test``: share of them that is the test split."""

    count: int = Field(COUNT, gt=0, le=COUNT)
    seed: int = Field(0, ge=0)
    test: float = Field(0.1, gt=0, lt=1)

    def about(self) -> About:
        return About(
            spec=DataSpec((1, SIDE, SIDE), classes=SHAPES),
            licence="CC0 1.0",
            source=SAID,
            count=self.count,
            test=self.test,
        )

    def examples(self) -> Iterator[Example]:
        chosen = np.random.default_rng(self.seed).permutation(COUNT)[: self.count]
        for row in np.stack(np.unravel_index(chosen, tuple(SIZES.values())), 1):
            shape, scale, rotation, x, y = row.tolist()
            origin = f"{SHAPES[shape]}, scale {scale}, rotation {rotation}, at {x}, {y}"
            yield Example("train", render(row[None])[0], shape, origin)


def draw(n: int, *, seed: int) -> np.ndarray:
    """Values of the factors in the order of ``SIZES``, independent and uniform: int64 [n, 5], the same by ``seed``."""
    return np.random.default_rng(seed).integers(tuple(SIZES.values()), size=(n, len(SIZES)))


def render(values: np.ndarray) -> np.ndarray:
    """The images that factors [N, 5] describe: uint8 [N, 1, 28, 28], x to the right and y downwards.

    Shapes move by whole pixels. Raises IndexError for values that a factor does not have.
    """
    images = np.zeros((len(values), 1, SIDE, SIDE), np.uint8)
    for image, (shape, scale, rotation, x, y) in zip(images[:, 0], values.tolist(), strict=True):
        if not (0 <= x < SIZES["x"] and 0 <= y < SIZES["y"]):
            raise IndexError(f"a shape at {x}, {y}: places are 0 to {SIZES['x'] - 1} and 0 to {SIZES['y'] - 1}")
        image[TOP + y : TOP + y + PATCH, x : x + PATCH] = _patches()[shape, scale, rotation]
    return images


def known(description: dict[str, Any]) -> bool:
    """Whether an ingested data set is of this source, by what its dataset.json says."""
    return description["source"] == SAID


@functools.cache
def _patches() -> np.ndarray:
    """Each shape at each scale and rotation: uint8 [shapes, scales, rotations, 15, 15]."""
    middles = (np.arange(PATCH * FINE) + 0.5) * 2 / (PATCH * FINE) - 1  # of points over [-1, 1]
    y, x = np.meshgrid(-middles, middles, indexing="ij")  # upwards here, as formulas have it
    patches = np.empty((*tuple(SIZES.values())[:3], PATCH, PATCH), np.uint8)
    for i, scale in enumerate(np.linspace(*SCALES, SIZES["scale"])):
        for j, angle in enumerate(np.linspace(-TURN, TURN, SIZES["rotation"])):
            along = (math.cos(angle) * x + math.sin(angle) * y) / scale
            across = (math.cos(angle) * y - math.sin(angle) * x) / scale
            for k, inside in enumerate(_inside(along, across)):
                share = inside.reshape(PATCH, FINE, PATCH, FINE).mean((1, 3))
                patches[k, i, j] = (255 * share).round()
    return patches


def _inside(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Whether points lie in each shape, in the order of ``SHAPES``; all shapes lie in the unit disc."""
    rectangle = (np.abs(x) <= 0.8) & (np.abs(y) <= 0.4)
    ellipse = (x / 0.95) ** 2 + (y / 0.475) ** 2 <= 1
    u, v = 1.45 * x, 1.45 * y + 0.1  # the heart's sextic curve, whose farthest point is 1.43 from its origin
    heart = (u**2 + v**2 - 1) ** 3 <= u**2 * v**3
    return rectangle, ellipse, heart


Source = Factors
