"""Masked autoregressive flow, MAF MoG (Papamakarios et al. 2017, https://arxiv.org/abs/1705.07057).

Each layer shifts and scales number i by functions of the numbers before it (eq. 3, 4), which a MADE gives for all of
them in one pass; the order is reversed from layer to layer. What comes out is modelled by one more MADE, whose
conditionals are mixtures of Gaussians (section 4: MAF MoG). The density takes one pass a layer; a sample takes D,
number by number: the reverse of genus.families.flows.iaf.

Differences from the paper: the scales are bounded, exp(b tanh(s / b)), and only the input is normalised, not every
layer, which would need running statistics. The mixtures' distribution functions make the last step a layer like the
others, onto a standard normal: so there is a code, and samples are drawn from it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Generator, Tensor, nn

from genus.data.spec import DataSpec
from genus.families.flows._flow import ShiftAndScale, VectorFlow
from genus.nn.dequantisation import LOG_2PI
from genus.nn.made import MADE

# Where the data are vectors, radians of the MADEs' sines a unit of about normal data. A mixture's parameters may jump
# from one number to the next; shifts and scales that do, under one another, wreck each other's training.
PITCH, GENTLE = 12.0, 1.0
GAIN = 5.0  # of what a MADE says of a mixture: its deviations have far to go
HALVINGS = 64


class MAF(VectorFlow):
    """``layers`` of shift and scale, then mixtures of ``components``; ``hidden``: units of both layers of each MADE.

    An image is a vector of its pixels in raster order (channel by channel): all that MADE knows of places is the order.
    ``bound``: a layer scales by e^-bound … e^bound. Raises ValueError for text and for no components.
    """

    paper = "Papamakarios et al. 2017, arXiv:1705.07057"
    widths = ("hidden",)

    def __init__(self, spec: DataSpec, *, layers: int = 2, hidden: int = 96, components: int = 16, bound: float = 2.0):
        super().__init__(spec)
        if layers < 0 or components < 1:
            raise ValueError(f"layers must be at least 0 and components 1, not {layers} and {components}")
        pitch, gentle = (PITCH, GENTLE) if spec.flat else (0.0, 0.0)
        self.layers = nn.ModuleList(Affine(spec.dims, hidden, bound, gentle) for _ in range(layers))
        self.mixture = Mixture(spec.dims, hidden, components, pitch)

    def normalise(self, y: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """To what the mixtures model. One pass a layer."""
        for layer in self.layers:
            y, change = layer(y)
            y, log_det = y.flip(1), log_det + change
        return y, log_det

    def generate(self, code: Tensor) -> Tensor:
        """D passes a layer."""
        u = self.mixture.inverse(code)
        for layer in reversed(self.layers):
            u = cast("Affine", layer).inverse(u.flip(1))
        return u

    def encode(self, x: Tensor) -> Tensor:
        return self.mixture(super().encode(x))

    def _log_prob(self, x: Tensor, generator: Generator) -> Tensor:
        u, log_det = self.flow(x, generator)
        return log_det + self.mixture.log_prob(u)


class Affine(ShiftAndScale):
    """u_i = (x_i - shift_i) exp(-log_scale_i), both of x before i (eq. 4). One pass forward, D passes back."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.split(self.made(x))
        return (x - shift) * (-log_scale).exp(), -log_scale.sum(1)

    def inverse(self, u: Tensor) -> Tensor:
        def solve(u: Tensor, told: Tensor) -> Tensor:
            shift, log_scale = self.split(told)
            return u * log_scale.exp() + shift

        return self.made.unroll(u, solve)[0]


class Mixture(nn.Module):
    """u_i is of a mixture of Gaussians, whose weights, means and deviations are functions of u before i.

    As a layer: z_i = Φ⁻¹(F_i(u_i)), F_i the mixture's distribution function, which is standard normal.
    """

    def __init__(self, dims: int, hidden: int, components: int, pitch: float):
        super().__init__()
        self.made = MADE(dims, hidden, 3 * components, pitch=pitch)
        with torch.no_grad():  # side by side over a standard normal
            _, means, log_scales = self.made.last_bias.chunk(3, -1)
            middles = (torch.arange(components) + 0.5) / components
            means += torch.special.ndtri(middles) / GAIN
            log_scales -= 0.5 * math.log(components) / GAIN

    def log_prob(self, u: Tensor) -> Tensor:
        """[B] nats."""
        log_weights, means, log_scales = self._split(self.made(u))
        z = (u.unsqueeze(-1) - means) * (-log_scales).exp()
        return torch.logsumexp(log_weights - log_scales - 0.5 * (z.square() + LOG_2PI), -1).sum(1)

    def forward(self, u: Tensor) -> Tensor:
        """z [B, D]. In double: where a mixture has next to nothing, a float's last digit of z is much of u."""
        log_weights, means, log_scales = self._split(self.made(u).double())
        z = (u.unsqueeze(-1) - means) * (-log_scales).exp()
        below, above = ((log_weights.exp() * _normal(side)).sum(-1) for side in (z, -z))
        tail = torch.minimum(below, above).clamp(1e-300, 0.5)  # the smaller one is precise
        return (torch.special.ndtri(tail) * torch.where(below < above, 1.0, -1.0)).to(u.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        """u [B, D], by halving the interval of where the components alone would put z."""

        def solve(z: Tensor, told: Tensor) -> Tensor:
            z, (log_weights, means, log_scales) = z.double(), self._split(told.double())
            weights, widths = log_weights.exp(), log_scales.exp()
            low, high = (means + widths * z.unsqueeze(-1)).aminmax(dim=-1)
            side = torch.where(z > 0, -1.0, 1.0)  # the smaller tail is precise
            tail = _normal(side * z)
            signed = side.unsqueeze(-1) / widths
            for _ in range(HALVINGS):
                u = 0.5 * (low + high)
                reached = (weights * _normal((u.unsqueeze(-1) - means) * signed)).sum(-1)
                beyond = (reached > tail) == (side > 0)
                low, high = torch.where(beyond, low, u), torch.where(beyond, u, high)
            return (0.5 * (low + high)).to(told.dtype)

        return self.made.unroll(z, solve)[0]

    def _split(self, told: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, means and log-deviations, each [..., components]; deviations are 1e-3 at least."""
        logits, means, raw = (GAIN * told).chunk(3, -1)
        return logits.log_softmax(-1), means, raw.clamp(min=math.log(1e-3))


def _normal(x: Tensor) -> Tensor:
    """Φ(x), far down the lower tail as well: torch.special.ndtr's error there is 1e-6 of the value at -7."""
    return 0.5 * torch.erfc(-math.sqrt(0.5) * x)


Model = MAF
