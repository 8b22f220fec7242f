"""DCGAN with the R1 penalty: the non-saturating game, damped where the data is.

Mescheder et al. 2018, "Which Training Methods for GANs do actually Converge?" (https://arxiv.org/abs/1801.04406): the
penalty, without which the game need not converge. Karras et al. 2019 (https://arxiv.org/abs/1912.04958) found that it
suffices every few steps. The networks are those of Radford et al. 2015 (https://arxiv.org/abs/1511.06434).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Generator, Tensor
from torch.nn import functional

from genus.contract import Batch, Terms
from genus.data.spec import DataSpec
from genus.families.gan._adversarial import DCGAN, slopes


class R1(DCGAN):
    """Goodfellow's game with a penalty γ/2 E|∇D(x)|² on real images (equation 9).

    ``r1``: the weight γ, of a penalty that is applied every ``r1_every`` critic steps and then that many times as
    strong. For vectors γ is a tenth of it: a critic of few numbers must be steep. The rest is as ``DCGAN`` has it.
    The generator learns five times as fast as the critic in params.yaml: with equal rates the critic wins early.
    """

    critic_steps: Tensor
    paper = "Mescheder et al. 2018, arXiv 1801.04406"

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int = 64,
        width: int = 32,
        critic_width: int = 20,
        r1: float = 0.1,
        r1_every: int = 16,
        conditional: bool = False,
    ):
        super().__init__(spec, latent=latent, width=width, critic_width=critic_width, conditional=conditional)
        self.r1, self.r1_every = r1 / 10 if spec.flat else r1, r1_every
        self.register_buffer("critic_steps", torch.zeros((), dtype=torch.int64))  # where in the R1 cycle: for resuming

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """Goodfellow et al., algorithm 1 with one critic step, non-saturating (their section 3).

        Both steps use one batch of fakes: the generator's pass is its main cost and is made once.
        """
        fake = self.generator(self.codes(batch, generator))
        # Real and fake go through the critic apart, each with its own batch statistics (Radford et al.).
        real = batch.x.requires_grad_(self._penalise())
        real_score, fake_score = self.score(real, batch.cond), self.score(fake.detach(), batch.cond)
        terms = {"loss": functional.softplus(-real_score).mean() + functional.softplus(fake_score).mean()}
        if self._penalise():
            penalty = gradient_penalty(real_score, real)
            terms = {"loss": terms["loss"] + self.r1 / 2 * self.r1_every * penalty, "r1": penalty}
        yield "critic", terms
        self.critic_steps += 1
        yield "generator", {"loss": functional.softplus(-self.score(fake, batch.cond)).mean()}

    def _penalise(self) -> bool:
        return self.r1 > 0 and int(self.critic_steps) % self.r1_every == 0


def gradient_penalty(score: Tensor, x: Tensor) -> Tensor:
    """R1: the mean over the batch of |∇ score(x)|² (equation 9), differentiable itself."""
    return slopes(score, x).square().sum(1).mean()


Model = R1
