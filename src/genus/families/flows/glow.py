"""Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal 2018, https://arxiv.org/abs/1807.03039).

An image is squeezed (2x2 pixels become channels), goes through steps of flow (figure 2a: actnorm, invertible 1x1
convolution, affine coupling), loses half of its channels to a prior that sees the other half, and is squeezed again
(figure 2b). All of it is inverted exactly for sampling.

Differences from the paper, each measured or for the sake of exactness:
- the scale of a coupling is bounded on both sides, exp(b tanh(s / b)), not sigmoid(s + 2), whose inverse is unbounded;
- the last prior has a mean and scale a position (the paper: a convolution of zeros, the same but for the border);
- pixels are Gaussianised by their histogram before the first layer (see genus.nn.dequantisation);
- the networks know their place in the image, and on the last scale they see it whole: shapes come much sooner;
- the networks' hidden layers are neither actnormed nor scaled to unit variance by the first batch. So large, they let
  the first step of Adam, which moves each weight as far whatever its gradient, turn all log-scales by 0.5 at once, and
  5.4 bits/dim become 33; as they are, by 0.07. Eight seeds of 110 short steps of (6, 10) on 12 x 12 pixels, 5 of
  warm-up, end at 4.34 to 5.76 bits/dim scaled, at 4.20 to 4.28 not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from genus.data.spec import DataSpec
from genus.families.flows._coupling import Affine, Base, Conditional, Convolutions, CouplingFlow, Dense, Layer, Mixing


class Glow(CouplingFlow):
    """``steps`` and ``hidden``: steps of flow and width of the coupling networks, one number a scale.

    ``bound``: a coupling scales by e^-bound … e^bound. ``onto_reals``: "gaussianise", or "logit" with its ``alpha``.
    Vectors [D, 1, 1] have one scale of all steps, whose networks are dense, as wide as the widest; a quarter of the
    bound, since all steps act on the same few numbers: the product of their scales must not run away; and mixings that
    start by reversing the order, so that the halves take turns: random rotations cost 0.03 nats on a checkerboard.
    Raises ValueError for an image whose sides can't be halved once a scale.
    """

    paper = "Kingma & Dhariwal 2018, arXiv:1807.03039"

    def __init__(
        self,
        spec: DataSpec,
        *,
        steps: Sequence[int] = (4, 8),
        hidden: Sequence[int] = (32, 64),
        bound: float = 2.0,
        onto_reals: str = "gaussianise",
        alpha: float = 1e-6,
    ):
        if not steps or len(steps) != len(hidden):
            raise ValueError(f"steps and hidden need one number a scale each, not {list(steps)} and {list(hidden)}")
        super().__init__(spec, len(steps), onto_reals=onto_reals, alpha=alpha)
        if spec.flat:
            changed = spec.dims // 2  # as chunk() halves an odd number
            layers: list[Layer] = []
            for _ in range(sum(steps)):
                dense = Dense(spec.dims - changed, max(hidden), 2 * changed, he=True)
                layers += [Mixing(torch.eye(spec.dims).flip(0)), Affine(dense, bound / 4)]
            self.scales.append(nn.ModuleList(layers))
            return
        for (height, width, channels), count, wide in zip(self.sizes(len(steps)), steps, hidden, strict=True):
            changed = channels // 2
            last = len(self.scales) + 1 == len(steps)
            layers = []
            for _ in range(count):
                rotation, _ = torch.linalg.qr(torch.randn(channels, channels))
                network = Convolutions(channels - changed, wide, 2 * changed, (height, width), whole=last)
                layers += [Mixing(rotation), Affine(network, bound)]
            self.scales.append(nn.ModuleList(layers))
            self.priors.append(Base(channels, height, width) if last else Conditional(channels - changed, changed))
        self.to(memory_format=torch.channels_last)


Model = Glow
