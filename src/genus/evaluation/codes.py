"""What is measured of a code of tokens: how much of it is used, and what is left of an image after it."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genus import progress
from genus.evaluation import metrics
from genus.evaluation.quality import FRECHET_FROM
from genus.training import autocast


@torch.inference_mode()
def codes(task: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Rows of the evaluator's metrics for a model that Quantises, all of the test split:

    - codes_used: share of the entries that occur; of the grid where it is least, every grid under ``grids``;
    - code_perplexity: the exponential of the entropy of the tokens' frequencies, likewise; at most ``entries``;
    - code_bits: bits of the tokens, were all alike probable, for each number of an example;
    - reconstruction_error: root mean squared error of what is decoded again, in levels, interval over examples;
    - reconstruction_frechet: the Fréchet distance of reconstructions from the test split, which are the same images:
      its floor is 0. Only where the judge's Fréchet distances mean something, as of samples.

    Raises FloatingPointError where a reconstruction is not finite.
    """
    model, data = task.model, task.data
    spec, images = data.spec, data.split("test")
    counts = [np.zeros(model.entries, np.int64) for _ in model.grids]
    started, parts = time.monotonic(), []
    for start in range(0, len(images), task.effort.batch_size):
        stored = torch.from_numpy(np.array(images[start : start + task.effort.batch_size])).to(task.device)
        with autocast(task.device):
            tokens = model.quantise(spec.to_float(stored))
            again = model.dequantise(tokens)
        if not again.isfinite().all():
            last = start + len(again) - 1
            raise FloatingPointError(f"a reconstruction of test images {start} to {last} is not finite")
        parts.append(spec.to_stored(again.float()).cpu().numpy())
        counts = [seen + count(grid, model.entries) for seen, grid in zip(counts, tokens, strict=True)]
        progress.report(start + len(stored), len(images), unit="reconstruction")
    seconds = time.monotonic() - started
    again, n = np.concatenate(parts), len(images)
    names = [f"{rows}x{columns}" for rows, columns in model.grids]
    used = {name: float((seen > 0).mean()) for name, seen in zip(names, counts, strict=True)}
    spread = {name: perplexity(seen) for name, seen in zip(names, counts, strict=True)}
    bits = sum(math.prod(grid) for grid in model.grids) * math.log2(model.entries)
    about = {"n": n, "entries": model.entries}
    figures = {
        "codes_used": {"value": min(used.values()), "grids": used} | about,
        "code_perplexity": {"value": min(spread.values()), "grids": spread} | about,
        "code_bits": {"value": bits / spec.dims} | about,
        "reconstruction_error": root_mean_square(again, np.asarray(images)),
    }
    view = task.reference.views["judge"]
    if n >= min(FRECHET_FROM, len(view.test)):
        seen = view.extract(again)
        distance = view.frechet(seen)
        low, high = metrics.bootstrap(view.frechet, seen, seed=task.seed)
        ends = {"value": distance, "low": low, "high": high, "n": n, "floor": 0.0, "kind": view.name}
        figures["reconstruction_frechet"] = ends | {"relative": distance / view.control, "control": view.control}
    return figures, {"reconstruction_ms": 1e3 * seconds / n}


def count(tokens: Tensor, entries: int) -> np.ndarray:
    """How often each entry occurs: int64 [entries]."""
    return torch.bincount(tokens.flatten(), minlength=entries).cpu().numpy()


def perplexity(counts: np.ndarray) -> float:
    """exp(entropy) of what occurs so often: 1 if it is always the same, the number of entries if all are alike."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def root_mean_square(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Of the differences of stored examples [N, ...]: a figure; the interval is the mean square's, over examples."""
    squares = np.stack([((x.astype(np.float64) - y) ** 2).mean() for x, y in zip(a, b, strict=True)])
    value, low, high = metrics.mean_interval(squares)
    return {"value": math.sqrt(value), "low": math.sqrt(max(low, 0.0)), "high": math.sqrt(high), "n": len(squares)}
