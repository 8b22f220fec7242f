"""Convolutional variational autoencoder with a discretised likelihood.

Kingma & Welling 2013, "Auto-Encoding Variational Bayes", arXiv:1312.6114; the importance-weighted bound is that of
Burda et al. 2015, arXiv:1509.00519; the likelihood, a mixture of logistics a pixel, that of PixelCNN++; the weight
``beta`` of the KL term that of Higgins et al. 2017, "beta-VAE" (ICLR).
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


class ChannelsLast(nn.Module):
    """The same values, laid out as [B, H, W, C]: small convolutions run up to twice as fast on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


class VAE(Family):
    """p(z) = N(0, I); q(z|x) = N(mean, diag) from one network; p(x|z), from another, a mixture of logistics a pixel.

    The convolutions stand at a half and a quarter of the resolution, the fully connected layers hold most parameters:
    on centred images that buys more likelihood a CPU second than convolutions at full resolution. Height and width
    must be multiples of 4 (ValueError). Vectors [D, 1, 1] get fully connected layers half as wide, behind a layer of
    sines, four times as many logistics a value, and a code of at most D numbers. Continuous data is a ValueError.
    """

    paper = "Kingma & Welling 2013, arXiv:1312.6114"
    density = "elbo"
    widths = ("channels", "hidden")

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int = 32,
        channels: int = 24,
        hidden: int = 320,
        mixtures: int = 3,
        free_bits: float = 0.0,
        beta: float = 1.0,
    ):
        super().__init__(spec)
        colours, height, width = spec.shape
        if not spec.levels:
            raise ValueError("continuous data: the mixture of logistics speaks of levels")
        if spec.flat:
            latent, mixtures = min(latent, spec.dims), 4 * mixtures
        self.latent, self.mixtures, self.free_bits, self.beta = latent, mixtures, free_bits, beta
        self.fold = 1 if spec.flat else 2
        if spec.flat:
            outputs = 3 * mixtures * colours
            self.encoder = nn.Sequential(nn.Flatten(), *dense(spec.dims, hidden // 2, 2 * latent, pitch=4.0))
            self.decoder = nn.Sequential(
                *dense(latent, hidden // 2, outputs, pitch=1.0), nn.Unflatten(1, (outputs, 1, 1))
            )
            # The code starts by saying much, with little noise. From the usual start it is never used where the values'
            # own mixtures already fit each of them alone: on a checkerboard the bound stays at the marginals.
            last = cast("nn.Linear", self.encoder[-1])
            with torch.no_grad():
                last.weight[:latent] *= 8
                last.weight[latent:] *= 0.1
                last.bias[latent:] -= 3
            return
        if height % 4 or width % 4:
            raise ValueError(f"a {height}x{width} image: height and width must be multiples of 4")
        low = (2 * channels, height // 4, width // 4)
        self.encoder = nn.Sequential(
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
        self.decoder = nn.Sequential(
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

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of q(z|x), each [B, latent]."""
        mean, log_std = self.encoder(x).to(x.dtype).chunk(2, dim=1)  # x's: exp() of autocast's bf16 is coarse
        return mean, log_std

    def likelihood(self, z: Tensor) -> Tensor:
        """Parameters of p(x|z), for the image folded 2x2 into channels: [B, 3 * mixtures, 4C, H/2, W/2].

        For vectors [B, 3 * mixtures, D, 1, 1].
        """
        return self.decoder(z).contiguous().unflatten(1, (3 * self.mixtures, -1))

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """The negative ELBO, its KL term in closed form (Kingma & Welling, eq. 10).

        ``beta`` weighs the KL (beta-VAE); 1 is the bound. ``free_bits`` is the KL in nats that each code dimension may
        have at no cost (Kingma et al. 2016, arXiv:1606.04934, appendix C.8). On small images the code else stays
        unused: its price comes before its worth.
        """
        mean, log_std = self.posterior(batch.x)
        log_px = self._log_likelihood(batch.x, _draw(mean, log_std, generator)).mean()
        kl = kl_by_dimension(mean, log_std).mean(0)
        bound = (log_px - kl.sum()).detach()
        return {
            "loss": self.beta * kl.clamp(min=self.free_bits).sum() - log_px,
            "kl": kl.detach().sum(),
            "reconstruction": -log_px.detach(),
            "bits_per_dim": -bound / (self.spec.dims * math.log(2)),
        }

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """The ELBO from one draw of the code: [B] nats, below the log-probability in expectation."""
        mean, log_std = self.posterior(batch.x)
        return self._log_likelihood(batch.x, _draw(mean, log_std, generator)) - kl_to_prior(mean, log_std)

    def log_weights(self, batch: Batch, k: int, *, generator: Generator) -> Tensor:
        """[k, B] nats: log p(x, z) - log q(z|x) for ``k`` draws of z (Burda et al. 2015, eq. 8).

        The log of their mean over k is the importance-weighted bound, tighter as k grows.
        """
        mean, log_std = self.posterior(batch.x)
        weights = []
        for _ in range(k):
            z = _draw(mean, log_std, generator)
            log_ratio = _log_normal(z, torch.zeros_like(z), torch.zeros_like(z)) - _log_normal(z, mean, log_std)
            weights.append(self._log_likelihood(batch.x, z) + log_ratio)
        return torch.stack(weights)

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's mean: [B, latent]."""
        return self.posterior(x)[0]

    def decode(self, code: Tensor) -> Tensor:
        """The expected image of p(x|z): [B, C, H, W]."""
        return F.pixel_shuffle(logistic.mean(self.likelihood(code)), self.fold)

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, temperature: float = 0.0) -> Tensor:
        """Images from the prior: [n, C, H, W].

        ``temperature`` 0 shows the expected image of p(x|z), what VAE papers print; 1 draws every pixel from its
        mixture, which is the distribution that ``log_prob`` speaks of: independent noise in each pixel.
        """
        dtype = next(self.parameters()).dtype
        z = torch.randn(n, self.latent, generator=generator, device=generator.device, dtype=dtype)
        if temperature == 0:
            return self.decode(z)
        likelihood = self.likelihood(z)
        x = logistic.sample(likelihood, self.spec.levels, generator=generator, temperature=temperature)
        return F.pixel_shuffle(x, self.fold)

    def _log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        folded = F.pixel_unshuffle(x, self.fold)
        return logistic.log_prob(self.likelihood(z), folded, self.spec.levels).flatten(1).sum(1)


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


def dense(inputs: int, hidden: int, outputs: int, *, pitch: float) -> list[nn.Module]:
    """A perceptron of two hidden layers, the first one of sines."""
    return [Sines(inputs, hidden, pitch), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)]


def kl_to_prior(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, exp(log_std)^2) || N(0, I)) in nats: [B]."""
    return kl_by_dimension(mean, log_std).sum(1)


def kl_by_dimension(mean: Tensor, log_std: Tensor) -> Tensor:
    """The same before it is summed over the code: [B, latent]."""
    return 0.5 * (mean**2 + torch.expm1(2 * log_std) - 2 * log_std)


def _draw(mean: Tensor, log_std: Tensor, generator: Generator) -> Tensor:
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + log_std.exp() * noise


def _log_normal(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    return (-0.5 * ((z - mean) * torch.exp(-log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(1)


Model = VAE
