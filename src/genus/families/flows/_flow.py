"""What flows have in common, whatever their layers: likelihood, sampling, and vectors' way onto the reals and back."""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import torch
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.nn.dequantisation import LOG_2PI
from genus.nn.made import MADE
from genus.nn.standardise import Standardise


class NormalizingFlow(Family):
    """A density of dequantised data by the change of variables, and samples by decoding a standard normal code.

    Heirs say what ``check`` refuses, how an example's log-density is found, and how a code is decoded.
    Raises ValueError for a kind of data that the family does not take.
    """

    density = "dequantised"

    def __init__(self, spec: DataSpec):
        super().__init__(spec)
        if spec.kind not in self.kinds:
            takes = " and ".join(f"{kind}s" for kind in self.kinds)
            raise ValueError(f"{type(self).__name__} is for {takes}, not for {spec.kind} data of shape {spec.shape}")
        self.latent = spec.dims

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        loss = -self._log_prob(batch.x, generator).mean()
        return {"loss": loss, "bits_per_dim": loss.detach() / (self.spec.dims * math.log(2))}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """[B] nats of the stored levels, a lower bound in expectation over the noise; of continuous data, the density.

        Raises what ``check`` does.
        """
        self.check(batch.x)
        return self._log_prob(batch.x, generator)

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """[n, *shape]. ``temperature`` scales the deviation of the code: 0.7 is tidier, less varied.

        Raises what ``decode`` does.
        """
        like = next(self.parameters())
        code = torch.randn(n, self.latent, generator=generator, device=like.device, dtype=like.dtype)
        return self.decode(code * temperature)

    def check(self, x: Tensor) -> None:
        """Raises ValueError for the wrong shape, NaN, or values outside [-1, 1]."""
        raise NotImplementedError

    def decode(self, code: Tensor) -> Tensor:
        """[B, *shape] of a code [B, D]."""
        raise NotImplementedError

    def _log_prob(self, x: Tensor, generator: Generator) -> Tensor:
        raise NotImplementedError


class VectorFlow(NormalizingFlow):
    """A flow of examples as vectors [B, D] about standard normal, which ``normalise`` makes more so."""

    def __init__(self, spec: DataSpec):
        super().__init__(spec)
        self.standardise = Standardise(spec)

    def normalise(self, y: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [B, D] to their codes, and the log-determinant [B] with its own added."""
        raise NotImplementedError

    def generate(self, code: Tensor) -> Tensor:
        """The inverse of ``normalise``: [B, D]."""
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self, batch: Batch, *, generator: Generator) -> None:
        self.standardise.initialise(batch.x, generator=generator)

    def check(self, x: Tensor) -> None:
        self.standardise.check(x)

    def encode(self, x: Tensor) -> Tensor:
        """[B, D] standard normal code of the middle of each level's cell. Raises what ``check`` does."""
        self.check(x)
        return self.flow(x, None)[0]

    def decode(self, code: Tensor) -> Tensor:
        with torch.autocast(code.device.type, enabled=False):  # rounded, it would not be what flow() did
            return self.standardise.inverse(self.generate(code))

    def flow(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Examples to their codes [B, D], and the log-determinant [B]."""
        with torch.autocast(x.device.type, enabled=False):
            return self.normalise(*self.standardise(x, generator=generator))

    def _log_prob(self, x: Tensor, generator: Generator) -> Tensor:
        z, log_det = self.flow(x, generator)
        return log_det - 0.5 * (z.square() + LOG_2PI).sum(1)


class Bend(Protocol):
    """One layer of few numbers, ``raw``, as genus.nn.planar and genus.nn.radial are."""

    def forward(self, z: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, y: Tensor, raw: Tensor) -> Tensor: ...

    def check(self, raw: Tensor) -> None: ...


class BendingFlow(VectorFlow):
    """Layers each of which bends space in one place: ``bend``, with the numbers ``start`` [layers, N] to begin from.

    ``speed``: of a layer's numbers, which have further to go than a network's weights.
    """

    bend: ClassVar[Bend]
    speed: ClassVar[float]
    widths: ClassVar[tuple[str, ...]] = ("layers",)
    kinds: ClassVar[tuple[str, ...]] = ("vector",)

    def __init__(self, spec: DataSpec, start: Tensor):
        super().__init__(spec)
        self.slow = nn.Parameter(start / self.speed)

    def check(self, x: Tensor) -> None:
        """Also for weights that are not invertible."""
        super().check(x)
        self.bend.check(self.speed * self.slow)

    def normalise(self, y: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        for raw in (self.speed * self.slow).unbind():
            y, change = self.bend.forward(y, raw)
            log_det = log_det + change
        return y, log_det

    def generate(self, code: Tensor) -> Tensor:
        """Raises ValueError for weights that are not invertible."""
        self.bend.check(self.speed * self.slow)
        for raw in reversed((self.speed * self.slow).unbind()):
            code = self.bend.inverse(code, raw)
        return code


class ShiftAndScale(nn.Module):
    """A shift and a scale within e^-bound … e^bound of number i, functions of the numbers before it, by a MADE."""

    def __init__(self, dims: int, hidden: int, bound: float, pitch: float):
        super().__init__()
        self.bound = bound
        self.made = MADE(dims, hidden, 2, pitch=pitch)

    def split(self, told: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log-scale of what the MADE tells, [..., 2]."""
        shift, raw = told.unbind(-1)
        return shift, self.bound * torch.tanh(raw / self.bound)
