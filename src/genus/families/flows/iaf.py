"""Inverse autoregressive flow (Kingma et al. 2016, https://arxiv.org/abs/1606.04934).

Each layer shifts and scales number i of a code by functions of the code's numbers before it (algorithm 1), which a MADE
gives for all of them in one pass; the order is reversed from layer to layer. A sample takes one pass a layer, with its
density; the density of an example takes D, number by number: the reverse of genus.families.flows.maf. The paper bends
a posterior with it, which needs the density of its own samples alone; here it is a model of its own.

Differences from the paper: the scale is exp(b tanh(s / b)), not a gate sigmoid(s) that only shrinks; training is by
maximum likelihood, through the D passes, which suits vectors of few numbers.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from genus.data.spec import DataSpec
from genus.families.flows._flow import ShiftAndScale, VectorFlow

PITCH = 2.0  # radians of a MADE's sines a unit of about normal data


class IAF(VectorFlow):
    """``layers`` of shift and scale; ``hidden``: units of each of the MADEs' two layers. For vectors [D, 1, 1].

    ``bound``: a layer scales by e^-bound … e^bound. Raises ValueError for other data: an image's likelihood would take
    as many passes a layer as it has pixels.
    """

    paper = "Kingma et al. 2016, arXiv:1606.04934"
    widths = ("hidden",)
    kinds = ("vector",)

    def __init__(self, spec: DataSpec, *, layers: int = 8, hidden: int = 64, bound: float = 0.5):
        super().__init__(spec)
        self.layers = nn.ModuleList(Affine(spec.dims, hidden, bound, PITCH) for _ in range(layers))

    def normalise(self, y: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """D passes a layer."""
        for layer in reversed(self.layers):
            y, change = cast("Affine", layer).inverse(y.flip(1))
            log_det = log_det - change
        return y, log_det

    def generate(self, code: Tensor) -> Tensor:
        """One pass a layer."""
        for layer in self.layers:
            code = layer(code)[0].flip(1)
        return code


class Affine(ShiftAndScale):
    """y_i = shift_i + z_i exp(log_scale_i), both of z before i (algorithm 1). One pass forward, D passes back."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, D] and the log-determinant [B] of z to y."""
        shift, log_scale = self.split(self.made(z))
        return z * log_scale.exp() + shift, log_scale.sum(1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, D] and, again, the log-determinant of z to y."""

        def solve(y: Tensor, told: Tensor) -> Tensor:
            shift, log_scale = self.split(told)
            return (y - shift) * (-log_scale).exp()

        z, told = self.made.unroll(y, solve)
        return z, self.split(told)[1].sum(1)


Model = IAF
