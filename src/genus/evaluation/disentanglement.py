"""Whether the numbers of a code mean something each: on shapes whose factors are known (data/sources/factors.py).

A code may hold all of the factors and yet mix them; disentangled is one whose every number tells of one factor, and
every factor of which one number tells. Codes are taken on the scale of a standard normal, as the contract has them.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from scipy import sparse

from genus.data.sources import factors as source

DRAWN = 10_000  # images of known factors
CELLS = 21  # of a number of the code, each with the same mass of a standard normal; odd: what says nothing is in one
DRAWS = 50  # of the bootstrap
FITTED, TREES, DEEP = 2_000, 10, 8  # images, trees and their depth of the regressors of DCI
LARGEST = 64  # numbers in a code of which regressors are fitted


def disentanglement(task: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Mutual information gap, and disentanglement, completeness and informativeness of a model that Encodes.

    A row of the evaluator's metrics: {"mutual_information_gap": {"value", "low", "high", "n", "kind", "factors"}}, the
    95% interval being that of the images drawn, and {"dci": {"value", "completeness", "informativeness", "n", …}};
    none for data whose factors are not known. Raises FloatingPointError, naming the image, where a code is not finite.
    """
    if not source.known(task.data.description):
        return {}, {}
    started = time.monotonic()
    values = source.draw(DRAWN, seed=task.seed)
    codes = encoded(task, source.render(values))
    encoding = time.monotonic() - started
    gap, low, high, each = gap_interval(codes, values, seed=task.seed)
    told: dict[str, Any] = {"value": gap, "low": low, "high": high, "n": len(codes), "kind": f"means in {CELLS} cells"}
    figures = {"mutual_information_gap": told | {"factors": dict(zip(source.SIZES, each.tolist(), strict=True))}}
    if codes.shape[1] <= LARGEST:
        parts = dci(codes, values, seed=task.seed)
        figures["dci"] = {"value": parts.pop("disentanglement"), **parts, "n": 2 * FITTED, "kind": "random forests"}
    return figures, {"encode_ms": 1e3 * encoding / len(codes)}


@torch.inference_mode()
def encoded(task: Any, stored: np.ndarray) -> np.ndarray:
    """Codes of stored images, float64 [N, D]. Raises FloatingPointError, naming the image, where one is not finite."""
    parts = []
    for part in torch.from_numpy(stored).split(task.effort.batch_size):
        code = task.model.encode(task.data.spec.to_float(part.to(task.device)))
        parts.append(code.double().flatten(1).cpu().numpy())
    codes = np.concatenate(parts)
    if not np.isfinite(codes).all():
        raise FloatingPointError(f"the code of image {int((~np.isfinite(codes)).any(1).argmax())} is not finite")
    return codes


def gap_interval(codes: np.ndarray, values: np.ndarray, *, seed: int) -> tuple[float, float, float, np.ndarray]:
    """The mutual information gap of codes [N, D] and factors [N, K], its 95% interval, and each factor's own gap [K].

    Chen et al. 2018 (1802.04942, eq. 6): for each factor the mutual information of the number that tells most of it,
    less that of the next one, as a share of the factor's entropy; then the mean over factors. 1 is a code of one number
    a factor, 0 one that says nothing or everything twice. The information is that of the codes themselves, in cells,
    where the paper has q(z|x), noise included. The interval is 1.96 deviations of resampled rows either way.
    """
    joint = Joint(cells_of(codes), values)
    each = joint.gaps(np.ones(len(values)))
    random = np.random.default_rng(seed)
    drawn = [joint.gaps(random.multinomial(len(values), np.full(len(values), 1 / len(values)))) for _ in range(DRAWS)]
    half = 1.96 * float(np.std(np.mean(drawn, 1), ddof=1))
    value = float(each.mean())
    return value, max(value - half, 0.0), min(value + half, 1.0), each


def cells_of(codes: np.ndarray) -> np.ndarray:
    """The cell of each number: int64 [N, D], 0 … ``CELLS`` - 1. A code that hardly moves stays in the middle one."""
    from scipy.special import ndtri

    return np.searchsorted(ndtri(np.arange(1, CELLS) / CELLS), codes)


class Joint:
    """Counts of cells [N, D] and values [N, K] together, for any weights of the rows: one sparse product a time."""

    def __init__(self, cells: np.ndarray, values: np.ndarray):
        self.sizes = values.max(0) + 1
        self.left = _indicators(values, self.sizes)
        self.right = _indicators(cells, np.full(cells.shape[1], CELLS))

    def information(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mutual information [K, D] of every factor with every number, and each factor's entropy [K], in nats.

        Entropies are too low by about a 2n-th for each cell that is occupied but one (Miller 1955): that is put right.
        """
        total = weights.sum()
        counts = (self.left.multiply(weights[:, None]).T @ self.right).toarray() / total
        parts = counts.reshape(len(counts), -1, CELLS)  # [values of all factors, D, cells]
        ends = np.cumsum(self.sizes)[:-1]
        found, entropies = [], []
        for joint in np.split(parts, ends):  # [values, D, cells]
            value, cell = joint.sum(2)[:, :1, None], joint.sum(0)
            with np.errstate(divide="ignore", invalid="ignore"):
                plain = np.where(joint > 0, joint * np.log(joint / (value * cell)), 0).sum((0, 2))
            p = value[value > 0]
            spare = (joint > 0).sum((0, 2)) - len(p) - (cell > 0).sum(1) + 1
            found.append(plain - spare / (2 * total))
            entropies.append(float(-(p * np.log(p)).sum()) + (len(p) - 1) / (2 * total))
        return np.stack(found), np.array(entropies)

    def gaps(self, weights: np.ndarray) -> np.ndarray:
        """Each factor's gap [K]: best less second, as a share of the entropy; a code of one number has no second."""
        found, entropies = self.information(weights)
        best = np.sort(np.pad(found, ((0, 0), (1, 0))), 1)[:, -2:]
        return (best[:, 1] - best[:, 0]) / entropies


def _indicators(numbers: np.ndarray, sizes: np.ndarray) -> sparse.csr_matrix:
    """[N, Σ sizes]: a 1 in each row for each column of ``numbers`` [N, M], at the place of its value."""
    n, m = numbers.shape
    places = numbers + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return sparse.csr_matrix((np.ones(n * m), places.ravel(), np.arange(n + 1) * m), (n, int(sizes.sum())))


def dci(codes: np.ndarray, values: np.ndarray, *, seed: int) -> dict[str, float]:
    """Disentanglement, completeness and informativeness (Eastwood & Williams 2018, "A framework …", section 2).

    By random forests that tell each factor from the code, on ``FITTED`` rows. Their importances R [D, K] are read as
    probabilities: a number is disentangled as far as its row lacks entropy, a factor complete as far as its column
    does, weighted by how much a number matters; informativeness is the share of factors named rightly on other rows.
    """
    from sklearn.ensemble import RandomForestClassifier

    fitted, judged = slice(0, FITTED), slice(FITTED, 2 * FITTED)
    importances, right = [], []
    for factor in values.T:
        forest = RandomForestClassifier(TREES, max_depth=DEEP, max_features=None, random_state=seed)
        forest.fit(codes[fitted], factor[fitted])
        importances.append(forest.feature_importances_)
        right.append(forest.score(codes[judged], factor[judged]))
    table = np.stack(importances, 1)  # [D, K]
    return {
        "disentanglement": float(_told(table) @ (table.sum(1) / table.sum())),
        "completeness": float(_told(table.T).mean()),
        "informativeness": float(np.mean(right)),
    }


def _told(table: np.ndarray) -> np.ndarray:
    """1 - entropy of each row, as a share of the most there can be: 1 where all is in one place. 0 for rows of none."""
    total = table.sum(1, keepdims=True)
    share = np.divide(table, total, out=np.full_like(table, 1 / table.shape[1]), where=total > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(share > 0, share * np.log(share), 0).sum(1)
    return 1 - entropy / max(np.log(table.shape[1]), 1e-12)
