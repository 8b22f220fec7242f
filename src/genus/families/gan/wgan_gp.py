"""WGAN-GP: a penalty on the critic's slope in place of clipped weights.

Gulrajani et al. 2017, "Improved Training of Wasserstein GANs" (https://arxiv.org/abs/1704.00028). The networks are
those of Radford et al. 2015 (https://arxiv.org/abs/1511.06434), but for the critic's norm.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Generator

from genus.contract import Batch, Terms
from genus.data.spec import DataSpec
from genus.families.gan._adversarial import DCGAN, deal, slopes


class WGANGP(DCGAN):
    """The critic maximises E f(x) - E f(G(z)) - λ E(|∇f(x̂)| - 1)², x̂ between a real and a fake (equation 3).

    ``penalty``: λ, by default 10 (algorithm 1); for vectors 0.1, as in the authors' code for toys: with 10 it takes far
    more critic steps. ``n_critic``: critic steps for one of the generator, among which the batch is dealt out
    (algorithm 1: 5). ``norm``: the penalty is of the slope at one example, so the critic's norm is "layer" or "none",
    never "batch" (section 4). The rest is as ``DCGAN`` has it.
    Raises ValueError for "batch".
    """

    paper = "Gulrajani et al. 2017, arXiv 1704.00028"

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int = 64,
        width: int = 32,
        critic_width: int = 20,
        n_critic: int = 5,
        penalty: float | None = None,
        norm: str = "layer",
        conditional: bool = False,
    ):
        if norm == "batch":
            raise ValueError("norm: with batch norm the critic has no slope at one example; use layer or none")
        super().__init__(
            spec,
            latent=latent,
            width=width,
            critic_width=critic_width,
            conditional=conditional,
            norm=norm,
            offset=False,
        )
        self.n_critic, self.penalty = n_critic, (0.1 if spec.flat else 10.0) if penalty is None else penalty

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """Algorithm 1. The term "wasserstein" is the critic's estimate of the distance, "slope" the mean of |∇f(x̂)|."""
        with torch.no_grad():  # the generator stands still meanwhile
            fakes = self.generator(self.codes(batch, generator))
        mix = torch.rand(len(fakes), 1, 1, 1, generator=generator, device=fakes.device, dtype=batch.x.dtype)
        between = mix * batch.x + (1 - mix) * fakes
        for x, fake, mixed, cond in deal(self.n_critic, batch.x, fakes, between, batch.cond):
            distance = self.score(x, cond).mean() - self.score(fake, cond).mean()
            mixed.requires_grad_()
            slope = slopes(self.score(mixed, cond), mixed).norm(dim=1)
            loss = self.penalty * (slope - 1).square().mean() - distance
            yield "critic", {"loss": loss, "wasserstein": distance, "slope": slope.mean()}
        code, cond = deal(self.n_critic, self.codes(batch, generator), batch.cond)[0]
        yield "generator", {"loss": -self.score(self.generator(code), cond).mean()}


Model = WGANGP
