"""NCSN: denoising score matching over a ladder of noise levels, sampled by annealed Langevin dynamics.

Song & Ermon 2019, "Generative Modeling by Estimating Gradients of the Data Distribution", https://arxiv.org/abs/1907.05600
Song & Ermon 2020, "Improved Techniques for Training Score-Based Generative Models", https://arxiv.org/abs/2006.09011
The network's inputs and outputs are scaled as in Karras et al. 2022 (EDM), https://arxiv.org/abs/2206.00364, table 1.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.nn.unet import denoiser
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
        self.network = denoiser(spec, width, (blocks_high, blocks_low), hidden)

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
