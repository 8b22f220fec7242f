"""Points in the plane whose density is known: what a family learns of a density can be seen, and measured exactly.

The shapes are those that papers on flows and energies draw (Rezende & Mohamed 2015, arXiv:1505.05770, figure 3;
Grathwohl et al. 2019, FFJORD, arXiv:1810.01367, figure 2), each given here by a formula on the square [-4, 4]².
An example is an image of one place and two channels, uint8 [2, 1, 1]: x and y, each the number of one of ``levels``
equal cells of the side. So all kinds of model speak of the same thing, the probability of a cell of the square.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field

from genus.config import Section
from genus.data.sources import About, Example
from genus.data.spec import DataSpec
from genus.errors import UserError, nearest

SAID = "draws from a known density on a square: "  # of an ingested data set, before the shape's name
SIDE = 4.0  # the square is [-SIDE, SIDE]²
SHAPES = ("checkerboard", "eight_gaussians", "pinwheel", "rings", "spiral", "two_moons")

RADII, RING_WIDTH = np.array([1.0, 2.0, 3.0]), 0.2
ARMS, ARM_MEAN, ARM_LENGTH, ARM_WIDTH, TWIST = 5, 2.0, 0.4, 0.2, 0.5  # TWIST: radians a unit of radius


class TwoD(Section):
    """``count`` points of a shape, drawn by ``seed``; ``test``: share of them that becomes the test split."""

    shape: Literal["checkerboard", "eight_gaussians", "pinwheel", "rings", "spiral", "two_moons"]
    count: int = Field(20_000, gt=0)
    levels: int = Field(256, ge=2, le=256)
    seed: int = Field(0, ge=0)
    test: float = Field(0.1, gt=0, lt=1)

    def about(self) -> About:
        return About(
            spec=DataSpec((2, 1, 1), levels=self.levels),
            licence="CC0 1.0",
            source=SAID + self.shape,
            count=self.count,
            test=self.test,
        )

    def examples(self) -> Iterator[Example]:
        for number, point in enumerate(draw(self.shape, self.count, self.levels, self.seed)):
            yield Example("train", point, 0, f"point {number}")


def truth(shape: str, levels: int) -> np.ndarray:
    """The probability of every cell: float64 [levels (x), levels (y)], sums to 1.

    In closed form where each coordinate has one (checkerboard, mixtures of Gaussians), else by Gauss-Legendre
    quadrature, whose error is below 1e-9 a cell. Raises UserError for an unknown shape, ValueError for levels below 1.
    """
    _check(shape)
    if levels < 1:
        raise ValueError(f"levels must be at least 1, not {levels}")
    mass = _mass(shape, levels)
    return mass / mass.sum()


def density(shape: str, points: np.ndarray) -> np.ndarray:
    """The density at points [N, 2] of the plane, float64 [N]: 0 outside of the square, over which it integrates to 1.

    Raises UserError for an unknown shape.
    """
    _check(shape)
    points = np.asarray(points, np.float64)
    inside = (np.abs(points) <= SIDE).all(1)
    return np.where(inside, _plane(shape, points) / _inside(shape), 0.0)


def log_prob(shape: str, stored: np.ndarray, levels: int) -> np.ndarray:
    """The true log-probabilities of stored examples [N, 2, 1, 1], in nats: float64 [N], -inf where none can be.

    What a model's ``log_prob`` is to be compared with. Raises as ``truth`` does, and ValueError for examples of another
    shape or with levels that there are not.
    """
    if stored.shape[1:] != (2, 1, 1) or (len(stored) and stored.max() >= levels):
        raise ValueError(f"examples of shape {stored.shape[1:]}: right would be (2, 1, 1) and levels below {levels}")
    with np.errstate(divide="ignore"):
        return np.log(truth(shape, levels))[tuple(stored[:, :, 0, 0].astype(np.int64).T)]


def shape_of(description: dict[str, Any]) -> str | None:
    """The shape from which an ingested data set was drawn, by what its dataset.json says; None where from none."""
    shape = str(description["source"]).removeprefix(SAID)
    return shape if shape in SHAPES and description["source"] == SAID + shape else None


def draw(shape: str, n: int, levels: int, seed: int) -> np.ndarray:
    """``n`` examples, uint8 [n, 2, 1, 1], drawn from the table ``truth(shape, levels)`` itself. Same seed, same bytes.

    Raises UserError for an unknown shape, ValueError for levels that no byte can hold.
    """
    if levels > 256:
        raise ValueError(f"examples are bytes: levels must be at most 256, not {levels}")
    below = truth(shape, levels).ravel().cumsum()
    cells = np.searchsorted(below, np.random.default_rng(seed).random(n) * below[-1], side="right")
    return np.stack(np.divmod(cells, levels), 1).astype(np.uint8)[:, :, None, None]


def _check(shape: str) -> None:
    if shape not in SHAPES:
        raise UserError(f"unknown 2-D shape '{shape}': {nearest(shape, SHAPES)}")


def _mass(shape: str, levels: int) -> np.ndarray:
    """What each cell holds of the density on the plane: [levels, levels]."""
    edges = np.linspace(-SIDE, SIDE, levels + 1)
    if shape == "checkerboard":
        strips = np.linspace(-SIDE, SIDE, 5)
        ends = np.minimum(edges[1:, None], strips[1:]) - np.maximum(edges[:-1, None], strips[:-1])
        share = np.clip(ends, 0, None)  # [levels, 4]: length of each cell in each strip
        return share @ (_dark(4) / 32) @ share.T
    if (mixture := _mixture(shape)) is not None:
        from scipy.special import ndtr

        centres, deviation = mixture
        x, y = (np.diff(ndtr((edges[:, None] - centre) / deviation), axis=0) for centre in centres.T)
        return x @ y.T / len(centres)
    parts = levels * math.ceil(128 / levels)  # cells of 1/16 at most, a third of the finest detail
    nodes, weights = np.polynomial.legendre.leggauss(6)
    half = SIDE / parts
    side = (-SIDE + half * (2 * np.arange(parts)[:, None] + 1) + half * nodes).ravel()
    rows = [_plane(shape, np.stack(np.broadcast_arrays(x, side), 1)) for x in side]  # a row at a time: little memory
    fine = np.stack(rows) * np.outer(*[np.tile(half * weights, parts)] * 2)
    width = len(side) // levels
    return fine.reshape(levels, width, levels, width).sum((1, 3))


@functools.cache
def _inside(shape: str) -> float:
    """The share of the plane's density that lies on the square."""
    return float(_mass(shape, 64).sum())


def _plane(shape: str, points: np.ndarray) -> np.ndarray:
    """The density on the whole plane, at [N, 2]: float64 [N]."""
    x, y = points.T
    if shape == "checkerboard":
        strip = np.floor((points + SIDE) / 2).astype(int).clip(0, 3)
        return _dark(4)[strip[:, 0], strip[:, 1]] / 32
    if shape == "rings":  # normal around each radius; as many points a length on each ring
        far = (np.hypot(x, y)[:, None] - RADII) / RING_WIDTH
        erf = np.array([math.erf(radius / RING_WIDTH / math.sqrt(2)) for radius in RADII])
        # 2π ∫ r exp(-(r - R)² / 2s²) dr over r > 0
        area = RING_WIDTH**2 * np.exp(-0.5 * (RADII / RING_WIDTH) ** 2)
        area = 2 * math.pi * (area + RADII * RING_WIDTH * math.sqrt(math.pi / 2) * (1 + erf))
        return np.exp(-0.5 * far**2) @ (RADII / RADII.sum() / area)
    if shape == "pinwheel":  # a Gaussian for each arm, twisted by the radius, which keeps areas
        radius, angle = np.hypot(x, y), np.arctan2(y, x)
        turned = (angle - TWIST * radius)[:, None] - 2 * math.pi / ARMS * np.arange(ARMS)
        along = (radius[:, None] * np.cos(turned) - ARM_MEAN) / ARM_LENGTH
        across = radius[:, None] * np.sin(turned) / ARM_WIDTH
        return np.exp(-0.5 * (along**2 + across**2)).mean(1) / (2 * math.pi * ARM_LENGTH * ARM_WIDTH)
    mixture = _mixture(shape)
    assert mixture is not None
    centres, deviation = mixture
    total = np.zeros(len(points))
    for centre in centres:
        total += np.exp(-0.5 * ((points - centre) ** 2).sum(1) / deviation**2)
    return total / (len(centres) * 2 * math.pi * deviation**2)


def _dark(n: int) -> np.ndarray:
    """1 where a board of n × n squares is filled, else 0: float64 [n, n]."""
    return (np.add.outer(np.arange(n), np.arange(n)) % 2).astype(np.float64)


def _mixture(shape: str) -> tuple[np.ndarray, float] | None:
    """Centres [K, 2] and standard deviation of the equal round Gaussians that make a shape up, where they do."""
    if shape == "eight_gaussians":
        angle = math.pi / 4 * np.arange(8)
        return 2.6 * np.stack([np.cos(angle), np.sin(angle)], 1), 0.3
    if shape == "two_moons":
        angle = np.linspace(0, math.pi, 48)
        moon = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], 1)
        return 1.9 * np.concatenate([moon, -moon]), 0.2
    if shape == "spiral":  # of Archimedes, two turns, evenly along its length
        fine = np.linspace(0.5, 4 * math.pi, 10_000)
        length = np.concatenate([[0], np.hypot(1, fine)[:-1].cumsum()])
        angle = np.interp(np.linspace(0, length[-1], 192), length, fine)
        return 0.25 * angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1), 0.2
    return None


Source = TwoD
