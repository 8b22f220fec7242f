"""TarFlow: Normalizing Flows are Capable Generative Models (Zhai et al. 2024, https://arxiv.org/abs/2412.06329).

A stack of autoregressive flows over the patches of an image, each with a causal Transformer of its own, every other one
in the opposite order (section 3.2, eqs. 4-6). A density takes one pass through all of them; their inverses, which
sample, go patch by patch and keep keys and values.

Differences from the paper, for the sake of small budgets:
- the values inside a patch depend on one another too, by a small masked network (genus.nn.head): in the paper they are
  conditionally independent within one flow;
- the first flow, the one at the data, does not scale and shift a value but takes it through the distribution function
  of a mixture of logistics, and back through that of one (Ho et al. 2019, Flow++, arXiv:1902.00275, section 3.2): an
  affine map cannot bend the edges of dequantised levels. With one component it is the paper's affine map, as in all
  later flows. On Fashion-MNIST, after 400 steps of 16: maps of (5, 1) components 3.17 bits/dim, of (1, 1, 1) 3.38, and
  a single flow of 5, which has no other direction to go, 3.33;
- the first flow is told the earlier values' levels, without the noise that dequantised them;
- attention is local: a row of patches sees itself so far and the rows just above (genus.nn.raster);
- the data is dequantised by uniform noise, for a bound on the likelihood of bytes; the paper's Gaussian noise, and the
  denoising of samples that it asks for, trade likelihood for looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.flows._flow import NormalizingFlow
from genus.nn.dequantisation import Dequantise, Gaussianise, Logit
from genus.nn.raster import RasterTransformer

MAX_LOG_SCALE = 5.0  # a component's scale is within e^-5 … e^5, and a flow can be inverted


class TarFlow(NormalizingFlow):
    """``mixtures``: the flows, first to last, by the number of components of their maps; each has ``layers`` layers.

    ``above``: rows of patches above its own that a patch attends to. ``head``: width of the network inside a patch.
    A vector [D, 1, 1] is taken as an image of one row, each number a patch.
    Raises ValueError for text, for no flow, and where height and width are no multiples of ``block`` or ``channels``
    none of ``heads``.
    """

    paper = "Zhai et al. 2024, arXiv:2412.06329"
    widths = ("channels", "head")

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
        if not mixtures or min(mixtures) < 1:
            raise ValueError(f"mixtures needs one number from 1 up for each flow, not {list(mixtures)}")
        self.shape = (1, 1, spec.dims) if spec.flat else spec.shape
        block = 1 if spec.flat else block
        self.dequantise = Dequantise(spec, Gaussianise(spec.levels) if spec.levels else Logit())
        self.flows = nn.ModuleList(
            Flow(
                self.shape,
                block,
                components,
                inputs=2 if index == 0 else 1,
                channels=channels,
                layers=layers,
                heads=heads,
                above=above,
                head=head,
            )
            for index, components in enumerate(mixtures)
        )

    @torch.no_grad()
    def initialise(self, batch: Batch, *, generator: Generator) -> None:
        """Takes the histogram of levels from ``batch``: the flows start at data that is standard normal by pixel."""
        if isinstance(self.dequantise.onto_reals, Gaussianise):
            self.dequantise.onto_reals.fit(self.spec.to_levels(batch.x))

    def check(self, x: Tensor) -> None:
        self.dequantise.check(x)

    def encode(self, x: Tensor) -> Tensor:
        """[B, D] standard normal code of the middle of each level's cell. Raises ValueError as ``log_prob`` does."""
        self.check(x)
        z = self.flow(self.dequantise(x, generator=None)[0])[0].flatten(1)
        return -z.sign() * torch.special.ndtri((-z.abs().double()).sigmoid()).to(z.dtype)

    def decode(self, code: Tensor) -> Tensor:
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

    def _log_prob(self, x: Tensor, generator: Generator) -> Tensor:
        y, log_det = self.dequantise(x, generator=generator)
        z, flow_log_det = self.flow(y)
        return log_det + flow_log_det + (F.logsigmoid(z) + F.logsigmoid(-z)).flatten(1).sum(1)

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
    """One autoregressive flow, in raster order: a causal Transformer that gives every value its map.

    ``network``: the parameters of genus.nn.raster.RasterTransformer.
    """

    def __init__(self, shape: tuple[int, ...], block: int, components: int, **network: Any):
        super().__init__()
        self.block = block
        # Components start spread over standard normal values and wide enough to overlap; a single one at 0 and 1.
        means, log_scale = torch.linspace(-1.5, 1.5, components + 2)[1:-1], -1.0 if components > 1 else 0.0
        self.network = RasterTransformer(shape, block=block, means=means, log_scale=log_scale, **network)

    def forward(self, x: Tensor, see: See) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] to the same and the log-determinant [B]. ``see``: what the network gets of [B, D, …] values."""
        x = F.pixel_unshuffle(x, self.block)
        values = x.permute(1, 0, 2, 3).flatten(1)  # [D, B * R * W]
        z, log_slope = bend(self.network(see(x)), values)
        z = z.unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1)
        return F.pixel_shuffle(z, self.block), log_slope.unflatten(1, (len(x), -1)).sum((0, 2))

    def inverse(self, z: Tensor, see: See) -> Tensor:
        """The image of which ``forward`` makes z, value by value."""
        z = F.pixel_unshuffle(z, self.block)

        def solve(parameters: Tensor, j: int, r: int, c: int) -> Tensor:
            return unbend(parameters, z[None, :, j, r, c])[0]

        return F.pixel_shuffle(self.network.unroll(len(z), see, solve), self.block)


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


Model = TarFlow
