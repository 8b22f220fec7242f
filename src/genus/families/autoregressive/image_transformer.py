"""Image Transformer: self-attention over what is already drawn (Parmar et al. 2018, https://arxiv.org/abs/1802.05751).

Positions follow one another in raster order. Attention is the paper's local 1D attention (section 3.3): the queries are
one row of positions, their memory is that row so far and the rows just above it. The likelihood is the paper's mixture
of discretised logistics.

Differences from the paper, all for the sake of small budgets:
- a position is a ``block`` x ``block`` square of pixels, all its colours; the values inside it are conditioned on one
  another in the head. That is an exact factorisation like any other order, and costs a quarter with 2 x 2 blocks;
- a position's embedding is a convolution over the blocks before it, not just the one: what is next to what need not be
  learned by attention first;
- instead of sines added to the embedding, every head has a learned bias for each query column and key row and column,
  which starts as a penalty on distance (Press et al. 2022, arXiv:2108.12409);
- layers normalise before they attend, not after (Xiong et al. 2020, arXiv:2002.04745): a large learning rate holds.
"""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.nn import logistic


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


class Head(nn.Module):
    """Mixture parameters of the D values of a position: value j from the position's features and values 0 … j - 1."""

    mask: Tensor

    def __init__(self, channels: int, values: int, width: int, mixtures: int):
        super().__init__()
        self.values = values
        self.features = nn.Linear(channels, values * width)
        self.earlier = nn.Parameter(0.3 * torch.randn(values * width, 2 * values))
        self.hidden = nn.Parameter(torch.randn(values, width, width) / math.sqrt(width))
        self.hidden_bias = nn.Parameter(torch.zeros(values, width, 1))
        self.out = nn.Parameter(0.1 * torch.randn(values, 3 * mixtures, width) / math.sqrt(width))
        # Starts with components spread over the range and wide enough to overlap.
        start = torch.cat([torch.zeros(mixtures), torch.linspace(-1, 1, mixtures), torch.full((mixtures,), -2.0)])
        self.out_bias = nn.Parameter(start.repeat(values, 1).unsqueeze(-1))
        mask = torch.ones(values, values).tril(-1).repeat_interleave(width, 0).repeat(1, 2)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, features: Tensor, inputs: Tensor) -> Tensor:
        """Features [P, channels] and inputs [P, 2D] -> mixture parameters [D, 3 * mixtures, P]."""
        hidden = self.features(features) + F.linear(inputs, self.earlier * self.mask)
        hidden = F.relu(hidden).T.unflatten(0, (self.values, -1))  # [D, width, P]
        hidden = F.relu(torch.baddbmm(self.hidden_bias, self.hidden, hidden))
        return torch.baddbmm(self.out_bias, self.out, hidden)


class ImageTransformer(Family):
    """log p(x) = sum over values of log p(value | all earlier ones within reach), exactly.

    ``above``: rows of blocks above its own that a position attends to, in each of ``layers`` layers. ``head``: width of
    the network inside a block. Raises ValueError where height and width are no multiples of ``block``, ``channels``
    none of ``heads``, and for continuous data.
    """

    paper = "Parmar et al. 2018, arXiv:1802.05751"
    density = "exact"
    widths = ("channels", "head")
    kinds = ("image",)

    def __init__(
        self,
        spec: DataSpec,
        *,
        channels: int = 64,
        layers: int = 3,
        heads: int = 4,
        above: int = 3,
        mixtures: int = 5,
        head: int = 48,
        block: int = 2,
    ):
        super().__init__(spec)
        if spec.kind not in self.kinds:
            raise ValueError(f"the Image Transformer is for images [C, H, W], not for {spec.kind} {spec.shape}")
        if not spec.levels:
            raise ValueError("continuous data: the mixture of logistics speaks of levels")
        colours, height, width = spec.shape
        if height % block or width % block:
            raise ValueError(f"a {height}x{width} image cannot be cut into {block}x{block} blocks")
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads: {channels} is none of {heads}")
        self.block = block
        self.values, self.rows, self.columns = colours * block**2, height // block, width // block
        self.upper = nn.Conv2d(2 * self.values, channels, (2, 5))
        self.before = nn.Conv2d(2 * self.values, channels, (1, 2), bias=False)
        self.place = nn.Parameter(torch.zeros(self.rows, self.columns, channels))
        self.layers = nn.ModuleList(Layer(channels, heads, above, self.rows, self.columns) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.head = Head(channels, self.values, head, mixtures)

    def stack(self) -> list[Layer]:
        """The layers, first to last."""
        return cast("list[Layer]", list(self.layers))

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        loss = -self.log_prob(batch, generator=generator).mean()
        return {"loss": loss, "bits_per_dim": loss.detach() / (self.spec.dims * math.log(2))}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """Exact log-probability: [B] nats. Draws nothing."""
        x = F.pixel_unshuffle(batch.x, self.block)
        values = x.permute(1, 0, 2, 3).flatten(1)  # [D, B * R * W]
        found = logistic.log_prob(self.conditionals(x), values, self.spec.levels)
        return found.unflatten(1, (len(x), -1)).sum((0, 2))

    def conditionals(self, x: Tensor) -> Tensor:
        """Mixture parameters of every value given those before it.

        Folded images [B, D, R, W] -> [D, 3 * mixtures, B * R * W], as ``logistic`` wants them.
        """
        inputs = self._inputs(x)
        before = F.pad(inputs.flatten(2), (2, -1)).unsqueeze(2)
        h = self._embed(F.pad(inputs, (2, 2, 2, -1)), before).unflatten(1, (self.rows, -1)) + self.place  # [B, R, W, C]
        for layer in self.stack():
            h = layer(h)
        return self.head(self.norm(h).flatten(0, 2), inputs.permute(0, 2, 3, 1).flatten(0, 2))

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Images [n, C, H, W], value by value; keys and values of earlier positions are kept.

        ``temperature`` < 1 sharpens every conditional.
        """
        rows, columns, layers = self.rows, self.columns, self.stack()
        x = self.place.new_zeros(n, self.values, rows, columns)
        seen = self.place.new_zeros(n, 2 * self.values, 2 + rows, 2 + columns + 2)
        before = self.place.new_zeros(n, 2 * self.values, 1, 2 + rows * columns)
        caches = [layer.attention.cache(n, rows * columns) for layer in layers]
        for position, (r, c) in enumerate(itertools.product(range(rows), range(columns))):
            h = self._embed(seen[:, :, r : r + 2, c : c + 5], before[..., position : position + 2]) + self.place[r, c]
            for layer, cache in zip(layers, caches, strict=True):
                h = layer.step(h, cache, position)
            features = self.norm(h)[:, 0]
            for j in range(self.values):
                parameters = self.head(features, self._inputs(x[:, :, r, c]))[j : j + 1]
                x[:, j, r, c] = logistic.sample(
                    parameters, self.spec.levels, generator=generator, temperature=temperature
                )[0]
            seen[:, :, r + 2, c + 2] = before[:, :, 0, position + 2] = self._inputs(x[:, :, r, c])
        return F.pixel_shuffle(x, self.block)

    def _inputs(self, x: Tensor) -> Tensor:
        """The values, and whether each is the lowest level (backgrounds often are): [B, D, …] -> [B, 2D, …]."""
        return torch.cat([x, (x < 1 / (self.spec.levels - 1) - 1).to(x.dtype)], 1)

    def _embed(self, above: Tensor, before: Tensor) -> Tensor:
        """Features [B, R * W, C] of positions from the blocks above and before them.

        ``above``: two rows more than R, less the last, and two columns more to each side, [B, 2D, 1 + R, 4 + W].
        ``before``: the two blocks before each in raster order, across the ends of rows, [B, 2D, 1, 1 + R * W].
        """
        above, before = (inputs.contiguous(memory_format=torch.channels_last) for inputs in (above, before))
        return flat(self.upper(above)) + flat(self.before(before))


def flat(x: Tensor) -> Tensor:
    """[B, C, R, W] to [B, R * W, C]; no copy where the channels lie last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


Model = ImageTransformer
