"""Sample metrics on feature arrays [N, D], in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import linalg


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets (Heusel et al. 2017, eq. 6).

    tr sqrt(A B) is the sum of the square roots of the eigenvalues of the symmetric sqrt(A) B sqrt(A), which stays
    real where a direct square root of A B drifts into complex numbers (features that are always zero).
    """
    root = np.real(_symmetric_root(np.cov(a, rowvar=False)))
    cross = linalg.eigvalsh(root @ np.cov(b, rowvar=False) @ root)
    trace = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False))
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + trace - 2 * np.sqrt(cross.clip(0)).sum()
    return float(max(distance, 0.0))


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel inception distance: the unbiased MMD² with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018)."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(b)
    aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2 * ab.mean())


def bootstrap(metric: Callable[[np.ndarray], float], values: np.ndarray, *, draws: int, seed: int) -> tuple[float, float]:
    """A 95% percentile interval of ``metric`` under resampling of the rows of ``values``."""
    random = np.random.default_rng(seed)
    results = [metric(values[random.integers(len(values), size=len(values))]) for _ in range(draws)]
    low, high = np.quantile(results, [0.025, 0.975])
    return float(low), float(high)


def gaussian_control(images: np.ndarray, n: int, *, levels: int, seed: int) -> np.ndarray:
    """``n`` stored images drawn from a full-covariance Gaussian fitted to the pixels, clipped and quantised.

    What a model that knows only means and covariances would draw: the scale of the Fréchet distance here.
    """
    flat = images.reshape(len(images), -1).astype(np.float64)
    root = np.real(_symmetric_root(np.cov(flat, rowvar=False)))
    noise = np.random.default_rng(seed).standard_normal((n, flat.shape[1]))
    drawn = flat.mean(0) + noise @ root
    return drawn.round().clip(0, levels - 1).astype(images.dtype).reshape(n, *images.shape[1:])


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
