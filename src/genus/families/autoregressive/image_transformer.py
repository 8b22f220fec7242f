"""Image Transformer: self-attention over what is already drawn (Parmar et al. 2018, https://arxiv.org/abs/1802.05751).

Positions follow one another in raster order. Attention is the paper's local 1D attention (section 3.3), which stands in
genus.nn.raster. The likelihood is the paper's mixture of discretised logistics.

Differences from the paper, all for the sake of small budgets:
- a position is a ``block`` x ``block`` square of pixels, all its colours; the values inside it are conditioned on one
  another in the head (genus.nn.head). That is an exact factorisation like any other order, and costs a quarter with
  2 x 2 blocks;
- a position's embedding is a convolution over the blocks before it, not just the one;
- learned biases for relative places, which start as a penalty on distance, instead of sines added to the embedding;
- layers normalise before they attend, not after.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.nn import logistic
from genus.nn.raster import RasterTransformer


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
        self.block = block
        self.network = RasterTransformer(
            spec.shape,
            block=block,
            inputs=2,
            channels=channels,
            layers=layers,
            heads=heads,
            above=above,
            head=head,
            means=torch.linspace(-1, 1, mixtures),  # spread over the range and wide enough to overlap
            log_scale=-2.0,
        )

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
        return self.network(self._inputs(x))

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Images [n, C, H, W], value by value. ``temperature`` < 1 sharpens every conditional."""

        def draw(parameters: Tensor, *place: int) -> Tensor:
            return logistic.sample(parameters, self.spec.levels, generator=generator, temperature=temperature)[0]

        return F.pixel_shuffle(self.network.unroll(n, self._inputs, draw), self.block)

    def _inputs(self, x: Tensor) -> Tensor:
        """The values, and whether each is the lowest level (backgrounds often are): [B, D, …] -> [B, 2D, …]."""
        return torch.cat([x, (x < 1 / (self.spec.levels - 1) - 1).to(x.dtype)], 1)


Model = ImageTransformer
