"""Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal 2018, https://arxiv.org/abs/1807.03039).

An image is squeezed (2x2 pixels become channels), goes through steps of flow (figure 2a: actnorm, invertible 1x1
convolution, affine coupling), loses half of its channels to a prior that sees the other half, and is squeezed again
(figure 2b). All of it is inverted exactly for sampling.

Differences from the paper, each measured or for the sake of exactness:
- the scale of a coupling is bounded on both sides, exp(b tanh(s / b)), not sigmoid(s + 2), whose inverse is unbounded;
- the last prior has a mean and scale a position (the paper: a convolution of zeros, the same but for the border);
- pixels are Gaussianised by their histogram before the first layer (see genus.nn.dequantisation);
- the networks know their place in the image, and on the last scale they see it whole: shapes come much sooner;
- the networks' hidden layers are not actnormed, but initialised so that the first batch is (Salimans & Kingma 2016).

Inside, a tensor is [B, H, W, C]: the 1x1 convolution is one matrix product with actnorm folded into it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.nn.dequantisation import LOG_2PI, Dequantise, Gaussianise, Logit


class Glow(Family):
    """``steps`` and ``hidden``: steps of flow and width of the coupling networks, one number a scale.

    Vectors [D, 1, 1] are never squeezed: all steps make one scale, the couplings' networks are dense and see sines.
    ``bound``: a coupling scales by e^-bound … e^bound; for vectors a quarter of it, since all steps act on the same few
    numbers: the product of their scales must not run away.
    ``onto_reals``: "gaussianise", or "logit" with its ``alpha``.
    Raises ValueError for an image whose sides can't be halved once a scale.
    """

    paper = "Kingma & Dhariwal 2018, arXiv:1807.03039"
    density = "dequantised"
    widths = ("hidden",)

    def __init__(
        self,
        spec: DataSpec,
        *,
        steps: Sequence[int] = (4, 8),
        hidden: Sequence[int] = (32, 64),
        bound: float = 2.0,
        onto_reals: str = "gaussianise",
        alpha: float = 1e-6,
    ):
        super().__init__(spec)
        if len(spec.shape) != 3:
            raise ValueError(f"Glow is for images [C, H, W], not for shape {spec.shape}")
        if not steps or len(steps) != len(hidden):
            raise ValueError(f"steps and hidden need one number a scale each, not {list(steps)} and {list(hidden)}")
        if onto_reals not in ("gaussianise", "logit"):
            raise ValueError(f"onto_reals must be gaussianise or logit, not {onto_reals}")
        channels, height, width = spec.shape
        self.fold = 1 if spec.flat else 2
        self.latent = spec.dims
        if spec.flat:
            steps, hidden = [sum(steps)], [max(hidden)]
        if height % self.fold ** len(steps) or width % self.fold ** len(steps):
            raise ValueError(f"{height}x{width} can't be halved {len(steps)} times: give steps and hidden fewer scales")
        histogram = onto_reals == "gaussianise" and spec.levels > 0
        self.dequantise = Dequantise(spec, Gaussianise(spec.levels) if histogram else Logit(alpha))
        self.scales = nn.ModuleList()
        self.priors = nn.ModuleList()  # of what leaves after each scale but the last
        for count, wide in zip(steps, hidden, strict=True):
            channels, height, width = self.fold**2 * channels, height // self.fold, width // self.fold
            if spec.flat:
                self.scales.append(nn.ModuleList([DenseSteps(count, channels, wide, bound / 4)]))
                continue
            self.scales.append(
                nn.ModuleList(
                    Step(channels, wide, bound, (height, width), last=len(self.scales) == len(steps) - 1)
                    for _ in range(count)
                )
            )
            if len(self.scales) < len(steps):
                channels //= 2
                self.priors.append(zeroed(nn.Conv2d(channels, 2 * channels, 3, padding=1)))
        self.top = nn.Parameter(torch.zeros(height, width, 2 * channels))  # mean and log-scale
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def initialise(self, batch: Batch, *, generator: Generator) -> None:
        """Data-dependent initialisation (section 3.1): actnorms normalise ``batch``."""
        if isinstance(self.dequantise.onto_reals, Gaussianise):
            levels = self.spec.to_levels(batch.x)
            self.dequantise.onto_reals.fit(blurred(levels, self.spec.levels) if self.spec.flat else levels)
        x = self.dequantise(batch.x, generator=generator)[0].permute(0, 2, 3, 1)
        for index, steps in enumerate(self._steps()):
            x = squeeze(x, self.fold)
            for step in steps:
                x = step.initialise(x)
            if index < len(self.priors):
                x = x.chunk(2, -1)[0]

    def _steps(self) -> list[list[Step | DenseSteps]]:
        return [cast("list[Step | DenseSteps]", list(scale.children())) for scale in self.scales]

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        loss = -self._log_prob(batch.x, generator).mean()
        return {"loss": loss, "bits_per_dim": loss.detach() / (self.spec.dims * math.log(2))}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """[B] nats of the stored levels, a lower bound in expectation over the noise.

        Raises ValueError for the wrong shape, NaN, or values outside [-1, 1].
        """
        self.dequantise.check(batch.x)
        return self._log_prob(batch.x, generator)

    def _log_prob(self, x: Tensor, generator: Generator) -> Tensor:
        y, log_det = self.dequantise(x, generator=generator)
        latents, flow_log_det = self.flow(y)
        return log_det + flow_log_det - 0.5 * sum(flat(z.square() + LOG_2PI) for z in latents)

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """[n, *shape]. ``temperature`` scales the priors' deviation (section 6): 0.7 is tidier, less varied."""
        noise = torch.randn(n, self.spec.dims, generator=generator, device=self.top.device, dtype=self.top.dtype)
        return self.decode(noise * temperature)

    def encode(self, x: Tensor) -> Tensor:
        """[B, D] standard normal code of the middle of each level's cell. Raises ValueError as ``log_prob`` does."""
        self.dequantise.check(x)
        latents, _ = self.flow(self.dequantise(x, generator=None)[0])
        return torch.cat([z.flatten(1) for z in latents], 1)

    def decode(self, code: Tensor) -> Tensor:
        """[B, *shape] of a code [B, D]."""
        return self.dequantise.inverse(self.unflow(code))

    def flow(self, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """Reals [B, C, H, W] to standard normal latents, one a scale, and the log-determinant [B]."""
        x, log_det, latents = y.permute(0, 2, 3, 1), y.new_zeros(len(y)), []  # [B, H, W, C]
        for index, steps in enumerate(self._steps()):
            x = squeeze(x, self.fold)  # [B, H/2, W/2, 4C]
            for step in steps:
                x, change = step(x)
                log_det = log_det + change
            if index < len(self.priors):
                x, out = x.chunk(2, -1)
                mean, log_scale = apply(self.priors[index], x).chunk(2, -1)
            else:
                out, (mean, log_scale) = x, self.top.chunk(2, -1)
            latents.append((out - mean) * (-log_scale).exp())
            log_det = log_det - flat(log_scale.expand_as(out))
        return latents, log_det

    def unflow(self, code: Tensor) -> Tensor:
        """The inverse of ``flow``, from the latents laid end to end, [B, D]."""
        channels, height, width = self.spec.shape
        shapes = []
        for index in range(len(self.scales)):
            channels, height, width = self.fold**2 * channels, height // self.fold, width // self.fold
            channels = channels // 2 if index < len(self.priors) else channels
            shapes.append((height, width, channels))
        parts = code.split([math.prod(shape) for shape in shapes], 1)
        latents = [part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        mean, log_scale = self.top.chunk(2, -1)
        x = mean + log_scale.exp() * latents[-1]
        for index in reversed(range(len(self.scales))):
            if index < len(self.priors):
                mean, log_scale = apply(self.priors[index], x).chunk(2, -1)
                x = torch.cat([x, mean + log_scale.exp() * latents[index]], -1)
            for step in reversed(self._steps()[index]):
                x = step.inverse(x)
            x = unsqueeze(x, self.fold)
        return x.permute(0, 3, 1, 2)


class Step(nn.Module):
    """Figure 2a: actnorm, invertible 1x1 convolution, affine coupling."""

    def __init__(self, channels: int, hidden: int, bound: float, size: tuple[int, int], *, last: bool):
        super().__init__()
        self.mixing = Mixing(channels)
        self.coupling = Coupling(channels, hidden, bound, size, whole=last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, mixed = self.mixing(x)
        x, coupled = self.coupling(x)
        return x, mixed + coupled

    def inverse(self, y: Tensor) -> Tensor:
        return self.mixing.inverse(self.coupling.inverse(y))

    def initialise(self, x: Tensor) -> Tensor:
        self.mixing.initialise(x)
        x, _ = self.mixing(x)
        self.coupling.initialise(x)
        return x  # an untrained coupling is the identity


class Mixing(nn.Module):
    """Actnorm (section 3.1) and the LU-parameterised 1x1 convolution (section 3.2, eq. 10) as one matrix product.

    y = W s (x + b), W = P L (U + diag(sign exp(log_diagonal))), started at a random rotation.
    """

    permutation: Tensor
    sign: Tensor
    eye: Tensor

    def __init__(self, channels: int):
        super().__init__()
        rotation, _ = torch.linalg.qr(torch.randn(channels, channels))
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())
        self.register_buffer("eye", torch.eye(channels), persistent=False)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
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
            return y @ torch.linalg.inv(self.matrix()).t() - self.bias

    def initialise(self, x: Tensor) -> None:
        self.bias.copy_(-x.mean((0, 1, 2)))
        self.log_scale.copy_(-x.std((0, 1, 2)).clamp(min=1e-3).log())


class Coupling(nn.Module):
    """Affine coupling (section 3.3): half of the channels scale and shift the other half.

    ``size``: height and width, for a bias a place: convolutions alone don't know where in a centred picture they are.
    ``whole``: the network also sees its half all at once, which few small convolutions don't.
    """

    def __init__(self, channels: int, hidden: int, bound: float, size: tuple[int, int], *, whole: bool = False):
        super().__init__()
        self.bound = bound
        half = channels // 2
        kept, changed = channels - half, half  # as chunk() halves an odd number
        kernel = 3 if math.prod(size) > 1 else 1
        # The middle convolution is 1x1, as in the paper: most weights, fewest places.
        self.first = nn.Conv2d(kept, hidden, kernel, padding=kernel // 2)
        self.middle = nn.Conv2d(hidden, hidden, 1)
        self.place = nn.Parameter(torch.zeros(hidden, *size))
        inputs = kept * math.prod(size)
        self.context = (
            nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, hidden))
            if whole and kernel > 1
            else None
        )
        self.last = zeroed(nn.Conv2d(hidden, 2 * changed, kernel, padding=kernel // 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = x.chunk(2, -1)
        log_scale, shift = self.log_scale_and_shift(kept)
        return torch.cat([kept, torch.addcmul(shift, changed, log_scale.exp())], -1), flat(log_scale)

    def inverse(self, y: Tensor) -> Tensor:
        kept, changed = y.chunk(2, -1)
        log_scale, shift = self.log_scale_and_shift(kept)
        return torch.cat([kept, (changed - shift) * (-log_scale).exp()], -1)

    def log_scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        x = kept.permute(0, 3, 1, 2)
        h = self.first(x) + self.place
        if self.context is not None:
            h = h + self.context(x)[:, :, None, None]
        h = F.relu(h, inplace=True)
        raw, shift = (
            apply(self.last, F.relu(self.middle(h), inplace=True).permute(0, 2, 3, 1)).to(kept.dtype).chunk(2, -1)
        )
        return self.bound * torch.tanh(raw / self.bound), shift

    def initialise(self, x: Tensor) -> None:
        """Scales the hidden layers' weights so that what they give for x has mean 0 and variance 1 a channel."""
        h = x.chunk(2, -1)[0].permute(0, 3, 1, 2)
        for layer in (self.first, self.middle):
            h = layer(h)
            mean, deviation = h.mean((0, 2, 3)), h.std((0, 2, 3)) + 1e-3
            layer.weight.div_(deviation.view(-1, 1, 1, 1))
            if layer.bias is not None:
                layer.bias.sub_(mean).div_(deviation)
            h = ((h - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1)).relu()


class DenseSteps(nn.Module):
    """All steps of flow for vectors [B, 1, 1, C]: those of ``Step``, their parameters stacked [K, …], since for few
    numbers most of the time goes into calling small operations.

    A coupling's network is dense, its first layer a sine of many frequencies (Sitzmann et al. 2020, 2006.09661): an
    affine coupling makes two humps of one only by folding, and needs shifts that turn quickly for it. The mixings start
    by reversing the order, so that the halves take turns: random rotations cost 0.03 nats on a checkerboard.
    """

    eye: Tensor

    def __init__(self, count: int, channels: int, hidden: int, bound: float):
        super().__init__()
        self.bound = bound
        changed = channels // 2
        kept = channels - changed  # as chunk() halves an odd number
        self.register_buffer("eye", torch.eye(channels), persistent=False)
        self.bias = nn.Parameter(torch.zeros(count, channels))
        self.log_scale = nn.Parameter(torch.zeros(count, channels))
        self.lower = nn.Parameter(torch.zeros(count, channels, channels))
        self.upper = nn.Parameter(torch.zeros(count, channels, channels))
        self.log_diagonal = nn.Parameter(torch.zeros(count, channels))
        self.first = nn.Parameter(2 * torch.randn(count, hidden, kept))  # radians a unit, of about normal data
        self.phase = nn.Parameter(math.pi * (2 * torch.rand(count, hidden) - 1))
        self.middle = nn.Parameter(math.sqrt(2 / hidden) * torch.randn(count, hidden, hidden))
        self.middle_bias = nn.Parameter(torch.zeros(count, hidden))
        self.last = nn.Parameter(torch.zeros(count, 2 * changed, hidden))  # an untrained coupling is the identity
        self.last_bias = nn.Parameter(torch.zeros(count, 2 * changed))

    def matrices(self) -> Tensor:
        """[K, C, C]: W diag(s) of every step, as ``Mixing`` has one; here P reverses the order."""
        upper = self.upper.triu(1) + torch.diag_embed(self.log_diagonal.exp())
        return ((self.lower.tril(-1) + self.eye) @ upper).flip(1) * self.log_scale.exp().unsqueeze(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # rounded, it would not be what inverse() inverts
            shape, x, log_scales = x.shape, x.flatten(1), []
            matrices = self.matrices()
            offsets = (matrices @ self.bias.unsqueeze(-1)).squeeze(-1)
            for matrix, offset, network in zip(matrices.unbind(), offsets.unbind(), self._networks(), strict=True):
                kept, changed = F.linear(x, matrix, offset).chunk(2, -1)
                log_scale, shift = self._log_scale_and_shift(kept, network)
                x = torch.cat([kept, torch.addcmul(shift, changed, log_scale.exp())], -1)
                log_scales.append(log_scale)
            log_det = flat(torch.cat(log_scales, 1)) + self.log_scale.sum() + self.log_diagonal.sum()
            return x.view(shape), log_det

    def inverse(self, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            shape, y = y.shape, y.flatten(1)
            inverses = torch.linalg.inv(self.matrices())
            for k, network in reversed(list(enumerate(self._networks()))):
                kept, changed = y.chunk(2, -1)
                log_scale, shift = self._log_scale_and_shift(kept, network)
                y = F.linear(torch.cat([kept, (changed - shift) * (-log_scale).exp()], -1), inverses[k]) - self.bias[k]
            return y.view(shape)

    def initialise(self, x: Tensor) -> Tensor:
        """The actnorms normalise ``x``; returns what the last step makes of it."""
        shape, x = x.shape, x.flatten(1)
        for k in range(len(self.bias)):
            self.bias[k].copy_(-x.mean(0))
            self.log_scale[k].copy_(-x.std(0).clamp(min=1e-3).log())
            x = F.linear(x + self.bias[k], self.matrices()[k])
        return x.view(shape)

    def _networks(self) -> list[tuple[Tensor, ...]]:
        """The six parameters of every step's network."""
        stacked = (self.first, self.phase, self.middle, self.middle_bias, self.last, self.last_bias)
        return list(zip(*(parameters.unbind() for parameters in stacked), strict=True))

    def _log_scale_and_shift(self, kept: Tensor, network: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        first, phase, middle, middle_bias, last, last_bias = network
        h = F.relu(F.linear(F.linear(kept, first, phase).sin(), middle, middle_bias))
        raw, shift = F.linear(h, last, last_bias).chunk(2, -1)
        return self.bound * torch.tanh(raw / self.bound), shift


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


def apply(network: nn.Module, x: Tensor) -> Tensor:
    """A convolutional network on [B, H, W, C], which is what channels_last keeps in memory: no copy."""
    return network(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).to(x.dtype)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Starts at zero, so that an untrained coupling is the identity (section 3.3)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def flat(x: Tensor) -> Tensor:
    """The sum over everything but the batch: [B]."""
    return x.flatten(1).sum(1)


Model = Glow
