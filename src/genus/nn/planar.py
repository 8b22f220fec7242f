"""The planar layer of a flow: y = z + û tanh(w·z + b) (Rezende & Mohamed 2015, arXiv:1505.05770, eq. 10).

It stretches or squeezes space across the plane w·z + b = 0. It is invertible where w·û > -1 (appendix A.1), which û
holds by construction: û = u + (m(w·u) - w·u) w / |w|², m(x) = softplus(x + c) - 1. The paper has c = 0; here m(0) = 0,
so that u = 0 is the identity.

``raw``: [..., 2 D + 1] unconstrained numbers, u, w and b end to end; one layer for all of z [B, D], or one for each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = math.log(math.e - 1)  # softplus of it is 1
TINY = 1e-12  # of |w|²: a w of zero makes a translation
HALVINGS = 64


def numbers(dims: int) -> int:
    """Of a layer's parameters."""
    return 2 * dims + 1


def start(layers: int, dims: int) -> Tensor:
    """[layers, numbers] to begin from: planes that cross a standard normal anywhere, hardly bent."""
    u = 0.01 * torch.randn(layers, dims)
    w = torch.randn(layers, dims)
    b = torch.randn(layers, 1)
    return torch.cat([u, w, b], 1)


def forward(z: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, D] and the log-determinant [B] in nats (eq. 12)."""
    u, w, b, slope = _constrained(raw)
    bend = torch.tanh((z * w).sum(-1) + b)
    # 1 + tanh' w·û as a sum of what is positive: no rounding makes it negative
    return z + u * bend.unsqueeze(-1), (bend.square() + (1 - bend.square()) * slope).log()


def inverse(y: Tensor, raw: Tensor) -> Tensor:
    """z [B, D] of y: s + (w·û) tanh s = w·y + b rises in s, and is solved by halving, to the last bit."""
    u, w, b, slope = _constrained(raw)
    target, reach = (y * w).sum(-1) + b, slope - 1
    low, high = target - reach.abs(), target + reach.abs()
    for _ in range(HALVINGS):
        s = 0.5 * (low + high)
        above = s + reach * torch.tanh(s) > target
        low, high = torch.where(above, low, s), torch.where(above, s, high)
    return y - u * torch.tanh(0.5 * (low + high)).unsqueeze(-1)


def check(raw: Tensor) -> None:
    """Raises ValueError, naming the layer and its w·û, where layers [K, numbers] are not invertible or no numbers."""
    u, w, b, slope = _constrained(raw.detach())
    good = (slope > 0) & slope.isfinite() & (u.sum(-1) + w.sum(-1) + b).isfinite()
    if not good.all():
        k = int((~good).flatten().int().argmax())
        told = float((slope - 1).flatten()[k])
        raise ValueError(f"planar layer {k + 1} is not invertible: w·û is {told:g} where it must be above -1")


def _constrained(raw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """û, w, b, and 1 + w·û, which is above 0."""
    dims = (raw.shape[-1] - 1) // 2
    u, w, b = raw[..., :dims], raw[..., dims:-1], raw[..., -1]
    along = (u * w).sum(-1)
    slope = F.softplus(along + SHIFT)
    return u + ((slope - 1 - along) / w.square().sum(-1).clamp(min=TINY)).unsqueeze(-1) * w, w, b, slope
