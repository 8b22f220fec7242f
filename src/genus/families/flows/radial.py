"""Radial flow: Variational Inference with Normalizing Flows (Rezende & Mohamed 2015, https://arxiv.org/abs/1505.05770).

Layers y = z + β (z - c) / (α + |z - c|), each of which pushes space away from one centre or pulls it there (section
4.1). The paper bends a posterior with them, which genus.families.vae.vae does with ``posterior: radial``. Here they are
a model of their own, trained by maximum likelihood: from the data to a standard normal; sampling inverts each layer in
closed form (genus.nn.radial).
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.nn import radial
from genus.nn.dequantisation import LOG_2PI
from genus.nn.standardise import Standardise

SPEED = 30.0  # of a layer's numbers, which have further to go than a network's weights


class RadialFlow(Family):
    """``layers``: how many centres. For vectors [D, 1, 1] of few numbers: a layer is one ball, whatever D is.

    Raises ValueError for other data.
    """

    paper = "Rezende & Mohamed 2015, arXiv:1505.05770"
    density = "dequantised"
    widths = ("layers",)
    kinds = ("vector",)

    def __init__(self, spec: DataSpec, *, layers: int = 32):
        super().__init__(spec)
        if spec.kind not in self.kinds:
            raise ValueError(f"a radial flow is for vectors, not for {spec.kind} data of shape {spec.shape}")
        self.latent = spec.dims
        self.standardise = Standardise(spec)
        self.slow = nn.Parameter(radial.start(layers, spec.dims, reach=0.4) / SPEED)  # [layers, D + 2]

    @torch.no_grad()
    def initialise(self, batch: Batch, *, generator: Generator) -> None:
        self.standardise.initialise(batch.x, generator=generator)

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        loss = -self._log_prob(batch.x, generator).mean()
        return {"loss": loss, "bits_per_dim": loss.detach() / (self.spec.dims * math.log(2))}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """[B] nats of the stored levels, a lower bound in expectation over the noise; exact for continuous data.

        Raises ValueError for the wrong shape, NaN, values outside [-1, 1], and weights that are not invertible.
        """
        self.standardise.check(batch.x)
        radial.check(SPEED * self.slow)
        return self._log_prob(batch.x, generator)

    def _log_prob(self, x: Tensor, generator: Generator) -> Tensor:
        z, log_det = self.flow(x, generator)
        return log_det - 0.5 * (z.square() + LOG_2PI).sum(1)

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """[n, *shape]. ``temperature`` scales the prior's deviation. Raises ValueError as ``decode`` does."""
        noise = torch.randn(n, self.latent, generator=generator, device=self.slow.device, dtype=self.slow.dtype)
        return self.decode(noise * temperature)

    def encode(self, x: Tensor) -> Tensor:
        """[B, D] standard normal code of the middle of each level's cell. Raises ValueError as ``log_prob`` does."""
        self.standardise.check(x)
        radial.check(SPEED * self.slow)
        return self.flow(x, None)[0]

    def decode(self, code: Tensor) -> Tensor:
        """[B, *shape] of a code [B, D]. Raises ValueError for weights that are not invertible."""
        radial.check(SPEED * self.slow)
        with torch.autocast(code.device.type, enabled=False):  # rounded, it would not be what flow() did
            for raw in reversed((SPEED * self.slow).unbind()):
                code = radial.inverse(code, raw)
            return self.standardise.inverse(code)

    def flow(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Examples to standard normal vectors [B, D], and the log-determinant [B]."""
        with torch.autocast(x.device.type, enabled=False):
            z, log_det = self.standardise(x, generator=generator)
            for raw in (SPEED * self.slow).unbind():
                z, change = radial.forward(z, raw)
                log_det = log_det + change
            return z, log_det


Model = RadialFlow
