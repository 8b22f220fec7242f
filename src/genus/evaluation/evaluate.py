"""Every figure of a trained model: a table of metrics, each with the capability that it needs.

``METRICS`` is the table for images and other numbers; text has its own, in text/evaluate.py.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from genus import progress
from genus.config import Evaluate
from genus.contract import (
    Batch,
    Conditional,
    Decodes,
    Denoises,
    Encodes,
    Informs,
    Quantises,
    Samples,
    Scores,
    Translates,
    Weighs,
)
from genus.data.loaders import Dataset
from genus.errors import UserError
from genus.evaluation import codes, constraints, metrics, ode, two_d
from genus.evaluation.disentanglement import disentanglement
from genus.evaluation.judge import accuracy, train_judge
from genus.evaluation.latent import active_units, rate
from genus.evaluation.quality import FRECHET_FROM, Figures, quality
from genus.evaluation.translation import translation
from genus.sampling import draw
from genus.training import autocast, peak_memory_mb

Timing = dict[str, Any]  # figures of time: they differ from run to run and stand in files of their own

SAMPLING_SECONDS = 60.0  # what drawing the samples may take; more is said, not hidden
REPEATS, PATIENCE = 7, 4.0  # timed drawings of a batch, and seconds after which no further one is begun
INVERTED = 200  # test examples that are encoded and decoded again
TABLED = 500  # training examples from which a score model's level table is made
LEARNT = 600  # steps of the classifier that learns from generated examples


@dataclass(frozen=True)
class Task:
    """One evaluation: what is measured, on which data, with how much effort."""

    model: Any  # a Family that also has the capability of the metric
    data: Dataset
    reference: Any  # what samples are measured against: images have a Reference, text one of its own
    effort: Evaluate
    seed: int
    device: torch.device
    held_out: dict[str, Any] | None = None  # what held-out real examples score as memorisation

    @cached_property
    def drawn(self) -> tuple[np.ndarray, float]:
        """The model's samples, stored [n, *shape], and the seconds that they took. Drawn once for all metrics.

        Raises FloatingPointError where one is not finite.
        """
        effort = self.effort
        warm = min(effort.batch_size, effort.samples)
        self.draw(min(2, warm), seed=0)  # first-call costs
        started = time.monotonic()
        drawn = self.draw(effort.samples, seed=self.seed + 12, batch_size=warm, quiet=False)
        seconds = time.monotonic() - started
        if seconds > SAMPLING_SECONDS:
            print(f"note: {len(drawn)} samples took {seconds:.0f} s; evaluate.samples sets how many", file=sys.stderr)
        return drawn, seconds

    def draw(
        self, n: int, *, seed: int, batch_size: int = 64, knobs: Mapping[str, Any] | None = None, quiet: bool = True
    ) -> np.ndarray:
        """``n`` samples, stored, with the model's knobs and over them ``knobs``."""
        knobs = self.effort.knobs | dict(knobs or {})
        return draw(self.model, n, seed=seed, device=self.device, batch_size=batch_size, knobs=knobs, quiet=quiet)

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Every combination of the knobs' values that ``evaluate.curve`` names."""
        curve = self.effort.curve
        return [dict(zip(curve, values, strict=True)) for values in product(*curve.values())] if curve else []

    def tried(self, knobs: Mapping[str, Any]) -> np.ndarray:
        """As many samples as are measured, with other knobs. Raises UserError where the model does not take them."""
        effort = self.effort
        try:
            return self.draw(effort.samples, seed=self.seed + 12, batch_size=effort.batch_size, knobs=knobs)
        except (TypeError, ValueError) as error:
            raise UserError(f"evaluate.curve: {dict(knobs)}: {error}") from error

    def count(self, key: str) -> int:
        """Test examples that ``evaluate.<key>`` asks for; the default is as many as there are.

        Raises UserError where more are asked for than there are.
        """
        wanted, there = getattr(self.effort, key), self.data.count("test")
        if wanted > there and key in self.effort.model_fields_set:
            raise UserError(f"evaluate.{key}: {wanted:,} is more than the {there:,} examples of the test split")
        return min(wanted, there)

    def test(self, n: int) -> torch.Tensor:
        """The first ``n`` test examples in the units of DataSpec, on the device."""
        return self.data.spec.to_float(torch.from_numpy(np.array(self.data.split("test")[:n])).to(self.device))

    def generator(self, number: int) -> torch.Generator:
        """A generator of its own for every metric: adding one changes no other's figure."""
        return torch.Generator(self.device).manual_seed(self.seed + number)


class Metric(NamedTuple):
    needs: tuple[type, ...]
    measure: Callable[[Task], tuple[Figures, Timing]]


def evaluate(task: Task, table: Sequence[Metric] | None = None) -> tuple[Figures, Timing]:
    """Runs every metric of ``table`` whose capabilities the model has; the default is ``METRICS``, for images.

    Timings are apart: they differ from run to run.

    Raises FloatingPointError, naming the example, where a likelihood or a sample is not finite.
    """
    started = time.monotonic()
    figures: Figures = {}
    timing: Timing = {}
    for metric in METRICS if table is None else table:
        if all(isinstance(task.model, needed) for needed in metric.needs):
            begun = time.monotonic()
            found, seconds = metric.measure(task)
            figures |= found
            timing |= seconds | {f"{metric.measure.__name__}_seconds": time.monotonic() - begun}
    timing["evaluate_seconds"] = time.monotonic() - started
    timing["evaluate_peak_memory_mb"] = peak_memory_mb()
    return figures, timing


@torch.inference_mode()
def likelihood(task: Task) -> tuple[Figures, Timing]:
    """Bits/dim of the test split: -log_prob / (D ln 2), the mean with its 95% interval over examples."""
    model, spec = task.model, task.data.spec
    images = task.data.split("test")[: task.count("likelihoods")]
    generator = task.generator(11)
    started, parts = time.monotonic(), []
    for start in range(0, len(images), task.effort.batch_size):
        stored = torch.from_numpy(np.array(images[start : start + task.effort.batch_size])).to(task.device)
        with autocast(task.device):
            parts.append(model.log_prob(Batch(spec.to_float(stored)), generator=generator).double().cpu())
        progress.report(start + len(stored), len(images), unit="likelihood")
    seconds = time.monotonic() - started
    figure = _bits(torch.cat(parts), spec.dims) | {"kind": model.density}
    return {"bits_per_dim": figure}, {"likelihood_ms": 1e3 * seconds / len(images)}


def _bits(nats: torch.Tensor, dims: int) -> dict[str, Any]:
    """Log-probabilities [N] as bits/dim. Raises FloatingPointError at the first that is not finite."""
    bits = -nats.double().cpu().numpy() / (dims * math.log(2))
    if not np.isfinite(bits).all():
        raise FloatingPointError(f"log_prob of test image {int(np.flatnonzero(~np.isfinite(bits))[0])} is not finite")
    value, low, high = metrics.mean_interval(bits)
    return {"value": value, "low": low, "high": high, "n": len(bits)}


@torch.inference_mode()
def tighter_bound(task: Task) -> tuple[Figures, Timing]:
    """The importance-weighted bound for k = 1, 2, 4 … draws of the code, and the gap between the first and the last.

    Burda et al. 2015 (1509.00519, eq. 8). The bound for k is the mean over disjoint groups of k of the same draws, so
    that it can only tighten as k grows, here and not just in expectation.
    """
    dims, k = task.data.spec.dims, task.effort.weights
    images = task.test(task.count("weighed"))
    generator = task.generator(13)
    started, parts = time.monotonic(), []
    for x in images.split(min(task.effort.batch_size, 50)):
        with autocast(task.device):
            parts.append(task.model.log_weights(Batch(x), k, generator=generator).double())
    weights = torch.cat(parts, 1)  # [k, N]
    points, bound = [], weights
    for doubled in range(int(math.log2(k)) + 1):
        points.append({"k": 2**doubled} | _bits(bound.mean(0), dims))
        even = len(bound) // 2 * 2
        last, bound = bound, torch.logaddexp(bound[0:even:2], bound[1:even:2]) - math.log(2)
    tightened = (last.mean(0) - weights.mean(0)).numpy(force=True) / (dims * math.log(2))
    value, low, high = metrics.mean_interval(tightened)
    best = points[-1]
    gap = {"value": value, "low": low, "high": high, "n": len(images), "kind": f"elbo - iwae-{best['k']}"}
    figure = best | {"kind": f"iwae-{best['k']}", "gap": gap, "points": points}
    return {"iwae_bits_per_dim": figure}, {"iwae_ms": 1e3 * (time.monotonic() - started) / len(images)}


def probability_flow(task: Task) -> tuple[Figures, Timing]:
    """Bits/dim by the ordinary differential equation that a score model also solves, on a stated subset.

    ``uniform`` is the same with uniform dequantisation, the older convention.
    """
    dims, images = task.data.spec.dims, task.test(task.count("flowed"))
    known = np.array(task.data.split("train")[:TABLED])
    known_x = task.data.spec.to_float(torch.from_numpy(known).to(task.device))
    table = ode.level_table(task.model, known_x, generator=task.generator(18))
    started = time.monotonic()
    found = ode.log_prob(task.model, images, generator=task.generator(14), table=table, probes=2)
    seconds = time.monotonic() - started
    figure = _bits(found.nats, dims) | {"kind": found.kind, "nfe": found.nfe, "probes": found.probes}
    figure |= {"rtol": found.rtol, "atol": found.atol, "sigma": found.start}
    figure |= {"spread": float(found.spread.mean()) / (dims * math.log(2))}  # an example's error by the trace's probes
    uniform = ode.log_prob(task.model, images, generator=task.generator(14))
    figure |= {"uniform": _bits(uniform.nats, dims)}
    return {"ode_bits_per_dim": figure}, {"ode_ms": 1e3 * seconds / len(images)}


def sample_quality(task: Task) -> tuple[Figures, Timing]:
    """All that samples score against the test split."""
    drawn, seconds = task.drawn
    found = quality(drawn, task.data, task.reference, seed=task.seed, memorisation=task.held_out)
    return found, {"sample_ms": 1e3 * seconds / len(drawn), "sample_seconds": seconds}


def sampling(task: Task) -> tuple[Figures, Timing]:
    """What a sample costs: network evaluations, random numbers, and warm milliseconds at batch 1 and 64."""
    knobs = task.effort.knobs
    calls = constraints.evaluations(task.model, seed=task.seed, knobs=knobs)
    noise = constraints.noise_dims(task.model, seed=task.seed, knobs=knobs)
    times = {f"sample_ms_{n}": milliseconds(task, n) for n in (1, 64)}
    return {"nfe": {"value": calls, "n": 1}, "noise_dims": {"value": noise, "n": 1}}, times


def milliseconds(task: Task, n: int) -> float:
    """Median milliseconds a sample, drawn ``n`` at a time."""
    task.draw(n, seed=0, batch_size=n)
    seconds: list[float] = []
    while len(seconds) < REPEATS and (len(seconds) < 2 or sum(seconds) < PATIENCE):
        started = time.monotonic()
        task.draw(n, seed=len(seconds), batch_size=n)
        seconds.append(time.monotonic() - started)
    return 1e3 * statistics.median(seconds) / n


def knob_curve(task: Task) -> tuple[Figures, Timing]:
    """Quality against time and network evaluations at other settings of the knobs that ``evaluate.curve`` names."""
    view = task.reference.views["judge"]
    points, times = [], []
    for knobs in task.settings:
        started = time.monotonic()
        drawn = task.tried(knobs)
        times.append(1e3 * (time.monotonic() - started) / len(drawn))
        point = {"knobs": knobs, "n": len(drawn)}
        point["calls"] = constraints.evaluations(task.model, seed=task.seed, knobs=task.effort.knobs | knobs)
        if len(drawn) >= min(FRECHET_FROM, len(view.test)):
            seen = view.extract(drawn)
            low, high = metrics.bootstrap(view.frechet, seen, seed=task.seed)
            ends = {"relative": view.frechet(seen), "low": low, "high": high}
            point |= {name: value / view.control for name, value in ends.items()}
        points.append(point)
    return ({"curve": {"points": points}}, {"curve_sample_ms": times}) if points else ({}, {})


def code_size(task: Task) -> tuple[Figures, Timing]:
    """Numbers in a code for each number in an example."""
    return {"latent_share": {"value": task.model.latent / task.data.spec.dims, "n": 1}}, {}


@torch.inference_mode()
def inverse(task: Task) -> tuple[Figures, Timing]:
    """Largest error of decode(encode(x)), in levels, where the code is of the data's size: there an inverse exists."""
    spec = task.data.spec
    if task.model.latent != spec.dims:
        return {}, {}
    x = task.test(INVERTED)
    error = float((task.model.decode(task.model.encode(x)) - x).abs().max())
    return {"inverse_error": {"value": error * (spec.levels - 1) / 2 if spec.levels else error, "n": len(x)}}, {}


def asked_for(task: Task) -> tuple[Figures, Timing]:
    """Of samples that are asked for by label: how many the judge takes for that, and what can be learnt from them.

    The latter is the accuracy on real test images of a classifier that has learnt from generated ones alone. The floor
    of both is the judge's own accuracy, which has learnt from real ones.
    """
    n, model, spec = task.effort.samples, task.model, task.data.spec
    labels = torch.arange(n, device=task.device) % model.labels
    generator, parts = task.generator(15), []
    with torch.inference_mode(), autocast(task.device):
        for cond in labels.split(task.effort.batch_size):
            x = model.sample(len(cond), generator=generator, cond=cond, **task.effort.knobs)
            parts.append(spec.to_stored(x.float()).cpu().numpy())
    torch.manual_seed(task.seed)
    options: dict[str, Any] = {"steps": LEARNT, "batch_size": 64, "learning_rate": 4e-3}
    drawn, wanted = np.concatenate(parts), labels.cpu().numpy()
    learner = train_judge(spec, drawn, wanted, device=task.device, **options)
    test = task.data.split("test"), task.data.labels("test")
    figures = {}
    for name, judge, (images, truth) in (
        ("asked_accuracy", task.reference.judge, (drawn, wanted)),
        ("generated_accuracy", learner, test),
    ):
        right = accuracy(judge, images, truth)
        low, high = metrics.wilson(right * len(images), len(images))
        figures[name] = {"value": right, "low": low, "high": high, "n": n, "floor": task.reference.accuracy}
    return figures, {}


METRICS = (
    Metric((Scores,), likelihood),
    Metric((Scores,), two_d.excess),
    Metric((Weighs,), tighter_bound),
    Metric((Denoises,), probability_flow),
    Metric((Denoises,), two_d.score_excess),
    Metric((Quantises,), codes.codes),
    Metric((Samples,), sample_quality),
    Metric((Samples,), sampling),
    Metric((Samples,), knob_curve),
    Metric((Conditional,), asked_for),
    Metric((Translates,), translation),
    Metric((Decodes,), code_size),
    Metric((Encodes, Decodes), inverse),
    Metric((Informs,), rate),
    Metric((Informs, Encodes), active_units),
    Metric((Encodes, Decodes), disentanglement),
)
