"""A histogram a place: independent categorical distributions, the floor under every other model of a density.

Krichevsky & Trofimov 1981, "The performance of universal encoding", IEEE Transactions on Information Theory 27 (2),
for what levels that were never seen are counted.

Here is why training by cross-entropy works, with nothing else in the way. With q the frequencies in the data and p the
model, cross-entropy(q, p) = entropy(q) + KL(q‖p), and only the last term depends on the model: the minimum is p = q,
which needs no gradient, only counting. The other autoregressive families minimise the same sum with a p that also sees
the values before.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec

# Nats in a unit of the weights. Adam's steps are as long as its learning rate, and rare levels are ten nats away.
UNIT = 10.0
LONGEST = 1000  # tokens of a sampled text, where no length is asked for


class Categorical(Family):
    """log p(x) = sum over places of log p(level | place), exactly. Text: one distribution for all tokens.

    ``smoothing``: what every level is counted beyond the data, in examples an example (text: a token); 1 / (2 N) is
    Krichevsky & Trofimov's half a count for N examples, 1 / N Laplace's one. Without it an unseen level is impossible.
    ``context``: tokens in a window of text, which only the size of a batch depends on.
    Raises ValueError for continuous data.
    """

    paper = "Krichevsky & Trofimov 1981, IEEE Transactions on Information Theory 27 (2)"
    density = "exact"
    kinds = ("image", "vector", "text")

    def __init__(self, spec: DataSpec, *, smoothing: float = 1e-5, context: int = 64):
        super().__init__(spec)
        if not (spec.levels or spec.alphabet):
            raise ValueError("continuous data: a categorical distribution speaks of levels or tokens")
        self.text, self.smoothing, self.context = bool(spec.alphabet), smoothing, context
        places, levels = (1, spec.vocabulary) if self.text else (spec.dims, spec.levels)
        self.weights = nn.Parameter(torch.zeros(places, levels))

    def log_probabilities(self) -> Tensor:
        """The model: [places, levels], whose exponentials sum to 1 in every place."""
        return F.log_softmax(UNIT * self.weights, 1)

    def frequencies(self, x: Tensor) -> Tensor:
        """The data: the share of each level in each place, [places, levels], of ``Batch.x``."""
        places, levels = self.weights.shape
        values = x.reshape(-1, 1) if self.text else self.spec.to_levels(x).flatten(1)
        cells = values + levels * torch.arange(places, device=x.device)
        counts = torch.bincount(cells.flatten(), minlength=places * levels)
        return counts.view(places, levels).to(self.weights.dtype) / len(values)

    def optimum(self, x: Tensor) -> Tensor:
        """What training on ``Batch.x`` converges to, by counting: log-probabilities [places, levels]."""
        counted = self.frequencies(x) + self.smoothing
        return (counted / counted.sum(1, keepdim=True)).log()

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """Cross-entropy from the batch's frequencies, smoothed, to the model; bits are without the smoothing."""
        frequencies = self.frequencies(batch.x[:, 1:] if self.text else batch.x)
        log_p = self.log_probabilities()
        bits = -(frequencies * log_p.detach()).sum() / (len(log_p) * math.log(2))
        loss = -((frequencies + self.smoothing) * log_p).sum()
        return {"loss": loss, "bits_per_char" if self.text else "bits_per_dim": bits}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """Exact log-probability: [B] nats; of a document, its first end included. Draws nothing."""
        log_p = self.log_probabilities()
        if self.text:
            ends = (batch.x == 0).long()
            after = ends.cumsum(1) > ends  # an end came before
            return log_p[0, batch.x].masked_fill(after, 0).sum(1)
        levels = self.spec.to_levels(batch.x).flatten(1)
        return log_p.gather(1, levels.T).sum(0)

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, length: int = 0) -> Tensor:
        """Images [n, *shape], all values at once; or documents, int64 [n, T], zeros after their end.

        ``length``: the T of documents; 0 is that of the longest known one, at most 1,000.
        """
        p = self.log_probabilities().exp()
        if self.text:
            length = length or min(self.spec.shape[0], LONGEST)
            tokens = torch.multinomial(p[0], n * length, replacement=True, generator=generator).view(n, length)
            return tokens.masked_fill((tokens == 0).cumsum(1) > 0, 0)
        levels = torch.multinomial(p, n, replacement=True, generator=generator)  # [places, n]
        return self.spec.to_float(levels.T.reshape(n, *self.spec.shape))


Model = Categorical
