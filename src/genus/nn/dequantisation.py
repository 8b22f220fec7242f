"""From stored levels to unbounded reals and back: what every flow does before its first layer.

Level k of L gets uniform noise, v = (k + u) / L with u ~ U[0, 1), and v an elementwise map onto the real line.
By Jensen's inequality (Theis et al. 2016, arXiv:1511.01844, eq. 3) the expected log-density of the result, with the
map's log-Jacobian and -log L a dimension, is a lower bound on the log-probability of the stored levels: the kind of
density called ``dequantised``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus.data.spec import DataSpec

LOG_2PI = math.log(2 * math.pi)


class Logit(nn.Module):
    """y = logit(α + (1 - 2α) v), for v in [0, 1) (RealNVP, Dinh et al. 2017, section 4.1).

    α keeps y finite. It should be small: a large one makes the levels at the ends narrow, and on Fashion-MNIST, half
    of whose pixels are exactly 0, α = 0.05 costs 0.4 bits/dim against 1e-6.
    """

    def __init__(self, alpha: float = 1e-6):
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha must be between 0 and 0.5, not {alpha}")
        self.alpha = alpha

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dv, both in v's shape."""
        p = self.alpha + (1 - 2 * self.alpha) * v
        log_p, log_q = p.log(), torch.log1p(-p)
        return log_p - log_q, math.log1p(-2 * self.alpha) - log_p - log_q

    def inverse(self, y: Tensor) -> Tensor:
        return (y.sigmoid() - self.alpha) / (1 - 2 * self.alpha)


class Gaussianise(nn.Module):
    """y = Φ⁻¹(C(v)), where C is the distribution function of all levels of a data set, pooled.

    With uniform noise C is piecewise linear, and y is standard normal over the data before anything is learned: a flow
    starts at the entropy of the level histogram. What is gained is at a level that holds much of the data: its uniform
    noise is exponential after a logit, half normal after this. An affine coupling can shift and scale noise, but not
    bend it into the normal shape of the prior: on Fashion-MNIST that is worth 0.13 bits/dim.
    """

    mass: Tensor

    def __init__(self, levels: int):
        super().__init__()
        # Double: near C = 1 the steps of a float are wider than a rare level.
        self.register_buffer("mass", torch.full((levels,), 1 / levels, dtype=torch.float64))

    @torch.no_grad()
    def fit(self, levels: Tensor) -> None:
        """Takes C from int64 levels of any shape.

        One batch is a small sample, so a level gets the median of its neighbours, unless it stands out of them,
        plus one count: no level is impossible.
        """
        counts = torch.bincount(levels.flatten(), minlength=len(self.mass)).double()
        reach = len(counts) // 64
        padded = F.pad(counts[None], (reach, reach), mode="replicate")[0] if reach else counts
        median = padded.unfold(0, 2 * reach + 1, 1).median(-1).values
        counts = torch.where(counts > 4 * median, counts, median) + 1
        self.mass.copy_(counts / counts.sum())

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dv, both in v's shape."""
        mass, below = self._table()
        position = v.double() * len(mass)
        level = position.long().clamp(0, len(mass) - 1)
        y = torch.special.ndtri((below[level] + (position - level) * mass[level]).clamp(1e-10, 1 - 1e-10))
        log_slope = (mass.log() + math.log(len(mass)))[level] + 0.5 * (y.square() + LOG_2PI)
        return y.to(v.dtype), log_slope.to(v.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        mass, below = self._table()
        reached = torch.special.ndtr(y.double())
        level = (torch.searchsorted(below, reached.contiguous(), right=True) - 1).clamp(0, len(mass) - 1)
        return ((level + (reached - below[level]) / mass[level]) / len(mass)).to(y.dtype)

    def _table(self) -> tuple[Tensor, Tensor]:
        mass = self.mass.double()  # again: model.float() would have narrowed it
        return mass, mass.cumsum(0) - mass


class Dequantise(nn.Module):
    """Examples in the units of DataSpec to reals [B, *shape] and back, all Jacobians and -log L included.

    Continuous data (levels = 0) passes as it is.
    """

    def __init__(self, spec: DataSpec, onto_reals: Logit | Gaussianise):
        super().__init__()
        self.spec, self.onto_reals = spec, onto_reals

    def forward(self, x: Tensor, *, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Reals in x's shape and the log-determinant [B] in nats. No generator: the middle of each level's cell."""
        if not self.spec.levels:
            return x, x.new_zeros(len(x))
        levels = self.spec.levels
        # Not in x's dtype where that is half: 256 levels and their noise need more than 11 bits.
        x = x if x.dtype == torch.float64 else x.float()
        noise = 0.5 if generator is None else torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        y, log_slope = self.onto_reals((((x + 1) * ((levels - 1) / 2)).round() + noise) / levels)
        return y, log_slope.flatten(1).sum(1) - self.spec.dims * math.log(levels)

    def inverse(self, y: Tensor) -> Tensor:
        """The level in whose cell each y lies, in the units of DataSpec."""
        if not self.spec.levels:
            return y
        top = self.spec.levels - 1
        level = (self.onto_reals.inverse(y) * self.spec.levels).floor().clamp(0, top)
        return level * (2 / top) - 1

    def check(self, x: Tensor) -> None:
        """Raises ValueError for the wrong shape, NaN, or values outside [-1, 1]."""
        if x.shape[1:] != self.spec.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; right would be [B, {', '.join(map(str, self.spec.shape))}]"
            )
        low, high = (float(end) for end in x.aminmax()) if x.numel() else (0.0, 0.0)
        if math.isnan(low) or math.isnan(high):
            raise ValueError("x holds NaN")
        if self.spec.levels and (low < -1.001 or high > 1.001):
            raise ValueError(f"x goes from {low:g} to {high:g}; levels are given as floats in [-1, 1]")
