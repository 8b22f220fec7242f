"""StyleGAN: a code is first mapped to a style, and the style then scales the features of every resolution.

Karras et al. 2018, "A Style-Based Generator Architecture for Generative Adversarial Networks"
(https://arxiv.org/abs/1812.04948), with the modulated convolutions, the summed images and the penalty every few steps
of Karras et al. 2019, "Analyzing and Improving the Image Quality of StyleGAN" (https://arxiv.org/abs/1912.04958).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from genus.contract import Batch, Terms
from genus.data.spec import DataSpec
from genus.families.gan._equalised import Conv, Equalised, Linear, PixelNorm, doubled, halved, last_look

SLOW = 0.1  # learning rate of the mapping, as a share: the authors' 0.01 is for a training a hundred times as long
FORGET = 0.01  # share of the latest batch in the mean style


class StyleGAN(Equalised):
    """z is mapped to w, by which every convolution's input is scaled; noise of each pixel's own is added (figure 1).

    The generator starts from a constant of the coarsest resolution and doubles it: the data's, halved for as long as
    both sides are even and their halves not below 4. Nothing is grown: the image is the sum of one of each resolution
    (1912.04958, section 4). The critic is that of Karras et al. 2017 (https://arxiv.org/abs/1710.10196).
    ``latent``: size of z and of w; ``layers`` of the mapping. ``width`` and ``critic_width``: channels at the full
    resolution, twice as many at each half.
    ``mixing``: share of the training images that take w from one code up to a layer and from another behind it, so that
    layers learn not to rely on each other (1812.04948, section 3.1). The paper's 0.9 is for a training a thousand times
    as long: in a short one it costs classes.
    The rest is as ``Equalised`` has it. The later paper's penalty on the path length, for smoother interpolation, is
    left out.
    """

    mean_style: Tensor
    paper = "Karras et al. 2018, arXiv 1812.04948; Karras et al. 2019, arXiv 1912.04958"

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int = 64,
        layers: int = 3,
        width: int = 12,
        critic_width: int = 12,
        mixing: float = 0.3,
        r1: float = 0.1,
        r1_every: int = 16,
        conditional: bool = False,
    ):
        super().__init__(spec, latent=latent, r1=r1, r1_every=r1_every, conditional=conditional)
        self.mixing = mixing
        self.register_buffer("mean_style", torch.zeros(latent))
        channels, high, across = spec.shape
        sides = halved(high, across)
        styled, seen = doubled(width, len(sides)), doubled(critic_width, len(sides))
        self.generator = nn.Sequential(Mapping(self.latent, latent, layers), Synthesis(latent, sides, styled, channels))
        halving = [[Conv(width, before, 4, stride=2), nn.LeakyReLU(0.2)] for before, width in pairwise(seen)]
        self.critic = nn.Sequential(
            Conv(channels, seen[-1], 1),
            nn.LeakyReLU(0.2),
            *(layer for pair in reversed(halving) for layer in pair),
            *last_look(seen[0], sides[0]),
            Linear(seen[0], 1, gain=1.0),
        )
        self._watch_labels()
        self.to(memory_format=torch.channels_last)

    @property
    def parts(self) -> tuple[Mapping, Synthesis]:
        return cast("tuple[Mapping, Synthesis]", tuple(self.generator))

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, truncation: float = 1.0) -> Tensor:
        """As ``Adversarial`` has it, but ``truncation`` is how far to go from the mean style (1812.04948, app. B: ψ).

        Below 1 samples are more typical and less varied; the mean is over all classes.
        """
        code = self._normal(n, generator)
        code = code if self.latent == self.noise else self._ask(code, cond)
        mapping, synthesis = self.parts
        style = torch.lerp(self.mean_style, mapping(code).to(self.mean_style.dtype), truncation)
        return synthesis([style] * len(synthesis.layers), synthesis.noise(code, generator)).clamp(-1, 1)

    def decode(self, code: Tensor) -> Tensor:
        """[B, *shape] of codes [B, latent]: with the same noise for all."""
        mapping, synthesis = self.parts
        style = mapping(code if self.latent == self.noise else self._ask(code, None))
        return synthesis([style] * len(synthesis.layers), synthesis.fixed()).clamp(-1, 1)

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """One step each, non-saturating. Both use one batch of fakes."""
        fake = self.parts[1](*self._styles(batch, generator))
        yield "critic", self.critic_terms(batch.x, fake, batch.cond)
        self.critic_steps += 1
        yield "generator", self.generator_terms(fake, batch.cond)

    def _styles(self, batch: Batch, generator: Generator) -> tuple[list[Tensor], list[Tensor]]:
        """A style for each layer, [B, latent], from one code or mixed from two; and noise for each."""
        mapping, synthesis = self.parts
        code = self.codes(batch, generator)
        style, n, layers = mapping(code), len(code), len(synthesis.layers)
        with torch.no_grad():
            self.mean_style.lerp_(style.mean(0).to(self.mean_style.dtype), FORGET)
        styles = [style] * layers
        if self.mixing > 0 and layers > 1:
            other = mapping(self.codes(batch, generator))
            mixed = torch.rand(n, generator=generator, device=code.device) < self.mixing
            last = torch.randint(1, layers, (n,), generator=generator, device=code.device)
            styles = [torch.where((mixed & (k >= last))[:, None], other, style) for k in range(layers)]
        return styles, synthesis.noise(code, generator)


class Mapping(nn.Sequential):
    """[B, inputs] to styles [B, outputs]: a code on the sphere through dense layers that learn slowly."""

    def __init__(self, inputs: int, outputs: int, layers: int):
        sizes = [inputs, *[outputs] * layers]
        dense = [[Linear(before, after, slow=SLOW), nn.LeakyReLU(0.2)] for before, after in pairwise(sizes)]
        super().__init__(PixelNorm(), *(layer for pair in dense for layer in pair))


class Synthesis(nn.Module):
    """Styles and noise to images: a constant, then a layer a resolution, each with an image of its own."""

    def __init__(self, style: int, sides: list[tuple[int, int]], widths: list[int], channels: int):
        super().__init__()
        self.sides = sides
        self.constant = nn.Parameter(torch.randn(1, widths[0], *sides[0]))
        inputs = [widths[0], *widths[:-1]]
        self.layers = nn.ModuleList(
            Styled(style, before, after, doubles=k > 0)
            for k, (before, after) in enumerate(zip(inputs, widths, strict=True))
        )
        self.heads = nn.ModuleList(Head(style, width, channels) for width in widths)
        for k, side in enumerate(sides):
            self.register_buffer(f"noise_{k}", torch.randn(1, 1, *side))

    def forward(self, styles: list[Tensor], noise: list[Tensor]) -> Tensor:
        """[B, C, H, W] of a style [B, S] and noise [B, 1, h, w] for each layer."""
        h, image = self.constant.expand(len(styles[0]), -1, -1, -1), None
        for layer, head, style, grain in zip(self.layers, self.heads, styles, noise, strict=True):
            h = layer(h, style, grain)
            image = head(h, style) + (0 if image is None else functional.interpolate(image, scale_factor=2.0))
        assert image is not None
        return image.tanh()  # black, in much of an image, is -1 exactly

    def noise(self, like: Tensor, generator: Generator) -> list[Tensor]:
        """Fresh noise for as many images as ``like`` has rows."""
        options: dict[str, Any] = {"generator": generator, "device": like.device, "dtype": like.dtype}
        return [torch.randn(len(like), 1, *side, **options) for side in self.sides]

    def fixed(self) -> list[Tensor]:
        """Noise that is always the same."""
        return [self.get_buffer(f"noise_{k}") for k in range(len(self.sides))]


class Styled(nn.Module):
    """A convolution whose input channels are scaled by a style, and its output back to variance 1 (1912.04958, eq. 3).

    Then noise, of a strength that is learnt from 0, and a leaky ReLU. With ``doubles`` the convolution is a transposed
    one that doubles the resolution: 2x2 of its 4x4 weights reach a pixel.
    """

    def __init__(self, style: int, inputs: int, outputs: int, *, doubles: bool):
        super().__init__()
        self.doubles, size = doubles, 4 if doubles else 3
        self.scales = Linear(style, inputs, gain=1.0, bias=1.0)
        self.weight = nn.Parameter(torch.randn(*((inputs, outputs) if doubles else (outputs, inputs)), size, size))
        self.gain = 1 / math.sqrt(inputs * (4 if doubles else 9))
        self.strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        scales, weight = self.scales(style), self.gain * self.weight
        power = weight.square().sum((2, 3)).div(4).T if self.doubles else weight.square().sum((2, 3))  # [out, in]
        x = x * scales[:, :, None, None]
        x = (
            functional.conv_transpose2d(x, weight, None, 2, 1)
            if self.doubles
            else functional.conv2d(x, weight, None, 1, 1)
        )
        back = math.sqrt(2) * (functional.linear(scales.square(), power) + 1e-8).rsqrt()  # √2 makes up for the ReLU
        x = torch.addcmul(self.strength * noise + self.bias[:, None, None], x, back[:, :, None, None])
        return functional.leaky_relu(x, 0.2)


class Head(nn.Module):
    """Features to an image of their resolution, the features scaled by the style."""

    def __init__(self, style: int, inputs: int, channels: int):
        super().__init__()
        self.scales = Linear(style, inputs, gain=1.0, bias=1.0)
        self.colours = Conv(inputs, channels, 1, gain=1.0)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return self.colours(x * self.scales(style)[:, :, None, None])


Model = StyleGAN
