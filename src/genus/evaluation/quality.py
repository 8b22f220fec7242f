"""What a set of samples scores against real images: the same figures for a model's samples and for the controls."""

from __future__ import annotations

from typing import Any

import numpy as np

from genus.data.loaders import Dataset
from genus.errors import UserError
from genus.evaluation import metrics
from genus.evaluation.judge import classes
from genus.evaluation.reference import Reference, View

Figures = dict[str, dict[str, Any]]  # metric: {"value", "low", "high", "n", "floor", "kind", …}

FRECHET_FROM = 500  # a Fréchet distance of fewer samples is mostly bias: KID only
POINTS = 5000  # most points a side for precision, recall, density and coverage: their cost is quadratic
TOLD_APART = 2000  # most examples a side for the classifier two-sample test
COPIES = 2000  # most samples whose nearest training image is looked for
MISSING = 0.1  # a class is missing when samples have less than this share of what real images have


def quality(
    samples: np.ndarray, data: Dataset, reference: Reference, *, seed: int, memorisation: dict[str, Any] | None = None
) -> Figures:
    """All sample metrics of stored images [N, C, H, W]. Names of other feature sets than the judge's have a prefix.

    ``memorisation``: the figure of held-out real images, which says what is no copying. Raises UserError for an empty
    set, one of another shape, and one too small for its points to have neighbours.
    """
    if not len(samples):
        raise UserError("no samples to measure: the set is empty")
    if samples.shape[1:] != data.spec.shape:
        raise UserError(f"samples have shape {samples.shape[1:]}, the data {data.spec.shape}")
    if len(samples) <= metrics.NEIGHBOURS:
        raise UserError(f"{len(samples)} samples are too few: right would be at least {metrics.NEIGHBOURS + 1}")
    found: Figures = {}
    seen = {name: view.extract(samples) for name, view in reference.views.items()}
    for name, view in reference.views.items():
        prefix = "" if view is reference.views["judge"] else f"{name}_"
        found |= {prefix + key: figure for key, figure in _distances(seen[name], view, seed).items()}
    found |= {"two_sample": _two_sample(seen, reference, seed)}
    if reference.judge.labelled:
        found |= {"missing_classes": _classes(seen["judge"], reference, data.spec.classes)}
    found |= {"memorisation": copied(samples[:COPIES], data, memorisation)}
    if not data.spec.flat:
        found |= {"high_frequency": _fine_detail(samples, data)}
    return found


def _distances(seen: np.ndarray, view: View, seed: int) -> Figures:
    """KID, Fréchet distance and the four neighbourhood figures on one set of features, each with its floor.

    The floor is what as many training images score. ``relative`` is the share of the Gaussian control's distance.
    """
    n, floor = len(seen), view.floor(len(seen))
    value, error = metrics.kid(seen, view.test, seed=seed)
    found: Figures = {
        "kid": {
            "value": value,
            "low": value - 1.96 * error,
            "high": value + 1.96 * error,
            "n": n,
            "floor": metrics.kid(floor, view.test, seed=seed)[0],
            "kind": view.name,
        }
    }
    if n >= min(FRECHET_FROM, len(view.test)):
        distance = view.frechet(seen)
        low, high = metrics.bootstrap(view.frechet, seen, seed=seed)
        found["frechet_distance"] = {
            "value": distance,
            "low": low,
            "high": high,
            "n": n,
            "floor": view.frechet(floor),
            "floor_n": len(floor),
            "relative": distance / view.control,
            "control": view.control,
            "kind": view.name,
        }
    few = min(n, len(view.test), POINTS)  # as many of both: the figures depend on the numbers
    best = metrics.prdc(view.test[:few], view.train[:few])
    for name, points in metrics.neighbours(view.test[:few], seen[:few]).items():
        mean, low, high = metrics.mean_interval(points)
        ends = (max(low, 0.0), high if name == "density" else min(high, 1.0))
        found[name] = {"value": mean, "low": ends[0], "high": ends[1], "n": few, "floor": best[name], "kind": view.name}
    return found


def _two_sample(seen: dict[str, np.ndarray], reference: Reference, seed: int) -> dict[str, Any]:
    """Accuracy of a classifier that tells samples from test images by judge and pixel features; 0.5 is chance."""

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([part[:TOLD_APART] for part in parts], 1)

    views = [reference.views[name] for name in ("judge", "pixels")]
    real = joined([view.test for view in views])
    value, low, high, n = metrics.two_sample(real, joined([seen[view.name] for view in views]), seed=seed)
    floor = metrics.two_sample(real, joined([view.train for view in views])[: len(seen["judge"])], seed=seed)[0]
    return {"value": value, "low": low, "high": high, "n": n, "floor": floor, "kind": "judge and pixels"}


def _classes(seen: np.ndarray, reference: Reference, names: tuple[str, ...]) -> dict[str, Any]:
    """How many classes are missing among samples; the interval counts those that may or must be."""
    n, count = len(seen), len(names)
    hits = np.bincount(classes(reference.judge, seen), minlength=count)
    real = classes(reference.judge, reference.views["judge"].test)
    expected = np.bincount(real, minlength=count) / len(real)
    ends = [metrics.wilson(int(hit), n) for hit in hits]
    least = MISSING * expected
    missing = [bool(hit / n < bound) for hit, bound in zip(hits, least, strict=True)]
    return {
        "value": sum(missing),
        "low": sum(bool(high < bound) for (_, high), bound in zip(ends, least, strict=True)),
        "high": sum(bool(low < bound) for (low, _), bound in zip(ends, least, strict=True)),
        "n": n,
        "floor": 0,
        "kind": "judge",
        "classes": [name for name, gone in zip(names, missing, strict=True) if gone],
        "names": list(names),
        "histogram": (hits / n).tolist(),
        "expected": expected.tolist(),
    }


def copied(samples: np.ndarray, data: Dataset, held_out: dict[str, Any] | None) -> dict[str, Any]:
    """Share of samples that are nearer to training images than chance has it, flagged where held-out images are not.

    Equal samples count once: a thousand times the same image is no evidence of copying, but of one mode.
    """
    found = metrics.copying(np.unique(samples, axis=0), data.split("train"), data.split("test"))
    figure = {"value": found.share, "low": found.low, "high": found.high, "n": found.n, "kind": "pixels"}
    figure |= {"p_value": found.p_value}
    if held_out is not None:
        figure |= {"floor": held_out["value"], "flagged": found.low > held_out["high"]}
    return figure


def _fine_detail(samples: np.ndarray, data: Dataset) -> dict[str, Any]:
    """Energy of fine detail (above half the Nyquist frequency) beside the test split's: below 1 blur, above noise."""
    real = metrics.fine_detail(data.split("test")[:POINTS])
    train = metrics.fine_detail(data.split("train")[:POINTS])
    mean, _, high = metrics.mean_interval(metrics.fine_detail(samples))
    scale = float(real.mean())
    # The interval holds the real images' own uncertainty as well: relative errors add in squares.
    half = np.hypot((high - mean) / scale, (mean / scale) * 1.96 * real.std(ddof=1) / np.sqrt(len(real)) / scale)
    ratio = mean / scale
    ends = {"low": float(ratio - half), "high": float(ratio + half)}
    return {"value": ratio, **ends, "n": len(samples), "floor": float(train.mean() / scale), "kind": "pixels"}
