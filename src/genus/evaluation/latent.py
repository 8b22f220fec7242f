"""What a code holds: how many nats it says of an example, and how many of its numbers say anything.

For images and for text; whether the numbers mean something each is another question (disentanglement.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from genus.contract import Batch
from genus.evaluation.metrics import mean_interval, wilson

CODED = 2_000  # test examples that are encoded
ACTIVE = 0.01  # variance of a number's mean over the examples above which it is active


@torch.inference_mode()
def rate(task: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """{"rate": {"value", "low", "high", "n"}}: nats that a code says of a test example, the mean and its 95% interval.

    The other part of the bound is the distortion (Alemi et al. 2018, 1711.00464). Near 0 the code is ignored: the
    posterior has collapsed onto the prior. Raises FloatingPointError where one is not finite.
    """
    generator = task.generator(20)
    nats = torch.cat([task.model.rate(Batch(x), generator=generator).double().cpu() for x in _batches(task)]).numpy()
    if not np.isfinite(nats).all():
        raise FloatingPointError(f"rate of test example {int((~np.isfinite(nats)).argmax())} is not finite")
    value, low, high = mean_interval(nats)
    return {"rate": {"value": value, "low": low, "high": high, "n": len(nats)}}, {}


@torch.inference_mode()
def active_units(task: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """{"active_units": {"value", "low", "high", "n", "active", "latent"}}: the share of a code's numbers in use.

    Burda et al. 2015 (1509.00519, section 5.2): those whose mean of q(z|x) has a variance above 0.01 over test
    examples. The interval is Wilson's, of as many numbers as the code has.
    """
    codes = torch.cat([task.model.encode(x).double().flatten(1) for x in _batches(task)])
    active, latent = int((codes.var(0) > ACTIVE).sum()), codes.shape[1]
    low, high = wilson(active, latent)
    found = {"value": active / latent, "low": low, "high": high, "n": len(codes), "active": active, "latent": latent}
    return {"active_units": found}, {}


def spherical(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Codes [T, D] on the great circle from ``a`` to ``b`` [D] (Shoemake 1985; White 2016, 1609.04468).

    Normal codes of many numbers lie near a sphere: the straight line between two of them leaves it.
    """
    cosine = torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=1e-12)
    angle = torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))
    weights = torch.stack([torch.sin((1 - t) * angle), torch.sin(t * angle)], 1) / torch.sin(angle)
    return weights @ torch.stack([a, b])


def _batches(task: Any) -> tuple[Tensor, ...]:
    """Test examples in the units of Batch.x, on the device, in batches."""
    text = task.data.spec.kind == "text"
    x = _documents(task) if text else task.test(min(CODED, task.data.count("test")))
    return x.split(task.effort.batch_size)


def _documents(task: Any) -> Tensor:
    """Test documents, chosen at random, always the same ones: int64 [n, T]."""
    count = task.data.count("test")
    rows = np.random.default_rng(0).permutation(count)[:CODED]
    return task.data.spec.to_float(torch.from_numpy(task.data.documents("test", rows).astype(np.int64))).to(task.device)
