"""GAN: a generator and a discriminator play a game of two, and nothing damps it.

Goodfellow et al. 2014, "Generative Adversarial Nets" (https://arxiv.org/abs/1406.2661). The networks are those of
Radford et al. 2015 (https://arxiv.org/abs/1511.06434).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Generator
from torch.nn import functional

from genus.contract import Batch, Terms
from genus.data.spec import DataSpec
from genus.families.gan._adversarial import DCGAN


class GAN(DCGAN):
    """The value of the game is V = E log D(x) + E log(1 - D(G(z))), D the sigmoid of the score (equation 1).

    ``game`` is what the generator does: "minimax" minimises V, whose slope vanishes where D tells fakes with certainty;
    "non-saturating" maximises E log D(G(z)) in its place (section 3). The rest is as ``DCGAN`` has it.
    Raises ValueError for another game.
    """

    paper = "Goodfellow et al. 2014, arXiv 1406.2661"

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int = 64,
        width: int = 32,
        critic_width: int = 20,
        game: str = "non-saturating",
        conditional: bool = False,
    ):
        super().__init__(spec, latent=latent, width=width, critic_width=critic_width, conditional=conditional)
        if game not in ("minimax", "non-saturating"):
            raise ValueError(f"game: right would be minimax or non-saturating, not '{game}'")
        self.game = game

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """Algorithm 1 with k = 1. Both steps use one batch of fakes."""
        fake = self.generator(self.codes(batch, generator))
        real_score, fake_score = self.score(batch.x, batch.cond), self.score(fake.detach(), batch.cond)
        # -log D = softplus(-score) and -log(1 - D) = softplus(score)
        yield "critic", {"loss": functional.softplus(-real_score).mean() + functional.softplus(fake_score).mean()}
        score = self.score(fake, batch.cond)
        loss = -functional.softplus(score) if self.game == "minimax" else functional.softplus(-score)
        yield "generator", {"loss": loss.mean()}


Model = GAN
