"""Every figure of a trained model: a table of metrics, each with the capability that it needs."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from genus import progress
from genus.config import Evaluate
from genus.contract import Batch, Family, Samples, Scores
from genus.data.loaders import Dataset
from genus.evaluation import metrics
from genus.evaluation.judge import features
from genus.evaluation.reference import Reference
from genus.sampling import draw
from genus.training import autocast, peak_memory_mb

Figures = dict[str, dict[str, Any]]  # metric: {"value", "low", "high", "n", "floor", "kind", …}
Timing = dict[str, float]

FRECHET_FROM = 500  # a Fréchet distance of fewer samples is mostly bias: KID only
SAMPLING_SECONDS = 60.0  # what drawing the samples may take; more is said, not hidden


@dataclass(frozen=True)
class Task:
    """One evaluation: what is measured, on which data, with how much effort."""

    model: Any  # a Family that also has the capability of the metric
    data: Dataset
    reference: Reference
    effort: Evaluate
    seed: int
    device: torch.device


class Metric(NamedTuple):
    needs: type
    measure: Callable[[Task], tuple[Figures, Timing]]


def evaluate(task: Task) -> tuple[Figures, Timing]:
    """Runs every metric whose capability the model has. Timings are apart: they differ from run to run."""
    started = time.monotonic()
    figures: Figures = {}
    timing: Timing = {}
    for metric in METRICS:
        if isinstance(task.model, metric.needs):
            found, seconds = metric.measure(task)
            figures |= found
            timing |= seconds
    timing["evaluate_seconds"] = time.monotonic() - started
    timing["evaluate_peak_memory_mb"] = peak_memory_mb()
    return figures, timing


@torch.inference_mode()
def likelihood(task: Task) -> tuple[Figures, Timing]:
    """Bits/dim of the test split: -log_prob / (D ln 2), the mean with its 95% interval over examples."""
    model, spec = task.model, task.data.spec
    images = task.data.split("test")[: task.effort.likelihoods]
    generator = torch.Generator(task.device).manual_seed(task.seed + 11)
    started, parts = time.monotonic(), []
    for start in range(0, len(images), task.effort.batch_size):
        stored = torch.from_numpy(np.array(images[start : start + task.effort.batch_size])).to(task.device)
        with autocast(task.device):
            parts.append(model.log_prob(Batch(spec.to_float(stored)), generator=generator).double().cpu())
        progress.report(start + len(stored), len(images), unit="likelihood")
    seconds = time.monotonic() - started
    bits = -torch.cat(parts).numpy() / (spec.dims * math.log(2))
    if not np.isfinite(bits).all():
        raise FloatingPointError(f"log_prob of test image {int(np.flatnonzero(~np.isfinite(bits))[0])} is not finite")
    half = 1.96 * bits.std(ddof=1) / math.sqrt(len(bits))
    value = float(bits.mean())
    figure = {"value": value, "low": value - half, "high": value + half, "n": len(bits), "kind": model.density}
    return {"bits_per_dim": figure}, {"likelihood_ms": 1e3 * seconds / len(bits)}


def sample_quality(task: Task) -> tuple[Figures, Timing]:
    """Fréchet distance and KID of samples against the test split on judge features, each with its floor.

    The floor is what as many training images score. ``relative`` is the share of the Gaussian control's distance.
    """
    effort, reference = task.effort, task.reference
    warm = min(effort.batch_size, effort.samples)
    draw(task.model, min(2, warm), seed=0, device=task.device, knobs=effort.knobs, quiet=True)  # first-call costs
    started = time.monotonic()
    drawn = draw(
        task.model, effort.samples, seed=task.seed + 12, device=task.device, batch_size=warm, knobs=effort.knobs
    )
    seconds = time.monotonic() - started
    if seconds > SAMPLING_SECONDS:
        print(f"note: {len(drawn)} samples took {seconds:.0f} s; evaluate.samples sets how many", file=sys.stderr)
    seen = features(reference.judge, drawn)
    n, floor = len(seen), reference.floor(len(seen))
    value, error = metrics.kid(seen, reference.test, seed=task.seed)
    figures: Figures = {
        "kid": {
            "value": value,
            "low": value - 1.96 * error,
            "high": value + 1.96 * error,
            "n": n,
            "floor": metrics.kid(floor, reference.test, seed=task.seed)[0],
            "kind": "judge",
        }
    }
    if n >= min(FRECHET_FROM, len(reference.test)):
        distance = reference.frechet(seen)
        low, high = metrics.bootstrap(reference.frechet, seen, seed=task.seed)
        figures["frechet_distance"] = {
            "value": distance,
            "low": low,
            "high": high,
            "n": n,
            "floor": reference.frechet(floor),
            "floor_n": len(floor),
            "relative": distance / reference.control,
            "control": reference.control,
            "kind": "judge",
        }
    return figures, {"sample_ms": 1e3 * seconds / n, "sample_seconds": seconds}


METRICS = (Metric(Scores, likelihood), Metric(Samples, sample_quality))


def load_model(about: dict[str, Any], weights: dict[str, torch.Tensor]) -> Family:
    """A trained model from its model.json and tensors, in evaluation mode."""
    from genus.contract import build
    from genus.data.spec import DataSpec

    model = build(about["family"], DataSpec.from_json(about["spec"]), about["params"])
    model.load_state_dict(weights)
    return model.eval()
