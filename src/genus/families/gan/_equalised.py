"""What ProGAN and StyleGAN share: layers that learn at one rate, images halved to the coarsest, a critic's last look.

Karras et al. 2017, "Progressive Growing of GANs for Improved Quality, Stability, and Variation"
(https://arxiv.org/abs/1710.10196). The game is that of Mescheder et al. 2018 (https://arxiv.org/abs/1801.04406), its
penalty applied every few steps as by Karras et al. 2019 (https://arxiv.org/abs/1912.04958).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from genus.contract import Terms
from genus.data.spec import DataSpec
from genus.families.gan._adversarial import Adversarial, slopes

COARSEST = 4  # pixels a side below which no image is halved


class Equalised(Adversarial):
    """The non-saturating game with R1 every few steps, on images only.

    ``r1``: weight γ of the penalty γ/2 E|∇D(x)|² on real images, which comes every ``r1_every`` critic steps and then
    that many times as strong.
    """

    critic_steps: Tensor
    kinds = ("image",)
    widths = ("width", "critic_width")

    def __init__(self, spec: DataSpec, *, latent: int, r1: float, r1_every: int, conditional: bool):
        super().__init__(spec, latent=latent, conditional=conditional)
        self.r1, self.r1_every = r1, r1_every
        self.register_buffer("critic_steps", torch.zeros((), dtype=torch.int64))  # where training is: for resuming

    def critic_terms(self, real: Tensor, fake: Tensor, cond: Tensor | None) -> Terms:
        """The critic's loss on real and generated images, each of the classes ``cond``.

        They go through the critic apart: it looks at how much the examples of a batch differ.
        """
        penalised = self.r1 > 0 and int(self.critic_steps) % self.r1_every == 0
        real = real.requires_grad_(penalised)
        real_score, fake_score = self.score(real, cond), self.score(fake.detach(), cond)
        terms = {"loss": functional.softplus(-real_score).mean() + functional.softplus(fake_score).mean()}
        if penalised:
            penalty = slopes(real_score, real).square().sum(1).mean()
            terms = {"loss": terms["loss"] + self.r1 / 2 * self.r1_every * penalty, "r1": penalty}
        return terms

    def generator_terms(self, fake: Tensor, cond: Tensor | None) -> Terms:
        """The generator's, of the images that the critic has just seen."""
        return {"loss": functional.softplus(-self.score(fake, cond)).mean()}


def halved(high: int, across: int) -> list[tuple[int, int]]:
    """Heights and widths from the coarsest on: halves for as long as both are even and their halves not below 4."""
    sides = [(high, across)]
    while high % 2 == across % 2 == 0 and min(high, across) >= 2 * COARSEST:
        high, across = high // 2, across // 2
        sides.insert(0, (high, across))
    return sides


def doubled(width: int, count: int) -> list[int]:
    """Channels of ``count`` resolutions, the coarsest first: ``width`` at the last, twice as many at each half."""
    return [width << k for k in reversed(range(count))]


class Conv(nn.Conv2d):
    """A convolution that keeps or halves the resolution, with an equalised learning rate (section 4.1).

    Weights start standard normal and are scaled to He's as they are used, so that a step changes all of them by the
    same share.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, gain: float = math.sqrt(2)):
        super().__init__(inputs, outputs, size, stride, (size - 1) // 2)
        self.gain = gain / math.sqrt(inputs * size**2)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.gain * self.weight, self.bias)


class Linear(nn.Linear):
    """The same of a linear layer, whose biases start at ``bias``; ``slow``: its share of the learning rate."""

    def __init__(self, inputs: int, outputs: int, *, gain: float = math.sqrt(2), bias: float = 0.0, slow: float = 1.0):
        super().__init__(inputs, outputs)
        self.gain, self.slow = slow * gain / math.sqrt(inputs), slow
        nn.init.normal_(self.weight, std=1 / slow)
        nn.init.constant_(self.bias, bias / slow)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.gain * self.weight, self.slow * self.bias)


class PixelNorm(nn.Module):
    """Each pixel's features to the root mean square 1 (section 4.2), and so each code to a sphere."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class Deviation(nn.Module):
    """One more channel, the same everywhere: the mean standard deviation over the batch (section 3)."""

    def forward(self, x: Tensor) -> Tensor:
        deviation = ((x - x.mean(0)).square().mean(0) + 1e-8).sqrt().mean()
        return torch.cat([x, deviation.expand(len(x), 1, *x.shape[2:])], 1)


def last_look(width: int, low: tuple[int, int]) -> list[nn.Module]:
    """The critic's layers on the coarsest resolution, [B, width, h, w] to features [B, width] (table 2)."""
    return [
        Deviation(),
        Conv(width + 1, width, 3),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        Linear(width * low[0] * low[1], width),
        nn.LeakyReLU(0.2),
    ]
