"""Inverse autoregressive flow (Kingma et al. 2016, https://arxiv.org/abs/1606.04934).

Each layer shifts and scales number i of a code by functions of the code's numbers before it (algorithm 1), which a MADE
gives for all of them in one pass; the order is reversed from layer to layer. A sample takes one pass a layer, with its
density; the density of an example takes D, number by number: the reverse of genus.families.flows.maf. The paper bends
a posterior with it, which needs the density of its own samples alone; here it is a model of its own.

Differences from the paper: the scale is exp(b tanh(s / b)), not a gate sigmoid(s) that only shrinks; training is by
maximum likelihood, through the D passes, which suits vectors of few numbers.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.nn.dequantisation import LOG_2PI
from genus.nn.made import MADE
from genus.nn.standardise import Standardise

PITCH = 2.0  # radians of a MADE's sines a unit of about normal data


class IAF(Family):
    """``layers`` of shift and scale; ``hidden``: units of each of the MADEs' two layers. For vectors [D, 1, 1].

    ``bound``: a layer scales by e^-bound … e^bound. Raises ValueError for other data: an image's likelihood would take
    as many passes a layer as it has pixels.
    """

    paper = "Kingma et al. 2016, arXiv:1606.04934"
    density = "dequantised"
    widths = ("hidden",)
    kinds = ("vector",)

    def __init__(self, spec: DataSpec, *, layers: int = 8, hidden: int = 64, bound: float = 0.5):
        super().__init__(spec)
        if spec.kind not in self.kinds:
            raise ValueError(f"IAF is for vectors, not for {spec.kind} data of shape {spec.shape}")
        self.latent = spec.dims
        self.standardise = Standardise(spec)
        self.layers = nn.ModuleList(Affine(spec.dims, hidden, bound) for _ in range(layers))

    @torch.no_grad()
    def initialise(self, batch: Batch, *, generator: Generator) -> None:
        self.standardise.initialise(batch.x, generator=generator)

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        loss = -self._log_prob(batch.x, generator).mean()
        return {"loss": loss, "bits_per_dim": loss.detach() / (self.spec.dims * math.log(2))}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """[B] nats of the stored levels, a lower bound in expectation over the noise; exact for continuous data.

        D passes a layer. Raises ValueError for the wrong shape, NaN, or values outside [-1, 1].
        """
        self.standardise.check(batch.x)
        return self._log_prob(batch.x, generator)

    def _log_prob(self, x: Tensor, generator: Generator) -> Tensor:
        z, log_det = self.flow(x, generator)
        return log_det - 0.5 * (z.square() + LOG_2PI).sum(1)

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """[n, *shape], one pass a layer. ``temperature`` scales the code's deviation."""
        like = self.standardise.centre
        noise = torch.randn(n, self.latent, generator=generator, device=like.device, dtype=like.dtype)
        return self.decode(noise * temperature)

    def encode(self, x: Tensor) -> Tensor:
        """[B, D] standard normal code of the middle of each level's cell. Raises ValueError as ``log_prob`` does."""
        self.standardise.check(x)
        return self.flow(x, None)[0]

    def decode(self, code: Tensor) -> Tensor:
        """[B, *shape] of a code [B, D]."""
        with torch.autocast(code.device.type, enabled=False):  # rounded, it would not be what flow() inverts
            for layer in self.layers:
                code = layer(code)[0].flip(1)
            return self.standardise.inverse(code)

    def flow(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Examples to their codes [B, D], and the log-determinant [B]."""
        with torch.autocast(x.device.type, enabled=False):
            y, log_det = self.standardise(x, generator=generator)
            for layer in reversed(self.layers):
                y, change = cast("Affine", layer).inverse(y.flip(1))
                log_det = log_det - change
            return y, log_det


class Affine(nn.Module):
    """y_i = shift_i + z_i exp(log_scale_i), both of z before i (algorithm 1). One pass forward, D passes back."""

    def __init__(self, dims: int, hidden: int, bound: float):
        super().__init__()
        self.bound = bound
        self.made = MADE(dims, hidden, 2, pitch=PITCH)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, D] and the log-determinant [B] of z to y."""
        shift, log_scale = self._split(self.made(z))
        return z * log_scale.exp() + shift, log_scale.sum(1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, D] and, again, the log-determinant of z to y."""

        def solve(y: Tensor, told: Tensor) -> Tensor:
            shift, log_scale = self._split(told)
            return (y - shift) * (-log_scale).exp()

        z, told = self.made.unroll(y, solve)
        return z, self._split(told)[1].sum(1)

    def _split(self, told: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = told.unbind(-1)
        return shift, self.bound * torch.tanh(raw / self.bound)


Model = IAF
