"""The radial layer of a flow: y = z + β (z - c) / (α + |z - c|) (Rezende & Mohamed 2015, arXiv:1505.05770, eq. 13).

It pushes space away from a centre c, or pulls it there, within a distance of about α. It is invertible where β > -α
(appendix A.2): here β = α m, m = softplus(x + s) - 1 with m(0) = 0, so that x = 0 is the identity.

``raw``: [..., D + 2] unconstrained numbers, c, ln α and x end to end; one layer for all of z [B, D], or one for each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = math.log(math.e - 1)  # softplus of it is 1


def numbers(dims: int) -> int:
    """Of a layer's parameters."""
    return dims + 2


def start(layers: int, dims: int, *, reach: float = 1.0) -> Tensor:
    """[layers, numbers] to begin from: centres as a standard normal has them, of α = ``reach``, that hardly push."""
    centre = torch.randn(layers, dims)
    push = 0.01 * torch.randn(layers, 1)
    return torch.cat([centre, torch.full((layers, 1), math.log(reach)), push], 1)


def forward(z: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, D] and the log-determinant [B] in nats (eq. 14)."""
    centre, alpha, slope = _constrained(raw)
    away = z - centre
    near = alpha / (alpha + _length(away))  # α h(α, r): 1 at the centre, 0 far away
    # 1 + m x near, as sums of what is positive: across the radius D - 1 times, and along it
    across, along = 1 - near + near * slope, 1 - near.square() + near.square() * slope
    return centre + away * across.unsqueeze(-1), (z.shape[-1] - 1) * across.log() + along.log()


def inverse(y: Tensor, raw: Tensor) -> Tensor:
    """z [B, D] of y: its distance from the centre is the root of r² + (α + β - R) r = R α, R that of y."""
    centre, alpha, slope = _constrained(raw)
    away = y - centre
    length = _length(away)
    half = 0.5 * (length - alpha * slope)
    root = (half.square() + length * alpha).sqrt()
    radius = torch.where(
        half > 0, half + root, length * alpha / (root - half).clamp(min=1e-30)
    )  # no difference of equals
    near = alpha / (alpha + radius)
    return centre + away / (1 - near + near * slope).unsqueeze(-1)


def check(raw: Tensor) -> None:
    """Raises ValueError, naming the layer and its β/α, where layers [K, numbers] are not invertible or no numbers."""
    centre, alpha, slope = _constrained(raw.detach())
    good = (slope > 0) & (alpha > 0) & (centre.sum(-1) + alpha + slope).isfinite()
    if not good.all():
        k = int((~good).flatten().int().argmax())
        told = f"α is {float(alpha.flatten()[k]):g}, β/α {float((slope - 1).flatten()[k]):g}"
        raise ValueError(f"radial layer {k + 1} is not invertible: {told} where α > 0 and β/α > -1 must hold")


def _constrained(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre, α, and 1 + β/α, which is above 0."""
    return raw[..., :-2], raw[..., -2].exp(), F.softplus(raw[..., -1] + SHIFT)


def _length(x: Tensor) -> Tensor:
    """Of vectors, with a derivative at 0."""
    return (x.square().sum(-1) + torch.finfo(x.dtype).tiny).sqrt()
