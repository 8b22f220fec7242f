"""How well a family learns a density that is known: points in the plane, every cell of which can be asked for.

The figure is KL(truth || model) = Σ p ln(p / q) over all cells of the square, in nats: 0 for the truth itself, and
ln(cells) - entropy for a model that knows nothing. What a model can say decides how q is found, as everywhere: an exact
log-probability is summed, a bound is averaged over repeated draws, a denoiser's density is that of its probability-flow
ODE, and samples alone give a picture and no figure. A denoiser is asked for its score as well, which is known too, with
any noise added.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genus.config import Train
from genus.contract import Batch, Denoises, Family, Samples, Scores, Weighs, build, parameter_count
from genus.data.sources import two_d
from genus.data.spec import DataSpec
from genus.evaluation.metrics import mean_interval
from genus.evaluation.ode import log_prob as ode_log_prob
from genus.sampling import draw
from genus.training import train

LEVELS = 48  # cells a side: a sixth of a unit, 0.8 standard deviations of the finest shape
POINTS = 1 << 17  # training examples; few are seen twice
REPEATS = 8  # draws of every cell's bound
ODE_REPEATS = 2
WEIGHTS = 8  # codes a draw from which an importance-weighted estimate is made
TOLERANCE = 1e-3  # of the ODE's solver, relative and absolute
SAMPLES = 20_000
COARSE = 16  # cells a side in which shares are compared
LIGHTEST = 1e-30  # the least probability of a cell, so that a model that rules out what happens still has a figure
SIZE = 160  # pixels of a picture's side
NOISES, SCORED = 8, 2000  # levels at which a score is compared with the true one, and most examples at each


@dataclass(frozen=True)
class Fit:
    """A fitted model beside the truth. ``table``, ``truth``: probabilities of the cells, float64 [levels, levels]."""

    figures: dict[str, Any]
    seconds: dict[str, float]
    table: np.ndarray
    truth: np.ndarray

    @property
    def scale(self) -> float:
        """Of the truth's picture, for both."""
        return scale(self.truth)


def settings(model: Family) -> Train:
    """How a model of two numbers is trained, by what it is: two or three seconds of one thread, whichever it is."""
    if (
        len(model.groups()) > 1
    ):  # an adversarial game: little momentum, averaged weights (Yazici et al. 2018, 1806.04498)
        return Train(steps=900, batch_size=256, learning_rate=1.5e-3, betas=(0.5, 0.99), ema=0.99, final_lr=0.1)
    if isinstance(model, Denoises):  # a regression on noise: large batches and averaged weights
        return Train(steps=350, batch_size=1024, learning_rate=1e-2, betas=(0.9, 0.99), ema=0.99)
    steps = 800 if isinstance(model, Weighs) else 600  # a code has to be found before it can be of use
    return Train(steps=steps, batch_size=512, learning_rate=4e-3, betas=(0.9, 0.99), warmup=0.2, clip=5.0)


def fit(
    family: str,
    params: dict[str, Any],
    shape: str,
    *,
    seed: int,
    device: torch.device,
    steps: int | None = None,
    levels: int = LEVELS,
) -> Fit:
    """Trains a family on draws of a known density and compares what it has learned, cell by cell.

    ``figures`` are the same for the same seed and machine: "kl" {"value", "low", "high", "n", "kind"} in nats or None,
    "kind" of density, "mass" on all cells (a bound's: of the mean probability over draws), "entropy" of the truth in
    nats, "uniform", the KL of knowing nothing, "steps", "parameters" and "variation", the total variation between
    table and truth in 16 × 16 cells, which samples have too. ``seconds``: "train" and "density".

    Raises UserError for an unknown shape, family or parameter, NonFiniteLoss where training ends in no number.
    """
    truth = two_d.truth(shape, levels)
    spec = DataSpec((2, 1, 1), levels=levels)
    torch.manual_seed(seed)
    model = build(family, spec, params)
    parameters = parameter_count(model)  # before training: averaged weights are no parameters
    config = settings(model)
    steps = config.steps if steps is None else steps
    points = two_d.draw(shape, POINTS, levels, seed)
    started = time.monotonic()
    labels = np.zeros(len(points), np.int64)
    model = train(model, points, labels, config, steps=steps, seed=seed, device=device).model
    trained = time.monotonic()
    figures, table = measure(model, truth, seed=seed, device=device)
    figures |= {"steps": steps, "parameters": parameters}
    seconds = {"train": trained - started, "density": time.monotonic() - trained}
    return Fit(figures, seconds, table, truth)


def measure(model: Family, truth: np.ndarray, *, seed: int, device: torch.device) -> tuple[dict[str, Any], np.ndarray]:
    """The figures of a model beside a truth [L, L], and its table of probabilities [L, L], both float64.

    Raises TypeError for a model that can neither score, denoise nor sample.
    """
    levels = len(truth)
    grid = model.spec.to_float(cells(levels).to(device))
    generator = torch.Generator(device).manual_seed(seed)
    figures: dict[str, Any] = {"kl": None, "kind": "none", "mass": None, "entropy": entropy(truth)}
    figures["uniform"] = 2 * math.log(levels) - figures["entropy"]
    if isinstance(model, Scores):
        exact = model.density == "exact"
        with torch.inference_mode():
            bounds = [_scored(model, grid, generator) for _ in range(1 if exact else REPEATS)]
            weighed = (
                [_weighed(model, grid, generator) for _ in range(REPEATS)] if isinstance(model, Weighs) else bounds
            )
        kind = model.density
    elif isinstance(model, Denoises):
        found = [
            ode_log_prob(model, grid, generator=generator, trace="exact", rtol=TOLERANCE, atol=TOLERANCE)
            for _ in range(ODE_REPEATS)
        ]
        bounds = weighed = [each.nats for each in found]
        kind = found[0].kind
        figures |= {"nfe": found[0].nfe, "tolerance": TOLERANCE}
        some = np.random.default_rng(seed).choice(levels**2, SCORED, p=truth.ravel())
        figures |= {"score_error": score_error(model, truth, cells(levels)[some], generator=generator)}
    elif isinstance(model, Samples):
        shares = count(draw(model, SAMPLES, seed=seed, device=device, batch_size=SAMPLES, quiet=True), levels)
        return figures | {"variation": variation(truth, shares)}, smoothed(shares)
    else:
        raise TypeError(f"{type(model).__module__} neither scores, denoises nor samples: nothing to compare")

    tables = np.stack([each.double().cpu().numpy().reshape(levels, levels) for each in bounds])
    # Draws averaged as probabilities: unbiased for the cell's own, where each draw's logarithm is below it.
    table = np.mean([np.exp(each.double().cpu().numpy()) for each in weighed], 0).reshape(levels, levels)
    figures |= {"kind": kind, "mass": float(table.sum()), "kl": divergence(truth, tables) | {"kind": kind}}
    return figures | {"variation": variation(truth, table)}, table


@torch.inference_mode()
def excess(task: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What the model's log-probability of test examples lacks of the true one, where the data's density is known.

    A row of the evaluator's metrics: {"excess_nats": {"value", "low", "high", "n", "kind", "floor"}}, the mean with its
    95% interval over examples, an unbiased estimate of KL(truth || model), or of more by the gap of a bound; none for
    other data. Raises FloatingPointError, naming the example, where a log-probability is not finite.
    """
    data = task.data
    shape = two_d.shape_of(data.description)
    if shape is None:
        return {}, {}
    stored = np.array(data.split("test")[: task.count("likelihoods")])
    generator, parts = task.generator(19), []
    for batch in torch.from_numpy(stored).split(task.effort.batch_size):
        nats = task.model.log_prob(Batch(data.spec.to_float(batch.to(task.device))), generator=generator)
        parts.append(nats.double().cpu().numpy())
    lacks = two_d.log_prob(shape, stored, data.spec.levels) - np.concatenate(parts)
    if not np.isfinite(lacks).all():
        raise FloatingPointError(
            f"log_prob of test example {int(np.flatnonzero(~np.isfinite(lacks))[0])} is not finite"
        )
    value, low, high = mean_interval(lacks)
    figure = {"value": value, "low": low, "high": high, "n": len(lacks), "kind": task.model.density, "floor": 0.0}
    return {"excess_nats": figure}, {}


def score_excess(task: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """``score_error`` on test examples, as a row of the evaluator's metrics; none where no density is known."""
    shape = two_d.shape_of(task.data.description)
    if shape is None:
        return {}, {}
    stored = torch.from_numpy(np.array(task.data.split("test")[:SCORED])).long()
    truth = two_d.truth(shape, task.data.spec.levels)
    return {"score_error": score_error(task.model, truth, stored, generator=task.generator(20))}, {}


@torch.inference_mode()
def score_error(model: Any, truth: np.ndarray, stored: Tensor, *, generator: torch.Generator) -> dict[str, Any]:
    """E|s - s*|² / E|s*|² for the score s of a model that ``Denoises`` and the true one, s*: 0 is best, 1 says nothing.

    {"value", "low", "high", "n", "kind", "floor", "levels"}: the mean over 8 noise levels, evenly spaced in ln sigma up
    to the model's highest, with the 95% interval over examples, and the value at each. The lowest is the model's, but
    no less than the width of a cell: with less noise the true density is a staircase. The expectations are over
    examples ``stored`` [N, 2, 1, 1] with noise added, from the density whose cells hold ``truth`` [L, L].
    """
    spec, device, values, spread = model.spec, generator.device, [], np.zeros(len(stored))
    sigmas = np.geomspace(max(min(model.sigmas), 2 / (spec.levels - 1)), max(model.sigmas), NOISES)
    clean = spec.to_float(stored.to(device))
    for sigma in sigmas:
        within = torch.rand(clean.shape, generator=generator, device=device) - 0.5
        noise = torch.randn(clean.shape, generator=generator, device=device)
        x = clean + within * 2 / (spec.levels - 1) + float(sigma) * noise
        true = noised(truth, x, float(sigma))[1]
        far = (learnt_score(model, x, float(sigma)) - true).square().sum(1).cpu().numpy()
        size = true.square().sum(1).cpu().numpy()
        values.append(float(far.mean() / size.mean()))
        spread += (far - values[-1] * size) / size.mean() / NOISES  # each example's part in the ratio's error
    value, error = float(np.mean(values)), float(spread.std(ddof=1) / math.sqrt(len(spread)))
    figure = {"value": value, "low": value - 1.96 * error, "high": value + 1.96 * error, "n": len(stored)}
    by_level = [{"sigma": float(sigma), "value": each} for sigma, each in zip(sigmas, values, strict=True)]
    return figure | {"kind": "score", "floor": 0.0, "levels": by_level}


def learnt_score(model: Any, x: Tensor, sigma: float) -> Tensor:
    """The score at ``x`` [B, 2, 1, 1] that a denoiser implies (Tweedie's formula): float64 [B, 2]."""
    clean = model.denoise(x, torch.full((len(x),), sigma, device=x.device, dtype=x.dtype))
    return (clean - x).double().flatten(1) / sigma**2


def noised(truth: np.ndarray, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The density and its score at ``x`` [B, 2, 1, 1] with Gaussian noise ``sigma`` added: float64 [B] and [B, 2].

    Exact, in the units of DataSpec, for data that is spread evenly over each cell of ``truth`` [L, L]: a cell with
    noise is a product of differences of normal distribution functions. 0 and 0 where the density is below 1e-300.
    """
    levels, p = len(truth), torch.from_numpy(truth).to(x.device)
    edges = (2 * torch.arange(levels + 1, device=x.device, dtype=torch.float64) - 1) / (levels - 1) - 1
    z = (x.double().flatten(1)[:, :, None] - edges) / sigma  # [B, 2, L + 1], falling
    upper, lower = z[..., :-1], z[..., 1:]
    # On the side where both differences are small, or they would be lost in 1 - 1.
    turn = lower > 0
    near, far = torch.where(turn, -lower, upper), torch.where(turn, -upper, lower)
    mass = torch.special.ndtr(near) - torch.special.ndtr(far)
    bell = torch.exp(-0.5 * z.square()) / (sigma * math.sqrt(2 * math.pi))
    (mass_x, mass_y), (slope_x, slope_y) = mass.unbind(1), (bell[..., :-1] - bell[..., 1:]).unbind(1)
    along = mass_y @ p.T
    total = (mass_x * along).sum(1)
    slope = torch.stack([(slope_x * along).sum(1), (mass_x * (slope_y @ p.T)).sum(1)], 1)
    there = total > 1e-300
    score = torch.where(there[:, None], slope / total.clamp(min=1e-300)[:, None], 0.0)
    return torch.where(there, total, 0.0) * ((levels - 1) / 2) ** 2, score


def cells(levels: int) -> Tensor:
    """Every cell as a stored example: int64 [levels², 2, 1, 1], in the order of a table [x, y] laid flat."""
    return torch.cartesian_prod(torch.arange(levels), torch.arange(levels))[:, :, None, None]


def entropy(truth: np.ndarray) -> float:
    """In nats."""
    p = truth[truth > 0]
    return float(-(p * np.log(p)).sum())


def divergence(truth: np.ndarray, log_q: np.ndarray) -> dict[str, Any]:
    """KL(truth || q) in nats, for repeated draws of a table of ln q, [R, L, L]: {"value", "low", "high", "n"}.

    95% interval of the draws: each cell's own spread over the R, which are independent from cell to cell, weighted as
    the cell is. A single draw counts as exact. A cell of q is taken to hold 1e-30 at least.
    """
    some = truth > 0
    p, drawn = truth[some], np.maximum(log_q[:, some], math.log(LIGHTEST))
    value, n = float((p * (np.log(p) - drawn.mean(0))).sum()), len(log_q)
    error = math.sqrt(float((p**2 * drawn.var(0, ddof=1)).sum() / n)) if n > 1 else 0.0
    return {"value": value, "low": value - 1.96 * error, "high": value + 1.96 * error, "n": n}


def variation(truth: np.ndarray, table: np.ndarray) -> float:
    """Total variation: half of the summed differences of the shares of 16 × 16 cells (of all, where they are fewer)."""
    return 0.5 * float(np.abs(coarse(table) - coarse(truth)).sum())


def count(stored: np.ndarray, levels: int) -> np.ndarray:
    """Shares of stored examples [N, 2, 1, 1] in the cells: float64 [levels, levels]."""
    x, y = stored[:, :, 0, 0].astype(np.int64).T
    return np.bincount(levels * x + y, minlength=levels**2).reshape(levels, levels) / len(stored)


def coarse(table: np.ndarray) -> np.ndarray:
    """Summed into 16 × 16 cells, or as they are where they can't be."""
    side = len(table) // COARSE
    return table.reshape(COARSE, side, COARSE, side).sum((1, 3)) if side and len(table) % COARSE == 0 else table


def smoothed(shares: np.ndarray) -> np.ndarray:
    """A histogram blurred by one cell: what samples alone give to look at. It loses what falls off the square."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(shares, 1.0, mode="constant")


def scale(table: np.ndarray) -> float:
    """The probability that a picture shows brightest: all but a two-hundredth of the cells are below it."""
    return float(np.quantile(table, 0.995))


def picture(table: np.ndarray, top: float | None = None) -> np.ndarray:
    """A table [x, y] as uint8 [H, W, 3], about 160 pixels a side: x to the right, y upwards, in the colours of viridis.

    The colours go from 0 to ``top``, by default the table's own ``scale``; give two tables one to compare them.
    """
    from matplotlib import colormaps

    shown = np.clip(table.T[::-1] / max(scale(table) if top is None else top, LIGHTEST), 0, 1)
    zoom = max(1, round(SIZE / len(table)))
    colours = (colormaps["viridis"](shown)[..., :3] * 255).round().astype(np.uint8)
    return colours.repeat(zoom, 0).repeat(zoom, 1)


@torch.inference_mode()
def fields(model: Any, truth: np.ndarray, *, device: torch.device) -> np.ndarray:
    """True and learnt scores as arrows over the density, at three noise levels: uint8 [H, W, 3].

    Arrows are sigma · score, to one scale a row, where the density is at least a thousandth of its highest: elsewhere
    there is nothing to learn from.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 9.6), dpi=100, layout="constrained")
    rows = figure.subplots(3, 2, sharex=True, sharey=True)
    low, high = min(model.sigmas), max(model.sigmas)
    fine, rough = (torch.linspace(-1, 1, count, device=device) for count in (96, 24))
    for axes, sigma in zip(rows, np.geomspace(4 * low, high / 2, 3).tolist(), strict=True):
        grid, at = (torch.cartesian_prod(side, side)[:, :, None, None] for side in (fine, rough))
        density = noised(truth, grid, sigma)[0]
        there, true = noised(truth, at, sigma)
        some = (there > 1e-3 * density.max()).cpu().numpy()
        shown = density.view(len(fine), len(fine)).T.cpu().numpy()
        (x, y), longest = at.flatten(1).T.cpu().numpy()[:, some], sigma * float(true.norm(dim=1)[some].max())
        for axis, name, score in zip(axes, ("true", "learnt"), (true, learnt_score(model, at, sigma)), strict=True):
            axis.imshow(shown, origin="lower", extent=(-1, 1, -1, 1), cmap="viridis")
            u, v = sigma * score.T.cpu().numpy()[:, some]
            axis.quiver(x, y, u, v, color="white", angles="xy", scale=8 * longest, width=0.004)
            axis.set(title=f"{name}, sigma {sigma:.2g}", xticks=(), yticks=())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _scored(model: Any, grid: Tensor, generator: torch.Generator) -> Tensor:
    return model.log_prob(Batch(grid), generator=generator)


def _weighed(model: Any, grid: Tensor, generator: torch.Generator) -> Tensor:
    weights = model.log_weights(Batch(grid), WEIGHTS, generator=generator)
    return weights.double().logsumexp(0) - math.log(WEIGHTS)
