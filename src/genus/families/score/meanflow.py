"""MeanFlow: learns the average velocity between any two times, and so samples in few evaluations.

Geng et al. 2025, "Mean Flows for One-step Generative Modeling", https://arxiv.org/abs/2505.13447, algorithms 1 and 2;
Geng et al. 2025, "Improved Mean Flows", https://arxiv.org/abs/2512.02012: the direction of the derivative.
The path is rectified flow's straight line (Liu et al. 2022, https://arxiv.org/abs/2209.03003) from the data, t = 0, to
noise, t = 1.
"""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import torch
from torch import Generator, Tensor

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.nn.unet import denoiser
from genus.samplers import karras_levels

TURNS = math.pi * torch.arange(1, 5)  # how the network is told t - r: sines and cosines of so many half turns
FLOOR = 0.01  # it is told ln(t + FLOOR) / 4: fine where t is small, yet so slow that du/dt stays tame
LATEST = 4.0  # logit of the latest time that training on vectors visits


class MeanFlow(Family):
    """u(z, r, t), the average of the velocity over the times from r to t along the flow through z at t.

    It satisfies u = v - (t - r) du/dt (equation 6): v is known in the mean, and du/dt is a Jacobian-vector product of
    the network itself, by forward-mode differentiation. Where r = t that is flow matching (Lipman et al. 2023,
    https://arxiv.org/abs/2210.02747), and u(z, t, t) says what ``denoise`` needs.
    ``width``: channels at half resolution, twice as many at a quarter; ``hidden``: of the layers that see it whole.
    ``sigma_data``: standard deviation of a pixel. ``centre``, ``spread``: of the normal whose logistic the times are.
    ``apart``: the share of examples with r < t. ``power``: of the adaptive weight (equation 22); 0 is the plain square.
    Vectors [D, 1, 1] get a dense network, stored levels spread over their cells, times whose logits are uniform, and no
    adaptive weight: with few numbers in an example it turns the mean that is looked for into something like a mode.
    Raises ValueError where height or width is no multiple of 4.
    """

    widths = ("width", "hidden")
    paper = "Geng et al. 2025, 2505.13447"

    def __init__(
        self,
        spec: DataSpec,
        *,
        width: int = 24,
        blocks_high: int = 1,
        blocks_low: int = 2,
        hidden: int = 256,
        sigma_data: float = 0.7,
        centre: float = -0.4,
        spread: float = 1.0,
        apart: float = 0.25,
        power: float = 1.0,
    ):
        super().__init__(spec)
        self.cell = 2 / (spec.levels - 1) if spec.flat and spec.levels else 0.0
        self.sigma_min = min(0.02, self.cell / 4) if self.cell else 0.02
        self.sigmas: list[float] = karras_levels(1.5 * math.sqrt(spec.dims), self.sigma_min, 18)
        self.sigma_data, self.centre, self.spread, self.apart = sigma_data, centre, spread, apart
        self.power = 0.0 if spec.flat else power
        aside = 2 * len(TURNS)
        self.network = denoiser(spec, width, (blocks_high, blocks_low), hidden, aside)

    def velocity(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """u(z, r, t) of ``z`` [B, C, H, W] and times [B], 0 <= r <= t <= 1.

        A network that says nothing gives what is exact for data N(0, sigma_data²): z turns into z S(r) / S(t), with
        S² = t² + (1 - t)² sigma_data².
        """
        var = self.sigma_data**2
        at_t, at_r = (((time**2 + (1 - time) ** 2 * var).sqrt())[:, None, None, None] for time in (t, r))
        linear = (t + r - var * (2 - t - r))[:, None, None, None] / (at_t * (at_t + at_r))
        angle = (t - r)[:, None].to(z) * TURNS.to(z)
        aside = torch.cat([angle.sin(), angle.cos()], 1)
        return linear * z + (self.sigma_data / at_t) * self.network(z / at_t, (t + FLOOR).log() / 4, aside)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[clean | x] for ``x`` [B, C, H, W] with noise ``sigma`` [B]: z - t u(z, t, t) for z = (1 - t) x, t such that
        z has the path's noise, t = (1 - t) sigma."""
        t = sigma / (1 + sigma)
        z = x * (1 - t)[:, None, None, None]
        return z - t[:, None, None, None] * self.velocity(z, t, t)

    @torch.no_grad()
    def acceleration(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """du/dt along the flow, where dz/dt = v, dr/dt = 0, dt/dt = 1 (equation 8): [B, C, H, W].

        v is what the network takes it to be, u(z, t, t): of the same mean as e - x at z, without its noise.
        """
        # In full precision: forward mode does not know autocast's conversions, and a derivative needs the digits.
        with torch.autocast(z.device.type, enabled=False), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # what torch imports for it warns of its own use of torch.jit
            tangents = self.velocity(z, t, t), torch.zeros_like(r), torch.ones_like(t)
            return torch.func.jvp(self.velocity, (z, r, t), tangents)[1]

    def times(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """r and t, each [n]: two draws in order, or twice the same where they are not to be ``apart``."""
        if self.spec.flat:
            low = math.log(self.sigma_min)
            logits = low + (LATEST - low) * torch.rand(n, 2, generator=generator, device=generator.device)
        else:
            logits = self.centre + self.spread * torch.randn(n, 2, generator=generator, device=generator.device)
        later, earlier = logits.amax(1).sigmoid(), logits.amin(1).sigmoid()
        some = torch.rand(n, generator=generator, device=generator.device) < self.apart
        return torch.where(some, earlier, logits[:, 0].sigmoid()), torch.where(some, later, logits[:, 0].sigmoid())

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """|u(z, r, t) - sg(v - (t - r) du/dt)|^2 for z = (1 - t) x + t e and v = e - x, weighted (algorithm 1).

        ``squared`` is the same without the weight, a mean over the numbers of an example.
        """
        x = batch.x
        if self.cell:
            x = x + self.cell * (torch.rand(x.shape, generator=generator, device=x.device) - 0.5)
        r, t = self.times(len(x), generator)
        target = torch.randn(x.shape, generator=generator, device=x.device) - x
        z, some = x + t[:, None, None, None] * target, r < t
        if some.any():
            change = self.acceleration(z[some], r[some], t[some])
            target[some] -= (t - r)[some][:, None, None, None] * change
        squared = (self.velocity(z, r, t) - target).square().flatten(1).mean(1)
        weight = (squared.detach() + 1e-3) ** -self.power
        return {"loss": (weight * squared).mean(), "squared": squared.detach().mean()}

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, steps: int = 4) -> Tensor:
        """[n, *shape] in ``steps`` evaluations: z_r = z_t - (t - r) u(z_t, r, t), from noise down (algorithm 2)."""
        z = torch.randn((n, *self.spec.shape), generator=generator, device=generator.device)
        ends = torch.linspace(1, 0, steps + 1, device=z.device)
        for t, r in pairwise(ends):
            z = z - (t - r) * self.velocity(z, r.expand(n), t.expand(n))
        return z.clamp(-1, 1)

    def trajectory(self, n: int, *, frames: int, generator: Generator) -> Tensor:
        """[frames, n, *shape]: the same noise brought to samples in 1, 2, … evaluations."""
        state, shown = generator.get_state(), []
        for steps in range(1, frames + 1):
            generator.set_state(state)
            shown.append(self.sample(n, generator=generator, steps=steps))
        return torch.stack(shown)


Model = MeanFlow
