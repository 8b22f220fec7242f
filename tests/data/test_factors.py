"""The source of shapes with known factors: what it draws is what the factors say, and no two images are the same."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from genus.config import Dataset
from genus.data.ingestion import ingest
from genus.data.loaders import open_dataset
from genus.data.sources import factors, open_source
from genus.errors import UserError


def one(shape: int = 0, scale: int = 5, rotation: int = 0, x: int = 3, y: int = 4) -> np.ndarray:
    return factors.render(np.array([[shape, scale, rotation, x, y]]))[0, 0].astype(float)


def test_pixels_are_shares_of_the_shape_s_area() -> None:
    """Sums of all pixels against the areas of rectangle, ellipse and heart, in pixels: within 2%, as points are few."""
    unit = factors.PATCH / 2
    # The heart has no short formula: by a finer grid than the one that it is drawn by.
    u, v = np.meshgrid(np.linspace(-1.5, 1.5, 1501), np.linspace(-1.5, 1.5, 1501))
    heart = ((u**2 + v**2 - 1) ** 3 <= u**2 * v**3).mean() * 9 / 1.45**2
    for shape, area in enumerate((1.6 * 0.8, math.pi * 0.95 * 0.475, heart)):
        for scale, factor in enumerate(np.linspace(*factors.SCALES, 6)):
            assert one(shape, scale).sum() / 255 == pytest.approx(area * (unit * factor) ** 2, rel=0.02)


def test_a_step_of_x_or_y_moves_the_shape_by_a_pixel() -> None:
    still = one()
    assert np.array_equal(one(x=4), np.roll(still, 1, axis=1))
    assert np.array_equal(one(y=5), np.roll(still, 1, axis=0))


def test_rotation_turns_the_shape_s_axis() -> None:
    """The direction of the largest variance of an ellipse's pixels is the angle, within 0.5°, y being downwards."""
    rows, columns = np.mgrid[: factors.SIDE, : factors.SIDE]
    for rotation, angle in enumerate(np.linspace(-45, 45, 8)):
        image = one(1, rotation=rotation)
        x, y = columns - np.average(columns, weights=image), rows - np.average(rows, weights=image)
        xx, yy, xy = (np.average(part, weights=image) for part in (x * x, y * y, -x * y))
        assert math.degrees(0.5 * math.atan2(2 * xy, xx - yy)) == pytest.approx(angle, abs=0.5)


def test_every_combination_is_there_once_and_looks_like_no_other() -> None:
    every = list(open_source("factors", {}).examples())
    assert len(every) == factors.COUNT == 14_112
    assert len({example.image.tobytes() for example in every}) == factors.COUNT
    labels, counts = np.unique([example.label for example in every], return_counts=True)
    assert labels.tolist() == [0, 1, 2] and (counts == factors.COUNT // 3).all()


def test_shapes_stay_inside() -> None:
    """At every corner of the places the whole shape is in the picture."""
    for shape in range(3):
        for rotation in range(8):
            whole = one(shape, rotation=rotation).sum()
            for x, y in ((0, 0), (13, 0), (0, 6), (13, 6)):
                assert one(shape, rotation=rotation, x=x, y=y).sum() == whole


def test_examples_are_what_their_origin_says() -> None:
    example = next(iter(open_source("factors", {"seed": 4}).examples()))
    name, scale, rotation, place = example.origin.split(", ", 3)
    values = [factors.SHAPES.index(name), *(int(part.split()[-1]) for part in (scale, rotation)), *place_of(place)]
    assert np.array_equal(example.image, factors.render(np.array([values]))[0]) and example.label == values[0]


def place_of(text: str) -> list[int]:
    return [int(part) for part in text.removeprefix("at ").split(", ")]


def test_draws_are_independent_uniform_and_by_seed() -> None:
    drawn = factors.draw(60_000, seed=1)
    assert np.array_equal(drawn, factors.draw(60_000, seed=1))
    assert not np.array_equal(drawn, factors.draw(60_000, seed=2))
    for column, size in zip(drawn.T, factors.SIZES.values(), strict=True):
        share = np.bincount(column, minlength=size) / len(column)
        assert len(share) == size and np.abs(share - 1 / size).max() < 5 * math.sqrt(1 / size / len(column))
    correlation = np.corrcoef(drawn.T) - np.eye(5)
    assert np.abs(correlation).max() < 5 / math.sqrt(len(drawn))


def test_ingests_like_any_source(tmp_path: Path) -> None:
    config = Dataset(source="factors", options={"count": 1000})
    description = ingest("factors", config, seed=0, root=tmp_path)
    assert description["counts"] == {"train": 810, "validation": 90, "test": 100}
    data = open_dataset("factors", tmp_path / "processed")
    assert data.spec.shape == (1, 28, 28) and data.spec.classes == factors.SHAPES
    assert factors.known(data.description) and not factors.known({"source": "scikit-learn"})
    assert ingest("factors", config, seed=0, root=tmp_path / "again")["sha256"] == description["sha256"]


@pytest.mark.parametrize("value", [[0, 0, 0, 14, 0], [0, 0, 0, 0, -1], [3, 0, 0, 0, 0], [0, 6, 0, 0, 0]])
def test_values_that_there_are_not_are_refused(value: list[int]) -> None:
    with pytest.raises(IndexError):
        factors.render(np.array([value]))


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="count: Input should be less than or equal to 14112"):
        open_source("factors", {"count": 14_113})
