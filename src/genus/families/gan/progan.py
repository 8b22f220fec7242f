"""ProGAN: both networks grow from a coarse image to the full one, and each new resolution is faded in.

Karras et al. 2017, "Progressive Growing of GANs for Improved Quality, Stability, and Variation"
(https://arxiv.org/abs/1710.10196). The game is that of Mescheder et al. 2018 (https://arxiv.org/abs/1801.04406), its
penalty applied every few steps as by Karras et al. 2019 (https://arxiv.org/abs/1912.04958).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from genus.contract import Batch, Terms
from genus.data.spec import DataSpec
from genus.families.gan._adversarial import Adversarial, slopes

COARSEST = 4  # pixels a side below which no image is halved


class ProGAN(Adversarial):
    """Learns images of 7x7 pixels first, then of 14x14, then of 28x28 (section 2, figure 2).

    The coarsest image is the data's, halved for as long as both sides are even and their halves not below 4. ``grow``:
    steps at each resolution before the next one is faded in, and steps of that, in which networks and real images are
    mixed from both resolutions; 0: nothing grows. ``latent``: size of z, which goes in on the sphere. ``width`` and
    ``critic_width``: channels at the full resolution, twice as many at each half.
    ``r1``: weight γ of the penalty γ/2 E|∇D(x)|² on real images, which comes every ``r1_every`` critic steps and then
    that many times as strong. The paper plays WGAN-GP, whose penalty is due in every step and makes it twice as dear.
    """

    critic_steps: Tensor
    paper = "Karras et al. 2017, arXiv 1710.10196"
    kinds = ("image",)
    widths = ("width", "critic_width")

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int = 64,
        width: int = 12,
        critic_width: int = 12,
        grow: int = 60,
        r1: float = 0.1,
        r1_every: int = 16,
        conditional: bool = False,
    ):
        super().__init__(spec, latent=latent, conditional=conditional)
        self.grow, self.r1, self.r1_every = grow, r1, r1_every
        self.register_buffer("critic_steps", torch.zeros((), dtype=torch.int64))  # where it has grown to: for resuming
        channels, high, across = spec.shape
        doublings = 0
        while high % 2 == across % 2 == 0 and min(high, across) >= 2 * COARSEST:
            high, across, doublings = high // 2, across // 2, doublings + 1
        self.doublings = doublings
        grown, seen = ([size << k for k in range(doublings, -1, -1)] for size in (width, critic_width))
        self.generator = nn.Sequential(Growing(self.latent, (high, across), grown, channels))
        self.critic = nn.Sequential(
            Shrinking(channels, seen, (high, across)),  # [B, w]
            Linear(seen[0], 1, gain=1.0),
        )
        self._watch_labels()
        self.to(memory_format=torch.channels_last)

    def shares(self, *, now: bool = False) -> list[float]:
        """What each resolution adds to an image, the coarsest first; with ``now`` only up to the last that does."""
        grown = float(self.doublings)
        if self.grow:
            before, since = divmod(int(self.critic_steps), 2 * self.grow)
            grown = min(grown, before + max(0, since + 1 - self.grow) / self.grow)
        return [max(0.0, 1 - abs(k - grown)) for k in range(1 + (math.ceil(grown) if now else self.doublings))]

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, truncation: float = 1.0) -> Tensor:
        """As ``Adversarial`` has it, but for ``truncation``: codes are on a sphere, where none is nearer to the middle.

        Raises ValueError for any but 1.
        """
        if truncation != 1:
            raise ValueError(
                f"truncation: codes of ProGAN are on a sphere and have one size; leave it out, not {truncation}"
            )
        return super().sample(n, generator=generator, cond=cond)

    def decode(self, code: Tensor) -> Tensor:
        """[B, *shape] of codes [B, latent]. Of an image of the resolution that it has come to, pixels are repeated."""
        code = code if self.latent == self.noise else self._ask(code, None)
        return self.generator[0](code, self.shares()).clamp(-1, 1)

    def score(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """As ``Adversarial`` has it, of images of the resolution that it has come to."""
        features = self.critic[0](x, self.shares(now=True))
        score = self.critic[1](features)
        if self.label_vectors is not None:
            score = score + (self.label_vectors(cond) * features).sum(1, keepdim=True)
        return score.to(next(self.parameters()).dtype)

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """One step each, non-saturating. Both use one batch of fakes."""
        shares = self.shares(now=True)
        fake = self.generator[0](self.codes(batch, generator), shares)
        penalised = self.r1 > 0 and int(self.critic_steps) % self.r1_every == 0
        real = batch.x
        for _ in range(self.doublings + 1 - len(shares)):
            real = halve(real)
        real = torch.lerp(double(halve(real)), real, shares[-1]) if shares[-1] < 1 else real
        real = real.requires_grad_(penalised)
        # Real and fake go through the critic apart: it looks at how much the examples of a batch differ.
        real_score, fake_score = self.score(real, batch.cond), self.score(fake.detach(), batch.cond)
        terms = {"loss": functional.softplus(-real_score).mean() + functional.softplus(fake_score).mean()}
        if penalised:
            penalty = slopes(real_score, real).square().sum(1).mean()
            terms = {"loss": terms["loss"] + self.r1 / 2 * self.r1_every * penalty, "r1": penalty}
        yield "critic", terms
        yield "generator", {"loss": functional.softplus(-self.score(fake, batch.cond)).mean()}
        self.critic_steps += 1


class Growing(nn.Module):
    """The generator: a block and a head a resolution, the coarsest first, of so many channels each (table 2).

    Doubling and the convolution behind it are one transposed convolution, as in the authors' code.
    """

    def __init__(self, latent: int, low: tuple[int, int], widths: list[int], channels: int):
        super().__init__()
        first = nn.Sequential(
            PixelNorm(),
            Linear(latent, widths[0] * low[0] * low[1], gain=math.sqrt(2) / 4),  # the authors' gain
            nn.Unflatten(1, (widths[0], *low)),  # [B, w, h, w']
            nn.LeakyReLU(0.2),
            PixelNorm(),
            Conv(widths[0], widths[0], 3),
            nn.LeakyReLU(0.2),
            PixelNorm(),
        )
        doubling = (
            nn.Sequential(Double(before, width), nn.LeakyReLU(0.2), PixelNorm()) for before, width in pairwise(widths)
        )
        self.blocks = nn.ModuleList([first, *doubling])
        self.heads = nn.ModuleList(Conv(width, channels, 1, gain=1.0) for width in widths)

    def forward(self, code: Tensor, shares: list[float]) -> Tensor:
        """[B, C, H, W] of the last resolution that has a share; the heads from the first on that has one are summed."""
        h, image = code, None
        for block, head, share in zip(self.blocks, self.heads, shares, strict=False):
            h = block(h)
            image = None if image is None else double(image)
            if image is not None or share:
                image = share * head(h) + (0 if image is None else image)
        assert image is not None
        return image.tanh()  # black, in much of an image, is -1 exactly


class Shrinking(nn.Module):
    """The critic's features [B, w]: the generator's mirror image."""

    def __init__(self, channels: int, widths: list[int], low: tuple[int, int]):
        super().__init__()
        self.tails = nn.ModuleList(nn.Sequential(Conv(channels, width, 1), nn.LeakyReLU(0.2)) for width in widths)
        last = nn.Sequential(
            Deviation(),
            Conv(widths[0] + 1, widths[0], 3),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            Linear(widths[0] * low[0] * low[1], widths[0]),
            nn.LeakyReLU(0.2),
        )
        halving = (
            nn.Sequential(Conv(width, before, 4, stride=2), nn.LeakyReLU(0.2)) for before, width in pairwise(widths)
        )
        self.blocks = nn.ModuleList([last, *halving])

    def forward(self, x: Tensor, shares: list[float]) -> Tensor:
        """Of images of the resolution of the last of ``shares``; the rest goes to what is seen at half of that."""
        top, share = len(shares) - 1, shares[-1]
        h = self.tails[top](x)
        if share < 1:
            h = torch.lerp(self.tails[top - 1](halve(x)), self.blocks[top](h), share)
            top -= 1
        for k in range(top, -1, -1):
            h = self.blocks[k](h)
        return h


class Conv(nn.Conv2d):
    """A convolution that keeps or halves the resolution, with an equalised learning rate (section 4.1).

    Weights start standard normal and are scaled to He's as they are used, so that a step changes all of them by the
    same share.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, gain: float = math.sqrt(2)):
        super().__init__(inputs, outputs, size, stride, (size - 1) // 2)
        self.gain = gain / math.sqrt(inputs * size**2)
        standard(self)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.gain * self.weight, self.bias)


class Double(nn.ConvTranspose2d):
    """The same of a transposed convolution that doubles the resolution: 2x2 of its 4x4 weights reach a pixel."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 4, 2, 1)
        self.gain = math.sqrt(2 / (4 * inputs))
        standard(self)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return functional.conv_transpose2d(x, self.gain * self.weight, self.bias, 2, 1)


class Linear(nn.Linear):
    """The same of a linear layer."""

    def __init__(self, inputs: int, outputs: int, *, gain: float = math.sqrt(2)):
        super().__init__(inputs, outputs)
        self.gain = gain / math.sqrt(inputs)
        standard(self)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.gain * self.weight, self.bias)


def standard(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
    """Draws a layer's weights from a standard normal distribution; its biases are zero."""
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class PixelNorm(nn.Module):
    """Each pixel's features to the root mean square 1 (section 4.2), and so each code to a sphere."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class Deviation(nn.Module):
    """One more channel, the same everywhere: the mean standard deviation over the batch (section 3)."""

    def forward(self, x: Tensor) -> Tensor:
        deviation = ((x - x.mean(0)).square().mean(0) + 1e-8).sqrt().mean()
        return torch.cat([x, deviation.expand(len(x), 1, *x.shape[2:])], 1)


def halve(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0)


Model = ProGAN
