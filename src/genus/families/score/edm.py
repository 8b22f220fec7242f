"""EDM: a denoiser for every noise level, sampled along the probability flow by Heun's steps.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", https://arxiv.org/abs/2206.00364
Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", https://arxiv.org/abs/2207.12598: what labels are for.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.nn.unet import denoiser
from genus.samplers import Watch, heun, karras_levels


class EDM(Family):
    """Learns E[clean | noisy] with one regression; a sample is the solution of an ODE in the noise level.

    ``width``: channels at half resolution, twice as many at a quarter; ``hidden``: of the layers that see it whole.
    ``sigma_max``: default 1.5 √D, about the largest distance between two images (the paper's 80 for 32x32 colours).
    ``sigma_min``: the lowest level. ``sigma_data``: standard deviation of a pixel.
    ``centre``, ``spread``: in training ln sigma is normal (table 1's P_mean and P_std), cut off at both ends.
    ``conditional``: the network is told the label, but for a share ``dropout`` of the examples; then ``labels`` says
    how many there are, and ``sample`` takes ``cond``.
    Vectors [D, 1, 1] get a dense network; as they are asked for a density, stored levels are spread over their cells,
    the lowest level is a quarter of a cell at most, and ln sigma is uniform (see NCSN).
    Raises ValueError where height or width is no multiple of 4, and for labels that the data does not have.
    """

    widths = ("width", "hidden")
    paper = "Karras et al. 2022, 2206.00364"

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
        conditional: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__(spec)
        if conditional and len(spec.classes) < 2:
            raise ValueError("conditional: the data has no labels")
        self.cell = 2 / (spec.levels - 1) if spec.flat and spec.levels else 0.0
        self.sigma_max = sigma_max or 1.5 * math.sqrt(spec.dims)
        self.sigma_min = min(sigma_min, self.cell / 4) if self.cell else sigma_min
        self.sigma_data, self.centre, self.spread, self.dropout = sigma_data, centre, spread, dropout
        self.sigmas: list[float] = karras_levels(self.sigma_max, self.sigma_min, 18)
        aside = len(spec.classes) if conditional else 0
        if conditional:
            self.labels = aside
        self.network = denoiser(spec, width, (blocks_high, blocks_low), hidden, aside)

    def denoise(self, x: Tensor, sigma: Tensor, told: Tensor | None = None) -> Tensor:
        """E[clean | x] for ``x`` [B, C, H, W] with noise ``sigma`` [B] (equation 7 and table 1).

        ``told``: what a conditional model knows of the label, one-hot [B, labels]; zeros and None are nothing.
        """
        s = sigma[:, None, None, None]
        total = (s**2 + self.sigma_data**2).sqrt()
        labels = getattr(self, "labels", 0)
        told = x.new_zeros(len(x), labels) if told is None else told * math.sqrt(labels)  # of variance 1
        change = self.network(x / total, sigma.log(), told)
        return x * (self.sigma_data / total) ** 2 + change * s * self.sigma_data / total

    def noise_levels(self, n: int, generator: Generator) -> Tensor:
        """sigma [n]: log-normal; for vectors one from each of n equal shares of the range of ln sigma."""
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        if not self.spec.flat:
            normal = torch.randn(n, generator=generator, device=generator.device)
            return (self.centre + self.spread * normal).clamp(low, high).exp()
        share = torch.arange(n, device=generator.device) + torch.rand(n, generator=generator, device=generator.device)
        return (low + (high - low) / n * share).exp()

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """lambda(sigma) · |D(x + n, sigma) - x|^2 a number: 1 at every level for a silent network (equation 8)."""
        x, told = batch.x, None
        if self.cell:
            x = x + self.cell * (torch.rand(x.shape, generator=generator, device=x.device) - 0.5)
        if hasattr(self, "labels"):
            kept = torch.rand(len(x), 1, generator=generator, device=x.device) >= self.dropout
            told = self._told(batch.cond) * kept
        sigma = self.noise_levels(len(x), generator)
        s = sigma[:, None, None, None]
        error = self.denoise(x + s * torch.randn(x.shape, generator=generator, device=x.device), sigma, told) - x
        return {"loss": ((1 / s**2 + 1 / self.sigma_data**2) * error**2).mean()}

    def sample(
        self,
        n: int,
        *,
        generator: Generator,
        cond: Tensor | None = None,
        steps: int = 18,
        churn: float = 0.0,
        guidance: float = 1.0,
        watch: Watch | None = None,
    ) -> Tensor:
        """[n, C, H, W] in 2 · ``steps`` - 1 evaluations of the network: Heun's steps, see ``genus.samplers.heun``.

        ``cond``: labels int64 [n] of a conditional model, which else draws them, all equally likely. ``guidance`` w
        asks for D(x) + w (D(x | label) - D(x)), at twice the evaluations; 1 is the plain conditional. ``watch`` is
        shown every step. Raises ValueError for labels where the model is not conditional.
        """
        told = None
        if hasattr(self, "labels"):
            drawn = torch.randint(self.labels, (n,), generator=generator, device=generator.device)
            told = self._told(drawn if cond is None else cond)
        elif cond is not None:
            raise ValueError("cond: this model was trained without labels; build it with conditional: true")

        def score(x: Tensor, sigma: float) -> Tensor:
            level = torch.full((len(x),), sigma, device=x.device)
            clean = self.denoise(x, level, told)
            if told is not None and guidance != 1:
                clean = torch.lerp(self.denoise(x, level), clean, guidance)
            return (clean - x) / sigma**2

        sigmas = karras_levels(self.sigma_max, self.sigma_min, steps)
        x = self.sigma_max * torch.randn((n, *self.spec.shape), generator=generator, device=generator.device)
        return heun(score, x, sigmas, generator=generator, churn=churn, watch=watch).clamp(-1, 1)

    def trajectory(self, n: int, *, frames: int, generator: Generator) -> Tensor:
        """[frames, n, *shape]: the posterior means on the way, evenly spaced among the steps, and last the samples."""
        shown: list[Tensor] = []
        at = [round(k * 17 / max(1, frames - 1)) for k in range(frames - 1)]

        def watch(move: int, x: Tensor, score: Tensor, sigma: float) -> None:
            shown.extend([(x + sigma**2 * score).clamp(-1, 1)] * at.count(move))

        last = self.sample(n, generator=generator, watch=watch)
        return torch.stack([*shown, last])

    def _told(self, label: Tensor | None) -> Tensor:
        assert label is not None
        return F.one_hot(label, self.labels).float()


Model = EDM
