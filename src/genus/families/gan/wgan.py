"""WGAN: the critic's loss is an estimate of the Wasserstein distance, and its weights are clipped to keep it one.

Arjovsky et al. 2017, "Wasserstein GAN" (https://arxiv.org/abs/1701.07875). The networks are those of Radford et al.
2015 (https://arxiv.org/abs/1511.06434).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Generator

from genus.contract import Batch, Terms
from genus.data.spec import DataSpec
from genus.families.gan._adversarial import DCGAN, Sines, deal


class WGAN(DCGAN):
    """The critic maximises E f(x) - E f(G(z)) over functions whose slope is bounded (equations 2 and 3).

    ``n_critic``: critic steps for one of the generator, among which the batch is dealt out (algorithm 1: 5).
    ``clip``: c, the largest weight of the critic (algorithm 1: 0.01). The frequencies of a layer of sines are not
    clipped: they choose features, which are bounded as they are. ``norm`` of the critic: "batch", as in the paper's
    DCGAN, "layer" or "none". The rest is as ``DCGAN`` has it.
    """

    paper = "Arjovsky et al. 2017, arXiv 1701.07875"

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int = 64,
        width: int = 32,
        critic_width: int = 20,
        n_critic: int = 5,
        clip: float = 0.01,
        norm: str = "batch",
        conditional: bool = False,
    ):
        super().__init__(
            spec,
            latent=latent,
            width=width,
            critic_width=critic_width,
            conditional=conditional,
            norm=norm,
            offset=False,
        )
        self.n_critic, self.clip = n_critic, clip

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """Algorithm 1. The term "wasserstein" is the critic's estimate, K times the distance for slopes up to K."""
        with torch.no_grad():  # the generator stands still meanwhile
            fakes = self.generator(self.codes(batch, generator))
        for x, fake, cond in deal(self.n_critic, batch.x, fakes, batch.cond):
            distance = self.score(x, cond).mean() - self.score(fake, cond).mean()
            yield "critic", {"loss": -distance, "wasserstein": distance}
            self._clip()
        code, cond = deal(self.n_critic, self.codes(batch, generator), batch.cond)[0]
        yield "generator", {"loss": -self.score(self.generator(code), cond).mean()}

    @torch.no_grad()
    def _clip(self) -> None:
        free = {id(p) for module in self.critic if isinstance(module, Sines) for p in module.parameters()}
        for parameter in self.groups()["critic"]:
            if id(parameter) not in free:
                parameter.clamp_(-self.clip, self.clip)


Model = WGAN
