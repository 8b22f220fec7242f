"""What is measured of a model that translates between two classes: does it arrive, and what of an image is kept."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch

from genus.data.loaders import Dataset
from genus.errors import UserError
from genus.evaluation import metrics
from genus.evaluation.judge import classes
from genus.sampling import translate

SEEN = 0.1  # of the range between black and white: pixels above it are the silhouette


class Way(NamedTuple):
    """Real images of one domain, stored [N, C, H, W], their translations, and these translated back."""

    source: int  # the label of the domain
    target: int
    real: np.ndarray
    there: np.ndarray
    back: np.ndarray


def ways(model: Any, data: Dataset, split: str, *, most: int, seed: int, device: torch.device) -> list[Way]:
    """Both directions, of at most so many images of a split each. The way back starts from what would be stored."""
    labels = np.asarray(data.labels(split))
    found = []
    for source, target in (model.domains, model.domains[::-1]):
        real = np.array(data.split(split)[np.flatnonzero(labels == source)[:most]])
        there = translate(model, real, target, seed=seed, device=device)
        back = translate(model, there, source, seed=seed + 1, device=device)
        found.append(Way(source, target, real, there, back))
    return found


def strips(model: Any, data: Dataset, split: str, *, columns: int, seed: int, device: torch.device) -> np.ndarray:
    """Six rows of stored images [6 columns, C, H, W]: real ones, their translations and these back, both directions.

    Raises UserError where the split has no images of a domain.
    """
    found = ways(model, data, split, most=columns, seed=seed, device=device)
    n = min(len(way.real) for way in found)
    if not n:
        missing = next(data.spec.classes[way.source] for way in found if not len(way.real))
        raise UserError(f"{data.folder}: the {split} split has no image of class '{missing}' to translate")
    blank = np.zeros((columns - n, *data.spec.shape), found[0].real.dtype)
    return np.concatenate([part for way in found for row in way[2:] for part in (row[:n], blank)])


def translation(task: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Rows of the evaluator's metrics for a model that Translates, of all test images of its domains:

    - translated_accuracy: share of translations that the judge takes for the target. ``floor``: of real images of the
      target; ``before``: of the sources;
    - cycle_error: mean absolute difference of an image and its translation back, white being 1;
    - kept_silhouette: intersection over union of what is not black in an image and in its translation.

    Each of both directions together, and by itself under ``ways``. Where a domain has no two test images there is none.
    Raises FloatingPointError where a translation is not finite.
    """
    data, judge = task.data, task.reference.judge
    started = time.monotonic()
    found = ways(task.model, data, "test", most=data.count("test"), seed=task.seed + 19, device=task.device)
    n = sum(len(way.real) for way in found)
    if any(len(way.real) < 2 for way in found):
        return {}, {}
    timing = {"translate_ms": 1e3 * (time.monotonic() - started) / (2 * n)}
    levels = data.spec.levels
    taken = task.reference.views["judge"].extract
    # What the judge takes real images for, by domain: each is the source of one way and the target of the other.
    real = {way.source: classes(judge, taken(way.real)) for way in found}
    hits, before, floors, cycle, kept = ([] for _ in range(5))
    for way in found:
        hits.append(classes(judge, taken(way.there)) == way.target)
        before.append(real[way.source] == way.target)
        floors.append(real[way.target] == way.target)
        cycle.append(cycle_errors(way, levels))
        kept.append(overlap(silhouette(way.real, levels), silhouette(way.there, levels)))
    names = [f"{data.spec.classes[way.source]} to {data.spec.classes[way.target]}" for way in found]
    accuracy = _share(np.concatenate(hits)) | {"floor": float(np.concatenate(floors).mean())}
    accuracy["before"] = float(np.concatenate(before).mean())
    accuracy["ways"] = {
        name: _share(hit) | {"floor": float(floor.mean()), "before": float(was.mean())}
        for name, hit, floor, was in zip(names, hits, floors, before, strict=True)
    }
    figures = {"translated_accuracy": accuracy}
    for key, values in (("cycle_error", cycle), ("kept_silhouette", kept)):
        each = {name: _mean(part) for name, part in zip(names, values, strict=True)}
        figures[key] = _mean(np.concatenate(values)) | {"ways": each}
    return figures, timing


def cycle_errors(way: Way, levels: int) -> np.ndarray:
    """Mean absolute difference of each image and its translation back, white being 1: [N] float64."""
    difference = np.abs(way.back.astype(np.float64) - way.real) / (levels - 1)
    return difference.reshape(len(difference), -1).mean(1)


def silhouette(images: np.ndarray, levels: int) -> np.ndarray:
    """Which pixels of stored images [N, C, H, W] are not black: bool [N, H, W]."""
    return np.asarray(images.max(1) > SEEN * (levels - 1))


def overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union of bool [N, H, W] with another: [N] float64; of two that are empty 1."""
    both, either = (one & other).sum((1, 2)), (one | other).sum((1, 2))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def _share(hits: np.ndarray) -> dict[str, Any]:
    low, high = metrics.wilson(int(hits.sum()), len(hits))
    return {"value": float(hits.mean()), "low": low, "high": high, "n": len(hits)}


def _mean(values: np.ndarray) -> dict[str, Any]:
    value, low, high = metrics.mean_interval(values)
    return {"value": value, "low": low, "high": high, "n": len(values)}
