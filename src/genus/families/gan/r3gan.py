"""R3GAN: a game of pairs, damped on both sides, between two modern residual networks without norms.

Huang et al. 2024, "The GAN is dead; long live the GAN! A Modern Baseline GAN" (https://arxiv.org/abs/2501.05441). The
game is that of Jolicoeur-Martineau 2018 (https://arxiv.org/abs/1807.00734), the penalties are those of Mescheder et al.
2018 (https://arxiv.org/abs/1801.04406), applied every few steps as by Karras et al. 2019
(https://arxiv.org/abs/1912.04958).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from genus.contract import Batch, Terms
from genus.data.spec import DataSpec
from genus.families.gan._adversarial import Adversarial, dense, slopes


class R3GAN(Adversarial):
    """The critic judges each fake beside a real one: E f(D(G(z)) - D(x)), f(t) = -log(1 + exp(-t)) (section 2).

    So a fake is pulled to the data wherever it is, not only across one boundary, and modes are not forgotten.
    ``gamma``: weight γ of the penalties R1 and R2, γ/2 E|∇D|² on real and on generated images,
    which come ``every`` few critic steps and then that many times as strong; the paper has them in each.
    ``latent``: size of z. ``width`` and ``critic_width``: channels at half resolution, twice as many at a quarter;
    ``blocks``: at each of the two. Vectors [D, 1, 1] get the dense networks of DCGAN, z of at most D numbers and a
    tenth of γ: a critic of few numbers must be steep. Raises ValueError for sizes that are no multiples of 4.
    """

    critic_steps: Tensor
    paper = "Huang et al. 2024, arXiv 2501.05441"
    widths = ("width", "critic_width")

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int = 64,
        width: int = 24,
        critic_width: int = 24,
        blocks: int = 1,
        gamma: float = 0.05,
        every: int = 4,
        conditional: bool = False,
    ):
        super().__init__(spec, latent=latent, conditional=conditional)
        channels, high, across = spec.shape
        if not spec.flat and (high % 4 or across % 4):
            raise ValueError(f"R3GAN halves the image twice: height and width must be multiples of 4, not {spec.shape}")
        self.gamma, self.every = gamma / 10 if spec.flat else gamma, every
        self.register_buffer("critic_steps", torch.zeros((), dtype=torch.int64))  # where in the cycle: for resuming
        if spec.flat:
            self.generator, self.critic = dense(self.latent, spec, 4 * width, 8 * critic_width, offset=False)
            self._watch_labels()
            return
        low = (high // 4, across // 4)
        # Pixels are moved into channels and back, where the paper interpolates: it costs least.
        self.generator = nn.Sequential(
            nn.Linear(self.latent, 2 * width * low[0] * low[1]),
            nn.Unflatten(1, (2 * width, *low)),  # [B, 2w, H/4, W/4]
            *(Block(2 * width, blocks) for _ in range(blocks)),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.PixelShuffle(2),  # [B, w, H/2, W/2]
            *(Block(width, blocks) for _ in range(blocks)),
            nn.Conv2d(width, 4 * channels, 3, padding=1),
            nn.PixelShuffle(2),  # [B, C, H, W]
            nn.Tanh(),
        )
        w = critic_width
        self.critic = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * channels, w, 3, padding=1),  # [B, w, H/2, W/2]
            *(Block(w, blocks) for _ in range(blocks)),
            nn.Conv2d(w, 2 * w, 1),
            nn.AvgPool2d(2),  # [B, 2w, H/4, W/4]
            *(Block(2 * w, blocks) for _ in range(blocks)),
            nn.Flatten(),
            nn.Linear(2 * w * low[0] * low[1], 1, bias=False),
        )
        for layer in (*self.generator, *self.critic):
            if isinstance(layer, nn.Linear | nn.Conv2d):  # what norms would see to: variance 1 in, variance 1 out
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        self._watch_labels()
        self.to(memory_format=torch.channels_last)

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """One step each. Both use one batch of fakes, beside the reals as they come."""
        fake = self.generator(self.codes(batch, generator))
        damped = self.gamma > 0 and int(self.critic_steps) % self.every == 0
        both = torch.cat([batch.x, fake.detach()]).requires_grad_(damped)
        cond = None if batch.cond is None else batch.cond.repeat(2)
        scores = self.score(both, cond)  # nothing in the critic mixes examples: one pass
        real_score, fake_score = scores.chunk(2)
        terms = {"loss": functional.softplus(fake_score - real_score).mean()}
        if damped:
            r1, r2 = (slope.square().sum(1).mean() for slope in slopes(scores, both).chunk(2))
            terms = {"loss": terms["loss"] + self.gamma / 2 * self.every * (r1 + r2), "r1": r1, "r2": r2}
        yield "critic", terms
        self.critic_steps += 1
        with torch.no_grad():
            real_score = self.score(batch.x, batch.cond)
        yield "generator", {"loss": functional.softplus(real_score - self.score(fake, batch.cond)).mean()}


class Block(nn.Module):
    """x + W₃ φ(W₂ φ(W₁ φ(x))): 1x1, grouped 3x3 and 1x1 convolutions, φ a leaky ReLU (section 3).

    Groups of 16 channels, or of the largest number below that divides both. He's initialisation, scaled by the number
    of blocks, and W₃ = 0 (Zhang et al. 2019, arXiv:1901.09321): it starts as the identity, and nothing needs a norm.
    """

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.enter = nn.Conv2d(width, width, 1)
        self.inner = nn.Conv2d(width, width, 3, padding=1, groups=width // math.gcd(width, 16))
        self.leave = nn.Conv2d(width, width, 1)
        for layer in (self.enter, self.inner):
            nn.init.kaiming_normal_(layer.weight, a=0.2)
            layer.weight.data.mul_((2 * blocks) ** -0.25)
        nn.init.zeros_(self.leave.weight)
        for layer in (self.enter, self.inner, self.leave):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = functional.leaky_relu(self.enter(functional.leaky_relu(x, 0.2)), 0.2)
        return x + self.leave(functional.leaky_relu(self.inner(h), 0.2))


Model = R3GAN
