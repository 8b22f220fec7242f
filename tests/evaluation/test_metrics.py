"""Sample metrics against an independent library and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genus.evaluation.metrics import Frechet, bootstrap, gaussian_control, kid, mmd2


def two_sets(n: int = 400, m: int = 500, dims: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    mix = random.standard_normal((dims, dims))
    a, b = random.standard_normal((n, dims)) @ mix, 0.5 + random.standard_normal((m, dims)) * 1.3
    a[:, 0] = b[:, 0] = 0.0  # a dead feature, as behind a ReLU: the covariances are singular
    return a, b


def test_frechet_distance_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.fid import _compute_fid

    a, b = two_sets()
    moments = [torch.from_numpy(value) for x in (a, b) for value in (x.mean(0), np.cov(x, rowvar=False))]
    theirs = _compute_fid(*moments).item()
    assert Frechet(b)(a) == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_in_closed_form() -> None:
    a, _ = two_sets()
    assert Frechet(a)(a) == pytest.approx(0, abs=1e-8)
    assert Frechet(a)(a + 2.0) == pytest.approx(4.0 * a.shape[1], rel=1e-9)  # a shift: the squared distance of means
    scaled = (a - a.mean(0)) * 3 + a.mean(0)  # the same Gaussian three times as wide: (3 - 1)² tr A
    assert Frechet(a)(scaled) == pytest.approx(4 * np.trace(np.cov(a, rowvar=False)), rel=1e-9)


def test_kid_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = two_sets(300, 300)
    theirs = poly_mmd(torch.from_numpy(a), torch.from_numpy(b), degree=3, gamma=None, coef=1.0).item()
    assert mmd2(a, b) == pytest.approx(theirs, rel=1e-9)


def test_kid_is_near_zero_for_one_distribution() -> None:
    """Unbiased: over 20 subsets of 200 the mean lies within four standard errors of 0 (fixed seed)."""
    random = np.random.default_rng(1)
    value, error = kid(random.standard_normal((2000, 8)), random.standard_normal((2000, 8)), size=200, seed=0)
    assert abs(value) < 4 * error


def test_bootstrap_interval_covers_the_mean() -> None:
    """The 95% interval of a mean is the textbook's within 15% (500 rows, 400 draws, fixed seed)."""
    values = np.random.default_rng(2).standard_normal((500, 1)) + 5
    low, high = bootstrap(lambda rows: float(rows.mean()), values, draws=400, seed=0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(500), rel=0.15)


def test_gaussian_control_has_the_pixels_moments() -> None:
    """Mean and covariance of 20,000 draws within five standard errors, away from the clipped ends."""
    random = np.random.default_rng(3)
    base = random.standard_normal((5000, 6)) @ random.standard_normal((6, 6)) * 6 + 128
    images = base.round().clip(0, 255).astype(np.uint8).reshape(-1, 1, 2, 3)
    drawn = gaussian_control(images, 20_000, levels=256, seed=0).reshape(20_000, -1).astype(float)
    flat = images.reshape(len(images), -1).astype(float)
    spread = flat.std(0)
    assert (np.abs(drawn.mean(0) - flat.mean(0)) < 5 * spread / np.sqrt(20_000)).all()
    error = np.abs(np.cov(drawn, rowvar=False) - np.cov(flat, rowvar=False)) / np.outer(spread, spread)
    assert error.max() < 5 * np.sqrt(2 / 20_000) + 0.01  # 0.01: rounding adds 1/12 to the variances
