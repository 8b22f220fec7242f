"""TarFlow: Normalizing Flows are Capable Generative Models (Zhai et al. 2024, https://arxiv.org/abs/2412.06329).

A stack of autoregressive flows over the patches of an image, each with a causal Transformer of its own, every other one
in the opposite order (section 3.2, eqs. 4-6). A density takes one pass through all of them; their inverses, which
sample, go patch by patch and keep keys and values.

Differences from the paper, for the sake of small budgets:
- the values inside a patch depend on one another too, by a small masked network: in the paper they are conditionally
  independent within one flow;
- the first flow, the one at the data, does not scale and shift a value but takes it through the distribution function
  of a mixture of logistics, and back through that of one (Ho et al. 2019, Flow++, arXiv:1902.00275, section 3.2): an
  affine map cannot bend the edges of dequantised levels. With one component it is the paper's affine map, as in all
  later flows. On Fashion-MNIST, after 400 steps of 16: maps of (5, 1) components 3.17 bits/dim, of (1, 1, 1) 3.38, and
  a single flow of 5, which has no other direction to go, 3.33;
- the first flow is told the earlier values' levels, without the noise that dequantised them;
- attention is local: a row of patches sees itself so far and the rows just above (Parmar et al. 2018,
  arXiv:1802.05751), with biases that start as a penalty on distance (Press et al. 2022, arXiv:2108.12409);
- the data is dequantised by uniform noise, for a bound on the likelihood of bytes; the paper's Gaussian noise, and the
  denoising of samples that it asks for, trade likelihood for looks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.nn.dequantisation import Dequantise, Gaussianise, Logit

MAX_LOG_SCALE = 5.0  # a component's scale is within e^-5 … e^5, and a flow can be inverted


class TarFlow(Family):
    """``mixtures``: the flows, first to last, by the number of components of their maps; each has ``layers`` layers.

    ``above``: rows of patches above its own that a patch attends to. ``head``: width of the network inside a patch.
    A vector [D, 1, 1] is taken as an image of one row, each number a patch.
    Raises ValueError for text, for no flow, and where height and width are no multiples of ``block`` or ``channels``
    none of ``heads``.
    """

    paper = "Zhai et al. 2024, arXiv:2412.06329"
    density = "dequantised"
    widths = ("channels", "head")
    kinds = ("image", "vector")

    def __init__(
        self,
        spec: DataSpec,
        *,
        mixtures: Sequence[int] = (5, 1, 1),
        layers: int = 1,
        channels: int = 64,
        heads: int = 4,
        above: int = 3,
        head: int = 32,
        block: int = 2,
    ):
        super().__init__(spec)
        if spec.kind not in self.kinds:
            raise ValueError(f"TarFlow is for images and vectors, not for {spec.kind} {spec.shape}")
        if not mixtures or min(mixtures) < 1:
            raise ValueError(f"mixtures needs one number from 1 up for each flow, not {list(mixtures)}")
        self.shape = (1, 1, spec.dims) if spec.flat else spec.shape
        block = 1 if spec.flat else block
        height, width = self.shape[1:]
        if height % block or width % block:
            raise ValueError(f"a {height}x{width} image cannot be cut into {block}x{block} patches")
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads: {channels} is none of {heads}")
        self.latent = spec.dims
        self.dequantise = Dequantise(spec, Gaussianise(spec.levels) if spec.levels else Logit())
        self.flows = nn.ModuleList(
            Flow(self.shape, block, 2 if index == 0 else 1, layers, channels, heads, above, components, head)
            for index, components in enumerate(mixtures)
        )

    @torch.no_grad()
    def initialise(self, batch: Batch, *, generator: Generator) -> None:
        """Takes the histogram of levels from ``batch``: the flows start at data that is standard normal by pixel."""
        if isinstance(self.dequantise.onto_reals, Gaussianise):
            self.dequantise.onto_reals.fit(self.spec.to_levels(batch.x))

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        loss = -self._log_prob(batch.x, generator).mean()
        return {"loss": loss, "bits_per_dim": loss.detach() / (self.spec.dims * math.log(2))}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """One draw's lower bound on the log-probability of the stored levels: [B] nats.

        Raises ValueError for a wrong shape, NaN or values outside [-1, 1].
        """
        self.dequantise.check(batch.x)
        return self._log_prob(batch.x, generator)

    def _log_prob(self, x: Tensor, generator: Generator) -> Tensor:
        y, log_det = self.dequantise(x, generator=generator)
        z, flow_log_det = self.flow(y)
        return log_det + flow_log_det + (F.logsigmoid(z) + F.logsigmoid(-z)).flatten(1).sum(1)

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """[n, *shape]. ``temperature`` scales the code's deviation: below 1 is tidier, less varied."""
        like = next(self.parameters())
        noise = torch.randn(n, self.latent, generator=generator, device=like.device, dtype=like.dtype)
        return self.decode(noise * temperature)

    def encode(self, x: Tensor) -> Tensor:
        """[B, D] standard normal code of the middle of each level's cell. Raises ValueError as ``log_prob`` does."""
        self.dequantise.check(x)
        z = self.flow(self.dequantise(x, generator=None)[0])[0].flatten(1)
        return -z.sign() * torch.special.ndtri((-z.abs().double()).sigmoid()).to(z.dtype)

    def decode(self, code: Tensor) -> Tensor:
        """[B, *shape] of a code [B, D]."""
        z = torch.special.log_ndtr(code) - torch.special.log_ndtr(-code)
        return self.dequantise.inverse(self.unflow(z.view(-1, *self.shape)))

    def flow(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Reals [B, *shape] to standard logistic z, for a vector [B, 1, 1, D], and the log-determinant [B]."""
        y, log_det = y.reshape(-1, *self.shape), y.new_zeros(len(y))
        for see, flow in self._stack():
            y, change = flow(y, see)
            y, log_det = y.flip(1, 2, 3), log_det + change  # the next one goes the other way
        return y, log_det

    @torch.no_grad()
    def unflow(self, z: Tensor) -> Tensor:
        """The inverse of ``flow``: [B, *shape].

        The cache's sums come in another order: a trained model gives reals back to 5e-5 in single precision, 1e-13 in
        double, and levels exactly.
        """
        for see, flow in reversed(self._stack()):
            z = flow.inverse(z.flip(1, 2, 3), see)
        return z.reshape(-1, *self.spec.shape)

    def _stack(self) -> list[tuple[See, Flow]]:
        """The flows, first to last, and what each is shown of earlier values."""
        flows = cast("list[Flow]", list(self.flows))
        return [(self._levels if index == 0 else squashed, flow) for index, flow in enumerate(flows)]

    def _levels(self, y: Tensor) -> Tensor:
        """The levels that y stands for, and whether each is the lowest: [B, D, …] -> [B, 2D, …]."""
        x = self.dequantise.inverse(y)
        edge = 1 / (self.spec.levels - 1) - 1 if self.spec.levels else 0.0
        return torch.cat([x, (x < edge).to(x.dtype)], 1)


See = Callable[[Tensor], Tensor]


def squashed(x: Tensor) -> Tensor:
    """Values as the later flows see them: an outlier must not shake all that follow it."""
    return 3 * torch.tanh(x / 3)


class Flow(nn.Module):
    """One autoregressive flow, in raster order: a causal Transformer that gives every value its map."""

    def __init__(
        self,
        shape: tuple[int, ...],
        block: int,
        inputs: int,
        layers: int,
        channels: int,
        heads: int,
        above: int,
        mixtures: int,
        head: int,
    ):
        super().__init__()
        colours, height, width = shape
        self.block = block
        self.values, self.rows, self.columns = colours * block**2, height // block, width // block
        self.inputs = inputs * self.values
        self.upper = nn.Conv2d(self.inputs, channels, (2, 5)) if self.rows > 1 else None  # a vector has nothing above
        self.before = nn.Conv2d(self.inputs, channels, (1, 2), bias=False)
        self.place = nn.Parameter(torch.zeros(self.rows, self.columns, channels))
        self.layers = nn.ModuleList(Layer(channels, heads, above, self.rows, self.columns) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.head = Head(channels, self.values, inputs, head, mixtures)

    def forward(self, x: Tensor, see: See) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] to the same and the log-determinant [B]. ``see``: what the network gets of [B, D, …] values."""
        x = F.pixel_unshuffle(x, self.block)
        values = x.permute(1, 0, 2, 3).flatten(1)  # [D, B * R * W]
        z, log_slope = bend(self.conditionals(see(x)), values)
        z = z.unflatten(1, (len(x), self.rows, self.columns)).transpose(0, 1)
        return F.pixel_shuffle(z, self.block), log_slope.unflatten(1, (len(x), -1)).sum((0, 2))

    def conditionals(self, seen: Tensor) -> Tensor:
        """Every value's mixture given the values before it.

        What is seen of folded images, [B, inputs, R, W] -> [D, 3 * mixtures, B * R * W].
        """
        before = F.pad(seen.flatten(2), (2, -1)).unsqueeze(2)
        h = self._embed(F.pad(seen, (2, 2, 2, -1)), before).unflatten(1, (self.rows, -1)) + self.place  # [B, R, W, C]
        for layer in self.stack():
            h = layer(h)
        return self.head(self.norm(h).flatten(0, 2), seen.permute(0, 2, 3, 1).flatten(0, 2))

    def inverse(self, z: Tensor, see: See) -> Tensor:
        """The image of which ``forward`` makes z, value by value; keys and values of earlier patches are kept."""
        z = F.pixel_unshuffle(z, self.block)
        n, rows, columns, layers = len(z), self.rows, self.columns, self.stack()
        x = torch.zeros_like(z)
        seen = z.new_zeros(n, self.inputs, 2 + rows, 2 + columns + 2)
        before = z.new_zeros(n, self.inputs, 1, 2 + rows * columns)
        caches = [layer.attention.cache(n, rows * columns) for layer in layers]
        for position, (r, c) in enumerate(itertools.product(range(rows), range(columns))):
            h = self._embed(seen[:, :, r : r + 2, c : c + 5], before[..., position : position + 2]) + self.place[r, c]
            for layer, cache in zip(layers, caches, strict=True):
                h = layer.step(h, cache, position)
            features = self.norm(h)[:, 0]
            for j in range(self.values):
                parameters = self.head(features, see(x[:, :, r, c]))[j : j + 1]
                x[:, j, r, c] = unbend(parameters, z[None, :, j, r, c])[0]
            seen[:, :, r + 2, c + 2] = before[:, :, 0, position + 2] = see(x[:, :, r, c])
        return F.pixel_shuffle(x, self.block)

    def stack(self) -> list[Layer]:
        """The layers, first to last."""
        return cast("list[Layer]", list(self.layers))

    def _embed(self, above: Tensor, before: Tensor) -> Tensor:
        """Features [B, R * W, C] of patches from those above and before them.

        ``above``: two rows more than R, less the last, and two columns more to each side, [B, inputs, 1 + R, 4 + W].
        ``before``: the two patches before each in raster order, across the ends of rows, [B, inputs, 1, 1 + R * W].
        """
        above, before = (seen.contiguous(memory_format=torch.channels_last) for seen in (above, before))
        h = flat(self.before(before))
        return h if self.upper is None else flat(self.upper(above)) + h


def mixture(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log weights (normalised), means and log scales (bounded), each [D, K, P], of [D, 3K, P]."""
    logits, means, raw = parameters.chunk(3, 1)
    return logits.log_softmax(1), means, MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE)


def bend(parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """z = logit F(x), where F is a mixture's distribution function, and log dz/dx: both [D, P], as x is.

    With one component z = (x - mean) / scale. In logarithms: nothing is lost, or infinite, far out.
    """
    weights, means, log_scales = mixture(parameters.to(x.dtype))  # not in autocast's half precision
    t = (x.unsqueeze(1) - means) * torch.exp(-log_scales)
    below = F.logsigmoid(t)
    above = below - t
    log_f = torch.logsumexp(weights + below, 1)
    log_rest = torch.logsumexp(weights + above, 1)
    log_density = torch.logsumexp(weights + below + above - log_scales, 1)
    return log_f - log_rest, log_density - log_f - log_rest


def unbend(parameters: Tensor, z: Tensor) -> Tensor:
    """The inverse of ``bend``: x [D, P].

    A mixture's quantile lies between the least and the greatest of its components'. Each round asks at 15 places
    between; what they leave is small enough for Newton's method.
    """
    weights, means, log_scales = mixture(parameters.to(z.dtype))
    quantiles = means + log_scales.exp() * z.unsqueeze(1)
    low, high = quantiles.amin(1), quantiles.amax(1)
    if means.shape[1] == 1:
        return low
    # On the side where the distribution function is small, and keeps its digits.
    side = torch.where(z < 0, 1.0, -1.0).to(z.dtype)
    wanted = torch.sigmoid(-z.abs())
    weights, precision = weights.exp().unsqueeze(-1), (side.unsqueeze(1) * torch.exp(-log_scales)).unsqueeze(-1)
    places = torch.linspace(0, 1, 17, device=z.device, dtype=z.dtype)
    for _ in range(5):
        x = torch.lerp(low.unsqueeze(-1), high.unsqueeze(-1), places)  # [D, P, 17]
        reached = (weights * torch.sigmoid((x.unsqueeze(1) - means.unsqueeze(-1)) * precision)).sum(1)
        below = side.unsqueeze(-1) * (reached - wanted.unsqueeze(-1)) < 0
        cell = below[..., 1:-1].sum(-1, keepdim=True)
        low, high = x.gather(-1, cell).squeeze(-1), x.gather(-1, cell + 1).squeeze(-1)
    x = (low + high) / 2
    for _ in range(3):
        reached, log_slope = bend(parameters, x)
        x = x - (reached - z) * torch.exp(-log_slope)
    return x


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

    def __init__(self, channels: int, values: int, inputs: int, width: int, mixtures: int):
        super().__init__()
        self.values = values
        self.features = nn.Linear(channels, values * width)
        self.earlier = nn.Parameter(0.3 * torch.randn(values * width, inputs * values)) if values > 1 else None
        self.hidden = nn.Parameter(torch.randn(values, width, width) / math.sqrt(width))
        self.hidden_bias = nn.Parameter(torch.zeros(values, width, 1))
        self.out = nn.Parameter(0.1 * torch.randn(values, 3 * mixtures, width) / math.sqrt(width))
        # Starts with components spread over standard normal values and wide enough to overlap; a single one at 0 and 1.
        means = torch.linspace(-1.5, 1.5, mixtures + 2)[1:-1]
        start = torch.cat([torch.zeros(mixtures), means, torch.full((mixtures,), -1.0 if mixtures > 1 else 0.0)])
        self.out_bias = nn.Parameter(start.repeat(values, 1).unsqueeze(-1))
        mask = torch.ones(values, values).tril(-1).repeat_interleave(width, 0).repeat(1, inputs)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, features: Tensor, inputs: Tensor) -> Tensor:
        """Features [P, channels] and what is seen, [P, inputs * D], -> mixture parameters [D, 3 * mixtures, P]."""
        hidden = self.features(features)
        if self.earlier is not None:
            hidden = hidden + F.linear(inputs, self.earlier * self.mask)
        hidden = F.relu(hidden).T.unflatten(0, (self.values, -1))  # [D, width, P]
        hidden = F.relu(torch.baddbmm(self.hidden_bias, self.hidden, hidden))
        return torch.baddbmm(self.out_bias, self.out, hidden)


def flat(x: Tensor) -> Tensor:
    """[B, C, R, W] to [B, R * W, C]; no copy where the channels lie last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


Model = TarFlow
