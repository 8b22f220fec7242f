"""The probe: many short trainings of one model, by which stability, capacity and robustness are measured.

All jobs learn the same data, shrunk to ``size`` pixels a side, for the same number of steps, and differ in one thing each:
the seed, the learning rate, the width, the batch size, planted outliers, the resolution, or a parameter of the family.
Their quality is one figure that means the same for every family: the kernel distance of samples to the validation split
on the judge's features, as a share of what a Gaussian fitted to the pixels scores (1: no better than that; lower is better).
The test split is never read.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from genus import progress
from genus.config import Model, Probe
from genus.contract import Batch, Family, Samples, Scores, build, family_class, parameter_count
from genus.data.loaders import Dataset
from genus.data.spec import DataSpec
from genus.evaluation import metrics
from genus.evaluation.judge import Judge, features
from genus.sampling import draw
from genus.training import NonFiniteLoss, Row, train

TRAIN, REAL = 8192, 2000  # images that the jobs learn from, and are measured against
LIKELIHOODS = 500  # validation images scored
MISSING = 0.1  # a class is missing when samples have less than this share of what is expected
SPIKE = 5.0  # robust standard deviations above the running median
USABLE = 1.5  # a learning rate is usable when its quality is within this factor of the best one's


@dataclass(frozen=True)
class Job:
    """One short training; everything that is not said is as in params.yaml."""

    seed: int = 0
    learning_rate: float = 1.0  # multiplies the model's
    width: float = 1.0  # multiplies the parameters that the family names as its widths
    batch: float = 1.0  # multiplies the batch size
    outliers: float = 0.0  # share of the training images that are uniform noise
    size: int = 0  # side of the images; 0: the probe's
    params: tuple[tuple[str, Any], ...] = ()  # parameters of the family that differ


@dataclass(frozen=True)
class Outcome:
    """What a job came to. What cannot be measured is None; a job that failed says why and has no figures."""

    job: Job
    parameters: int = 0
    flops: float = 0.0  # of training, an image
    failed: str | None = None
    quality: float | None = None
    coverage: float | None = None
    missing_classes: int | None = None
    bits_per_dim: float | None = None
    pull: float | None = None  # gradient of an unseen outlier over that of a usual image
    spikes: float | None = None  # a thousand steps
    gradient_ratio: float | None = None  # 99th percentile over median of the gradient norm
    terms: dict[str, float] | None = None  # means over the last quarter of the steps


class Bench:
    """The data of all jobs at one resolution: training images, real images, and their features."""

    def __init__(self, data: Dataset, judge: Judge, size: int, seed: int):
        random = np.random.default_rng(seed)
        whole = data.split("train")
        chosen = np.sort(random.permutation(len(whole))[:TRAIN])
        self.spec = replace(data.spec, shape=(data.spec.shape[0], size, size))
        self.train = shrink(np.asarray(whole[chosen]), size, data.spec)
        self.labels = np.asarray(data.labels("train")[chosen])
        self.real = shrink(np.asarray(data.split("validation")[:REAL]), size, data.spec)
        self.real_labels = np.asarray(data.labels("validation")[:REAL])
        self.judge = judge
        self.seen = features(judge, self.real)
        control = metrics.gaussian_control(self.train, REAL, levels=self.spec.levels, seed=seed)
        self.control = self.distance(features(judge, control), seed)
        self.expected = np.bincount(classes(judge, self.seen), minlength=judge.head.out_features) / len(self.seen)

    def distance(self, seen: np.ndarray, seed: int) -> float:
        """KID to the real images: unbiased, so that few samples do."""
        return metrics.kid(seen, self.seen, seed=seed)[0]

    def noise(self, n: int, seed: int) -> np.ndarray:
        """Outliers: images of uniform noise, stored."""
        shape = (n, *self.spec.shape)
        return np.random.default_rng(seed).integers(self.spec.levels, size=shape).astype(self.train.dtype)


def shrink(images: np.ndarray, size: int, spec: DataSpec) -> np.ndarray:
    """Stored images [N, C, H, W] averaged down to [N, C, size, size], stored again."""
    if images.shape[-2:] == (size, size):
        return images
    parts = []
    for start in range(0, len(images), 1000):
        x = torch.from_numpy(np.array(images[start : start + 1000])).float()
        parts.append(functional.adaptive_avg_pool2d(x, size).round().byte().numpy())
    return np.concatenate(parts)


@torch.inference_mode()
def classes(judge: Judge, seen: np.ndarray) -> np.ndarray:
    """The class that the judge gives to each row of features: int64 [N]."""
    head = judge.head
    return head(torch.from_numpy(seen).to(head.weight.dtype)).argmax(1).numpy()


class Prober:
    """Runs the jobs of one model and keeps their outcomes; data are made once a resolution."""

    def __init__(self, config: Model, data: Dataset, judge: Judge, *, seed: int, device: torch.device):
        self.config, self.probe, self.data, self.judge = config, config.probe, data, judge
        self.seed, self.device = seed, device
        self.size = min(self.probe.size, *data.spec.shape[1:])
        self.benches: dict[int, Bench] = {}
        self.outcomes: dict[Job, Outcome] = {}
        self.seconds: dict[Job, float] = {}
        self.curve: list[dict[str, float]] = []  # of the first job: quality after some steps
        self.curve_seconds: list[float] = []

    def jobs(self) -> list[Job]:
        """All jobs, the base ones (one a seed) first."""
        probe = self.probe
        seeds = range(self.seed, self.seed + probe.seeds)
        found = [Job(seed=seed) for seed in seeds]
        found += [Job(seed=self.seed, learning_rate=rate) for rate in probe.learning_rates if rate != 1]
        if family_class(self.config.family).widths:
            found += [Job(seed=self.seed, width=width) for width in probe.widths if width != 1]
        if probe.batch != 1:
            found += [Job(seed=seed, batch=probe.batch) for seed in seeds]
        if probe.outliers:
            found += [Job(seed=seed, outliers=probe.outliers) for seed in seeds]
        limit = min(self.data.spec.shape[1:])
        found += [Job(seed=self.seed, size=size) for size in probe.sizes if size != self.size and size <= limit]
        found += [
            Job(seed=self.seed, params=((name, value),)) for name, values in probe.vary.items() for value in values
        ]
        return found

    def run(self) -> None:
        jobs = self.jobs()
        for done, job in enumerate(jobs, 1):
            started = time.monotonic()
            self.outcomes[job] = self.outcome(job)
            self.seconds[job] = time.monotonic() - started
            progress.report(done, len(jobs), unit="job")

    def bench(self, size: int) -> Bench:
        if size not in self.benches:
            self.benches[size] = Bench(self.data, self.judge, size, self.seed)
        return self.benches[size]

    def outcome(self, job: Job) -> Outcome:
        """Trains and measures one job."""
        bench = self.bench(job.size or self.size)
        torch.manual_seed(job.seed)
        model = build(self.config.family, bench.spec, self.params(job))
        found = Outcome(job, parameters=parameter_count(model), flops=self.flops(model, bench))
        torch.manual_seed(job.seed)  # counting draws nothing, but batch statistics have moved
        model = build(self.config.family, bench.spec, self.params(job))
        images = bench.train
        if job.outliers:
            images = images.copy()
            count = max(1, round(job.outliers * len(images)))
            # Within the images that the job really sees, at their share: fewer steps see fewer of them.
            where = np.random.default_rng(job.seed).permutation(len(images))[:count]
            images[where] = bench.noise(count, self.seed)
        base = job == Job(seed=self.seed)
        marks = frozenset(round(self.probe.steps * k / 4) for k in (1, 2, 3)) if base else frozenset()
        started, apart = time.monotonic(), 0.0

        def on_samples(model: Family, step: int) -> None:
            nonlocal apart
            begun = time.monotonic()
            self.mark(model, bench, step, begun - started - apart)
            apart += time.monotonic() - begun

        settings = self.config.train
        scaled = max(2, round(settings.batch_size * job.batch))
        rates: float | dict[str, float] = (
            {name: rate * job.learning_rate for name, rate in settings.learning_rate.items()}
            if isinstance(settings.learning_rate, dict)
            else settings.learning_rate * job.learning_rate
        )
        settings = settings.model_copy(update={"batch_size": scaled, "learning_rate": rates})
        try:
            result = train(
                model,
                images,
                bench.labels,
                settings,
                steps=self.probe.steps,
                seed=job.seed,
                device=self.device,
                log_every=1,
                on_samples=on_samples if isinstance(model, Samples) else None,
                samples_at=marks,
            )
            if base and isinstance(model, Samples):
                self.mark(result.model, bench, self.probe.steps, time.monotonic() - started - apart)
            return self.measured(found, result.model, result.history, bench)
        except (NonFiniteLoss, FloatingPointError, torch.linalg.LinAlgError) as failure:
            return replace(found, failed=" ".join(str(failure).split()))

    def params(self, job: Job) -> dict[str, Any]:
        """The family's parameters for a job: widths are scaled, keeping what they are multiples of."""
        params = self.config.params | dict(job.params)
        if job.width != 1:
            family = family_class(self.config.family)
            defaults = inspect.signature(family.__init__).parameters
            for name in family.widths:
                value = params.get(name, defaults[name].default)
                params[name] = (
                    [_scaled(part, job.width) for part in value]
                    if isinstance(value, list | tuple)
                    else _scaled(value, job.width)
                )
        return params

    def mark(self, model: Family, bench: Bench, step: int, seconds: float) -> None:
        """A point of the first job's learning curve."""
        quality, _ = self.quality(model, bench, self.seed)
        self.curve.append({"step": float(step), "quality": quality})
        self.curve_seconds.append(seconds)

    def quality(self, model: Family, bench: Bench, seed: int) -> tuple[float, np.ndarray]:
        """The share of the Gaussian control's distance that samples have, and the samples' features."""
        drawn = draw(
            model,
            self.probe.samples,
            seed=seed,
            device=self.device,
            batch_size=self.probe.samples,
            knobs=self.config.evaluate.knobs | self.probe.knobs,
            quiet=True,
        )
        seen = features(bench.judge, drawn)
        return bench.distance(seen, self.seed) / bench.control, seen

    def measured(self, found: Outcome, model: Family, history: list[Row], bench: Bench) -> Outcome:
        """An outcome with the figures of its trained model."""
        steps = {name: np.array([row[name] for row in history if name in row]) for name in history[-1]}
        losses = [values for name, values in steps.items() if name == "loss" or name.endswith("_loss")]
        norms = [values for name, values in steps.items() if name.endswith("grad_norm")]
        last = {name: float(values[-max(1, len(values) // 4) :].mean()) for name, values in steps.items()}
        found = replace(
            found,
            spikes=1000 * max(spikes(values) for values in losses) / len(history),
            gradient_ratio=max(float(np.quantile(values, 0.99) / np.median(values)) for values in norms),
            pull=self.pull(model, bench),
            terms={name: value for name, value in last.items() if name not in ("step", "learning_rate")},
        )
        if isinstance(model, Scores):
            found = replace(found, bits_per_dim=self.bits_per_dim(model, bench))
        if isinstance(model, Samples):
            quality, seen = self.quality(model, bench, found.job.seed)
            shares = np.bincount(classes(bench.judge, seen), minlength=len(bench.expected)) / len(seen)
            found = replace(
                found,
                quality=quality,
                coverage=metrics.prdc(bench.seen[: len(seen)], seen)["coverage"],
                missing_classes=int((shares < MISSING * bench.expected).sum()) if bench.judge.labelled else None,
            )
        return found

    @torch.inference_mode()
    def bits_per_dim(self, model: Any, bench: Bench) -> float:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        x = bench.spec.to_float(torch.from_numpy(bench.real[:LIKELIHOODS]).to(self.device))
        nats = model.log_prob(Batch(x), generator=generator).double().mean().item()
        if not math.isfinite(nats):
            raise FloatingPointError("log_prob of a validation image is not finite")
        return -nats / (bench.spec.dims * math.log(2))

    def pull(self, model: Family, bench: Bench) -> float:
        """How hard an image of noise pulls on the parameters, beside a usual image: ratio of gradient norms."""
        usual = bench.real[: self.config.train.batch_size]
        ratio = _gradient(model, bench.noise(len(usual), self.seed), bench.spec, self.device) / _gradient(
            model, usual, bench.spec, self.device
        )
        model.eval()
        return ratio

    def flops(self, model: Family, bench: Bench) -> float:
        """Floating-point operations of one training step, all its updates, an image."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            n = min(16, len(bench.train))
            _gradient(model, bench.train[:n], bench.spec, self.device)
        return counter.get_total_flops() / n


def _scaled(value: int, factor: float) -> int:
    """``value * factor``, a multiple of 8 or 4 where ``value`` is one: networks group their channels."""
    unit = next(unit for unit in (8, 4, 1) if value % unit == 0)
    return max(unit, unit * round(value * factor / unit))


def _gradient(model: Family, images: np.ndarray, spec: DataSpec, device: torch.device) -> float:
    """Norm of the gradients of all updates of one batch; changes no parameter."""
    model.to(device).train().requires_grad_(True)
    generator = torch.Generator(device).manual_seed(0)
    x = spec.to_float(torch.from_numpy(np.array(images)).to(device))
    batch = Batch(x, torch.zeros(len(x), dtype=torch.int64, device=device))
    groups, total = model.groups(), 0.0
    for group, terms in model.updates(batch, generator=generator):
        slopes = torch.autograd.grad(terms["loss"], groups[group], retain_graph=True, allow_unused=True)
        total += sum(float(slope.double().square().sum()) for slope in slopes if slope is not None)
    return math.sqrt(total)


def spikes(losses: np.ndarray, window: int = 15) -> int:
    """Steps whose loss is more than 5 σ above the median of the steps around it, σ robust (1.4826 MAD)."""
    if len(losses) < window:
        return 0
    padded = np.pad(losses, window // 2, mode="reflect")
    residual = losses - np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)
    sigma = 1.4826 * np.median(np.abs(residual))
    return int((residual > SPIKE * sigma).sum()) if sigma > 0 else 0


def summarise(prober: Prober) -> dict[str, Any]:
    """The figures of a probe: stability, capacity, outliers, resolution and what ``vary`` varied.

    A figure is {"value", "low", "high", "n"}; what could not be measured is None. Intervals: 95%, over the seeds.
    """
    outcomes = list(prober.outcomes.values())
    seed, probe = prober.seed, prober.probe

    def those(**wanted: Any) -> list[Outcome]:
        """Outcomes of the base job but for ``wanted``; a value of None stands for any."""
        usual = asdict(Job(seed=seed)) | wanted
        return [
            found
            for found in outcomes
            if all(value is None or getattr(found.job, name) == value for name, value in usual.items())
        ]

    base, rates, widths = those(seed=None), those(learning_rate=None), those(width=None)
    small, planted = those(seed=None, batch=probe.batch), those(seed=None, outliers=probe.outliers)
    return {
        "stability": {
            "diverged": _share([diverged(found, base) for found in (*base, *small)]),
            "spread": _spread(base),
            "spikes": _mean([found.spikes for found in base]),
            "gradient_ratio": _mean([found.gradient_ratio for found in base]),
            "usable_learning_rates": _usable(rates),
            "small_batch_cost": _ratio(base, small) if probe.batch != 1 else None,
            "small_batch_spread": _spread(small) if probe.batch != 1 else None,
            "outlier_cost": _ratio(base, planted) if probe.outliers else None,
            "outlier_pull": _mean([found.pull for found in base]),
        },
        "capacity": {
            "quality": _mean([found.quality for found in base], positive=True),
            "coverage": _mean([found.coverage for found in base]),
            "missing_classes": _mean([found.missing_classes for found in base]),
            "flops": {"value": base[0].flops, "n": 1},
            "slope": _slope(widths),
            "at_equal_parameters": _at(widths, _mean([found.quality for found in base], positive=True)),
            "resolution_cost": _resolution(those(size=None), prober.size),
        },
        "vary": {name: _vary(name, outcomes, base[0]) for name in probe.vary},
    }


EQUAL_PARAMETERS = 200_000  # where families are compared at equal size


def diverged(found: Outcome, peers: Iterable[Outcome]) -> bool:
    """Not finite, or three times as bad as the median of its peers: lost, even if its loss is still a number."""
    qualities = [peer.quality for peer in peers if peer.quality is not None]
    if found.failed or found.quality is None or not qualities:
        return bool(found.failed)
    return found.quality > 3 * float(np.median(qualities))


def _figure(value: float, low: float, high: float, n: int, **more: Any) -> dict[str, Any]:
    return {"value": float(value), "low": float(low), "high": float(high), "n": n} | more


def _share(hits: list[bool]) -> dict[str, Any]:
    """A share with its 95% Wilson interval."""
    n, z = len(hits), 1.96
    p = sum(hits) / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return _figure(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale), n)


def _mean(values: Iterable[float | None], *, positive: bool = False) -> dict[str, Any] | None:
    """The mean with its 95% t interval; of the logarithms (a geometric mean) where ``positive``."""
    from scipy import stats

    found = np.array([value for value in values if value is not None], float)
    if not len(found):
        return None
    positive = positive and bool((found > 0).all())
    logs = np.log(found) if positive else found
    half = stats.t.ppf(0.975, len(found) - 1) * logs.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else math.inf
    ends = (logs.mean(), logs.mean() - half, logs.mean() + half)
    value, low, high = (math.exp(min(end, 700.0)) for end in ends) if positive else ends
    return _finite(_figure(value, low, high, len(found)))


def _finite(figure: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: an interval without an end says None."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in figure.items()}


def _spread(found: list[Outcome]) -> dict[str, Any] | None:
    """Interquartile range over median of the quality across seeds; the interval from resampling the seeds."""
    values = np.array([outcome.quality for outcome in found if outcome.quality is not None])
    if len(values) < 2:
        return None

    def spread(rows: np.ndarray) -> np.ndarray:
        quartiles = np.quantile(rows, [0.25, 0.5, 0.75], axis=-1)
        return (quartiles[2] - quartiles[0]) / np.abs(quartiles[1])

    # The exact bootstrap of so few: an F interval would assume normal figures, resampling ends at the largest seen.
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(spread(draws), [0.025, 0.975])
    return _figure(float(spread(values)), low, high, len(values))


def _usable(found: list[Outcome]) -> dict[str, Any] | None:
    """Decades between the smallest and the largest usable learning rate, without a gap around the best."""
    order = sorted(found, key=lambda outcome: outcome.job.learning_rate)
    qualities = [math.inf if outcome.quality is None else outcome.quality for outcome in order]
    if not any(map(math.isfinite, qualities)):
        return None
    best = int(np.argmin(qualities))
    good = [quality <= max(USABLE * qualities[best], qualities[best] + 0.02) for quality in qualities]
    first = last = best
    while first > 0 and good[first - 1]:
        first -= 1
    while last + 1 < len(order) and good[last + 1]:
        last += 1
    rates = [outcome.job.learning_rate for outcome in order]
    # The true ends lie between the last usable rate and the next one tried.
    wider = math.log10(rates[min(last + 1, len(rates) - 1)] / rates[max(first - 1, 0)])
    decades = math.log10(rates[last] / rates[first])
    return _figure(decades, decades, wider, len(order), best=rates[best])


def _ratio(base: list[Outcome], changed: list[Outcome]) -> dict[str, Any] | None:
    """Quality of the changed jobs over that of the base jobs of the same seeds: 1 is no cost."""
    before = {found.job.seed: found.quality for found in base}
    pairs = [(before.get(found.job.seed), found.quality) for found in changed]
    return _mean([b / a if a and b and a > 0 and b > 0 else None for a, b in pairs], positive=True)


def _line(found: list[Outcome]) -> tuple[np.ndarray, np.ndarray] | None:
    """log2 of parameters and of quality over the widths, where at least two are known."""
    known = [outcome for outcome in found if outcome.quality is not None and outcome.quality > 0]
    if len({outcome.parameters for outcome in known}) < 2:
        return None
    return np.log2([o.parameters for o in known]), np.log2([o.quality or 1.0 for o in known])


def _slope(found: list[Outcome]) -> dict[str, Any] | None:
    """Factor of the quality a doubling of the parameters: below 1 is a gain. Points: every width."""
    line = _line(found)
    if line is None:
        return None
    slope = np.polyfit(*line, 1)[0]
    points = [
        {
            "width": outcome.job.width,
            "parameters": outcome.parameters,
            "flops": outcome.flops,
            "quality": outcome.quality,
            "coverage": outcome.coverage,
            "missing_classes": outcome.missing_classes,
        }
        for outcome in sorted(found, key=lambda outcome: outcome.job.width)
    ]
    return {"value": float(2**slope), "low": None, "high": None, "n": len(line[0]), "points": points}


def _at(found: list[Outcome], base: dict[str, Any] | None) -> dict[str, Any] | None:
    """Quality at EQUAL_PARAMETERS on the line through the widths, with the seeds' relative interval."""
    line = _line(found)
    if line is None or base is None:
        return None
    value = float(2 ** np.polyval(np.polyfit(*line, 1), math.log2(EQUAL_PARAMETERS)))
    ends = [None if base[end] is None else value * base[end] / base["value"] for end in ("low", "high")]
    return {"value": value, "low": ends[0], "high": ends[1], "n": len(line[0]), "parameters": EQUAL_PARAMETERS}


def _resolution(found: list[Outcome], size: int) -> dict[str, Any] | None:
    """Factor of the quality from the smallest to the largest resolution, at equal steps. Points: every size."""
    known = sorted(
        ((outcome.job.size or size, outcome.quality) for outcome in found if outcome.quality is not None),
        key=lambda pair: pair[0],
    )
    if len(known) < 2 or known[0][1] <= 0:
        return None
    points = [{"size": side, "quality": quality} for side, quality in known]
    return {"value": known[-1][1] / known[0][1], "low": None, "high": None, "n": len(known), "points": points}


def _vary(name: str, outcomes: list[Outcome], base: Outcome) -> list[dict[str, Any]]:
    """The terms and the quality at every value of one parameter, the model's own value as None."""
    found = [base] + [outcome for outcome in outcomes if dict(outcome.job.params).keys() == {name}]
    return [
        {
            "value": dict(outcome.job.params).get(name),
            "quality": outcome.quality,
            "failed": outcome.failed,
            "terms": outcome.terms,
        }
        for outcome in found
    ]


Measure = Callable[[Prober], dict[str, Any]]


def setting(probe: Probe, size: int, jobs: int) -> dict[str, Any]:
    """What was done, for the report."""
    return probe.model_dump(mode="json") | {"size": size, "jobs": jobs, "train_images": TRAIN, "real_images": REAL}
