"""Sample metrics against an independent library and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genus.evaluation.metrics import (
    Frechet,
    bootstrap,
    copying,
    fine_detail,
    gaussian_control,
    kid,
    mmd2,
    nearest,
    neighbours,
    prdc,
    two_sample,
    wilson,
)


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


def test_precision_recall_density_coverage_agree_with_prdc(capsys: pytest.CaptureFixture[str]) -> None:
    from prdc import compute_prdc

    a, b = two_sets(700, 650)
    for k in (3, 5):
        theirs = compute_prdc(b, a, k)  # it prints the numbers of both
        ours = prdc(b, a, k)
        assert ours == pytest.approx({name: float(value) for name, value in theirs.items()}, abs=1e-12)
        assert 0.01 < ours["precision"] < 0.95, "the sets overlap in part: the figures can differ"
    capsys.readouterr()


def test_metrics_agree_with_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = two_sets(500, 500)
    tensors = [torch.from_numpy(values) for values in (a, b)]
    statistics = [fid_features_to_statistics(values) for values in tensors]
    theirs = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert Frechet(b)(a) == pytest.approx(theirs, rel=1e-6)
    options = {"kid_subsets": 2, "kid_subset_size": 500, "verbose": False}  # every subset is the whole set
    theirs = kid_features_to_metric(*tensors, **options)["kernel_inception_distance_mean"]
    assert kid(a, b, subsets=2, size=500, seed=0)[0] == pytest.approx(theirs, rel=1e-6)
    found = prc_features_to_metric(*tensors, prc_neighborhood=5, prc_batch_size=100, verbose=False)
    ours = prdc(b, a, 5)
    assert [ours["precision"], ours["recall"]] == pytest.approx([found["precision"], found["recall"]], abs=1e-4)


def test_neighbours_in_closed_form() -> None:
    """Eight points on a line: radii, and so every indicator, can be read off."""
    real = np.arange(8.0)[:, None]
    found = neighbours(real, np.array([[0.4], [3.5], [20.0], [21.0]]), k=2)
    assert found["precision"].tolist() == [1, 1, 0, 0]
    assert found["coverage"].tolist() == [1, 1, 0, 1, 1, 0, 0, 0]  # radii: 2 at the ends, 1 inside
    assert found["density"].tolist() == [1.0, 1.0, 0, 0]
    with pytest.raises(ValueError, match="too few for 5 neighbours"):
        neighbours(real[:5], real, k=5)


def test_wilson_interval_agrees_with_scipy() -> None:
    from scipy import stats

    for hits, n in ((0, 10), (3, 10), (10, 10), (77, 2000)):
        theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits, n, stats.norm.ppf(0.975)) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_nearest_agrees_with_scikit_learn_in_any_chunks() -> None:
    from sklearn.neighbors import NearestNeighbors

    random = np.random.default_rng(3)
    images = random.integers(256, size=(257, 1, 4, 4)).astype(np.uint8)
    queries = random.integers(256, size=(20, 1, 4, 4)).astype(np.uint8)
    known = NearestNeighbors(n_neighbors=3).fit(images.reshape(257, -1).astype(float))
    distances, indices = known.kneighbors(queries.reshape(20, -1).astype(float))
    for chunk in (10, 64, 1000):
        ours, where = nearest(queries, images, 3, chunk)
        assert np.array_equal(where, indices) and np.allclose(ours, distances**2, rtol=1e-5)


def test_copies_are_told_from_new_samples() -> None:
    """Two independent sets of one distribution: the share is 0 within its own 95% interval (fixed seed)."""
    random = np.random.default_rng(4)
    sets = [random.integers(64, size=(n, 1, 3, 3)).astype(np.uint8) for n in (3000, 1000, 800)]
    train, held_out, fresh = sets
    honest = copying(fresh, train, held_out)
    assert honest.low < 0 < honest.high and honest.p_value > 0.01
    half = copying(np.concatenate([fresh[:400], train[:400]]), train, held_out)
    assert half.low < 0.5 < half.high and half.p_value < 1e-12
    assert copying(train[:300], train, held_out).share == 1


def test_two_samples_of_one_distribution_are_not_told_apart() -> None:
    random = np.random.default_rng(5)
    a, b = random.standard_normal((800, 6)), random.standard_normal((800, 6))
    _, low, high, n = two_sample(a, b, seed=0)
    assert low < 0.5 < high and n == 800
    # Means one deviation apart in one of the features: the best rule is right with Φ(1/2) = 0.691.
    _, low, high, _ = two_sample(a, b + np.eye(6)[0], seed=0)
    assert low < 0.691 < high and low > 0.6


def test_fine_detail_of_known_waves() -> None:
    x = np.arange(16)
    slow, fast = np.cos(2 * np.pi * x / 16), np.cos(2 * np.pi * x * 6 / 16)
    waves = np.stack([np.tile(100 * wave, (16, 1))[None] for wave in (slow, fast, slow + fast)])
    found = fine_detail(waves)
    energy = (100 * fast) ** 2 @ np.ones(16) * 16  # Parseval: the fast wave's own energy
    assert found == pytest.approx([0, energy, energy], abs=1e-6 * energy)
