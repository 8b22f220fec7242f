"""DCGAN: two convolutional networks play the non-saturating game.

Goodfellow et al. 2014, "Generative Adversarial Nets" (https://arxiv.org/abs/1406.2661): the game and its loss.
Radford et al. 2015, "Unsupervised Representation Learning with Deep Convolutional GANs"
(https://arxiv.org/abs/1511.06434): the networks. Mescheder et al. 2018, "Which Training Methods for GANs do actually
Converge?" (https://arxiv.org/abs/1801.04406): the R1 penalty, without which the game need not converge, and Karras et
al. 2019 (https://arxiv.org/abs/1912.04958), who found that it suffices every few steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec


class DCGAN(Family):
    """A generator and a critic (the paper's discriminator), trained in turns. Gives no density.

    ``latent``: size of z. ``width`` and ``critic_width``: channels at half resolution; twice as many at a quarter.
    The generator learns five times as fast as the critic in params.yaml: with equal rates the critic wins early.
    ``r1``: weight γ of the penalty γ/2 |∇D(x)|² on real images, applied every ``r1_every`` critic steps and then that
    many times as strong. Sizes must be multiples of 4. For vectors [D, 1, 1] both networks are fully connected, behind
    a layer of sines; z has at most D numbers, and γ is a tenth of it: a critic of few numbers must be steep.
    """

    critic_steps: Tensor
    paper = "Radford et al. 2015, arXiv 1511.06434"
    widths = ("width", "critic_width")

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int = 64,
        width: int = 32,
        critic_width: int = 20,
        r1: float = 0.1,
        r1_every: int = 16,
    ):
        super().__init__(spec)
        channels, height, width_px = spec.shape
        if not spec.flat and (height % 4 or width_px % 4):
            raise ValueError(f"DCGAN halves the image twice: height and width must be multiples of 4, not {spec.shape}")
        self.latent, self.r1, self.r1_every = latent, r1, r1_every
        self.register_buffer("critic_steps", torch.zeros((), dtype=torch.int64))  # where in the R1 cycle: for resuming
        if spec.flat:
            self.latent = latent = min(latent, spec.dims)
            self.r1 = r1 / 10
            self.generator = nn.Sequential(
                *perceptron(latent, 4 * width, nn.ReLU()), nn.Linear(4 * width, channels), nn.Tanh()
            )
            self.generator.append(nn.Unflatten(1, spec.shape))
            inputs = [nn.Flatten(), *perceptron(channels, 8 * critic_width, nn.LeakyReLU(0.2))]
            self.critic = nn.Sequential(*inputs, nn.Linear(8 * critic_width, 1))
            return
        small = (height // 4, width_px // 4)
        self.generator = nn.Sequential(
            nn.Linear(latent, 2 * width * small[0] * small[1], bias=False),
            nn.Unflatten(1, (2 * width, *small)),  # [B, 2w, H/4, W/4]
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),  # [B, w, H/2, W/2]
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, 2, 1),  # [B, C, H, W]
            nn.Tanh(),
        )
        # Batch norm in the critic, as the paper has it: without it the first epoch is lost.
        self.critic = nn.Sequential(
            nn.Conv2d(channels, critic_width, 4, 2, 1),  # [B, w, H/2, W/2]
            nn.LeakyReLU(0.2),
            nn.Conv2d(critic_width, 2 * critic_width, 4, 2, 1, bias=False),  # [B, 2w, H/4, W/4]
            nn.BatchNorm2d(2 * critic_width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * critic_width, 4 * critic_width, 3, 2, 1, bias=False),  # [B, 4w, H/8, W/8]
            nn.BatchNorm2d(4 * critic_width),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(4 * critic_width * -(-small[0] // 2) * -(-small[1] // 2), 1),
        )
        self.to(memory_format=torch.channels_last)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"critic": list(self.critic.parameters()), "generator": list(self.generator.parameters())}

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """Goodfellow et al., algorithm 1 with one critic step, non-saturating (their section 3).

        Both steps use one batch of fakes: the generator's pass is its main cost and is made once.
        """
        fake = self.generator(self._latents(len(batch.x), generator))
        # Real and fake go through the critic apart, each with its own batch statistics (Radford et al.).
        real = batch.x.requires_grad_(self._penalise())
        real_score, fake_score = self.critic(real), self.critic(fake.detach())
        terms = {"loss": functional.softplus(-real_score).mean() + functional.softplus(fake_score).mean()}
        if self._penalise():
            penalty = gradient_penalty(real_score, real)
            terms = {"loss": terms["loss"] + self.r1 / 2 * self.r1_every * penalty, "r1": penalty}
        yield "critic", terms
        self.critic_steps += 1
        yield "generator", {"loss": functional.softplus(-self.critic(fake)).mean()}

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, **knobs: Any) -> Tensor:
        """[n, C, H, W] in [-1, 1], in one pass."""
        return self.decode(self._latents(n, generator))

    def decode(self, code: Tensor) -> Tensor:
        """[B, C, H, W] of codes [B, latent]."""
        return self.generator(code)

    def _latents(self, n: int, generator: Generator) -> Tensor:
        return torch.randn(n, self.latent, generator=generator, device=self.critic_steps.device)

    def _penalise(self) -> bool:
        return self.r1 > 0 and int(self.critic_steps) % self.r1_every == 0


class Sines(nn.Module):
    """sin(W x + b), [B, inputs] to [B, outputs]: W starts normal, 5 radians a unit; b anywhere on the circle.

    Sitzmann et al. 2020, arXiv:2006.09661. From a few numbers, networks of ReLUs alone are slow to learn sharp edges.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(5 * torch.randn(outputs, inputs))
        self.phase = nn.Parameter(math.pi * (2 * torch.rand(outputs) - 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(functional.linear(x, self.weight, self.phase))


def perceptron(inputs: int, hidden: int, activation: nn.Module) -> list[nn.Module]:
    """Two hidden layers, the first one of sines."""
    return [Sines(inputs, hidden), nn.Linear(hidden, hidden), activation]


def gradient_penalty(score: Tensor, x: Tensor) -> Tensor:
    """R1: the mean over the batch of |∇ score(x)|² (Mescheder et al. 2018, eq. 9), differentiable itself."""
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return slope.square().flatten(1).sum(1).mean()


Model = DCGAN
