"""LSGAN: least squares in place of the logarithms.

Mao et al. 2017, "Least Squares Generative Adversarial Networks" (https://arxiv.org/abs/1611.04076). The networks are
those of Radford et al. 2015 (https://arxiv.org/abs/1511.06434).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Generator

from genus.contract import Batch, Terms
from genus.data.spec import DataSpec
from genus.families.gan._adversarial import DCGAN


class LSGAN(DCGAN):
    """Critic: ½ E(D(x) - b)² + ½ E(D(G(z)) - a)²; generator: ½ E(D(G(z)) - c)² (equation 2). D is the score itself.

    A fake far on the wrong side of the boundary is still pulled to it, where the logarithm's slope is gone.
    ``targets``: (a, b, c). (0, 1, 1) is equation 9; (-1, 1, 0) is equation 8, the Pearson χ² divergence between
    (p + q) and 2q. The rest is as ``DCGAN`` has it.
    """

    paper = "Mao et al. 2017, arXiv 1611.04076"

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int = 64,
        width: int = 32,
        critic_width: int = 20,
        targets: tuple[float, float, float] = (0.0, 1.0, 1.0),
        conditional: bool = False,
    ):
        super().__init__(spec, latent=latent, width=width, critic_width=critic_width, conditional=conditional)
        self.fake, self.real, self.wished = targets

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """One step each. Both use one batch of fakes."""
        fake = self.generator(self.codes(batch, generator))
        real_score, fake_score = self.score(batch.x, batch.cond), self.score(fake.detach(), batch.cond)
        real_error, fake_error = (real_score - self.real).square(), (fake_score - self.fake).square()
        yield "critic", {"loss": real_error.mean() / 2 + fake_error.mean() / 2}
        yield "generator", {"loss": (self.score(fake, batch.cond) - self.wished).square().mean() / 2}


Model = LSGAN
