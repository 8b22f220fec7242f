"""The encoder and the decoder that the variational autoencoders of this folder share, and the KL of their code.

A private base: so what is compared between them is what their papers say, and not the networks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genus.data.spec import DataSpec


def networks(
    spec: DataSpec, latent: int, channels: int, hidden: int, mixtures: int
) -> tuple[nn.Sequential, nn.Sequential]:
    """The encoder, [B, C, H, W] to [B, 2 latent], and the decoder, [B, latent] to parameters of a mixture of logistics.

    Those are of the image folded 2x2 into channels: [B, 3 * mixtures * 4C, H/2, W/2]. The convolutions stand at a half
    and a quarter of the resolution, the fully connected layers hold most parameters: on centred images that buys more
    likelihood a CPU second than convolutions at full resolution. For vectors [D, 1, 1] both are fully connected, half
    as wide, behind a layer of sines: [B, 3 * mixtures * D, 1, 1].
    Raises ValueError for continuous data, and a height or width that is no multiple of 4.
    """
    if not spec.levels:
        raise ValueError("continuous data: the mixture of logistics speaks of levels")
    colours, height, width = spec.shape
    if spec.flat:
        return _flat(spec.dims, latent, hidden // 2, 3 * mixtures * colours)
    if height % 4 or width % 4:
        raise ValueError(f"a {height}x{width} image: height and width must be multiples of 4")
    low = (2 * channels, height // 4, width // 4)
    encoder = nn.Sequential(
        ChannelsLast(),
        nn.Conv2d(colours, channels, 4, stride=2, padding=1),  # [channels, H/2, W/2]
        nn.ReLU(),
        nn.Conv2d(channels, low[0], 4, stride=2, padding=1),  # [2 channels, H/4, W/4]
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(math.prod(low), hidden),
        nn.ReLU(),
        nn.Linear(hidden, 2 * latent),
    )
    decoder = nn.Sequential(
        nn.Linear(latent, hidden),
        nn.ReLU(),
        nn.Linear(hidden, math.prod(low)),
        nn.ReLU(),
        nn.Unflatten(1, low),
        ChannelsLast(),
        nn.Conv2d(low[0], 4 * channels, 1),
        nn.PixelShuffle(2),  # [channels, H/2, W/2]
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 3 * mixtures * 4 * colours, 1),
    )
    return encoder, decoder


def _flat(dims: int, latent: int, hidden: int, outputs: int) -> tuple[nn.Sequential, nn.Sequential]:
    encoder = nn.Sequential(nn.Flatten(), *dense(dims, hidden, pitch=4.0), last := nn.Linear(hidden, 2 * latent))
    decoder = nn.Sequential(*dense(latent, hidden, pitch=1.0), nn.Linear(hidden, outputs))
    decoder.append(nn.Unflatten(1, (outputs, 1, 1)))
    # The code starts by saying much, with little noise. From the usual start it is never used where the values'
    # own mixtures already fit each of them alone: on a checkerboard the bound stays at the marginals.
    with torch.no_grad():
        last.weight[:latent] *= 8
        last.weight[latent:] *= 0.1
        last.bias[latent:] -= 3
    return encoder, decoder


class ChannelsLast(nn.Module):
    """The same values, laid out as [B, H, W, C]: small convolutions run up to twice as fast on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


class Sines(nn.Module):
    """sin(W x + b), [B, inputs] to [B, outputs]: W starts normal, ``pitch`` radians a unit; b anywhere on the circle.

    Sitzmann et al. 2020, arXiv:2006.09661. From a few numbers, networks of ReLUs alone are slow to learn sharp edges.
    """

    def __init__(self, inputs: int, outputs: int, pitch: float):
        super().__init__()
        self.weight = nn.Parameter(pitch * torch.randn(outputs, inputs))
        self.phase = nn.Parameter(math.pi * (2 * torch.rand(outputs) - 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(F.linear(x, self.weight, self.phase))


def dense(inputs: int, hidden: int, *, pitch: float) -> list[nn.Module]:
    """The two hidden layers of a perceptron, the first one of sines."""
    return [Sines(inputs, hidden, pitch), nn.Linear(hidden, hidden), nn.ReLU()]


def kl_by_dimension(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, exp(log_std)^2) || N(0, I)) in nats, a part for each number of the code: [B, latent]."""
    return 0.5 * (mean**2 + torch.expm1(2 * log_std) - 2 * log_std)
