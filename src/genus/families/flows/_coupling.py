"""What flows of coupling layers have in common, whatever their couplings do: scales, code, likelihood, networks.

RealNVP's multi-scale architecture (Dinh et al. 2016, arXiv:1605.08803, sections 3.4 to 3.6): an image is squeezed (2x2
pixels become channels), goes through layers, loses half of its channels to the code, and is squeezed again. Vectors
[D, 1, 1] are never squeezed and make one scale. Inside, a tensor is [B, H, W, C].
"""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.flows._flow import NormalizingFlow
from genus.nn.dequantisation import LOG_2PI, Dequantise, Gaussianise, Logit


class Layer(nn.Module):
    """An invertible map of [B, H, W, C]."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log |det dy/dx|, [B] or one number."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def initialise(self, x: Tensor) -> Tensor:
        """Sets itself up from a first batch and returns what it makes of it."""
        return self(x)[0]


class Prior(Layer):
    """Where half of the channels leaves: ``inverse(z, kept)`` undoes ``forward(out, kept)``; kept is what goes on."""

    def forward(self, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, y: Tensor, kept: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class CouplingFlow(NormalizingFlow):
    """A flow of scales of layers, which its heir puts into ``scales``; ``priors``: one a scale, or none at all.

    ``onto_reals``: "gaussianise", or "logit" with its ``alpha`` (genus.nn.dequantisation).
    Raises ValueError for what is no image [C, H, W], whose sides can't be halved once a scale, and for a single number.
    """

    widths: ClassVar[tuple[str, ...]] = ("hidden",)

    def __init__(self, spec: DataSpec, scales: int, *, onto_reals: str, alpha: float):
        super().__init__(spec)
        if len(spec.shape) != 3:
            raise ValueError(f"{type(self).__name__} is for images [C, H, W], not for shape {spec.shape}")
        if onto_reals not in ("gaussianise", "logit"):
            raise ValueError(f"onto_reals must be gaussianise or logit, not {onto_reals}")
        if spec.dims < 2:
            raise ValueError("a coupling needs two numbers at least, one to change by the other")
        _, height, width = spec.shape
        if not spec.flat and (height % 2**scales or width % 2**scales):
            raise ValueError(f"{height}x{width} can't be halved {scales} times: give fewer scales")
        self.fold = 1 if spec.flat else 2
        histogram = onto_reals == "gaussianise" and spec.levels > 0
        self.dequantise = Dequantise(spec, Gaussianise(spec.levels) if histogram else Logit(alpha))
        self.scales = nn.ModuleList()
        self.priors = nn.ModuleList()

    def sizes(self, scales: int) -> list[tuple[int, int, int]]:
        """Height, width and channels of each scale's layers."""
        channels, height, width = self.spec.shape
        found = []
        for _ in range(scales):
            channels, height, width = self.fold**2 * channels, height // self.fold, width // self.fold
            found.append((height, width, channels))
            channels -= channels // 2  # half leaves
        return found

    @torch.no_grad()
    def initialise(self, batch: Batch, *, generator: Generator) -> None:
        """Data-dependent initialisation: the layers normalise ``batch``."""
        if isinstance(self.dequantise.onto_reals, Gaussianise):
            levels = self.spec.to_levels(batch.x)
            self.dequantise.onto_reals.fit(blurred(levels, self.spec.levels) if self.spec.flat else levels)
        x = self.dequantise(batch.x, generator=generator)[0].permute(0, 2, 3, 1)
        for index, layers in enumerate(self._layers()):
            x = squeeze(x, self.fold)
            for layer in layers:
                x = layer.initialise(x)
            if index + 1 < len(self.scales):
                x = x.chunk(2, -1)[0]

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """Also raises LinAlgError for weights that give no numbers."""
        return self._finite(super().log_prob(batch, generator=generator), "log-probabilities")

    def check(self, x: Tensor) -> None:
        self.dequantise.check(x)

    def encode(self, x: Tensor) -> Tensor:
        """[B, D] standard normal code of the middle of each level's cell. Raises what ``log_prob`` does."""
        self.check(x)
        latents, _ = self.flow(self.dequantise(x, generator=None)[0])
        return self._finite(torch.cat([z.flatten(1) for z in latents], 1), "codes")

    def decode(self, code: Tensor) -> Tensor:
        """Raises LinAlgError for weights by which the flow can't be inverted."""
        return self.dequantise.inverse(self._finite(self.unflow(code), "samples"))

    def flow(self, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """Reals [B, C, H, W] to standard normal latents, one a scale, and the log-determinant [B]."""
        x, log_det, latents = y.permute(0, 2, 3, 1), y.new_zeros(len(y)), []  # [B, H, W, C]
        last = len(self.scales) - 1
        for index, layers in enumerate(self._layers()):
            x = squeeze(x, self.fold)  # [B, H/2, W/2, 4C]
            for layer in layers:
                x, change = layer(x)
                log_det = log_det + change
            kept, out = x.chunk(2, -1) if index < last else (None, x)
            if self.priors:
                out, change = self.priors[index](out, kept)
                log_det = log_det + change
            latents.append(out)
            x = x if kept is None else kept
        return latents, log_det

    def unflow(self, code: Tensor) -> Tensor:
        """The inverse of ``flow``, from the latents laid end to end, [B, D]."""
        last = len(self.scales) - 1
        shapes = [(h, w, c // 2 if index < last else c) for index, (h, w, c) in enumerate(self.sizes(last + 1))]
        parts = code.split([math.prod(shape) for shape in shapes], 1)
        x: Tensor | None = None
        for index in reversed(range(len(shapes))):
            out = parts[index].view(-1, *shapes[index])
            if self.priors:
                out = cast(Prior, self.priors[index]).inverse(out, x)
            x = out if x is None else torch.cat([x, out], -1)
            for layer in reversed(self._layers()[index]):
                x = layer.inverse(x)
            x = unsqueeze(x, self.fold)
        assert x is not None
        return x.permute(0, 3, 1, 2)

    def _log_prob(self, x: Tensor, generator: Generator) -> Tensor:
        y, log_det = self.dequantise(x, generator=generator)
        latents, flow_log_det = self.flow(y)
        return log_det + flow_log_det - 0.5 * sum(flat(z.square() + LOG_2PI) for z in latents)

    def _layers(self) -> list[list[Layer]]:
        return [cast("list[Layer]", list(scale.children())) for scale in self.scales]

    def _finite(self, values: Tensor, name: str) -> Tensor:
        """The values. Raises LinAlgError, naming the parameter to blame, where some are no numbers."""
        if not values.isfinite().all():
            bad = (name for name, parameter in self.named_parameters() if not parameter.isfinite().all())
            why = next((f"parameter {name} holds NaN or infinity" for name in bad), "a scale is out of a float's range")
            raise torch.linalg.LinAlgError(f"the flow's {name} are not finite: {why}")
        return values


class Coupling(Layer):
    """Half of the channels stays and tells, through ``network``, how the other half is bent, each number for itself.

    ``flip``: the first half is bent, not the second.
    """

    def __init__(self, network: nn.Module, *, flip: bool = False):
        super().__init__()
        self.network, self.flip = network, flip

    def bend(self, x: Tensor, parameters: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """[..., C] by its parameters [..., P]: y and the log of each slope dy/dx (of the inverse: dx/dy), [..., C]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = self._halves(x)
        changed, log_slope = self.bend(changed, self.network(kept))
        return self._whole(kept, changed), flat(log_slope)

    def inverse(self, y: Tensor) -> Tensor:
        kept, changed = self._halves(y)
        return self._whole(kept, self.bend(changed, self.network(kept), inverse=True)[0])

    def initialise(self, x: Tensor) -> Tensor:
        return x  # an untrained coupling is the identity

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, -1)
        return (second, first) if self.flip else (first, second)

    def _whole(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.cat([changed, kept] if self.flip else [kept, changed], -1)


class Affine(Coupling):
    """Affine coupling (Dinh et al. 2016, equations 7 and 8): the other half tells shift and scale of every number."""

    def __init__(self, network: nn.Module, bound: float, *, flip: bool = False):
        super().__init__(network, flip=flip)
        self.bound = bound

    def bend(self, x: Tensor, parameters: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        raw, shift = parameters.chunk(2, -1)
        log_scale = self.bound * torch.tanh(raw / self.bound)
        if inverse:
            return (x - shift) * (-log_scale).exp(), -log_scale
        return torch.addcmul(shift, x, log_scale.exp()), log_scale


class Mixing(Layer):
    """Actnorm and the invertible 1x1 convolution of Glow (Kingma & Dhariwal 2018, sections 3.1 and 3.2), one product.

    y = W s (x + b), W = P L (U + diag(sign exp(log_diagonal))), which begins as the given matrix [C, C] (eq. 10).
    """

    permutation: Tensor
    sign: Tensor
    eye: Tensor

    def __init__(self, start: Tensor):
        super().__init__()
        permutation, lower, upper = torch.linalg.lu(start)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())
        self.register_buffer("eye", torch.eye(len(start)), persistent=False)
        self.bias = nn.Parameter(torch.zeros(len(start)))
        self.log_scale = nn.Parameter(torch.zeros(len(start)))
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())

    def matrix(self) -> Tensor:
        """[C, C]: W diag(s)."""
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        return self.permutation @ (self.lower.tril(-1) + self.eye) @ upper * self.log_scale.exp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # rounded, it would not be what inverse() inverts
            matrix = self.matrix()
            y = torch.addmm(matrix @ self.bias, x.reshape(-1, x.shape[-1]), matrix.t()).view_as(x)
        return y, (self.log_scale.sum() + self.log_diagonal.sum()) * (x.shape[1] * x.shape[2])

    def inverse(self, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            exact = torch.linalg.inv(self.matrix().double()).to(y.dtype)
            return y @ exact.t() - self.bias

    def initialise(self, x: Tensor) -> Tensor:
        self.bias.copy_(-x.mean((0, 1, 2)))
        self.log_scale.copy_(-x.std((0, 1, 2)).clamp(min=1e-3).log())
        return self(x)[0]


class Base(Prior):
    """What the last scale leaves is normal, with a mean and scale a place."""

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(height, width, channels))
        self.log_scale = nn.Parameter(torch.zeros(height, width, channels))

    def forward(self, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (x - self.mean) * (-self.log_scale).exp(), -self.log_scale.sum()

    def inverse(self, y: Tensor, kept: Tensor | None = None) -> Tensor:
        return self.mean + self.log_scale.exp() * y


class Conditional(Prior):
    """What another scale leaves is normal, with a mean and scale that a convolution of what stays tells."""

    def __init__(self, kept: int, out: int):
        super().__init__()
        self.network = nn.Conv2d(kept, 2 * out, 3, padding=1)
        zero(self.network)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_scale = self._of(kept)
        return (x - mean) * (-log_scale).exp(), -flat(log_scale)

    def inverse(self, y: Tensor, kept: Tensor | None = None) -> Tensor:
        mean, log_scale = self._of(kept)
        return mean + log_scale.exp() * y

    def _of(self, kept: Tensor | None) -> tuple[Tensor, ...]:
        assert kept is not None
        return self.network(kept.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).to(kept.dtype).chunk(2, -1)


class Convolutions(nn.Module):
    """[B, H, W, inputs] to [B, H, W, outputs] by Glow's three layers (its section B): 3x3, 1x1, 3x3, the last of zeros.

    Every place has a bias: convolutions alone don't know where in a centred picture they are. With ``whole`` the
    network also sees its input all at once, which few small convolutions don't. The first layers start as PyTorch
    draws them: scaled to unit variance by a first batch they make the first steps of a training wild.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, size: tuple[int, int], *, whole: bool):
        super().__init__()
        self.first = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.middle = nn.Conv2d(hidden, hidden, 1)
        self.place = nn.Parameter(torch.zeros(hidden, *size))
        pixels = inputs * math.prod(size)
        self.context = (
            nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, hidden))
            if whole
            else None
        )
        self.last = nn.Conv2d(hidden, outputs, 3, padding=1)
        zero(self.last)

    def forward(self, kept: Tensor) -> Tensor:
        x = kept.permute(0, 3, 1, 2)  # which is what channels_last keeps in memory: no copy
        h = self.first(x) + self.place
        if self.context is not None:
            h = h + self.context(x)[:, :, None, None]
        h = F.relu(self.middle(F.relu(h, inplace=True)), inplace=True)
        return self.last(h).permute(0, 2, 3, 1).to(kept.dtype)


class Dense(nn.Module):
    """[..., inputs] to [..., outputs] for vectors, the last layer of zeros.

    The first layer is a sine of many frequencies (Sitzmann et al. 2020, arXiv:2006.09661), ``pace`` radians a unit of
    about normal data: what a coupling must do to a few numbers turns quickly with the others. ``plateaus``: layers that
    make level ground of it, where it does not turn; ``he``: these start as He et al. 2015 (arXiv:1502.01852, eq. 10)
    have it, with six times PyTorch's variance.
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int, *, pace: float = 2.0, plateaus: int = 1, he: bool = False
    ):
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        nn.init.normal_(self.first.weight, std=pace / math.sqrt(inputs))
        nn.init.uniform_(self.first.bias, -math.pi, math.pi)
        layers = [layer for _ in range(plateaus) for layer in (nn.Linear(hidden, hidden), nn.ReLU())]
        for layer in layers if he else ():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.middle = nn.Sequential(*layers)
        self.last = nn.Linear(hidden, outputs)
        zero(self.last)

    def forward(self, kept: Tensor) -> Tensor:
        return self.last(self.middle(self.first(kept).sin())).to(kept.dtype)


def blurred(levels: Tensor, count: int) -> Tensor:
    """Levels 0 … count - 1 with their neighbours, as far as a 24th of the range; what would lie outside is mirrored.

    A batch of vectors has few numbers, and the noise of their histogram would be one more thing for a flow to undo.
    """
    reach = count // 24
    spread = torch.stack([levels + distance for distance in range(-reach, reach + 1)])
    return torch.where(spread < 0, -1 - spread, torch.where(spread >= count, 2 * count - 1 - spread, spread))


def squeeze(x: Tensor, f: int = 2) -> Tensor:
    """[B, H, W, C] to [B, H/f, W/f, f²C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // f, f, w // f, f, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h // f, w // f, f * f * c)


def unsqueeze(x: Tensor, f: int = 2) -> Tensor:
    """[B, H, W, f²C] to [B, fH, fW, C]."""
    b, h, w, c = x.shape
    c //= f * f
    return x.reshape(b, h, w, f, f, c).permute(0, 1, 3, 2, 4, 5).reshape(b, f * h, f * w, c)


def zero(layer: nn.Module) -> None:
    """Sets all parameters to 0, so that an untrained coupling is the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def flat(x: Tensor) -> Tensor:
    """The sum over everything but the batch: [B]."""
    return x.flatten(1).sum(1)
