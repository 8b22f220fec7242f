"""Consistency distillation: a student that jumps along its teacher's probability flow.

Song et al. 2023, "Consistency Models", https://arxiv.org/abs/2303.01469, algorithm 2, which is ``steps`` = 1.
Heek et al. 2024, "Multistep Consistency Models", https://arxiv.org/abs/2403.06807: the way cut into as many parts.
Song & Dhariwal 2023, "Improved Techniques for Training Consistency Models", https://arxiv.org/abs/2310.14189: the
pseudo-Huber distance, and a target without an average of its own.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor

from genus.contract import Batch, Denoises, Family, Terms
from genus.data.spec import DataSpec
from genus.samplers import karras_levels


class Distilled(Family):
    """A sample in ``steps`` evaluations, learnt from a ``parent`` that ``Denoises`` (NCSN, EDM) and stays frozen.

    The parent's way from noise to data is a ladder of ``levels`` Heun steps, cut into ``steps`` equal parts; the
    student learns to get from anywhere on a part to its end in one jump. It is a copy of the parent that goes on
    learning: its jump from sigma to an end is an Euler step, x + (1 - end / sigma) (D(x, sigma) - x), which is the
    identity at the end itself (equation 5), and is to arrive where it does from one of the parent's steps further down.
    ``huber``: where the distance turns from square to straight, for a number of the example.
    Raises ValueError for a parent of other data, and for levels that cannot be cut into so many equal parts.
    """

    paper = "Song et al. 2023, 2303.01469; Heek et al. 2024, 2403.06807"
    inherits = Denoises

    def __init__(self, spec: DataSpec, *, parent: Any, steps: int = 2, levels: int = 8, huber: float = 0.01):
        super().__init__(spec)
        if parent.spec.shape != spec.shape:
            raise ValueError(f"the parent is of examples {parent.spec.shape}, the data of {spec.shape}")
        if steps < 1 or levels < 2 or levels % steps:
            raise ValueError(f"levels: {levels} cannot be cut into {steps} equal parts")
        self.parent = parent
        self.student = copy.deepcopy(parent).requires_grad_(True)
        self.ladder = [*karras_levels(max(parent.sigmas), min(parent.sigmas), levels), 0.0]
        self.part, self.huber = levels // steps, huber

    def jump(self, x: Tensor, now: Tensor, end: Tensor) -> Tensor:
        """Where the flow through ``x`` [B, *shape] at level ``now`` [B] is at level ``end`` [B], 0 <= end < now."""
        return torch.lerp(self.student.denoise(x, now), x, (end / now)[:, None, None, None])

    def follow(self, x: Tensor, now: Tensor, then: Tensor) -> Tensor:
        """The same by one step of the parent's: Heun's, or Euler's where ``then`` is 0."""
        s, t = now[:, None, None, None], then[:, None, None, None]
        clean = self.parent.denoise(x, now)
        slope = (x - clean) / s
        guess = x + (t - s) * slope
        low = then.clamp(min=self.ladder[-2])  # where it is 0 what comes of it is not used
        corrected = x + (t - s) * 0.5 * (slope + (guess - self.parent.denoise(guess, low)) / low[:, None, None, None])
        return torch.where(t > 0, corrected, clean)

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """√(|jump(x) - jump(x')|^2 + c^2) - c, where the parent's step leads from x to x' (algorithm 2).

        The norm is the root of the mean over the numbers of an example.
        """
        clean = batch.x
        levels = torch.tensor(self.ladder, device=clean.device)
        at = torch.randint(len(levels) - 1, (len(clean),), generator=generator, device=clean.device)
        now, then, end = levels[at], levels[at + 1], levels[(at // self.part + 1) * self.part]
        x = clean + now[:, None, None, None] * torch.randn(clean.shape, generator=generator, device=clean.device)
        with torch.no_grad():
            target = self.follow(x, now, then)
            before = then > end  # else it has arrived
            if before.any():
                target[before] = self.jump(target[before], then[before], end[before])
        far = (self.jump(x, now, end) - target).square().flatten(1).mean(1)
        return {"loss": ((far + self.huber**2).sqrt() - self.huber).mean()}

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None) -> Tensor:
        """[n, *shape]: from pure noise, jump by jump."""
        x = self.ladder[0] * torch.randn((n, *self.spec.shape), generator=generator, device=generator.device)
        ends = torch.tensor(self.ladder[:: self.part], device=x.device)
        for now, end in pairwise(ends):
            x = self.jump(x, now.expand(n), end.expand(n))
        return x.clamp(-1, 1)


Model = Distilled
