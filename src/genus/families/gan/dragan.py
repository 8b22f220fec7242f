"""DRAGAN: the non-saturating game with the critic's slope held near 1 around the data.

Kodali et al. 2017, "On Convergence and Stability of GANs" (https://arxiv.org/abs/1705.07215). The networks are those of
Radford et al. 2015 (https://arxiv.org/abs/1511.06434).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Generator
from torch.nn import functional

from genus.contract import Batch, Terms
from genus.data.spec import DataSpec
from genus.families.gan._adversarial import DCGAN, slopes


class DRAGAN(DCGAN):
    """Goodfellow's game with a penalty λ E(|∇D(x + δ)| - k)² of the critic, δ ~ N(0, c I) (section 2).

    ``penalty``: λ, by default 10 and for vectors 0.1, as WGAN-GP has it; ``slope``: k (1). ``spread``: √c, in standard
    deviations of the batch's numbers (the authors' code: 0.5). ``norm`` of the critic: with "batch" the slope is that
    of the sum of a batch's scores; with "layer" and "none" each example has its own, and learning is slower. The rest
    is as ``DCGAN`` has it.
    """

    paper = "Kodali et al. 2017, arXiv 1705.07215"

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int = 64,
        width: int = 32,
        critic_width: int = 20,
        penalty: float | None = None,
        slope: float = 1.0,
        spread: float = 0.5,
        norm: str = "batch",
        conditional: bool = False,
    ):
        super().__init__(
            spec, latent=latent, width=width, critic_width=critic_width, conditional=conditional, norm=norm
        )
        self.penalty = (0.1 if spec.flat else 10.0) if penalty is None else penalty
        self.slope, self.spread = slope, spread

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """One step each. Both use one batch of fakes."""
        fake = self.generator(self.codes(batch, generator))
        real_score, fake_score = self.score(batch.x, batch.cond), self.score(fake.detach(), batch.cond)
        loss = functional.softplus(-real_score).mean() + functional.softplus(fake_score).mean()
        noise = torch.randn(batch.x.shape, generator=generator, device=batch.x.device, dtype=batch.x.dtype)
        around = (batch.x + self.spread * batch.x.std() * noise).requires_grad_()
        slope = slopes(self.score(around, batch.cond), around).norm(dim=1)
        yield "critic", {"loss": loss + self.penalty * (slope - self.slope).square().mean(), "slope": slope.mean()}
        yield "generator", {"loss": functional.softplus(-self.score(fake, batch.cond)).mean()}


Model = DRAGAN
