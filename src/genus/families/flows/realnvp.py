"""RealNVP: Density estimation using Real NVP (Dinh, Sohl-Dickstein & Bengio 2016, https://arxiv.org/abs/1605.08803).

Each scale (section 3.6): affine couplings with a checkerboard mask, then affine couplings with a channel-wise mask
(figure 3), the two halves taking turns; then half of the channels leaves as standard normal code.

Differences from the paper:
- a squeezed image is the same checkerboard: of the 2x2 pixels that became channels it keeps one diagonal. So all
  networks work on squeezed images, a quarter of the places;
- the last scale has channel-wise couplings too, and there the networks see it whole;
- batch normalisation as a layer (section 3.7) is a scale and shift a channel that the first batch normalises;
- the networks are small: three layers and no residual blocks, for a minute or two of one CPU thread;
- pixels are Gaussianised by their histogram before the first layer, not logit (see genus.nn.dequantisation).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genus.data.spec import DataSpec
from genus.families.flows._coupling import Affine, Convolutions, CouplingFlow, Dense, Layer


class RealNVP(CouplingFlow):
    """``couplings``: of each mask, one number a scale; ``hidden``: width of their networks, one number a scale.

    ``bound``: a coupling scales by e^-bound … e^bound. ``onto_reals``: "gaussianise", or "logit" with its ``alpha``.
    Vectors [D, 1, 1] have one scale, whose masks are the halves of the vector: the largest number of couplings for
    each, the largest width for their dense networks, and a quarter of the bound, since all couplings act on the same
    few numbers: the product of their scales must not run away.
    Raises ValueError for an image whose sides can't be halved once a scale.
    """

    paper = "Dinh, Sohl-Dickstein & Bengio 2016, arXiv:1605.08803"

    def __init__(
        self,
        spec: DataSpec,
        *,
        couplings: Sequence[int] = (2, 4),
        hidden: Sequence[int] = (32, 64),
        bound: float = 2.0,
        onto_reals: str = "gaussianise",
        alpha: float = 1e-6,
    ):
        if not couplings or len(couplings) != len(hidden):
            raise ValueError(
                f"couplings and hidden need one number a scale each, not {list(couplings)} and {list(hidden)}"
            )
        super().__init__(spec, len(couplings), onto_reals=onto_reals, alpha=alpha)
        if spec.flat:
            kept, changed = spec.dims - spec.dims // 2, spec.dims // 2  # as chunk() halves an odd number
            layers: list[Layer] = []
            for _ in range(max(couplings)):
                layers += [Normalise(spec.dims), Affine(Dense(kept, max(hidden), 2 * changed), bound / 4)]
                layers += [Normalise(spec.dims), Affine(Dense(changed, max(hidden), 2 * kept), bound / 4, flip=True)]
            self.scales.append(nn.ModuleList(layers))
            return
        for (height, width, channels), count, wide in zip(self.sizes(len(couplings)), couplings, hidden, strict=True):
            layers = []
            for order in ((0, 3, 1, 2), (0, 2, 3, 1)):  # diagonals of the 2x2 pixels become halves, then its rows do
                layers.append(Reorder(order))
                for index in range(count):
                    whole = len(self.scales) + 1 == len(couplings)
                    network = Convolutions(channels // 2, wide, channels, (height, width), whole=whole)
                    layers += [Normalise(channels), Affine(network, bound, flip=index % 2 > 0)]
            self.scales.append(nn.ModuleList(layers))
        self.to(memory_format=torch.channels_last)


class Normalise(Layer):
    """y = (x + b) exp(s), a shift and scale a channel, by which the first batch gets mean 0 and variance 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x + self.bias) * self.log_scale.exp(), self.log_scale.sum() * (x.shape[1] * x.shape[2])

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_scale).exp() - self.bias

    def initialise(self, x: Tensor) -> Tensor:
        self.bias.copy_(-x.mean((0, 1, 2)))
        self.log_scale.copy_(-x.std((0, 1, 2)).clamp(min=1e-3).log())
        return self(x)[0]


class Reorder(Layer):
    """The four pixels that a squeeze made channels of, in another order: each of them is a quarter of the channels."""

    def __init__(self, order: Sequence[int]):
        super().__init__()
        self.order = list(order)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pixels = x.chunk(4, -1)
        return torch.cat([pixels[index] for index in self.order], -1), x.new_zeros(())

    def inverse(self, y: Tensor) -> Tensor:
        pixels = y.chunk(4, -1)
        return torch.cat([pixels[self.order.index(index)] for index in range(4)], -1)


Model = RealNVP
