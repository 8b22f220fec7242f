"""beta-VAE: a code whose numbers each mean something, for less of the image.

Higgins et al. 2017, "beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework" (ICLR,
https://openreview.net/forum?id=Sy2fzU9gl): the VAE's bound with its KL term weighed by beta > 1 (eq. 4). A code is then
kept only where it is worth its price, and one number a factor is what costs least (Burgess et al. 2018,
arXiv:1804.03599). The networks and the likelihood are those of ``vae.py``, so that beta is what is compared.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.families.vae._networks import kl_by_dimension, networks
from genus.nn import logistic


class BetaVAE(Family):
    """p(z) = N(0, I), q(z|x) = N(mean, diag), p(x|z) a mixture of logistics a pixel; learns with ``beta`` times the KL.

    ``beta``: 4 as in the paper; how dear that is depends on how many nats the likelihood has to offer, and so on the
    data: 8-bit pixels have more than the paper's binary ones. ``log_prob`` is the bound, at beta = 1.
    Height and width must be multiples of 4 (ValueError). Vectors [D, 1, 1] have a code of at most D numbers, and four
    times as many logistics. Continuous data is a ValueError.
    """

    paper = "Higgins et al. 2017, beta-VAE, ICLR"
    density = "elbo"
    widths = ("channels", "hidden")

    def __init__(
        self,
        spec: DataSpec,
        *,
        beta: float = 4.0,
        latent: int = 10,
        channels: int = 24,
        hidden: int = 320,
        mixtures: int = 3,
    ):
        super().__init__(spec)
        if not beta > 0:
            raise ValueError(f"beta must be above 0, not {beta}")
        if spec.flat:
            latent, mixtures = min(latent, spec.dims), 4 * mixtures
        self.beta, self.latent, self.mixtures = beta, latent, mixtures
        self.fold = 1 if spec.flat else 2
        self.encoder, self.decoder = networks(spec, latent, channels, hidden, mixtures)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of q(z|x), each [B, latent]."""
        mean, log_std = self.encoder(x).to(x.dtype).chunk(2, dim=1)  # exp() of autocast's bf16 is coarse
        return mean, log_std

    def likelihood(self, z: Tensor) -> Tensor:
        """Parameters of p(x|z), for the image folded 2x2 into channels: [B, 3 * mixtures, 4C, H/2, W/2]."""
        return self.decoder(z).contiguous().unflatten(1, (3 * self.mixtures, -1))

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """Eq. 4, negated: beta times the rate (KL) plus the distortion (-log p(x|z)), by one draw of the code."""
        log_px, kl = self._parts(batch.x, generator)
        rate, distortion = kl.mean(), -log_px.mean()
        return {
            "loss": self.beta * rate + distortion,
            "kl": rate.detach(),
            "reconstruction": distortion.detach(),
            "bits_per_dim": (rate + distortion).detach() / (self.spec.dims * math.log(2)),
        }

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """The ELBO from one draw of the code: [B] nats, below the log-probability in expectation, whatever beta is."""
        log_px, kl = self._parts(batch.x, generator)
        return log_px - kl

    def rate(self, batch: Batch, *, generator: Generator) -> Tensor:
        """KL(q(z|x) || p(z)), what the code says of each example: [B] nats. Draws nothing."""
        return kl_by_dimension(*self.posterior(batch.x)).sum(1)

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's mean: [B, latent]."""
        return self.posterior(x)[0]

    def decode(self, code: Tensor) -> Tensor:
        """The expected image of p(x|z): [B, C, H, W]."""
        return F.pixel_shuffle(logistic.mean(self.likelihood(code)), self.fold)

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, temperature: float = 0.0) -> Tensor:
        """Images from the prior: [n, C, H, W].

        ``temperature`` 0 shows the expected image of p(x|z); 1 draws every pixel from its mixture, which is the
        distribution that ``log_prob`` speaks of.
        """
        dtype = next(self.parameters()).dtype
        z = torch.randn(n, self.latent, generator=generator, device=generator.device, dtype=dtype)
        if temperature == 0:
            return self.decode(z)
        x = logistic.sample(self.likelihood(z), self.spec.levels, generator=generator, temperature=temperature)
        return F.pixel_shuffle(x, self.fold)

    def _parts(self, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """log p(x|z) for one draw of z from q(z|x), and KL(q(z|x) || p(z)), each [B] nats."""
        mean, log_std = self.posterior(x)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        likelihood = self.likelihood(mean + log_std.exp() * noise)
        log_px = logistic.log_prob(likelihood, F.pixel_unshuffle(x, self.fold), self.spec.levels).flatten(1).sum(1)
        return log_px, kl_by_dimension(mean, log_std).sum(1)


Model = BetaVAE
