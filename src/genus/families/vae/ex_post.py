"""Ex-post density estimation: once a variational autoencoder has learnt, a prior is fitted to the codes that it gives.

Ghosh et al. 2020, "From Variational to Deterministic Autoencoders", https://arxiv.org/abs/1903.12436: the codes of all
examples together are not the standard normal ones that samples are made from, so a second model learns where they are.

Differences from the paper, whose second model is a mixture of ten normals of full covariance:
- each number of the code has a mixture of normals that depends on the numbers before it, all from one MADE (Germain et
  al. 2015, https://arxiv.org/abs/1502.03509, as in Papamakarios et al. 2017, https://arxiv.org/abs/1705.07057);
- it learns from draws of q(z|x), not from means: its loss is a term of the bound, for which the best prior is the mean
  of q(z|x) over all examples (Tomczak & Welling 2018, https://arxiv.org/abs/1705.07120).

Told labels, it is one prior a class: the decoder, which z tells the class anyhow, needs to know none. Samples that are
more surely of a class can then be had as in Razavi et al. 2019 (VQ-VAE-2, https://arxiv.org/abs/1906.00446), which
rejects what a classifier of images doubts. Here the prior itself says by Bayes' rule which of several is the surest.
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
    ``conditional``: the prior is told the label y, p(z|y), with p(y) alike for all; what is given none is of any.
    Raises ValueError for a parent of other data, and for ``conditional`` where the data has no classes.
    """

    paper = "Ghosh et al. 2020, arXiv:1903.12436"
    density = "elbo"
    widths = ("hidden",)
    inherits = Infers

    def __init__(
        self, spec: DataSpec, *, parent: Any, hidden: int = 256, components: int = 8, conditional: bool = False
    ):
        super().__init__(spec)
        if parent.spec.shape != spec.shape:
            raise ValueError(f"the parent is of examples {parent.spec.shape}, the data of {spec.shape}")
        if conditional and len(spec.classes) < 2:
            raise ValueError("conditional: the data has no classes to ask for")
        self.parent, self.conditional = parent, conditional
        if conditional:
            self.labels = len(spec.classes)  # only then: contract.Conditional
        self.made = MADE(parent.latent, hidden, 3 * components, labels=len(spec.classes) if conditional else 0)
        # Together about standard normal, and apart: equal ones would stay equal.
        means = torch.linspace(-2, 2, components + 2)[1:-1]
        start = torch.cat([torch.zeros(components), means, torch.full((components,), math.log(0.6))])
        with torch.no_grad():
            self.made.last_bias.copy_(start)

    def log_prior(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """log p(z), [B] nats, of codes [B, latent]; of a conditional model log p(z|y) where ``label`` int64 [B] is."""
        if not self.conditional:
            return self._log_prior(z, None)
        if label is not None:
            return self._log_prior(z, label)
        every = torch.arange(self.labels, device=z.device)
        each = [self._log_prior(z, label) for label in every.unsqueeze(1).expand(-1, len(z))]
        return torch.stack(each).logsumexp(0) - math.log(self.labels)

    def _log_prior(self, z: Tensor, label: Tensor | None) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):  # bf16 is too coarse for a density, and for draws from it
            weights, means, log_stds = _mixture(self.made(z, label))
        each = -0.5 * ((z.unsqueeze(-1) - means) * torch.exp(-log_stds)).square() - log_stds
        return (weights + each - 0.5 * math.log(2 * math.pi)).logsumexp(-1).sum(1)

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """KL(q(z|x) || p(z)) in nats by one draw of z, or with labels p(z|y): all of the bound still to be learnt.

        ``normal_rate``: what it would be of the parent's standard normal prior, by the same draw.
        """
        with torch.no_grad():
            z, log_q = self.parent.infer(batch.x, generator=generator)
        normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        return {"loss": (log_q - self.log_prior(z, batch.cond)).mean(), "normal_rate": (log_q - normal).mean()}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """The ELBO from one draw of the code: [B] nats, below the log-probability in expectation.

        Of a conditional model, that of the example given its label; where there is none, of the example.
        """
        return self.log_weights(batch, 1, generator=generator)[0]

    def log_weights(self, batch: Batch, k: int, *, generator: Generator) -> Tensor:
        """[k, B] nats: log p(x, z) - log q(z|x) for ``k`` draws of z."""
        weights = []
        for _ in range(k):
            z, log_q = self.parent.infer(batch.x, generator=generator)
            weights.append(self.parent.log_likelihood(batch.x, z) + self.log_prior(z, batch.cond) - log_q)
        return torch.stack(weights)

    def rate(self, batch: Batch, *, generator: Generator) -> Tensor:
        """KL(q(z|x) || p(z)), what the code says of each example: [B] nats, an estimate by one draw."""
        z, log_q = self.parent.infer(batch.x, generator=generator)
        return log_q - self.log_prior(z, batch.cond)

    def encode(self, x: Tensor) -> Tensor:
        """The parent's code, [B, latent]."""
        return self.parent.encode(x)

    def decode(self, code: Tensor) -> Tensor:
        """What the parent makes of codes, [B, *shape]."""
        return self.parent.decode(code)

    def sample(
        self,
        n: int,
        *,
        generator: Generator,
        cond: Tensor | None = None,
        temperature: float = 0.0,
        truncation: float = 1.0,
        candidates: int = 1,
    ) -> Tensor:
        """[n, *shape]: codes drawn from the prior, of a conditional model for labels ``cond`` int64 [n] or for any.

        At ``temperature`` 0 the expected example of p(x|z), at 1 one that is drawn from it. ``truncation`` scales the
        standard deviations of the prior's normals: below 1 samples are more typical and vary less. Of a
        conditional model the best of so many ``candidates`` is shown, for whose label y p(y|z) is highest.
        """
        code = self.sample_codes(n, generator=generator, cond=cond, truncation=truncation, candidates=candidates)
        return self.parent.show(code, generator=generator, temperature=temperature)

    def sample_codes(
        self,
        n: int,
        *,
        generator: Generator,
        cond: Tensor | None = None,
        truncation: float = 1.0,
        candidates: int = 1,
    ) -> Tensor:
        """[n, latent]. Raises ValueError for ``candidates`` where there is no label to choose by."""
        if not self.conditional:
            if candidates != 1:
                raise ValueError("candidates: the prior is told no labels to choose by; leave them out")
            return self._draw(n, None, truncation, generator)
        if cond is None:
            cond = torch.randint(self.labels, (n,), generator=generator, device=self.made.last_bias.device)
        label = cond.repeat(candidates)
        code = self._draw(len(label), label, truncation, generator)
        if candidates == 1:
            return code
        best = (self.log_prior(code, label) - self.log_prior(code)).view(candidates, n).argmax(0)
        return code.view(candidates, n, -1)[best, torch.arange(n, device=code.device)]

    def _draw(self, n: int, label: Tensor | None, truncation: float, generator: Generator) -> Tensor:
        """[n, latent], number by number: a component, and where in it by a normal draw."""
        like = self.made.last_bias
        normal = truncation * torch.randn(n, len(like), generator=generator, device=like.device, dtype=like.dtype)

        def solve(normal: Tensor, told: Tensor) -> Tensor:
            weights, means, log_stds = _mixture(told)
            chosen = torch.multinomial(weights.exp(), 1, generator=generator)
            return torch.addcmul(means.gather(1, chosen)[:, 0], log_stds.gather(1, chosen)[:, 0].exp(), normal)

        with torch.autocast(like.device.type, enabled=False):
            return self.made.unroll(normal, solve, label)[0]


def _mixture(told: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log weights, means and log standard deviations, [..., K] each, of what the network gives, [..., 3 K]."""
    logits, means, log_stds = told.chunk(3, -1)
    return logits.log_softmax(-1), means, log_stds


Model = ExPost
