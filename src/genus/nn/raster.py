"""A causal Transformer over the patches of an image, one after the other in raster order.

Attention is the Image Transformer's local 1D attention (Parmar et al. 2018, arXiv:1802.05751, section 3.3): the queries
are one row of patches, their memory is that row so far and the rows just above it. Instead of sines added to the
embedding, every head has a learned bias for each query column and key row and column, which starts as a penalty on
distance (Press et al. 2022, arXiv:2108.12409). Layers normalise before they attend (Xiong et al. 2020,
arXiv:2002.04745): a large learning rate holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genus.nn.head import Head


class RasterTransformer(nn.Module):
    """A mixture for every value of an image, given the values before it: patch by patch, value by value inside.

    ``shape``: colours, height and width of images that are cut into ``block`` x ``block`` patches of D values, R rows
    of W. ``inputs``: numbers by which a value is seen. ``above``: rows of patches above its own that a patch attends
    to, in each of ``layers`` layers. ``head``: width of the network inside a patch, whose components start at ``means``
    with ``log_scale``. A patch's embedding is a convolution over the patches before it, not just the one: what is next
    to what need not be learned by attention first.

    Raises ValueError where height and width are no multiples of ``block``, and ``channels`` none of ``heads``.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        block: int,
        inputs: int,
        channels: int,
        layers: int,
        heads: int,
        above: int,
        head: int,
        means: Tensor,
        log_scale: float,
    ):
        super().__init__()
        colours, height, width = shape
        if height % block or width % block:
            raise ValueError(f"a {height}x{width} image cannot be cut into {block}x{block} blocks")
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads: {channels} is none of {heads}")
        self.values, self.rows, self.columns = colours * block**2, height // block, width // block
        self.inputs = inputs * self.values
        self.upper = nn.Conv2d(self.inputs, channels, (2, 5)) if self.rows > 1 else None  # a single row: nothing above
        self.before = nn.Conv2d(self.inputs, channels, (1, 2), bias=False)
        self.place = nn.Parameter(torch.zeros(self.rows, self.columns, channels))
        self.layers = nn.ModuleList(Layer(channels, heads, above, self.rows, self.columns) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.head = Head(channels, self.values, head, means, log_scale, inputs=inputs)

    def forward(self, seen: Tensor) -> Tensor:
        """What is seen of folded images, [B, inputs * D, R, W] -> mixture parameters [D, 3K, B * R * W]."""
        before = F.pad(seen.flatten(2), (2, -1)).unsqueeze(2)
        h = self._embed(F.pad(seen, (2, 2, 2, -1)), before).unflatten(1, (self.rows, -1)) + self.place  # [B, R, W, C]
        for layer in self._stack():
            h = layer(h)
        return self.head(self.norm(h).flatten(0, 2), seen.permute(0, 2, 3, 1).flatten(0, 2))

    @torch.no_grad()
    def unroll(
        self, n: int, see: Callable[[Tensor], Tensor], draw: Callable[[Tensor, int, int, int], Tensor]
    ) -> Tensor:
        """Folded images [n, D, R, W], value by value; keys and values of earlier patches are kept.

        ``see``: what is seen of values [n, D], [n, inputs * D]. ``draw``: value j of the patch in row r and column c,
        [n], of its parameters [1, 3K, n], j, r and c.
        """
        rows, columns, layers = self.rows, self.columns, self._stack()
        x = self.place.new_zeros(n, self.values, rows, columns)
        seen = self.place.new_zeros(n, self.inputs, 2 + rows, 2 + columns + 2)
        before = self.place.new_zeros(n, self.inputs, 1, 2 + rows * columns)
        caches = [layer.attention.cache(n, rows * columns) for layer in layers]
        for position, (r, c) in enumerate(itertools.product(range(rows), range(columns))):
            h = self._embed(seen[:, :, r : r + 2, c : c + 5], before[..., position : position + 2]) + self.place[r, c]
            for layer, cache in zip(layers, caches, strict=True):
                h = layer.step(h, cache, position)
            features, patch = self.norm(h)[:, 0], x[:, :, r, c]
            for j in range(self.values):
                patch[:, j] = draw(self.head(features, see(patch), j), j, r, c)
            seen[:, :, r + 2, c + 2] = before[:, :, 0, position + 2] = see(patch)
        return x

    def _stack(self) -> list[Layer]:
        """The layers, first to last."""
        return cast("list[Layer]", list(self.layers))

    def _embed(self, above: Tensor, before: Tensor) -> Tensor:
        """Features [B, R * W, C] of patches from those above and before them.

        ``above``: two rows more than R, less the last, and two columns more a side, [B, inputs * D, 1 + R, 4 + W].
        ``before``: the two patches before each in raster order, across the ends of rows, [B, inputs * D, 1, 1 + R * W].
        """
        above, before = (seen.contiguous(memory_format=torch.channels_last) for seen in (above, before))
        h = _flat(self.before(before))
        return h if self.upper is None else _flat(self.upper(above)) + h


class Attention(nn.Module):
    """Local 1D attention: a row of queries, whose keys are in the same row so far and in ``above`` rows above it."""

    hidden: Tensor

    def __init__(self, channels: int, heads: int, above: int, rows: int, columns: int):
        super().__init__()
        self.heads, self.above, self.columns = heads, above, columns
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        row, column = torch.arange(-above, 1).view(-1, 1), torch.arange(columns)
        distance = (column.view(-1, 1, 1) - column).abs() - row  # [query column, key row, key column]
        slopes = 2.0 ** -torch.arange(heads)
        self.bias = nn.Parameter(-(slopes.view(-1, 1, 1, 1) * distance).flatten(2))  # [heads, W, (above + 1) W]
        # Keys that come later, or would be above the image.
        later = (row == 0) & (column > column.view(-1, 1, 1))
        outside = (torch.arange(rows).view(-1, 1, 1, 1) + row) < 0
        hidden = (later | outside).expand(rows, columns, above + 1, columns).flatten(2)
        self.register_buffer("hidden", hidden.unsqueeze(1), persistent=False)  # [R, 1, W, (above + 1) W]

    def forward(self, x: Tensor) -> Tensor:
        """[B, R, W, C] -> [B, R, W, C]."""
        q, k, v = self.project(x)  # [B, R, heads, W, d]
        reach = [F.pad(t, (0, 0, 0, 0, 0, 0, self.above, 0)) for t in (k, v)]
        k, v = (torch.cat([t[:, i : i + x.shape[1]] for i in range(self.above + 1)], -2) for t in reach)
        return self.attend(q, k, v, self.bias.masked_fill(self.hidden, -math.inf))

    def step(self, x: Tensor, cache: Tensor, position: int) -> Tensor:
        """One position, [n, 1, C] -> [n, 1, C]; ``cache`` holds earlier keys and values, and gets its own.

        [2, n, heads, R * W, d], in raster order.
        """
        q, k, v = self.project(x)  # [n, heads, 1, d]
        cache[0, :, :, position], cache[1, :, :, position] = k[:, :, 0], v[:, :, 0]
        r, c = divmod(position, self.columns)
        k, v = cache[:, :, :, max(0, r - self.above) * self.columns : position + 1]
        bias = self.bias[:, c : c + 1, max(0, self.above - r) * self.columns : self.above * self.columns + c + 1]
        return self.attend(q, k, v, bias)

    def project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values of features [..., W, C]: [..., heads, W, d] each."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(-4, -2).unbind(-3)
        return [q / math.sqrt(q.shape[-1]), k, v]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Queries [..., heads, Q, d], keys and values [..., heads, K, d], bias [..., heads, Q, K] -> [..., Q, C]."""
        weights = (q @ k.transpose(-2, -1) + bias).softmax(-1).to(v.dtype)
        return self.out((weights @ v).transpose(-3, -2).flatten(-2))

    def cache(self, n: int, positions: int) -> Tensor:
        """Room for the keys and values of ``n`` images: [2, n, heads, positions, d]."""
        return self.bias.new_zeros(2, n, self.heads, positions, self.out.in_features // self.heads)


class Layer(nn.Module):
    """Attention, then a network a position, each on normalised features and added to them."""

    def __init__(self, channels: int, heads: int, above: int, rows: int, columns: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads, above, rows, columns)
        self.network = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, 4 * channels),
            nn.ReLU(inplace=True),
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, R, W, C] -> [B, R, W, C]."""
        x = x + self.attention(self.norm(x))
        return x + self.network(x)

    def step(self, x: Tensor, cache: Tensor, position: int) -> Tensor:
        """One position, as ``Attention.step``: [n, 1, C] -> [n, 1, C]."""
        x = x + self.attention.step(self.norm(x), cache, position)
        return x + self.network(x)


def _flat(x: Tensor) -> Tensor:
    """[B, C, R, W] to [B, R * W, C]; no copy where the channels lie last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
