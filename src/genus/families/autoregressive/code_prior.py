"""The prior of VQ-VAE-2: the tokens of a frozen autoencoder, one after another, the coarse grid before the fine one.

Razavi et al. 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2", https://arxiv.org/abs/1906.00446, section
3.2 and algorithm 2. The networks are causal Transformers (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

Differences from the paper, all for the sake of small budgets:
- all grids share the places of the coarsest one: a place of a grid twice as fine holds a block of 2 x 2 tokens, which
  are conditioned on one another in the head. That is an exact factorisation like any other, and costs a quarter;
- a place's embedding is a convolution over the places before it: what is next to what need not be learned by attention;
- attention in every layer, no gated convolutions; each head has a learned bias for every pair of places, which starts
  as a penalty on distance (Press et al. 2022, arXiv:2108.12409);
- no labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Quantises, Terms
from genus.data.spec import DataSpec
from genus.nn.raster import Layer


class Tokens(nn.Module):
    """The sum of an embedding a token: [..., V] tokens of a place to [..., width]."""

    offsets: Tensor

    def __init__(self, entries: int, values: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(values * entries, width) / math.sqrt(values))
        self.register_buffer("offsets", entries * torch.arange(values), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens + self.offsets, self.table).sum(-2)


class Head(nn.Module):
    """Logits of the V tokens of a place: token j from the place's features and tokens 0 … j - 1."""

    def __init__(self, channels: int, entries: int, values: int, width: int):
        super().__init__()
        self.values, self.width = values, width
        self.features = nn.Linear(channels, values * width)
        # What each token says to the units of those after it.
        later = (0.3 * torch.randn(entries, (values - 1 - value) * width) for value in range(values - 1))
        self.earlier = nn.ParameterList(later)
        self.out = nn.Parameter(torch.randn(values, width, entries) / (10 * math.sqrt(width)))
        self.out_bias = nn.Parameter(torch.zeros(values, 1, entries))

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Features [N, channels] and tokens [N, V] -> logits [V, N, entries]."""
        hidden = self.features(features)
        for value, table in enumerate(self.earlier):
            hidden = hidden + F.pad(F.embedding(tokens[:, value], table), ((value + 1) * self.width, 0))
        hidden = F.relu(hidden).unflatten(1, (self.values, -1)).transpose(0, 1)  # [V, N, width]
        return torch.baddbmm(self.out_bias, hidden, self.out)

    def only(self, value: int, features: Tensor, tokens: Tensor) -> Tensor:
        """Logits [N, entries] of one of the V tokens."""
        units = slice(value * self.width, (value + 1) * self.width)
        hidden = F.linear(features, self.features.weight[units], self.features.bias[units])
        for earlier in range(value):
            start = (value - 1 - earlier) * self.width
            hidden = hidden + F.embedding(tokens[:, earlier], self.earlier[earlier][:, start : start + self.width])
        return F.relu(hidden) @ self.out[value] + self.out_bias[value]


class Level(nn.Module):
    """The tokens of one grid, ``values`` in a place, given those of the coarser ones, ``known`` in a place."""

    def __init__(
        self, entries: int, values: int, known: int, grid: tuple[int, int], channels: int, layers: int, heads: int
    ):
        super().__init__()
        rows, columns = grid
        self.grid, self.values, self.channels = grid, values, channels
        self.embedding = Tokens(entries, values, channels)
        self.above = nn.Conv2d(channels, channels, (2, 5))
        self.before = nn.Conv2d(channels, channels, (1, 2), bias=False)
        self.place = nn.Parameter(torch.zeros(rows * columns, channels))
        self.known = Tokens(entries, known, channels) if known else None
        self.around = on_places(grid, channels, heads, causal=False) if known else None
        self.layers = nn.ModuleList(on_places(grid, channels, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.head = Head(channels, entries, values, channels)

    def stack(self) -> list[Layer]:
        """The layers, first to last."""
        return cast("list[Layer]", list(self.layers))

    def forward(self, tokens: Tensor, known: Tensor) -> Tensor:
        """Tokens [B, P, V] and those of coarser grids [B, P, known] -> logits [V, B, P, entries] of the former."""
        embedded = self.embedding(tokens).transpose(1, 2)  # [B, C, P]
        above = F.pad(embedded.unflatten(2, self.grid), (2, 2, 2, -1))
        h = self.embed(above, F.pad(embedded, (2, -1)).unsqueeze(2)) + self.given(known)
        h = h.unsqueeze(1)
        for layer in self.stack():
            h = layer(h)
        logits = self.head(self.norm(h).flatten(0, 2), tokens.flatten(0, 1))
        return logits.unflatten(1, tokens.shape[:2])

    def sample(self, known: Tensor, generator: Generator, temperature: float, top_k: int) -> Tensor:
        """Tokens [n, P, V] given those of coarser grids [n, P, known]; keys and values of earlier places are kept."""
        n, (rows, columns), layers = len(known), self.grid, self.stack()
        given = self.given(known).expand(n, -1, -1)
        tokens = known.new_zeros(n, rows * columns, self.values)
        above = self.place.new_zeros(n, self.channels, 2 + rows, 2 + columns + 2)
        before = self.place.new_zeros(n, self.channels, 1, 2 + rows * columns)
        caches = [layer.attention.cache(n, rows * columns) for layer in layers]
        for place, (r, c) in enumerate(itertools.product(range(rows), range(columns))):
            h = self.embed(above[:, :, r : r + 2, c : c + 5], before[..., place : place + 2])
            h = h + given[:, place : place + 1]
            for layer, cache in zip(layers, caches, strict=True):
                h = layer.step(h, cache, place)
            features = self.norm(h)[:, 0]
            for value in range(self.values):
                logits = self.head.only(value, features, tokens[:, place])
                tokens[:, place, value] = draw(logits, generator, temperature, top_k)
            above[:, :, r + 2, c + 2] = before[:, :, 0, place + 2] = self.embedding(tokens[:, place])
        return tokens

    def given(self, known: Tensor) -> Tensor:
        """What is known of each place before its grid's tokens: [B, P, C]; [1, P, C] where that is the place alone."""
        if self.known is None or self.around is None:
            return self.place.unsqueeze(0)
        return self.around((self.known(known) + self.place).unsqueeze(1)).squeeze(1)

    def embed(self, above: Tensor, before: Tensor) -> Tensor:
        """Features [B, R * W, C] of places from what is above and before them.

        ``above``: two rows more than R, less the last, and two columns more to each side, [B, C, 1 + R, 4 + W].
        ``before``: the two places before each in raster order, across the ends of rows, [B, C, 1, 1 + R * W].
        """
        return flat(self.above(above)) + flat(self.before(before))


class CodePrior(Family):
    """log p(tokens) = sum over tokens of log p(token | all earlier ones), exactly; grid by grid, the coarsest first.

    ``parent``: the autoencoder whose tokens these are; samples are decoded by it. ``layers``: of each grid's
    Transformer, one number for all or one a grid, the coarsest first.

    It gives no density of images: that of a code is none of what it decodes to. Raises ValueError where a grid is no
    whole multiple of the coarsest, or ``channels`` none of ``heads``.
    """

    paper = "Razavi et al. 2019, arXiv:1906.00446"
    widths = ("channels",)
    kinds = ("image",)
    inherits = Quantises

    def __init__(
        self,
        spec: DataSpec,
        *,
        parent: Family,
        channels: int = 64,
        layers: int | Sequence[int] = 3,
        heads: int = 4,
    ):
        super().__init__(spec)
        if not isinstance(parent, Quantises):
            raise TypeError(f"{type(parent).__name__} has no tokens")
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads: {channels} is none of {heads}")
        self.parent = parent
        self.grids = parent.grids
        rows, columns = self.grids[0]
        depths = [layers] * len(self.grids) if isinstance(layers, int) else layers
        levels, known = [], 0
        for (height, width), depth in zip(self.grids, depths, strict=True):
            if height % rows or width % columns:
                raise ValueError(f"a grid of {height}x{width} is no whole multiple of the coarsest, {rows}x{columns}")
            values = (height // rows) * (width // columns)
            levels.append(Level(parent.entries, values, known, (rows, columns), channels, depth, heads))
            known += values
        self.levels = nn.ModuleList(levels)

    def stack(self) -> list[Level]:
        """The grids' networks, the coarsest first."""
        return cast("list[Level]", list(self.levels))

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """Minus the log-probability of an example's tokens; beside it each grid's share. Draws nothing."""
        with torch.no_grad(), torch.autocast(batch.x.device.type, enabled=False):  # the tokens that others would see
            tokens = self.parent.quantise(batch.x)
        nats = [-part.mean() for part in self.log_probs(tokens)]
        parts = {f"nats_{h}x{w}": value.detach() for (h, w), value in zip(self.grids, nats, strict=True)}
        return {"loss": torch.stack(nats).sum()} | parts

    def log_probs(self, tokens: list[Tensor]) -> list[Tensor]:
        """Log-probabilities of each grid given the coarser ones, nats [B], for tokens [B, rows, columns] a grid."""
        found = []
        for grid, logits in zip(self._folded(tokens), self.logits(tokens), strict=True):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # not in autocast's half precision
            log_p = logits.log_softmax(-1).gather(-1, grid.permute(2, 0, 1).unsqueeze(-1))
            found.append(log_p.sum((0, 2, 3)))
        return found

    def logits(self, tokens: list[Tensor]) -> list[Tensor]:
        """Of every token given those before it: [V, B, P, entries] a grid, V tokens in each of P places."""
        folded = self._folded(tokens)
        return [
            level(grid, torch.cat([folded[0][..., :0], *folded[:k]], -1))
            for k, (level, grid) in enumerate(zip(self.stack(), folded, strict=True))
        ]

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        generator: Generator,
        cond: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
    ) -> Tensor:
        """Images [n, C, H, W]: drawn tokens, decoded. ``temperature`` < 1 sharpens every conditional.

        ``top_k``: a token is one of the so many most probable ones; 0: any.
        """
        return self.parent.dequantise(self.sample_tokens(n, generator=generator, temperature=temperature, top_k=top_k))

    @torch.no_grad()
    def sample_tokens(self, n: int, *, generator: Generator, temperature: float = 1.0, top_k: int = 0) -> list[Tensor]:
        """The tokens of ``sample``: int64 [n, rows, columns] a grid."""
        rows, columns = self.grids[0]
        known = torch.zeros((n, rows * columns, 0), dtype=torch.int64, device=generator.device)
        found = []
        for level, (height, width) in zip(self.stack(), self.grids, strict=True):
            tokens = level.sample(known, generator, temperature, top_k)
            known = torch.cat([known, tokens], -1)
            blocks = tokens.view(n, rows, columns, height // rows, width // columns)
            found.append(blocks.transpose(2, 3).reshape(n, height, width))
        return found

    def _folded(self, tokens: list[Tensor]) -> list[Tensor]:
        """Every grid [B, rows, columns] on the places of the coarsest: [B, P, V]."""
        rows, columns = self.grids[0]
        cut = [grid.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)) for grid in tokens]  # [B, R, v, W, w]
        return [grid.transpose(2, 3).flatten(3).flatten(1, 2) for grid in cut]


def on_places(grid: tuple[int, int], channels: int, heads: int, *, causal: bool = True) -> Layer:
    """A Transformer's layer in which every place of a grid attends to those up to its own; or else to all of them.

    To it all places are one row, but its bias starts by their distance on the grid.
    """
    rows, columns = grid
    layer = Layer(channels, heads, 0, 1, rows * columns)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    slopes = 2.0 ** -torch.arange(heads)
    with torch.no_grad():
        layer.attention.bias.copy_(-slopes.view(-1, 1, 1) * torch.cdist(places, places, p=1))  # [heads, P, P]
    if not causal:
        layer.attention.hidden.zero_()
    return layer


def draw(logits: Tensor, generator: Generator, temperature: float, top_k: int) -> Tensor:
    """One token [n] from each row of logits [n, entries]."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial((logits.float() / temperature).softmax(1), 1, generator=generator)[:, 0]


def flat(x: Tensor) -> Tensor:
    """[B, C, R, W] to [B, R * W, C]; no copy where the channels lie last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


Model = CodePrior
