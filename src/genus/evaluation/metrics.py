"""Sample metrics on feature arrays [N, D], in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import linalg


class Frechet:
    """Squared Fréchet distance between Gaussians fitted to feature sets, to one fixed reference set [N, D].

    Heusel et al. 2017, eq. 6. The trace of sqrt(A B) is the sum of the square roots of the eigenvalues of the
    symmetric sqrt(A) B sqrt(A), which stays real where a direct square root of A B drifts into complex numbers
    (features that are always zero).
    """

    def __init__(self, reference: np.ndarray):
        self.mean, self.covariance = reference.mean(0), _covariance(reference)
        self.root = _symmetric_root(self.covariance)

    def __call__(self, features: np.ndarray) -> float:
        covariance = _covariance(features)
        cross = linalg.eigvalsh(self.root @ covariance @ self.root)
        trace = np.trace(covariance) + np.trace(self.covariance) - 2 * np.sqrt(cross.clip(0)).sum()
        return float(max(((features.mean(0) - self.mean) ** 2).sum() + trace, 0.0))


def kid(
    features: np.ndarray, reference: np.ndarray, *, subsets: int = 20, size: int = 1000, seed: int
) -> tuple[float, float]:
    """Kernel inception distance and its standard error: mean over subsets of the unbiased squared MMD.

    Bińkowski et al. 2018, kernel (x·y / D + 1)³. Subsets have ``size`` rows, fewer where there are fewer.
    """
    random = np.random.default_rng(seed)
    size = min(size, len(features), len(reference))
    values = [
        mmd2(
            features[random.choice(len(features), size, replace=False)],
            reference[random.choice(len(reference), size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(subsets))


def mmd2(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy of two sets under KID's cubic kernel."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(b)
    aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2 * ab.mean())


def bootstrap(
    metric: Callable[[np.ndarray], float], values: np.ndarray, *, draws: int = 50, seed: int
) -> tuple[float, float]:
    """A 95% interval of ``metric`` by resampling the rows of ``values``: the basic bootstrap, 2 θ - quantiles.

    Basic and not percentile, because a resample repeats rows: that biases distances upwards, here taken out again.
    """
    random = np.random.default_rng(seed)
    results = [metric(values[random.integers(len(values), size=len(values))]) for _ in range(draws)]
    value = metric(values)
    low, high = 2 * value - np.quantile(results, [0.975, 0.025])
    return float(max(low, 0.0)), float(max(high, 0.0))


def gaussian_control(images: np.ndarray, n: int, *, levels: int, seed: int) -> np.ndarray:
    """``n`` stored images drawn from a full-covariance Gaussian fitted to the pixels, clipped and quantised.

    What a model that knows only means and covariances would draw: the scale of the Fréchet distance here.
    """
    flat = images.reshape(len(images), -1)
    mean, covariance = _moments(flat)
    noise = np.random.default_rng(seed).standard_normal((n, flat.shape[1]))
    drawn = mean + noise @ _symmetric_root(covariance)
    return drawn.round().clip(0, levels - 1).astype(images.dtype).reshape(n, *images.shape[1:])


def _moments(flat: np.ndarray, chunk: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of stored rows, a chunk at a time: the float copy of all images never exists."""
    mean = flat.mean(0, dtype=np.float64)
    scatter = np.zeros((flat.shape[1], flat.shape[1]))
    for start in range(0, len(flat), chunk):
        centred = flat[start : start + chunk] - mean
        scatter += centred.T @ centred
    return mean, scatter / (len(flat) - 1)


def _covariance(features: np.ndarray) -> np.ndarray:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
