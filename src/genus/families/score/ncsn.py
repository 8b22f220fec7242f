"""NCSN: denoising score matching over a ladder of noise levels, sampled by annealed Langevin dynamics.

Song & Ermon 2019, "Generative Modeling by Estimating Gradients of the Data Distribution", https://arxiv.org/abs/1907.05600
Song & Ermon 2020, "Improved Techniques for Training Score-Based Generative Models", https://arxiv.org/abs/2006.09011
The network's inputs and outputs are scaled as in Karras et al. 2022 (EDM), https://arxiv.org/abs/2206.00364, table 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.samplers import Watch, annealed_langevin, step_rate


def ladder_ratio(dims: int) -> float:
    """Technique 2 (2006.09011): the ratio of neighbouring noise levels, from the number of dimensions.

    In high dimension the norm of sigma · z is N(√D sigma, sigma^2 / 2), nearly. The ratio is where level i - 1 puts
    half of its mass within three standard deviations of level i: Φ(√2D (r - 1) + 3r) - Φ(√2D (r - 1) - 3r) = 1/2.
    """
    low, high = 1.0, 10.0
    for _ in range(60):  # the overlap falls from 0.997 at r = 1
        ratio = (low + high) / 2
        shift = math.sqrt(2 * dims) * (ratio - 1)
        overlap = 0.5 * (math.erf((shift + 3 * ratio) / math.sqrt(2)) - math.erf((shift - 3 * ratio) / math.sqrt(2)))
        low, high = (ratio, high) if overlap > 0.5 else (low, ratio)
    return (low + high) / 2


class Block(nn.Module):
    """Residual block, GroupNorm-SiLU-conv twice, scaled and shifted in between by the embedding of the noise level."""

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(width // 8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(width // 8, width), nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * width)
        nn.init.zeros_(self.conv2.weight)  # starts as the identity

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.film(embedded)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return x + h


class Whole(nn.Module):
    """Residual: all positions of a few channels through two linear layers.

    Convolutions need many steps to learn that the two halves of a shirt belong together; this sees the whole at once.
    """

    def __init__(self, width: int, size: int, hidden: int, channels: int = 16):
        super().__init__()
        self.norm = nn.GroupNorm(width // 8, width)
        self.gather, self.spread = nn.Conv2d(width, channels, 1), nn.Conv2d(channels, width, 1)
        self.inner, self.outer = nn.Linear(channels * size, hidden), nn.Linear(hidden, channels * size)
        nn.init.zeros_(self.spread.weight)  # starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        h = self.gather(self.norm(x))
        return x + self.spread(self.outer(F.silu(self.inner(h.flatten(1)))).view(h.shape))


class UNet(nn.Module):
    """[B, C, H, W] and ln sigma [B] to [B, C, H, W]. Works on the 2x2-unshuffled image, where a 3x3 convolution costs
    a quarter and sees twice as far, and one level below it; what goes down needs little work, what comes up more."""

    frequencies: Tensor

    def __init__(self, shape: tuple[int, ...], width: int, blocks: tuple[int, int], hidden: int):
        super().__init__()
        channels, (high, across) = shape[0], (shape[1] // 2, shape[2] // 2)
        embedding, size = 4 * width, high * across // 4
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(0.3), math.log(10.0), width)))
        self.embed = nn.Sequential(
            nn.Linear(2 * width, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.enter = nn.Conv2d(4 * channels, width, 3, padding=1)
        # What is where in a centred picture, which convolutions see only by the border's padding.
        self.place_high = nn.Parameter(torch.zeros(width, high, across))
        self.place_low = nn.Parameter(torch.zeros(2 * width, high // 2, across // 2))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.whole = nn.ModuleList(Whole(2 * width, size, hidden) for _ in range(blocks[1]))
        self.below = nn.ModuleList(Block(2 * width, embedding) for _ in range(blocks[1]))
        self.up = nn.Conv2d(2 * width, 4 * width, 1)
        self.after = nn.ModuleList(Block(width, embedding) for _ in range(blocks[0]))
        self.norm, self.leave = nn.GroupNorm(width // 8, width), nn.Conv2d(width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        angles = log_sigma[:, None] * self.frequencies
        embedded = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        h = self.enter(F.pixel_unshuffle(x, 2)) + self.place_high  # [B, width, H/2, W/2]
        low = self.down(h) + self.place_low  # [B, 2 width, H/4, W/4]
        for whole, block in zip(self.whole, self.below, strict=True):
            low = block(whole(low), embedded)
        h = h + F.pixel_shuffle(self.up(low), 2)
        for block in self.after:
            h = block(h, embedded)
        return F.pixel_shuffle(self.leave(F.silu(self.norm(h))), 2)


class Dense(nn.Module):
    """The network for vectors: [B, D, 1, 1] and ln sigma [B] to [B, D, 1, 1].

    Residual, scaled and shifted by the level. It sees x also as sines and cosines (Tancik et al. 2020, 2006.10739):
    edges and thin lines come much sooner.
    """

    waves: Tensor
    frequencies: Tensor

    def __init__(self, dims: int, hidden: int, blocks: int = 3):
        super().__init__()
        self.register_buffer("waves", math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0]), persistent=False)
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(0.3), math.log(10.0), 16)))
        self.embed = nn.Sequential(nn.Linear(32, 32), nn.SiLU())
        self.enter, self.leave = nn.Linear((1 + 2 * len(self.waves)) * dims, hidden), nn.Linear(hidden, dims)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.film = nn.ModuleList(nn.Linear(32, 2 * hidden) for _ in range(blocks))

    def forward(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        angle = log_sigma[:, None] * self.frequencies
        embedded = self.embed(torch.cat([angle.cos(), angle.sin()], 1))
        phase = (x.flatten(1).unsqueeze(-1) * self.waves).flatten(1)
        h = self.enter(torch.cat([x.flatten(1), phase.cos(), phase.sin()], 1))
        for block, film in zip(self.blocks, self.film, strict=True):
            scale, shift = film(embedded).chunk(2, 1)
            h = h + block(F.silu(torch.addcmul(shift, h, 1 + scale)))
        return self.leave(F.silu(h)).view(x.shape)


class NCSN(Family):
    """Learns the score of the data at L noise levels; samples by going down them.

    ``sigma_max``: about the largest distance between two training images (technique 1); default 1.5 √D, which is the 42
    that Fashion-MNIST has in [-1, 1] (21 in [0, 1]). ``sigma_min``: 0.02, the papers' 0.01 in [0, 1].
    ``width``: channels at half resolution, twice as many at a quarter; ``hidden``: of the layers that see it whole.
    ``sigma_data``: standard deviation of a pixel, for the scaling.
    ``centre``, ``spread``: training visits level sigma with weight exp(-(ln sigma - centre)^2 / 2 spread^2), EDM's
    log-normal restricted to the ladder: the middle levels decide the look, the outer ones are nearly linear in x.
    Vectors [D, 1, 1] get a dense network and a density that can be measured: stored levels are spread over their cells,
    the ladder goes down to a quarter of a cell and is fine enough to be asked between its levels, all of which training
    visits alike. With lambda below that makes the loss a bound of the likelihood (Song et al. 2021, 2101.09258).
    Raises ValueError where height or width is no multiple of 4.
    """

    widths = ("width", "hidden")
    paper = "Song & Ermon 2019, 1907.05600; 2020, 2006.09011"
    ladder: Tensor
    chance: Tensor

    def __init__(
        self,
        spec: DataSpec,
        *,
        width: int = 24,
        blocks_high: int = 1,
        blocks_low: int = 2,
        hidden: int = 256,
        sigma_max: float | None = None,
        sigma_min: float = 0.02,
        sigma_data: float = 0.7,
        centre: float = -1.2,
        spread: float = 1.2,
    ):
        super().__init__(spec)
        _, height, across = spec.shape
        if not spec.flat and (height % 4 or across % 4):
            raise ValueError(f"NCSN needs height and width divisible by 4, not {height}x{across}")
        top = sigma_max or 1.5 * math.sqrt(spec.dims)
        self.cell = 2 / (spec.levels - 1) if spec.flat and spec.levels else 0.0
        sigma_min = min(sigma_min, self.cell / 4) if self.cell else sigma_min
        count = 1 + math.ceil(math.log(top / sigma_min) / math.log(ladder_ratio(spec.dims)))
        count = max(count, 64) if spec.flat else count
        self.sigmas: list[float] = [top * (sigma_min / top) ** (i / (count - 1)) for i in range(count)]
        self.sigma_data = sigma_data
        ladder = torch.tensor(self.sigmas)
        self.register_buffer("ladder", ladder, persistent=False)
        chance = torch.exp(-((ladder.log() - centre) ** 2) / (2 * spread**2))
        self.register_buffer("chance", torch.ones(count) if spec.flat else chance, persistent=False)
        self.network = (
            Dense(spec.dims, hidden // 2) if spec.flat else UNet(spec.shape, width, (blocks_high, blocks_low), hidden)
        )

    @property
    def nfe(self) -> int:
        """Network evaluations of a sample with the default knobs: one a level and one to denoise."""
        return len(self.sigmas) + 1

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[clean | x] for ``x`` [B, C, H, W] with noise ``sigma`` [B]; EDM's scaling, equation 7."""
        s = sigma[:, None, None, None]
        total = (s**2 + self.sigma_data**2).sqrt()
        change = self.network(x / total, sigma.log())
        return x * (self.sigma_data / total) ** 2 + change * s * self.sigma_data / total

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Gradient of the log density of the data with noise ``sigma`` [B] added, by Tweedie's formula."""
        return (self.denoise(x, sigma) - x) / sigma[:, None, None, None] ** 2

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """Denoising score matching, lambda(sigma) · |score(x + sigma z, sigma) + z / sigma|^2 / D (2019, equation 5).

        lambda = sigma^2 (1 + sigma^2 / sigma_data^2) makes every level's loss 1 for a network that says nothing.
        """
        x = batch.x
        if self.cell:
            x = x + self.cell * (torch.rand(x.shape, generator=generator, device=x.device) - 0.5)
        if self.spec.flat:  # one level each from as many equal shares of the ladder: less noise than drawing them all
            share = torch.arange(len(x), device=x.device) + torch.rand(len(x), generator=generator, device=x.device)
            level = (share * (len(self.ladder) / len(x))).long().clamp(max=len(self.ladder) - 1)
        else:
            level = torch.multinomial(self.chance, len(x), replacement=True, generator=generator)
        sigma = self.ladder[level]
        z = torch.randn(x.shape, generator=generator, device=x.device)
        s = sigma[:, None, None, None]
        error = self.denoise(x + s * z, sigma) - x  # = sigma^2 (score + z / sigma)
        weight = 1 / s**2 + 1 / self.sigma_data**2  # = lambda / sigma^4
        return {"loss": (weight * error**2).mean()}

    def sample(
        self,
        n: int,
        *,
        generator: Generator,
        cond: Tensor | None = None,
        steps: int = 1,
        thin: int = 1,
        watch: Watch | None = None,
    ) -> Tensor:
        """[n, C, H, W] by annealed Langevin dynamics: ``steps`` moves at every ``thin``-th level, then one denoising.

        The step size is technique 4's for that ladder and number of steps. ``watch`` is shown every move.
        """
        sigmas = self.sigmas[::thin]
        x = sigmas[0] * torch.randn((n, *self.spec.shape), generator=generator, device=generator.device)
        rate = step_rate(sigmas[0] / sigmas[1], steps)

        def score(x: Tensor, sigma: float) -> Tensor:
            return self.score(x, torch.full((len(x),), sigma, device=x.device))

        sampled = annealed_langevin(score, x, sigmas, rate=rate, steps=steps, generator=generator, watch=watch)
        return sampled.clamp(-1, 1)

    def trajectory(self, n: int, *, frames: int, generator: Generator) -> Tensor:
        """[frames, n, *shape]: the posterior means on the way, evenly spaced in ln sigma, and last the samples.

        Not the noisy states: their noise hides what has been decided.
        """
        shown: list[Tensor] = []
        at = {round(k * (len(self.sigmas) - 1) / max(1, frames - 1)) for k in range(frames - 1)}

        def watch(move: int, x: Tensor, score: Tensor, sigma: float) -> None:
            if move in at:
                shown.append((x + sigma**2 * score).clamp(-1, 1))

        last = self.sample(n, generator=generator, watch=watch)
        return torch.stack([*shown, last])


Model = NCSN
