"""Gated PixelCNN with a discretised mixture of logistics, on blocks of pixels.

van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", arXiv:1606.05328 (gates, two stacks);
Salimans et al. 2017, "PixelCNN++", arXiv:1701.05517 (the likelihood, shifts instead of masks).

The image is folded: each ``block`` x ``block`` square of pixels, all its colours, is one position of the two stacks, in
raster order, and the values inside a position are conditioned on one another in the head (genus.nn.head). That is an
exact factorisation like any other order; with 2 x 2 blocks it costs a quarter an image.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.nn import logistic
from genus.nn.head import Head

WAVES = (math.pi / 2, math.pi, 2 * math.pi, 4 * math.pi)  # radians a unit of x
LOG_SCALE = -2.0  # of components that start spread over the range: wide enough to overlap


class Layer(nn.Module):
    """One gated layer of both stacks (van den Oord et al. 2016, figure 2), each with a residual connection.

    ``vertical`` and ``horizontal`` take their stack's features with ``dilation`` rows above, or columns to the left, of
    what they return, so that the sampler can ask for a single row.
    """

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.down = nn.Conv2d(channels, 2 * channels, (2, 3), dilation=dilation)
        self.right = nn.Conv2d(channels, 2 * channels, (1, 2), dilation=dilation, bias=False)
        self.across = nn.Conv2d(channels, 2 * channels, 1)
        self.mix = nn.Conv2d(channels, channels, 1)

    def vertical(self, v: Tensor) -> Tensor:
        """[B, C, dilation + R, W] -> [B, C, R, W]: a row sees itself and the one ``dilation`` above."""
        d = self.dilation
        return v[:, :, d:] + F.glu(self.down(F.pad(v, (d, d, 0, 0))), 1)

    def horizontal(self, h: Tensor, v: Tensor) -> Tensor:
        """[B, C, R, dilation + N] and the vertical stack [B, C, R, N] -> [B, C, R, N]."""
        gated = F.glu(self.right(h) + self.across(v), 1)
        return h[..., self.dilation :] + self.mix(gated)

    def onward(self, before: Tensor, h: Tensor, across: Tensor) -> Tensor:
        """``horizontal`` at one position: itself and the one ``dilation`` before, [B, C]; across(v), [B, 2C]."""
        gated = F.glu(at(self.right, torch.stack([before, h], 2)) + across, 1)
        return h + at(self.mix, gated)


class PixelCNN(Family):
    """log p(x) = sum over values of log p(value | all earlier ones), exactly.

    Vectors [D, 1, 1] are one position, and the head is all there is: no stacks, four times as many logistics a value,
    and the earlier values also as sines and cosines (Tancik et al. 2020, arXiv:2006.10739), as sharp edges want.
    The receptive field of a position: rows up to ``2 + sum of dilations`` above, columns as far to the left. Height and
    width must be multiples of ``block`` (ValueError); ``block`` 1 is the classical model.
    """

    paper = "van den Oord et al. 2016, arXiv:1606.05328; Salimans et al. 2017, arXiv:1701.05517"
    density = "exact"
    widths = ("channels", "head")

    def __init__(
        self,
        spec: DataSpec,
        *,
        channels: int = 32,
        layers: int = 4,
        mixtures: int = 5,
        head: int = 64,
        block: int = 2,
    ):
        super().__init__(spec)
        colours, height, width = spec.shape
        block = 1 if spec.flat else block
        if height % block or width % block:
            raise ValueError(f"a {height}x{width} image cannot be cut into {block}x{block} blocks")
        if not spec.levels:
            raise ValueError("continuous data: the mixture of logistics speaks of levels")
        self.block, self.channels = block, channels
        self.values, self.rows, self.columns = colours * block**2, height // block, width // block
        if spec.flat:
            self.place_h = nn.Parameter(torch.randn(channels, 1, 1))
            self.layers = nn.ModuleList()
            means = torch.linspace(-1, 1, 4 * mixtures)
            self.head = Head(channels, self.values, 2 * head, means, LOG_SCALE, inputs=2 + 2 * len(WAVES))
            return
        self.first_down = nn.Conv2d(2 * self.values, channels, (2, 3))
        self.first_right = nn.Conv2d(2 * self.values, channels, (1, 2))
        # Where on the image a position lies: centred objects make that informative, convolutions cannot tell.
        self.place_v = nn.Parameter(torch.zeros(channels, self.rows, self.columns))
        self.place_h = nn.Parameter(torch.zeros(channels, self.rows, self.columns))
        # 1, 2, 4, 1, …: sums of these reach every offset, so the receptive field has no holes.
        self.layers = nn.ModuleList(Layer(channels, 2 ** (k % 3)) for k in range(layers))
        self.head = Head(channels, self.values, head, torch.linspace(-1, 1, mixtures), LOG_SCALE)

    def stack(self) -> list[Layer]:
        """The gated layers, first to last."""
        return cast("list[Layer]", list(self.layers))

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        loss = -self.log_prob(batch, generator=generator).mean()
        return {"loss": loss, "bits_per_dim": loss.detach() / (self.spec.dims * math.log(2))}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """Exact log-probability: [B] nats. Draws nothing."""
        x = F.pixel_unshuffle(batch.x, self.block)
        parameters = self.conditionals(x)
        values = x.permute(1, 0, 2, 3).flatten(1)  # [D, B * rows * columns]
        return logistic.log_prob(parameters, values, self.spec.levels).unflatten(1, (len(x), -1)).sum((0, 2))

    def conditionals(self, x: Tensor) -> Tensor:
        """Mixture parameters of every value given those before it.

        Folded images [B, D, rows, columns] -> [D, 3 * mixtures, B * rows * columns], as ``logistic`` wants them.
        """
        if self.spec.flat:
            return self.head(self.place_h.flatten().expand(len(x), -1), self._inputs(x).flatten(1))
        seen = self._inputs(x).contiguous(memory_format=torch.channels_last)
        padded = F.pad(seen, (2, 1, 2, 0))
        v = self.first_down(padded[:, :, :-1, 1:]) + self.place_v  # a row sees the two above it, not itself
        h = self.first_right(padded[:, :, 2:, :-2]) + self.place_h  # a position sees the two left of it, not itself
        for layer in self.stack():
            v = layer.vertical(F.pad(v, (0, 0, layer.dilation, 0)))
            h = layer.horizontal(F.pad(h, (layer.dilation, 0)), v)
        return self.head(F.relu(h).permute(0, 2, 3, 1).flatten(0, 2), seen.permute(0, 2, 3, 1).flatten(0, 2))

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Images [n, C, H, W], value by value.

        Every feature is computed once: the vertical stack a row at a time, the horizontal one a position at a time,
        each from the kept features of earlier rows or positions. ``temperature`` < 1 sharpens every conditional.
        """
        if self.spec.flat:
            x = self.place_h.new_zeros(n, self.values)
            self._fill(x, self.place_h.flatten().expand(n, -1), generator, temperature)
            return x.view(n, *self.spec.shape)
        rows, columns, place = self.rows, self.columns, self.place_v
        x = place.new_zeros(n, self.values, rows, columns)
        seen = place.new_zeros(n, 2 * self.values, rows + 2, columns + 3)
        above = [place.new_zeros(n, self.channels, rows + layer.dilation, columns) for layer in self.stack()]
        for r in range(rows):
            v = self.first_down(seen[:, :, r : r + 2, 1:]) + place[:, r : r + 1]
            across = []
            for layer, kept in zip(self.stack(), above, strict=True):
                kept[:, :, r + layer.dilation] = v[:, :, 0]
                v = layer.vertical(kept[:, :, r : r + layer.dilation + 1])
                across.append(layer.across(v)[:, :, 0].permute(2, 0, 1).contiguous())  # [columns, n, 2C]
            left = [place.new_zeros(columns + layer.dilation, n, self.channels) for layer in self.stack()]
            for c in range(columns):
                h = at(self.first_right, seen[:, :, r + 2, c : c + 2]) + self.place_h[:, r, c]
                for layer, kept, from_above in zip(self.stack(), left, across, strict=True):
                    kept[c + layer.dilation] = h
                    h = layer.onward(kept[c], h, from_above[c])
                seen[:, :, r + 2, c + 2] = self._fill(x[:, :, r, c], F.relu(h), generator, temperature)
        return F.pixel_shuffle(x, self.block)

    def _fill(self, x: Tensor, features: Tensor, generator: Generator, temperature: float) -> Tensor:
        """Draws the values of one position into ``x`` [B, D], from its features [B, C]; returns their inputs."""
        for j in range(self.values):
            parameters = self.head(features, self._inputs(x), j)
            x[:, j] = logistic.sample(parameters, self.spec.levels, generator=generator, temperature=temperature)[0]
        return self._inputs(x)

    def _inputs(self, x: Tensor) -> Tensor:
        """The values, and whether each is the lowest level (backgrounds often are): [B, D, …] -> [B, 2D, …].

        For vectors sines and cosines as well: [B, (2 + 2 waves) D, …].
        """
        inputs = [x, (x < 1 / (self.spec.levels - 1) - 1).to(x.dtype)]
        for wave in WAVES if self.spec.flat else ():
            inputs += [torch.sin(wave * x), torch.cos(wave * x)]
        return torch.cat(inputs, 1)


def at(convolution: nn.Conv2d, window: Tensor) -> Tensor:
    """A convolution at the one place that its window [B, C, …] is of: [B, C']. A matrix product has less to set up."""
    return F.linear(window.flatten(1), convolution.weight.flatten(1), convolution.bias)


Model = PixelCNN
