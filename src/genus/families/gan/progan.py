"""ProGAN: both networks grow from a coarse image to the full one, and each new resolution is faded in.

Karras et al. 2017, "Progressive Growing of GANs for Improved Quality, Stability, and Variation"
(https://arxiv.org/abs/1710.10196). The paper plays WGAN-GP, whose penalty is due in every step and makes it twice as
dear; here the game is that of ``_equalised``.
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
from genus.families.gan._equalised import Conv, Equalised, Linear, PixelNorm, doubled, halved, last_look


class ProGAN(Equalised):
    """Learns images of 7x7 pixels first, then of 14x14, then of 28x28 (section 2, figure 2).

    The coarsest image is the data's, halved for as long as both sides are even and their halves not below 4. ``grow``:
    steps at each resolution before the next one is faded in, and steps of that, in which networks and real images are
    mixed from both resolutions; 0: nothing grows. ``latent``: size of z, which goes in on the sphere. ``width`` and
    ``critic_width``: channels at the full resolution, twice as many at each half.
    The rest is as ``Equalised`` has it; steps are counted for where it has grown to, too.
    """

    paper = "Karras et al. 2017, arXiv 1710.10196"

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
        super().__init__(spec, latent=latent, r1=r1, r1_every=r1_every, conditional=conditional)
        self.grow = grow
        channels, high, across = spec.shape
        sides = halved(high, across)
        self.doublings = len(sides) - 1
        grown, seen = doubled(width, len(sides)), doubled(critic_width, len(sides))
        self.generator = nn.Sequential(Growing(self.latent, sides[0], grown, channels))
        self.critic = nn.Sequential(
            Shrinking(channels, seen, sides[0]),  # [B, w]
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
        real = batch.x
        for _ in range(self.doublings + 1 - len(shares)):
            real = halve(real)
        real = torch.lerp(double(halve(real)), real, shares[-1]) if shares[-1] < 1 else real
        yield "critic", self.critic_terms(real, fake, batch.cond)
        yield "generator", self.generator_terms(fake, batch.cond)
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
        halving = (
            nn.Sequential(Conv(width, before, 4, stride=2), nn.LeakyReLU(0.2)) for before, width in pairwise(widths)
        )
        self.blocks = nn.ModuleList([nn.Sequential(*last_look(widths[0], low)), *halving])

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


class Double(nn.ConvTranspose2d):
    """``Conv``'s like that doubles the resolution, a transposed convolution: 2x2 of its 4x4 weights reach a pixel."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 4, 2, 1)
        self.gain = math.sqrt(2 / (4 * inputs))
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return functional.conv_transpose2d(x, self.gain * self.weight, self.bias, 2, 1)


def halve(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0)


Model = ProGAN
