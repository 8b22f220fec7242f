"""Ex-post density estimation: once a variational autoencoder has learnt, a prior is fitted to the codes that it gives.

Ghosh et al. 2020, "From Variational to Deterministic Autoencoders", https://arxiv.org/abs/1903.12436: the codes of all
examples together are not the standard normal ones that samples are made from, so a second model learns where they are.

Differences from the paper, whose second model is a mixture of ten normals of full covariance:
- each number of the code has a mixture of normals that depends on the numbers before it, all from one MADE (Germain et
  al. 2015, https://arxiv.org/abs/1502.03509, as in Papamakarios et al. 2017, https://arxiv.org/abs/1705.07057);
- it learns from draws of q(z|x), not from means: its loss is a term of the bound, for which the best prior is the mean
  of q(z|x) over all examples (Tomczak & Welling 2018, https://arxiv.org/abs/1705.07120).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor

from genus.contract import Batch, Family, Infers, Terms
from genus.data.spec import DataSpec
from genus.nn.made import MADE


class ExPost(Family):
    """p(x, z) = p(x|z) p(z): p(x|z) and q(z|x) are those of a ``parent`` that ``Infers`` and stays frozen; p(z) is new.

    ``components``: normals in each number's mixture; ``hidden``: width of the network that gives them.
    Raises ValueError for a parent of other data, and for one that is told labels: its codes are in part not learnt.
    """

    paper = "Ghosh et al. 2020, arXiv:1903.12436"
    density = "elbo"
    widths = ("hidden",)
    inherits = Infers

    def __init__(self, spec: DataSpec, *, parent: Any, hidden: int = 256, components: int = 8):
        super().__init__(spec)
        if parent.spec.shape != spec.shape:
            raise ValueError(f"the parent is of examples {parent.spec.shape}, the data of {spec.shape}")
        if hasattr(parent, "labels"):
            raise ValueError("the parent is conditional: right would be one that is told no labels")
        self.parent = parent
        self.made = MADE(parent.latent, hidden, 3 * components)
        # Together about standard normal, and apart: equal ones would stay equal.
        means = torch.linspace(-2, 2, components + 2)[1:-1]
        start = torch.cat([torch.zeros(components), means, torch.full((components,), math.log(0.6))])
        with torch.no_grad():
            self.made.last_bias.copy_(start)

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z), [B] nats, of codes [B, latent]."""
        with torch.autocast(z.device.type, enabled=False):  # bf16 is too coarse for a density, and for draws from it
            weights, means, log_stds = _mixture(self.made(z))
        each = -0.5 * ((z.unsqueeze(-1) - means) * torch.exp(-log_stds)).square() - log_stds
        return (weights + each - 0.5 * math.log(2 * math.pi)).logsumexp(-1).sum(1)

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """KL(q(z|x) || p(z)) in nats by one draw of z: all of the bound that is still to be learnt.

        ``normal_rate``: what it would be of the parent's standard normal prior, by the same draw.
        """
        with torch.no_grad():
            z, log_q = self.parent.infer(batch.x, generator=generator)
        normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        return {"loss": (log_q - self.log_prior(z)).mean(), "normal_rate": (log_q - normal).mean()}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """The ELBO from one draw of the code: [B] nats, below the log-probability in expectation."""
        return self.log_weights(batch, 1, generator=generator)[0]

    def log_weights(self, batch: Batch, k: int, *, generator: Generator) -> Tensor:
        """[k, B] nats: log p(x, z) - log q(z|x) for ``k`` draws of z."""
        weights = []
        for _ in range(k):
            z, log_q = self.parent.infer(batch.x, generator=generator)
            weights.append(self.parent.log_likelihood(batch.x, z) + self.log_prior(z) - log_q)
        return torch.stack(weights)

    def rate(self, batch: Batch, *, generator: Generator) -> Tensor:
        """KL(q(z|x) || p(z)), what the code says of each example: [B] nats, an estimate by one draw."""
        z, log_q = self.parent.infer(batch.x, generator=generator)
        return log_q - self.log_prior(z)

    def encode(self, x: Tensor) -> Tensor:
        """The parent's code, [B, latent]."""
        return self.parent.encode(x)

    def decode(self, code: Tensor) -> Tensor:
        """What the parent makes of codes, [B, *shape]."""
        return self.parent.decode(code)

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, temperature: float = 0.0) -> Tensor:
        """[n, *shape]: codes drawn from the prior and shown by the parent.

        At ``temperature`` 0 the expected example of p(x|z), at 1 one that is drawn from it.
        """
        return self.parent.show(self.sample_codes(n, generator=generator), generator=generator, temperature=temperature)

    def sample_codes(self, n: int, *, generator: Generator) -> Tensor:
        """[n, latent], number by number: a component, and where in it by a normal draw."""
        like = self.made.last_bias
        normal = torch.randn(n, len(like), generator=generator, device=like.device, dtype=like.dtype)

        def solve(normal: Tensor, told: Tensor) -> Tensor:
            weights, means, log_stds = _mixture(told)
            chosen = torch.multinomial(weights.exp(), 1, generator=generator)
            return torch.addcmul(means.gather(1, chosen)[:, 0], log_stds.gather(1, chosen)[:, 0].exp(), normal)

        with torch.autocast(like.device.type, enabled=False):
            return self.made.unroll(normal, solve)[0]


def _mixture(told: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log weights, means and log standard deviations, [..., K] each, of what the network gives, [..., 3 K]."""
    logits, means, log_stds = told.chunk(3, -1)
    return logits.log_softmax(-1), means, log_stds


Model = ExPost
