"""Mutual information gap and DCI: codes whose figures are known, and scikit-learn's mutual information beside ours."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from sklearn.metrics import mutual_info_score
from torch import Tensor

from genus.config import Evaluate
from genus.data.sources import factors as source
from genus.data.spec import DataSpec
from genus.evaluation import disentanglement as measured

SIZES = np.array(list(source.SIZES.values()))
VALUES = source.draw(6_000, seed=3)
PERFECT = ndtri((VALUES + 0.5) / SIZES)  # one number a factor, on the scale of a standard normal


def gap(codes: np.ndarray) -> float:
    return measured.gap_interval(codes, VALUES, seed=0)[0]


def rotated(angle: float) -> np.ndarray:
    """Every pair of neighbouring numbers of the perfect code, turned."""
    turned, c, s = PERFECT.copy(), math.cos(angle), math.sin(angle)
    for i in (0, 2):
        turned[:, i], turned[:, i + 1] = (
            c * turned[:, i] - s * turned[:, i + 1],
            s * turned[:, i] + c * turned[:, i + 1],
        )
    return turned


def test_a_perfect_code_has_a_gap_of_one() -> None:
    """But for chance: what independent numbers seem to have in common, some 1 / n in nats."""
    value, low, high, each = measured.gap_interval(PERFECT, VALUES, seed=0)
    assert each.min() > 0.99 and low <= value <= high
    assert high - low < 0.01


def test_a_factor_said_twice_has_no_gap() -> None:
    assert gap(np.concatenate([PERFECT, PERFECT], 1)) == pytest.approx(0, abs=1e-12)


def test_two_factors_in_one_number_share_their_gap() -> None:
    """A code of one number that tells shape and nothing else: a gap of 1 for shape, 0 for the others, 0.2 together."""
    _, _, _, each = measured.gap_interval(PERFECT[:, :1], VALUES, seed=0)
    assert each[0] == pytest.approx(1, abs=1e-12)
    assert each[1:].max() < 0.01


def test_rotation_closes_the_gap() -> None:
    none, some, half = (gap(rotated(angle)) for angle in (0.0, 0.3, math.pi / 4))
    assert none > some + 0.1 > half + 0.2


def test_noise_has_none() -> None:
    noise = np.random.default_rng(0).standard_normal((len(VALUES), 10))
    assert gap(noise) < 0.005
    still = 1e-3 * PERFECT  # a code that hardly moves is in one cell: it says nothing against the prior's noise
    assert gap(still) == 0


def test_information_is_that_of_scikit_learn() -> None:
    """Every factor with every number of a noisy code, in nats, to 1e-10; and the entropies. But for Miller's part."""
    codes = rotated(0.4) + 0.3 * np.random.default_rng(1).standard_normal(PERFECT.shape)
    cells = measured.cells_of(codes)
    found, entropies = measured.Joint(cells, VALUES).information(np.ones(len(VALUES)))
    n = 2 * len(VALUES)

    def told(factor: np.ndarray, cell: np.ndarray) -> float:
        together = len(np.unique(np.stack([factor, cell], 1), axis=0))
        spare = together - len(np.unique(factor)) - len(np.unique(cell)) + 1
        return mutual_info_score(factor, cell) - spare / n

    np.testing.assert_allclose(found, [[told(factor, cell) for cell in cells.T] for factor in VALUES.T], atol=1e-10)
    np.testing.assert_allclose(entropies, [told(factor, factor) for factor in VALUES.T], atol=1e-10)


def test_weights_are_repeated_rows() -> None:
    codes, weights = rotated(0.4)[:500], np.random.default_rng(0).integers(3, size=500)
    cells, values = measured.cells_of(codes), VALUES[:500]
    again = measured.Joint(cells.repeat(weights, 0), values.repeat(weights, 0)).gaps(np.ones(weights.sum()))
    np.testing.assert_allclose(measured.Joint(cells, values).gaps(weights.astype(float)), again, atol=1e-12)


def test_cells_hold_the_same_mass_of_a_standard_normal() -> None:
    cells = measured.cells_of(np.random.default_rng(0).standard_normal((50_000, 1)))
    share = np.bincount(cells[:, 0], minlength=measured.CELLS) / len(cells)
    assert len(share) == measured.CELLS
    assert np.abs(share - 1 / measured.CELLS).max() < 5 * math.sqrt(1 / measured.CELLS / len(cells))
    assert measured.cells_of(np.zeros((1, 1)))[0, 0] == measured.CELLS // 2


def test_the_interval_holds_the_value_of_more_images() -> None:
    """Ten sets of 2,000 images: the intervals of eight or more hold the gap of 100,000 (9.5 are expected)."""
    random, hits = np.random.default_rng(5), 0

    def coded(values: np.ndarray) -> np.ndarray:
        return ndtri((values + 0.5) / SIZES) + 0.5 * random.standard_normal(values.shape)

    many = source.draw(100_000, seed=100)
    truth = measured.Joint(measured.cells_of(coded(many)), many).gaps(np.ones(len(many))).mean()
    for seed in range(10):
        few = source.draw(2_000, seed=seed)
        _, low, high, _ = measured.gap_interval(coded(few), few, seed=0)
        hits += low <= truth <= high
    assert hits >= 8


def test_dci_of_known_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "FITTED", 1_000)
    perfect, mixed = (measured.dci(codes, VALUES, seed=0) for codes in (PERFECT, rotated(math.pi / 4)))
    assert min(perfect.values()) > 0.97
    assert mixed["disentanglement"] < 0.8 and mixed["completeness"] < 0.8
    noise = measured.dci(np.random.default_rng(0).standard_normal(PERFECT.shape), VALUES, seed=0)
    assert max(noise["disentanglement"], noise["completeness"]) < 0.02
    assert noise["informativeness"] < np.mean(1 / SIZES) + 0.06  # chance


class Sums:
    """A model whose code is where the ink is: its amount, and its place across and down, nearly on a normal's scale."""

    def encode(self, x: Tensor) -> Tensor:
        ink = (x[:, 0] + 1) / 2
        total, places = ink.sum((1, 2)), torch.arange(28.0) - 13.5
        across, down = (ink.sum(1) * places).sum(1) / total, (ink.sum(2) * places).sum(1) / total
        return torch.stack([total / 40 - 2, across / 4, down / 4], 1)


def task(model: Any, description: dict[str, Any]) -> Any:
    data = SimpleNamespace(spec=DataSpec((1, 28, 28)), description=description)
    return SimpleNamespace(model=model, data=data, effort=Evaluate(batch_size=500), seed=0, device=torch.device("cpu"))


def test_a_model_is_measured_on_images_of_known_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "DRAWN", 4_000)
    monkeypatch.setattr(measured, "FITTED", 1_000)
    figures, timing = measured.disentanglement(task(Sums(), {"source": source.SAID}))
    found = figures["mutual_information_gap"]
    assert found["n"] == 4_000 and found["low"] < found["value"] < found["high"]
    assert min(found["factors"]["x"], found["factors"]["y"]) > 0.6 and found["factors"]["rotation"] < 0.05
    assert figures["dci"]["value"] > 0.4 and timing["encode_ms"] > 0


def test_other_data_are_not_measured() -> None:
    assert measured.disentanglement(task(Sums(), {"source": "scikit-learn"})) == ({}, {})


def test_a_code_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "DRAWN", 10)

    class Broken:
        def encode(self, x: Tensor) -> Tensor:
            code = torch.zeros(len(x), 2)
            code[3, 1] = math.nan
            return code

    with pytest.raises(FloatingPointError, match="the code of image 3 is not finite"):
        measured.disentanglement(task(Broken(), {"source": source.SAID}))
