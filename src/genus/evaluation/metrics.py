"""Sample metrics on feature arrays [N, D], in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from scipy import linalg

NEIGHBOURS = 5  # k of precision, recall, density and coverage


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


def prdc(real: np.ndarray, fake: np.ndarray, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage of ``fake`` [M, D] against ``real`` [N, D]: means of ``neighbours``."""
    return {name: float(values.mean()) for name, values in neighbours(real, fake, k).items()}


def neighbours(real: np.ndarray, fake: np.ndarray, k: int = NEIGHBOURS) -> dict[str, np.ndarray]:
    """What each point adds to precision and density ([M], one a fake), recall and coverage ([N], one a real).

    Kynkäänniemi et al. 2019 (1904.06991, eq. 2) and Naeem et al. 2020 (2002.09797, eqs. 3 to 5): balls around the
    points of one set reach to their k-th neighbour within it. Raises ValueError for sets of no more than k points.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"{len(real)} real and {len(fake)} generated examples are too few for {k} neighbours")
    around_real, around_fake = _radii(real, k), _radii(fake, k)
    precision, density = np.zeros(len(fake), bool), np.zeros(len(fake))
    recall, nearest = np.zeros(len(real), bool), np.zeros(len(real))
    for start, rows in _distances(real, fake):  # [chunk of real, M]
        chunk = slice(start, start + len(rows))
        inside = rows < around_real[chunk, None]
        precision |= inside.any(0)
        density += inside.sum(0) / k
        recall[chunk] = (rows < around_fake).any(1)
        nearest[chunk] = rows.min(1)
    covered = nearest < around_real
    return {"precision": precision.astype(float), "recall": recall.astype(float), "density": density} | {
        "coverage": covered.astype(float)
    }


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each point to its k-th neighbour, itself not counted."""
    return np.concatenate([np.partition(rows, k, axis=1)[:, k] for _, rows in _distances(points, points)])


def _distances(a: np.ndarray, b: np.ndarray, chunk: int = 500) -> Iterator[tuple[int, np.ndarray]]:
    """Squared distances [chunk, M] of some rows of ``a`` to all of ``b``: the whole matrix never exists."""
    squares = (b**2).sum(1)
    for start in range(0, len(a), chunk):
        rows = a[start : start + chunk]
        yield start, np.maximum((rows**2).sum(1)[:, None] + squares - 2 * rows @ b.T, 0)


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927)."""
    p = hits / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return min(max(low, 0.0), p), max(min(high, 1.0), p)  # rounding must not put the share itself outside


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of independent values and its 95% interval."""
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def nearest(queries: np.ndarray, images: np.ndarray, k: int = 1, chunk: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` images nearest to each query by squared pixel distance: distances and indices, both [Q, k].

    Stored arrays of any shape; ``images`` may be memory-mapped and is read in chunks.
    """
    flat = queries.reshape(len(queries), -1).astype(np.float32)
    own = (flat**2).sum(1)[:, None]
    best, where = np.full((len(flat), k), np.inf, np.float32), np.zeros((len(flat), k), np.int64)
    for start in range(0, len(images), chunk):
        rows = np.asarray(images[start : start + chunk]).reshape(-1, flat.shape[1]).astype(np.float32)
        distances = own + (rows**2).sum(1) - 2 * flat @ rows.T
        few = min(k, len(rows))
        closest = np.argpartition(distances, few - 1, axis=1)[:, :few]
        both = np.concatenate([best, np.take_along_axis(distances, closest, 1)], 1)
        indices = np.concatenate([where, closest + start], 1)
        order = np.argsort(both, axis=1, kind="stable")[:, :k]
        best, where = np.take_along_axis(both, order, 1), np.take_along_axis(indices, order, 1)
    return np.maximum(best, 0), where


class Copying(NamedTuple):
    """Whether samples lie nearer to the training images than chance has it. ``share``: 0 is chance, 1 is every one."""

    share: float
    low: float
    high: float
    p_value: float
    n: int


def copying(samples: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> Copying:
    """Nearest neighbours in train against those in held-out data.

    A sample of a model that copies nothing is as near to an image it was trained on as to one it was not: were all
    images of the two sets exchangeable, its nearest one were a training image with the chance N / (N + M). The excess
    over that, as a share of the most that is possible, with its Wilson interval and the one-sided binomial p-value.
    (Blurred samples are near to everything, to both sets alike: comparing distances to train with those of real images
    to train, as Meehan et al. 2020, 2004.05675, do, would flag them.)
    """
    from scipy import stats

    chance = len(train) / (len(train) + len(held_out))
    hits = nearest(samples, train)[0][:, 0] <= nearest(samples, held_out)[0][:, 0]
    n, count = len(hits), int(hits.sum())
    share, low, high = ((end - chance) / (1 - chance) for end in (count / n, *wilson(count, n)))
    return Copying(share, low, high, float(stats.binom.sf(count - 1, n, chance)), n)


def two_sample(real: np.ndarray, fake: np.ndarray, *, seed: int) -> tuple[float, float, float, int]:
    """Accuracy of a classifier that tells generated features from real ones, its interval, and examples it judged.

    Lopez-Paz & Oquab 2017 (1610.06545): a logistic regression is fitted to one half and scored on the other;
    0.5 is indistinguishable. Equally many of both kinds.
    """
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(seed)
    n = min(len(real), len(fake))
    x = np.concatenate([real[random.permutation(len(real))[:n]], fake[random.permutation(len(fake))[:n]]])
    y = np.repeat([0, 1], n)
    order = random.permutation(2 * n)
    x, y = x[order], y[order]
    fitted, judged = slice(0, n), slice(n, 2 * n)
    mean, deviation = x[fitted].mean(0), x[fitted].std(0)
    x = (x - mean) / np.where(deviation > 0, deviation, 1)
    right = LogisticRegression(C=0.1, max_iter=300).fit(x[fitted], y[fitted]).predict(x[judged]) == y[judged]
    return float(right.mean()), *wilson(int(right.sum()), n), n


def fine_detail(images: np.ndarray) -> np.ndarray:
    """Energy of each stored image [N, C, H, W] above half the Nyquist frequency (0.25 cycles a pixel): [N] float64."""
    down, across = np.fft.fftfreq(images.shape[-2])[:, None], np.fft.fftfreq(images.shape[-1])
    high = np.hypot(down, across) > 0.25
    parts = []
    for start in range(0, len(images), 1000):
        spectrum = np.fft.fft2(np.asarray(images[start : start + 1000]), norm="ortho")
        parts.append((np.abs(spectrum) ** 2)[..., high].sum((1, 2)))
    return np.concatenate(parts)


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
    mean, covariance = moments(flat)
    noise = np.random.default_rng(seed).standard_normal((n, flat.shape[1]))
    drawn = mean + noise @ _symmetric_root(covariance)
    return drawn.round().clip(0, levels - 1).astype(images.dtype).reshape(n, *images.shape[1:])


def moments(flat: np.ndarray, chunk: int = 5000) -> tuple[np.ndarray, np.ndarray]:
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
