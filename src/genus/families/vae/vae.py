"""Convolutional variational autoencoder with a discretised likelihood.

Kingma & Welling 2013, "Auto-Encoding Variational Bayes", arXiv:1312.6114; the importance-weighted bound is that of
Burda et al. 2015, arXiv:1509.00519; the likelihood, a mixture of logistics a pixel, that of PixelCNN++; the weight
``beta`` of the KL term that of Higgins et al. 2017, "beta-VAE" (ICLR); the flows that bend the posterior those of
Rezende & Mohamed 2015, arXiv:1505.05770.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.families.vae._networks import kl_by_dimension, networks
from genus.nn import logistic, planar, radial

FLOWS = {"planar": planar, "radial": radial}  # of the posterior


class VAE(Family):
    """p(z) = N(0, I); q(z|x) = N(mean, diag) from one network; p(x|z), from another, a mixture of logistics a pixel.

    ``posterior``: "diagonal" is that normal; "planar" and "radial" bend it by ``flow_layers`` layers of a flow, whose
    parameters the encoder gives as well (Rezende & Mohamed 2015, section 4.2): the decoder stays the same.

    Height and width must be multiples of 4 (ValueError). Vectors [D, 1, 1] get fully connected layers, four times as
    many logistics a value, and a code of at most D numbers. Continuous data is a ValueError.
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
        posterior: str = "diagonal",
        flow_layers: int = 16,
    ):
        super().__init__(spec)
        if posterior not in ("diagonal", *FLOWS):
            raise ValueError(f"posterior must be diagonal, {' or '.join(FLOWS)}, not {posterior}")
        if spec.flat:
            latent, mixtures = min(latent, spec.dims), 4 * mixtures
        self.latent, self.mixtures, self.free_bits, self.beta = latent, mixtures, free_bits, beta
        self.fold = 1 if spec.flat else 2
        self.bend = posterior
        self.encoder, self.decoder = networks(spec, latent, channels, hidden, mixtures)
        self._build_flow(flow_layers)

    def _build_flow(self, layers: int) -> None:
        """The flow's head beside the encoder's last layer, built last: all else starts the same with and without it."""
        if self.bend not in FLOWS:
            return
        width = cast("nn.Linear", self.encoder[-1]).in_features
        start = FLOWS[self.bend].start(layers, self.latent)
        self.flow = nn.Linear(width, start.numel())
        with torch.no_grad():
            self.flow.weight *= 0.1
            self.flow.bias.copy_(start.flatten())
        self.flow_shape = start.shape

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Mean and log standard deviation of a normal, each [B, latent], and the layers that bend it to q(z|x).

        A layer is its parameters as ``genus.nn.planar`` or ``radial`` has them, [B, numbers]; "diagonal" has none.
        """
        seen = self.encoder[:-1](x)
        mean, log_std = self.encoder[-1](seen).to(x.dtype).chunk(2, dim=1)  # exp() of autocast's bf16 is coarse
        layers = self.flow(seen).to(x.dtype).unflatten(1, self.flow_shape).unbind(1) if self.bend in FLOWS else ()
        return mean, log_std, layers

    def likelihood(self, z: Tensor) -> Tensor:
        """Parameters of p(x|z), for the image folded 2x2 into channels: [B, 3 * mixtures, 4C, H/2, W/2].

        For vectors [B, 3 * mixtures, D, 1, 1].
        """
        return self.decoder(z).contiguous().unflatten(1, (3 * self.mixtures, -1))

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """The negative ELBO, its KL term in closed form (Kingma & Welling, eq. 10) where no flow bends the posterior.

        ``beta`` weighs the KL (beta-VAE); 1 is the bound. ``free_bits`` is the KL in nats that each code dimension may
        have at no cost (Kingma et al. 2016, arXiv:1606.04934, appendix C.8); under a flow, which mixes dimensions, the
        code as a whole may have as much. On small images the code else stays unused: its price comes before its worth.
        """
        z, kl = self._code(batch.x, generator)
        log_px, kl = self.log_likelihood(batch.x, z).mean(), kl.mean(0)
        bound = (log_px - kl.sum()).detach()
        return {
            "loss": self.beta * kl.clamp(min=self.free_bits * (self.latent / len(kl))).sum() - log_px,
            "kl": kl.detach().sum(),
            "reconstruction": -log_px.detach(),
            "bits_per_dim": -bound / (self.spec.dims * math.log(2)),
        }

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """The ELBO from one draw of the code: [B] nats, below the log-probability in expectation."""
        z, kl = self._code(batch.x, generator)
        return self.log_likelihood(batch.x, z) - kl.sum(1)

    def rate(self, batch: Batch, *, generator: Generator) -> Tensor:
        """KL(q(z|x) || p(z)), what the code says of each example: [B] nats; under a flow an estimate by one draw."""
        return self._code(batch.x, generator)[1].sum(1)

    def log_weights(self, batch: Batch, k: int, *, generator: Generator) -> Tensor:
        """[k, B] nats: log p(x, z) - log q(z|x) for ``k`` draws of z (Burda et al. 2015, eq. 8).

        The log of their mean over k is the importance-weighted bound, tighter as k grows.
        """
        posterior, weights = self.posterior(batch.x), []
        for _ in range(k):
            z, log_q = self._drawn(*posterior, generator)
            weights.append(self.log_likelihood(batch.x, z) + _log_normal(z) - log_q)
        return torch.stack(weights)

    def infer(self, x: Tensor, *, generator: Generator) -> tuple[Tensor, Tensor]:
        """A draw z from q(z|x), [B, latent], and log q(z|x) of it, [B] nats."""
        return self._drawn(*self.posterior(x), generator)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), [B] nats."""
        folded = F.pixel_unshuffle(x, self.fold)
        return logistic.log_prob(self.likelihood(z), folded, self.spec.levels).flatten(1).sum(1)

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's mean, or to where the flow bends its normal's: [B, latent]."""
        mean, log_std, layers = self.posterior(x)
        return self._bent(torch.zeros_like(mean), mean, log_std, layers)[0] if layers else mean

    def _code(self, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """A draw of the code [B, latent], and the KL of its posterior, a part for each dimension [B, latent].

        Under a flow the KL is one number [B, 1], of this draw but for the normal's entropy: Rezende & Mohamed, eq. 15.
        """
        mean, log_std, layers = self.posterior(x)
        z, log_det = self._bent(_noise(mean, generator), mean, log_std, layers)
        if not layers:
            return z, kl_by_dimension(mean, log_std)
        return z, (0.5 * (z.square() - 1) - log_std).sum(1, keepdim=True) - log_det.unsqueeze(1)

    def _drawn(
        self, mean: Tensor, log_std: Tensor, layers: tuple[Tensor, ...], generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """z from the posterior of those parameters, and the log of its density there."""
        noise = _noise(mean, generator)
        z, log_det = self._bent(noise, mean, log_std, layers)
        return z, _log_normal(noise) - log_std.sum(1) - log_det

    def _bent(self, noise: Tensor, mean: Tensor, log_std: Tensor, layers: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """A code [B, latent] of standard normal noise, and the log-determinant [B] of the flow alone.

        The layers come before mean and deviation, not after them as in the paper: planes and centres that start at the
        scale of the noise are where the posterior is, however narrow.
        """
        log_det = noise.new_zeros(len(noise))
        for layer in layers:
            noise, change = FLOWS[self.bend].forward(noise, layer)
            log_det = log_det + change
        return mean + log_std.exp() * noise, log_det

    def decode(self, code: Tensor) -> Tensor:
        """The expected image of p(x|z): [B, C, H, W]."""
        return F.pixel_shuffle(logistic.mean(self.likelihood(code)), self.fold)

    def show(self, code: Tensor, *, generator: Generator, temperature: float = 0.0) -> Tensor:
        """Images of codes, [B, C, H, W]: at ``temperature`` 0 as decoded, at 1 drawn from p(x|z)."""
        if temperature == 0:
            return self.decode(code)
        x = logistic.sample(self.likelihood(code), self.spec.levels, generator=generator, temperature=temperature)
        return F.pixel_shuffle(x, self.fold)

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, temperature: float = 0.0) -> Tensor:
        """Images from the prior: [n, C, H, W].

        ``temperature`` 0 shows the expected image of p(x|z), what VAE papers print; 1 draws every pixel from its
        mixture, which is the distribution that ``log_prob`` speaks of: independent noise in each pixel.
        """
        dtype = next(self.parameters()).dtype
        code = torch.randn(n, self.latent, generator=generator, device=generator.device, dtype=dtype)
        return self.show(code, generator=generator, temperature=temperature)


def _noise(like: Tensor, generator: Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _log_normal(z: Tensor) -> Tensor:
    """Log-density of standard normal z [B, D]: [B] nats."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)


Model = VAE
