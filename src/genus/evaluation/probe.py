"""The probe: many short trainings of one model, by which stability, capacity and robustness are measured.

All jobs learn the same data, for the same number of steps, and differ in one thing each: the seed, the learning rate,
the width, the batch size, planted outliers, the resolution, or a parameter of the family. Their quality is one figure
that means the same for every family. Of images, shrunk to ``size`` pixels a side, it is the kernel distance (KID,
Bińkowski et al. 2018) of samples to the validation split on the judge's features, as a share of what a Gaussian fitted
to the pixels scores (1: no better than that; lower is better; 0: as real images, and unbiased, so it may fall below).
Of text it is the bits a character of validation documents, as a share of what a model of pairs of symbols needs.
The test split is never read. A job that fails is an outcome: it counts as having learned nothing.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from genus import progress
from genus.config import Model, Probe
from genus.contract import (
    Batch,
    Carries,
    Family,
    Initialises,
    Samples,
    Scores,
    Translates,
    build,
    example,
    family_class,
    parameter_count,
)
from genus.data.loaders import Dataset
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.evaluation import effort, metrics
from genus.evaluation.judge import Judge, classes
from genus.training import NonFiniteLoss, Row, autocast, train

REAL = 2000  # validation images that samples are measured against, and draws of the Gaussian control
CONTROL = 4000  # training images that the Gaussian control is fitted to
LIKELIHOODS = 500  # validation images scored
MISSING = 0.1  # a class is missing when samples have less than this share of what is expected
SPIKE = 5.0  # robust standard deviations above the running median
FLOOR = 0.02  # the least quality in a ratio: the standard error of 1,000 real images' on Fashion-MNIST
MARKS = 6  # points of the learning curve
CYCLE = 16  # training steps whose operations are counted where they differ: what is done now and then has its share
EQUAL_PARAMETERS = 200_000  # where families are compared at equal size
REPEATED = 3  # seeds, at most, of the jobs with small batches and with outliers
REACH = 2.0  # how far beyond the widths tried, as a factor of the parameters, their line is believed
PULLED = 32  # images of the batch in which one is an outlier, and
PULLS = 4  # batches so tried


@dataclass(frozen=True)
class Job:
    """One short training; everything that is not said is as in params.yaml."""

    seed: int = 0
    learning_rate: float = 1.0  # multiplies the model's
    width: float = 1.0  # multiplies the parameters that the family names as its widths
    batch: float = 1.0  # multiplies the batch size
    outliers: float = 0.0  # share of the training examples that are uniform noise
    size: int = 0  # side of the images; 0: the probe's
    params: tuple[tuple[str, Any], ...] = ()  # parameters of the family that differ


@dataclass(frozen=True)
class Outcome:
    """What a job came to. What cannot be measured is None; a job that failed says why and has no figures."""

    job: Job
    parameters: int = 0
    flops: float = 0.0  # of training, an image or a token of text
    untrained: float | None = None  # quality before the first step: of a model that has learned nothing
    untried: str | None = None  # why the family cannot be built so
    failed: str | None = None  # why training or sampling came to no numbers
    quality: float | None = None
    coverage: float | None = None
    missing_classes: int | None = None
    bits: float | None = None  # a dimension of validation images, or a token of validation documents
    pull: float | None = None  # change of a batch's gradient by one outlier in it, over the gradient
    spikes: float | None = None  # a thousand steps
    gradient_ratio: float | None = None  # 99th percentile over median of the gradient norm
    terms: dict[str, float] | None = None  # means over the last quarter of the steps


class Scale(NamedTuple):
    """What a quality says, which depends on how it is measured. ``bits``: the name of the likelihood's figure."""

    usable: float  # a learning rate is usable when its quality is within this factor of the best one's
    lost: float  # a training is lost when it ends so many times as bad as the median of the same with other seeds
    bits: str


IMAGES = Scale(usable=1.5, lost=3.0, bits="bits_per_dim")
USABLE, LOST = IMAGES.usable, IMAGES.lost


class Bench(Protocol):
    """The data of all jobs at one resolution, and how good a model of it is."""

    scale: Scale
    needs: Any  # the capability, a protocol of contract.py, that the quality is measured by
    spec: DataSpec
    size: int  # pixels a side; 0 for text
    told: dict[str, int]  # how much of what it holds

    def train_set(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        """What a job is trained on: stored examples, or the tokens of a text; and labels."""
        ...

    def quality(self, model: Family, sample: Callable[[], Tensor]) -> tuple[float, dict[str, Any]]:
        """The quality, and further figures of an Outcome. ``sample`` draws as many as the probe asks for.

        Raises FloatingPointError for a model whose samples or likelihoods are not finite.
        """
        ...

    def bits(self, model: Any, generator: torch.Generator) -> float:
        """Of validation examples, a dimension or token. Raises FloatingPointError where it is not finite."""
        ...

    def few(self, model: Family, n: int, device: torch.device) -> Batch:
        """A batch of the first training examples."""
        ...

    def odd(self, model: Family, place: int, seed: int, device: torch.device) -> tuple[Batch, Batch]:
        """A batch of ``PULLED`` validation examples, another for each ``place``; and it with noise for the first."""
        ...

    def units(self, batch: Batch) -> int:
        """Images or tokens that a batch teaches."""
        ...


class Images:
    """Training images, real images, and their features. A ``Bench``."""

    scale, needs = IMAGES, Samples

    def __init__(self, data: Dataset, judge: Judge, size: int, seed: int, train_images: int):
        self.size = size
        order = np.random.default_rng(seed).permutation(len(data.split("train")))
        self.spec = replace(data.spec, shape=(data.spec.shape[0], size, size))
        self.judge = judge
        chosen = np.sort(order[:train_images])  # sorted: memory-mapped files are read from front to back
        self.train = shrink(data.split("train")[chosen], size)
        self.labels = np.array(data.labels("train")[chosen])
        self.real = shrink(data.split("validation")[:REAL], size)
        self.real_labels = np.array(data.labels("validation")[:REAL])
        self.told = {"train_images": train_images, "real_images": len(self.real)}
        self.seen = features(judge, self.real)
        self.within = _within(self.seen)
        fitted = shrink(data.split("train")[np.sort(order[:CONTROL])], size)
        control = metrics.gaussian_control(fitted, REAL, levels=self.spec.levels, seed=seed)
        # Not 0 nor less, which it could be by chance for data that are Gaussian.
        self.control = max(self.distance(features(judge, control)), 1e-6)
        self.expected = np.bincount(classes(judge, self.seen), minlength=judge.head.out_features) / len(self.seen)

    def distance(self, seen: np.ndarray) -> float:
        """KID of features [N, D] to the real images': ``metrics.mmd2``, the real images' own term made once."""
        return float(_within(seen) + self.within - 2 * _kernel(seen, self.seen).mean())

    def train_set(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        images = self.train
        if job.outliers:
            images, count = images.copy(), max(1, round(job.outliers * len(images)))
            where = np.random.default_rng(job.seed).permutation(len(images))[:count]
            images[where] = self.noise(count, job.seed)
        return images, self.labels

    def quality(self, model: Family, sample: Callable[[], Tensor]) -> tuple[float, dict[str, Any]]:
        x = sample()
        if not x.isfinite().all():  # they would be stored as black
            raise FloatingPointError("the samples are not finite")
        seen = features(self.judge, self.spec.to_stored(x.float()).cpu().numpy())
        shares = np.bincount(classes(self.judge, seen), minlength=len(self.expected)) / len(seen)
        few = min(len(seen), len(self.seen))
        missing = int((shares < MISSING * self.expected).sum()) if self.judge.labelled else None
        more = {"coverage": metrics.prdc(self.seen[:few], seen[:few])["coverage"], "missing_classes": missing}
        return self.distance(seen) / self.control, more

    @torch.inference_mode()
    def bits(self, model: Any, generator: torch.Generator) -> float:
        real, labels = self.real[:LIKELIHOODS], self.real_labels[:LIKELIHOODS]
        nats = model.log_prob(self.batch(real, labels, generator.device), generator=generator)
        mean = nats.double().mean().item()
        if not math.isfinite(mean):
            raise FloatingPointError("log_prob of a validation image is not finite")
        return -mean / (self.spec.dims * math.log(2))

    def few(self, model: Family, n: int, device: torch.device) -> Batch:
        return self.batch(self.train[:n], self.labels[:n], device)

    def odd(self, model: Family, place: int, seed: int, device: torch.device) -> tuple[Batch, Batch]:
        asked = model.domains if isinstance(model, Translates) else self.real_labels
        seen = np.isin(self.real_labels, asked)  # one that translates looks at no other class than its two
        few = min(PULLED, int(seen.sum()))
        usual, labels = (np.roll(part[seen], -few * place, axis=0)[:few] for part in (self.real, self.real_labels))
        odd = np.concatenate([self.noise(1, seed), usual[1:]])
        return self.batch(usual, labels, device), self.batch(odd, labels, device)

    def units(self, batch: Batch) -> int:
        return len(batch.x)

    def noise(self, n: int, seed: int) -> np.ndarray:
        """Outliers: images of uniform noise, stored."""
        shape = (n, *self.spec.shape)
        return np.random.default_rng(seed).integers(self.spec.levels, size=shape).astype(self.train.dtype)

    def batch(self, images: np.ndarray, labels: np.ndarray, device: torch.device) -> Batch:
        x = self.spec.to_float(torch.from_numpy(np.array(images)).to(device))
        return Batch(x, torch.from_numpy(np.array(labels)).to(device))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _within(a: np.ndarray) -> float:
    """Mean of the kernel over pairs of different rows."""
    kernel = _kernel(a, a)
    return float((kernel.sum() - np.trace(kernel)) / (len(a) * (len(a) - 1)))


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Stored images [N, C, H, W] averaged down to [N, C, size, size], stored again."""
    if images.shape[-2:] == (size, size):
        return np.array(images)
    parts = []
    for start in range(0, len(images), 1000):
        x = torch.from_numpy(np.array(images[start : start + 1000])).float()
        parts.append(functional.adaptive_avg_pool2d(x, size).round().byte().numpy())
    return np.concatenate(parts)


@torch.inference_mode()
def features(judge: Judge, images: np.ndarray, batch_size: int = 250) -> np.ndarray:
    """Judge features [N, 128] float64 of stored images of any size, enlarged to what the judge has learned.

    By repeating pixels: the judge names more of the shrunk images of Fashion-MNIST right than after interpolation.
    """
    parts = []
    for start in range(0, len(images), batch_size):
        x = torch.from_numpy(np.array(images[start : start + batch_size])).to(judge.head.weight.device)
        x = functional.interpolate(judge.spec.to_float(x), size=judge.spec.shape[1:])
        parts.append(judge.features(x).double().cpu().numpy())
    return np.concatenate(parts)


class Prober:
    """Runs the jobs of one model and keeps their outcomes; data are made once a resolution. Text needs no ``judge``."""

    def __init__(
        self,
        config: Model,
        data: Dataset,
        judge: Judge | None,
        *,
        seed: int,
        device: torch.device,
        parent: Prober | None = None,
    ):
        self.parent = parent  # of the model that this one learns from
        self.parents: dict[int, Family] = {}  # it, trained at a resolution
        self.config, self.probe, self.data, self.judge = config, config.probe, data, judge
        self.seed, self.device = seed, device
        text = data.spec.kind == "text"
        self.size = 0 if text else min(self.probe.size, *data.spec.shape[1:])
        # As many as the steps need, so that a job sees every image about once, an outlier among them too.
        self.train_images = 0 if text else min(len(data.split("train")), self.probe.steps * config.train.batch_size)
        self.benches: dict[int, Bench] = {}
        self.outcomes: dict[Job, Outcome] = {}
        self.seconds: dict[Job, float] = {}
        self.curve: list[dict[str, float]] = []  # of the first job: quality after some steps
        self.curve_seconds: list[float] = []
        self._flops: dict[Job, float] = {}
        self._untrained: dict[int, float | None] = {}

    def jobs(self) -> list[Job]:
        """All jobs, the base ones (one a seed) first."""
        probe = self.probe
        seeds = range(self.seed, self.seed + probe.seeds)
        found = [Job(seed=seed) for seed in seeds]
        found += [Job(seed=self.seed, learning_rate=rate) for rate in probe.learning_rates if rate != 1]
        if family_class(self.config.family).widths:
            found += [Job(seed=self.seed, width=width) for width in probe.widths if width != 1]
        if probe.batch != 1:
            found += [Job(seed=seed, batch=probe.batch) for seed in seeds[:REPEATED]]
        if probe.outliers:
            found += [Job(seed=seed, outliers=probe.outliers) for seed in seeds[:REPEATED]]
        limit = min(self.data.spec.shape[1:], default=0)
        found += [Job(seed=self.seed, size=size) for size in probe.sizes if size != self.size and size <= limit]
        found += [
            Job(seed=seed, params=((name, value),))
            for name, values in probe.vary.items()
            for value in values
            for seed in seeds[:2]  # two, so that what differs by chance is seen
        ]
        return found

    def run(self) -> None:
        """Does all jobs. Raises UserError where the family cannot be built at the probe's size."""
        jobs = self.jobs()
        for done, job in enumerate(jobs, 1):
            started = time.monotonic()
            self.outcomes[job] = self.outcome(job)
            self.seconds[job] = time.monotonic() - started
            progress.report(done, len(jobs), unit="job")

    def bench(self, size: int) -> Bench:
        if size not in self.benches:
            if self.judge is not None:
                self.benches[size] = Images(self.data, self.judge, size, self.seed, self.train_images)
            else:
                from genus.evaluation.text.bench import Text

                context: int = example(self.config.family, self.data.spec, self.config.params).context  # type: ignore[assignment]
                windows = self.probe.steps * self.config.train.batch_size
                self.benches[size] = Text(self.data, (windows + 2) * context)  # two more: where they begin is shifted
        return self.benches[size]

    def outcome(self, job: Job) -> Outcome:
        """Trains and measures one job."""
        bench, first = self.bench(job.size or self.size), job == Job(seed=self.seed)
        try:
            model = self.built(job)
        except ValueError as error:
            if first:
                where = f"probe.size: {self.config.family} at {self.size} pixels" if self.size else self.config.family
                raise UserError(f"{where}: {error}") from error
            return Outcome(job, untried=" ".join(str(error).split()))
        found = Outcome(
            job, parameters=parameter_count(model), flops=self.flops(job, bench), untrained=self.untrained(bench)
        )
        examples, labels = bench.train_set(job)
        steps = self.probe.steps
        marks = frozenset(round(steps * k / MARKS) for k in range(1, MARKS)) if first else frozenset()
        started, apart = time.monotonic(), 0.0

        def on_samples(model: Family, step: int) -> None:
            nonlocal apart
            begun = time.monotonic()
            self.mark(self.quality(model, bench, self.seed)[0], step, begun - started - apart)
            apart += time.monotonic() - begun

        try:
            result = train(
                model,
                examples,
                labels,
                self.settings(job),
                steps=steps,
                seed=job.seed,
                device=self.device,
                log_every=1,
                on_samples=on_samples if isinstance(model, bench.needs) else None,
                samples_at=marks,
            )
            seconds = time.monotonic() - started - apart
            found = self.measured(found, result.model, result.history, bench)
        except (NonFiniteLoss, FloatingPointError, torch.linalg.LinAlgError) as failure:
            return replace(found, failed=" ".join(str(failure).split()))
        except RuntimeError as failure:
            # Operations refuse numbers that are none in words of their own; anything else is a mistake of ours.
            if all(parameter.isfinite().all() for parameter in model.parameters()):
                raise
            return replace(found, failed=" ".join(str(failure).split()))
        if first and found.quality is not None:
            self.mark(found.quality, steps, seconds)
        return found

    def built(self, job: Job) -> Family:
        """The job's model, untrained. Raises ValueError where the family cannot be built so."""
        parent = self.learned_from(job.size or self.size)
        torch.manual_seed(job.seed)
        return build(self.config.family, self.bench(job.size or self.size).spec, self.params(job), parent)

    def learned_from(self, size: int) -> Family | None:
        """The parent as its own probe trains it at that resolution, once for all jobs; None where there is none."""
        if self.parent is None:
            return None
        if size not in self.parents:
            job = Job(seed=self.seed, size=size)
            examples, labels = self.parent.bench(size).train_set(job)
            steps, settings = self.parent.probe.steps, self.parent.settings(job)
            model = self.parent.built(job)
            self.parents[size] = train(
                model, examples, labels, settings, steps=steps, seed=job.seed, device=self.device
            ).model
        return copy.deepcopy(self.parents[size])

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

    def settings(self, job: Job) -> Any:
        """The trainer's settings for a job."""
        usual = self.config.train
        rates: float | dict[str, float] = (
            {name: rate * job.learning_rate for name, rate in usual.learning_rate.items()}
            if isinstance(usual.learning_rate, dict)
            else usual.learning_rate * job.learning_rate
        )
        scaled = max(2, round(usual.batch_size * job.batch))
        return usual.model_copy(update={"batch_size": scaled, "learning_rate": rates})

    def mark(self, quality: float, step: int, seconds: float) -> None:
        """A point of the first job's learning curve; its seconds are of training alone."""
        self.curve.append({"step": float(step), "quality": quality})
        self.curve_seconds.append(seconds)

    def quality(self, model: Family, bench: Bench, seed: int) -> tuple[float, dict[str, Any]]:
        """The quality of a model, and what else the bench has found. Raises FloatingPointError as the bench does."""
        generator = torch.Generator(self.device).manual_seed(seed)
        knobs = self.config.evaluate.knobs | self.probe.knobs

        def sample() -> Tensor:
            with torch.inference_mode(), autocast(self.device):
                return model.sample(self.probe.samples, generator=generator, **knobs)  # type: ignore[operator]

        return bench.quality(model, sample)

    def measured(self, found: Outcome, model: Family, history: list[Row], bench: Bench) -> Outcome:
        """An outcome with the figures of its trained model."""
        names = dict.fromkeys(name for row in history for name in row)
        steps = {name: np.array([row[name] for row in history if name in row]) for name in names}
        norms = [values for name, values in steps.items() if name.endswith("grad_norm")]
        last = {name: float(values[-max(1, len(values) // 4) :].mean()) for name, values in steps.items()}
        ratios = [float(np.quantile(values, 0.99) / np.median(values)) for values in norms if np.median(values) > 0]
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise FloatingPointError("the last step left weights that are not finite")
        found = replace(
            found,
            spikes=1000 * most_spikes(history) / len(history),
            gradient_ratio=max(ratios, default=None),
            pull=self.pull(model, bench) if found.job == Job(seed=found.job.seed) else None,
            terms={name: value for name, value in last.items() if name not in ("step", "learning_rate")},
        )
        if isinstance(model, bench.needs):
            quality, more = self.quality(model, bench, found.job.seed)
            found = replace(found, quality=quality, **more)
        if isinstance(model, Scores) and found.bits is None:
            generator = torch.Generator(self.device).manual_seed(self.seed)
            found = replace(found, bits=bench.bits(model, generator))
        return found

    def pull(self, model: Family, bench: Bench) -> float:
        """How far one example of noise among ``PULLED`` turns the gradient: |with it - without it| / |without it|.

        1: it weighs as much as all others together. The median over some batches, of the group of parameters that it
        moves most; nothing is clipped.
        """
        ratios = []
        for place in range(PULLS):
            without, beside = (
                gradients(model, batch) for batch in bench.odd(model, place, self.seed + place, self.device)
            )
            ratios.append(
                max(
                    float((beside[group] - slope).norm() / slope.norm().clamp(min=1e-12))
                    for group, slope in without.items()
                )
            )
        return float(np.median(ratios))

    def untrained(self, bench: Bench) -> float | None:
        """The quality of a model that has learned nothing."""
        size = bench.size
        if size not in self._untrained:
            model = self.built(Job(seed=self.seed, size=size)).to(self.device)
            if isinstance(model, Initialises):
                generator = torch.Generator(self.device).manual_seed(self.seed)
                model.initialise(bench.few(model, PULLED, self.device), generator=generator)
            try:
                self._untrained[size] = (
                    self.quality(model.eval(), bench, self.seed)[0] if isinstance(model, bench.needs) else None
                )
            except FloatingPointError:
                self._untrained[size] = None
        return self._untrained[size]

    def flops(self, job: Job, bench: Bench) -> float:
        """Floating-point operations of training, all updates of a step, an image or token."""
        kind = Job(size=bench.size, width=job.width, params=job.params)
        if kind not in self._flops:
            model = self.built(job).to(self.device).train()
            few = bench.few(model, 8, self.device)
            totals = [0]
            with Operations() as counted:
                while len(totals) <= CYCLE and not (len(totals) == 3 and totals[2] == 2 * totals[1]):
                    _slopes(model, few)
                    totals.append(counted.total)
            self._flops[kind] = totals[-1] / ((len(totals) - 1) * bench.units(few))
        return self._flops[kind]


def _recurrent_backward(*args: Any, **more: Any) -> int:
    return 2 * effort.FORMULAS[torch.ops.aten.mkldnn_rnn_layer](*args, **more)


COUNTED = effort.FORMULAS | {
    torch.ops.aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: effort.FORMULAS[
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ],
}


class Operations(TorchDispatchMode):
    """Counts floating-point operations of matrix products, convolutions, attention and recurrent layers, two for each
    multiply-add.

    By PyTorch's own table and what it lacks; its FlopCounterMode hooks into modules as well, which a penalty on
    gradients breaks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in COUNTED:
            self.total += COUNTED[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def _scaled(value: int, factor: float) -> int:
    """``value * factor``, a multiple of 8 or 4 where ``value`` is one: networks group their channels."""
    unit = next(unit for unit in (8, 4, 1) if value % unit == 0)
    return max(unit, unit * math.floor(value * factor / unit + 0.5))


def gradients(model: Family, batch: Batch) -> dict[str, Tensor]:
    """The gradient of every group's loss in one training step, laid flat; the model stays as it is."""
    model = copy.deepcopy(model).train().requires_grad_(True)
    if isinstance(model, Carries):
        model.restart()
    return _slopes(model, batch)


def _slopes(model: Family, batch: Batch) -> dict[str, Tensor]:
    generator = torch.Generator(batch.x.device).manual_seed(0)
    groups, found = model.groups(), {}
    for group, terms in model.updates(Batch(batch.x.clone(), batch.cond), generator=generator):
        slopes = torch.autograd.grad(terms["loss"], groups[group], retain_graph=True, allow_unused=True)
        found[group] = torch.cat([slope.double().flatten() for slope in slopes if slope is not None])
    return found


def most_spikes(history: Sequence[Row]) -> int:
    """The ``spikes`` of the loss that has most of them.

    Steps that have other terms than their neighbours (a penalty that is added every few steps) are a series apart.
    """
    counts: Counter[str] = Counter()
    for names in {frozenset(row) for row in history}:
        rows = [row for row in history if row.keys() == names]
        for name in names:
            if name == "loss" or name.endswith("_loss"):
                counts[name] += spikes(np.array([row[name] for row in rows]))
    return max(counts.values(), default=0)


def spikes(losses: np.ndarray, window: int = 15, around: int = 61) -> int:
    """Steps whose loss is more than 5 σ above the median of the ``window`` steps around it.

    σ is robust (1.4826 times the median absolute deviation) and local, over ``around`` steps: noise falls as a model
    learns. The first and last ``window // 2`` steps have no such median and are not judged. A spike is what lasts less
    than half of ``window``; what lasts longer is another level.
    """
    if len(losses) < 2 * window:
        return 0
    half = window // 2
    median = np.median(np.lib.stride_tricks.sliding_window_view(losses, window), axis=1)
    residual = losses[half : len(losses) - half] - median
    size = np.abs(residual)
    reach = min(around, len(size)) // 2
    places = np.arange(len(size)).clip(reach, max(reach, len(size) - 1 - reach))
    sigma = np.array([1.4826 * np.median(size[max(0, at - reach) : at + reach + 1]) for at in places])
    # Without any noise at all, a rounding error would be a spike.
    least = 1e-9 * np.abs(median).max()
    return int((residual > SPIKE * np.maximum(sigma, least)).sum())


# What the outcomes say. A figure is {"value", "low", "high", "n"}: the ends of a 95% interval over the seeds; an end
# that is not known is None and the figure says "open". What could not be measured at all is None.


class Noise(NamedTuple):
    """How much one job's log quality varies from seed to seed: standard deviation and its degrees of freedom."""

    sd: float
    df: int

    def half(self, variance: float) -> float:
        """Half of the 95% interval of a figure that has ``variance`` times the noise's."""
        from scipy import stats

        return float(stats.t.ppf(0.975, self.df) * self.sd * math.sqrt(variance)) if self.df else math.inf


def level(found: Outcome) -> float | None:
    """The log of a quality. A failed job has learned nothing; what can't be told from real images has ``FLOOR``."""
    quality = found.untrained if found.failed else found.quality
    return None if quality is None else math.log(max(quality, FLOOR))


def levels(found: Iterable[Outcome]) -> np.ndarray:
    return np.array([value for outcome in found if (value := level(outcome)) is not None], float)


def pooled(*groups: Sequence[Outcome]) -> Noise:
    """The noise within groups of outcomes that differ by their seeds alone."""
    known = [logs for group in groups if len(logs := levels(group)) > 1]
    df = sum(len(logs) - 1 for logs in known)
    squares = sum(float(((logs - logs.mean()) ** 2).sum()) for logs in known)
    return Noise(math.sqrt(squares / df) if df else 0.0, df)


def summarise(prober: Prober) -> dict[str, Any]:
    """The figures of a probe: stability, capacity, density and what ``vary`` varied. Intervals: 95%, over the seeds."""
    scale = prober.bench(prober.size).scale
    return summary(list(prober.outcomes.values()), prober.probe, prober.size, prober.seed, scale)


def summary(outcomes: list[Outcome], probe: Probe, size: int, seed: int, scale: Scale = IMAGES) -> dict[str, Any]:
    """``summarise`` of outcomes; the first of them is the base job's."""
    outcomes = [found for found in outcomes if not found.untried]

    def those(**wanted: Any) -> list[Outcome]:
        """Outcomes of the base job but for ``wanted``; a value of None stands for any."""
        usual = asdict(Job(seed=seed)) | wanted
        return [
            found
            for found in outcomes
            if all(value is None or getattr(found.job, name) == value for name, value in usual.items())
        ]

    base, rates, widths, sizes = those(seed=None), those(learning_rate=None), those(width=None), those(size=None)
    small = those(seed=None, batch=probe.batch) if probe.batch != 1 else []
    planted = those(seed=None, outliers=probe.outliers) if probe.outliers else []
    noise = pooled(base, planted)  # few outliers change the quality, hardly its noise
    usual = [found for found in outcomes if found.job.learning_rate == 1 and not found.job.params]
    grown = [*base, *(found for found in widths if found not in base)]
    return {
        "stability": {
            "diverged": _share([diverged(found, outcomes, scale.lost) for found in usual]),
            "spread": _spread(base),
            "spikes": _mean([found.spikes for found in base], least=0.0),
            "gradient_ratio": _mean([found.gradient_ratio for found in base], least=1.0),
            "usable_learning_rates": _usable(rates, noise, scale.usable),
            "small_batch_cost": _ratio(base, small),
            "small_batch_spread": _spread(small),
            "outlier_cost": _paired(base, planted),
            "outlier_bits": _lost_bits(base, planted),
            "outlier_pull": _mean([found.pull for found in base], least=0.0),
        },
        "capacity": {
            "quality": _quality(base),
            "untrained": None if base[0].untrained is None else {"value": base[0].untrained, "n": 1, "open": True},
            "coverage": _mean([found.coverage for found in base], least=0.0),
            "missing_classes": _mean([found.missing_classes for found in base], least=0.0),
            "flops": {"value": base[0].flops, "n": 1},
            "slope": _slope(grown, noise, "parameters"),
            "flops_slope": _slope(grown, noise, "flops"),
            "at_equal_parameters": _at(grown, noise),
            "resolution_cost": _resolution(sizes, size, noise),
        },
        "density": {
            scale.bits: _mean([found.bits for found in base]),
            "kl_trade": next((found for name in probe.vary if (found := _trade(name, outcomes, base))), None),
        },
        "vary": {name: _vary(name, outcomes, base[0]) for name in probe.vary},
    }


def diverged(found: Outcome, outcomes: Iterable[Outcome], lost: float = LOST) -> bool:
    """Not finite; or no better than before the first step; or ``lost`` times as bad as with other seeds."""
    if found.failed:
        return True
    if found.quality is None:
        return False
    if found.untrained is not None and found.quality >= found.untrained:
        return True
    peers = levels(other for other in outcomes if replace(other.job, seed=found.job.seed) == found.job)
    return len(peers) > 2 and math.log(max(found.quality, FLOOR)) > math.log(lost) + float(np.median(peers))


def _figure(value: float, low: float, high: float, n: int, **more: Any) -> dict[str, Any]:
    """JSON has no infinity: an end that is not known is None, and the figure then says that it is open."""
    ends = {name: float(end) if math.isfinite(end) else None for name, end in (("low", low), ("high", high))}
    return {"value": float(value), **ends, "n": n} | ({"open": True} if None in ends.values() else {}) | more


def _share(hits: Sequence[bool]) -> dict[str, Any] | None:
    """A share with its 95% Wilson interval."""
    return _figure(sum(hits) / len(hits), *metrics.wilson(sum(hits), len(hits)), len(hits)) if hits else None


def _mean(values: Iterable[float | None], *, least: float = -math.inf) -> dict[str, Any] | None:
    """The mean with its 95% t interval, which ends at ``least``."""
    from scipy import stats

    found = np.array([value for value in values if value is not None], float)
    if not len(found):
        return None
    mean, n = found.mean(), len(found)
    half = stats.t.ppf(0.975, n - 1) * found.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return _figure(mean, max(mean - half, least) if math.isfinite(half) else -math.inf, mean + half, n)


def _quality(found: Sequence[Outcome]) -> dict[str, Any] | None:
    """The geometric mean over the seeds with its 95% t interval."""
    logs, noise = levels(found), pooled(found)
    if not len(logs):
        return None
    return _exp(logs.mean(), noise.half(1 / len(logs)), len(logs))


def _exp(value: float, half: float, n: int, **more: Any) -> dict[str, Any]:
    """The figure of a logarithm. An interval of more than e^50 to either side is none."""
    known = half < 50
    low, high = (math.exp(value - half), math.exp(value + half)) if known else (-math.inf, math.inf)
    return _figure(math.exp(value), low, high, n, **more)


def _spread(found: Sequence[Outcome]) -> dict[str, Any] | None:
    """Interquartile range over median of the quality, of the log-normal distribution through the seeds.

    The quartiles of three figures would lie between the figures and say too little. The interval is that of a standard
    deviation (χ²): with three seeds it goes from half to six times the value.
    """
    from scipy import stats

    noise = pooled(found)
    if not noise.df:
        return None
    ends = [noise.sd * math.sqrt(noise.df / stats.chi2.ppf(end, noise.df)) for end in (0.5, 0.975, 0.025)]
    # Quartiles of a log-normal: median times e^(±0.6745 σ). Beyond σ = 50 no number is left to print.
    _, low, high = (2 * math.sinh(0.6745 * min(end, 50.0)) for end in ends)
    return _figure(2 * math.sinh(0.6745 * min(noise.sd, 50.0)), low, high, noise.df + 1)


def _usable(found: Sequence[Outcome], noise: Noise, usable: float = USABLE) -> dict[str, Any] | None:
    """Decades between the smallest and the largest usable learning rate, without a gap around the best.

    The true ends lie between the last usable rate and the next one tried: the interval's upper end counts up to there,
    and is open where the last rate tried is usable. Both ends hold for 95% of what the noise makes of the qualities.
    """
    order = sorted((o for o in found if level(o) is not None), key=lambda outcome: outcome.job.learning_rate)
    logs, rates = levels(order), np.log10([outcome.job.learning_rate for outcome in order])
    if len(logs) < 2 or all(outcome.failed for outcome in order):
        return None

    def ends(logs: np.ndarray) -> tuple[int, int]:
        first = last = int(np.argmin(logs))
        good = logs <= logs[first] + math.log(usable)
        while first > 0 and good[first - 1]:
            first -= 1
        while last + 1 < len(good) and good[last + 1]:
            last += 1
        return first, last

    def least(first: int, last: int) -> float:
        return float(rates[last] - rates[first])

    def most(first: int, last: int) -> float:
        tried = first > 0 and last + 1 < len(rates)
        return float(rates[last + 1] - rates[first - 1]) if tried else math.inf

    found_ends, best = ends(logs), int(np.argmin(logs))
    more = {"best": order[best].job.learning_rate}
    if not noise.df:
        return _figure(least(*found_ends), -math.inf, math.inf, len(logs), **more)
    random = np.random.default_rng(0)
    tried = [ends(logs + noise.sd * random.standard_t(noise.df, len(logs))) for _ in range(1000)]
    low = np.quantile([least(*each) for each in tried], 0.025)
    high = np.quantile([most(*each) for each in tried], 0.975, method="higher")  # no infinity is interpolated
    return _figure(least(*found_ends), low, high, len(logs), **more)


def _ratio(base: Sequence[Outcome], changed: Sequence[Outcome]) -> dict[str, Any] | None:
    """Quality of the changed jobs over that of the base jobs: 1 is no cost. Geometric means, Welch's t interval."""
    from scipy import stats

    groups = levels(base), levels(changed)
    if not all(map(len, groups)):
        return None
    value, n = groups[1].mean() - groups[0].mean(), min(map(len, groups))
    if n < 2:
        return _exp(value, math.inf, n)
    squares = [logs.var(ddof=1) / len(logs) for logs in groups]
    below = sum(square**2 / (len(logs) - 1) for square, logs in zip(squares, groups, strict=True))
    df = sum(squares) ** 2 / below if below else len(groups[0]) + len(groups[1]) - 2
    return _exp(value, float(stats.t.ppf(0.975, df)) * math.sqrt(sum(squares)), n)


def _paired(base: Sequence[Outcome], changed: Sequence[Outcome]) -> dict[str, Any] | None:
    """``_ratio`` of jobs that go the same way but for the change, seed by seed: t interval of the log ratios."""
    before = {found.job.seed: value for found in base if (value := level(found)) is not None}
    pairs = [(before.get(found.job.seed), level(found)) for found in changed]
    found = _mean([b - a for a, b in pairs if a is not None and b is not None])
    if found is None:
        return None
    return _exp(found["value"], math.inf if found["high"] is None else found["high"] - found["value"], found["n"])


def _lost_bits(base: Sequence[Outcome], planted: Sequence[Outcome]) -> dict[str, Any] | None:
    """Bits of validation examples that planted outliers cost, by pairs of the same seed."""
    before = {found.job.seed: found.bits for found in base}
    pairs = [(before.get(found.job.seed), found.bits) for found in planted]
    return _mean([b - a for a, b in pairs if a is not None and b is not None])


class Line(NamedTuple):
    """A straight line through points, ``value`` at the middle of their x."""

    value: float
    slope: float
    middle: float
    n: int
    squares: float  # Σ (x - middle)²

    def variance(self, x: float) -> float:
        """Of the line at ``x``, in units of a point's."""
        return 1 / self.n + (x - self.middle) ** 2 / self.squares


def _line(found: Sequence[Outcome], by: str) -> Line | None:
    """Log quality over the log of ``by`` (parameters or flops), where there are at least two of them."""
    # A job that failed says how stable a width is, not what it could learn.
    known = [(float(getattr(o, by)), y) for o in found if not o.failed and (y := level(o)) is not None]
    known = [(x, y) for x, y in known if x > 0]
    if len({x for x, _ in known}) < 2:
        return None
    xs, ys = np.log([x for x, _ in known]), np.array([y for _, y in known])
    slope, value = np.polyfit(xs - xs.mean(), ys, 1)
    return Line(float(value), float(slope), float(xs.mean()), len(xs), float(((xs - xs.mean()) ** 2).sum()))


def _slope(found: Sequence[Outcome], noise: Noise, by: str) -> dict[str, Any] | None:
    """Factor of the quality a doubling of the parameters or operations: below 1 is a gain. Points: every width."""
    line = _line(found, by)
    if line is None:
        return None
    points = []
    for width in sorted({outcome.job.width for outcome in found}):
        same = [outcome for outcome in found if outcome.job.width == width]
        logs = levels(outcome for outcome in same if not outcome.failed)
        points.append(
            {
                "width": width,
                "parameters": same[0].parameters,
                "flops": same[0].flops,
                "quality": float(np.exp(logs.mean())) if len(logs) else None,
                "coverage": _average([outcome.coverage for outcome in same]),
                "missing_classes": _average([outcome.missing_classes for outcome in same]),
                "n": len(same),
                "failed": next((outcome.failed for outcome in same if outcome.failed), None),
            }
        )
    double = math.log(2)
    return _exp(double * line.slope, noise.half(double**2 / line.squares), line.n, points=points)


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _at(found: Sequence[Outcome], noise: Noise) -> dict[str, Any] | None:
    """Quality at EQUAL_PARAMETERS on the line through the widths; None too far from them."""
    line, x = _line(found, "parameters"), math.log(EQUAL_PARAMETERS)
    tried = [math.log(outcome.parameters) for outcome in found if outcome.parameters and not outcome.failed]
    if line is None or not min(tried) - math.log(REACH) <= x <= max(tried) + math.log(REACH):
        return None
    half = noise.half(line.variance(x))
    return _exp(line.value + line.slope * (x - line.middle), half, line.n, parameters=EQUAL_PARAMETERS)


def _resolution(found: Sequence[Outcome], size: int, noise: Noise) -> dict[str, Any] | None:
    """Factor of the quality from the smallest to the largest resolution, at equal steps. Points: every size."""
    known = sorted((outcome.job.size or size, value) for outcome in found if (value := level(outcome)) is not None)
    if len(known) < 2:
        return None
    points = [{"size": side, "quality": math.exp(value)} for side, value in known]
    return _exp(known[-1][1] - known[0][1], noise.half(2), len(known), points=points)


def _vary(name: str, outcomes: Iterable[Outcome], base: Outcome) -> list[dict[str, Any]]:
    """The terms and the quality at every value of one parameter, the model's own value as None."""
    found = [base] + [o for o in outcomes if dict(o.job.params).keys() == {name} and o.job.seed == base.job.seed]
    return [
        {
            "value": dict(outcome.job.params).get(name),
            "quality": outcome.quality,
            "failed": outcome.failed,
            "terms": outcome.terms,
        }
        for outcome in found
    ]


def _trade(name: str, outcomes: Sequence[Outcome], base: Sequence[Outcome]) -> dict[str, Any] | None:
    """Rank correlation of code length and reconstruction error over the values of a parameter.

    -1: whichever value has the shorter code reconstructs worse. The interval holds 95% of what is left to chance: what
    neither the value nor the seed explains (the residuals of a two-way table). None where the family has other terms.
    """
    from scipy import stats

    rows: dict[Any, dict[int, list[float]]] = {}
    for o in [*base, *(o for o in outcomes if dict(o.job.params).keys() == {name})]:
        if o.terms and {"kl", "reconstruction"} <= set(o.terms):
            rows.setdefault(o.job.params, {})[o.job.seed] = [o.terms["kl"], o.terms["reconstruction"]]
    shared = sorted(set.intersection(*(set(row) for row in rows.values()))) if rows else []
    if len(rows) < 3 or not shared:
        return None
    table = np.array([[row[seed] for seed in shared] for row in rows.values()])  # [values, seeds, 2]
    points = table.mean(1)
    value = float(stats.spearmanr(*points.T).statistic)
    df = (len(rows) - 1) * (len(shared) - 1)
    if not df:
        return _figure(value, -math.inf, math.inf, len(rows))
    residuals = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean((0, 1))
    error = np.sqrt((residuals**2).sum((0, 1)) / df / len(shared))
    draws = points + error * np.random.default_rng(0).standard_t(df, (1000, *points.shape))
    low, high = np.quantile([stats.spearmanr(*each.T).statistic for each in draws], [0.025, 0.975])
    return _figure(value, min(low, value), max(high, value), len(rows))  # at an end of its range the noise lies inside


def setting(probe: Probe, prober: Prober) -> dict[str, Any]:
    """What was done, for the report."""
    done = {"size": prober.size, "jobs": len(prober.outcomes)}
    return probe.model_dump(mode="json") | done | prober.bench(prober.size).told
