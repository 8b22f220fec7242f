"""Examples as vectors of reals about standard normal, and back: what flows of vectors do before their first layer."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from genus.data.spec import DataSpec
from genus.nn.dequantisation import Dequantise, Gaussianise


class Standardise(nn.Module):
    """Dequantises, and shifts and scales every number by what a first batch showed; both are learned from there on.

    Levels go onto the reals by Gaussianise: for images by the histogram of a first batch; for vectors, of which a batch
    shows too little, as if all levels were equally probable. Continuous data are only shifted and scaled.
    """

    def __init__(self, spec: DataSpec):
        super().__init__()
        self.spec = spec
        self.dequantise = Dequantise(spec, Gaussianise(max(spec.levels, 1)))
        self.centre = nn.Parameter(torch.zeros(spec.dims))
        self.log_width = nn.Parameter(torch.zeros(spec.dims))

    def forward(self, x: Tensor, *, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """[B, *shape] in the units of DataSpec to [B, D], and the log-determinant [B] in nats, all of Dequantise's."""
        y, log_det = self.dequantise(x, generator=generator)
        return (y.flatten(1) - self.centre) * (-self.log_width).exp(), log_det - self.log_width.sum()

    def inverse(self, y: Tensor) -> Tensor:
        """[B, D] to [B, *shape] in the units of DataSpec."""
        return self.dequantise.inverse((y * self.log_width.exp() + self.centre).unflatten(1, self.spec.shape))

    def check(self, x: Tensor) -> None:
        """Raises ValueError for the wrong shape, NaN, or levels outside [-1, 1]."""
        self.dequantise.check(x)

    @torch.no_grad()
    def initialise(self, x: Tensor, *, generator: Generator) -> None:
        """So that what ``forward`` makes of ``x`` has mean 0 and variance 1 in every place."""
        onto_reals = self.dequantise.onto_reals
        if self.spec.levels and not self.spec.flat and isinstance(onto_reals, Gaussianise):
            onto_reals.fit(self.spec.to_levels(x))
        y = self.dequantise(x, generator=generator)[0].flatten(1)
        self.centre.copy_(y.mean(0))
        self.log_width.copy_(y.std(0).clamp(min=1e-3).log())
