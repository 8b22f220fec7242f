"""A variational autoencoder of documents: one code for what a whole verse says, a language model to say it.

Bowman et al. 2016, "Generating Sentences from a Continuous Space" (CoNLL), arXiv:1511.06349. What keeps the decoder
from ignoring the code is theirs (section 3): the weight of the KL term rises from 0 to 1 during training (KL cost
annealing), and tokens that the decoder has before it are left out at random (word dropout); all of them left out is
the inputless decoder.

Differences from the paper:
- Tokens are characters. So a word dropped is a character dropped, and there are ten times as many of them.
- The encoder gives the mean of its outputs, not the last one: over a hundred characters that is learnt much sooner.
- The code is an input of every step, not of the first one; the paper tried that too, and saw little difference.
- The posterior's means are held apart by batch normalisation (Zhu et al. 2020, "A Batch Normalized Inference Network
  Keeps the KL Vanishing Away", arXiv:2004.12585): without, in the minutes that a training has here, the code
  says nothing before the decoder has learnt to spell, and then it is too late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus import samplers
from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.families.vae._networks import kl_by_dimension

DECODED = 0.5  # temperature of the documents that codes decode to

Memory = tuple[Tensor, Tensor]  # of the decoder: output and cell, both [1, B, hidden]


class SentenceVAE(Family):
    """p(z) = N(0, I), q(z|x) = N(mean, diag) by an LSTM, p(x|z) by another one that reads z with every token.

    Learns from whole documents of at most ``context`` tokens; longer ones are cut there, in training alone.
    ``word_dropout``: share of the tokens before that the decoder is not shown in training; 1 is the inputless decoder,
    which is not shown them in ``log_prob`` and ``sample`` either. ``anneal``: steps in which the weight of the KL
    rises, in a straight line; 0: it is 1 from the start. ``spread``: standard deviation over the documents of a batch
    that each number's mean is held to, by which the KL is ``latent * spread**2 / 2`` nats at least; 0: it is free, as
    in the paper. ``hidden``: cells of the decoder.
    Raises ValueError for data that is not text.
    """

    paper = "Bowman et al. 2016, arXiv:1511.06349"
    density = "elbo"
    widths = ("hidden", "encoder")
    kinds = ("text",)
    whole = True
    steps: Tensor

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int = 16,
        hidden: int = 192,
        encoder: int = 64,
        embedding: int = 64,
        context: int = 200,
        word_dropout: float = 0.25,
        anneal: int = 300,
        spread: float = 0.7,
    ):
        super().__init__(spec)
        if spec.kind != "text":
            raise ValueError(f"a sentence VAE is for text, not for data of shape {spec.shape} without an alphabet")
        if not 0 <= word_dropout <= 1:
            raise ValueError(f"word_dropout is a share from 0 to 1, not {word_dropout}")
        self.latent, self.context, self.word_dropout = latent, context, word_dropout
        self.anneal, self.spread = anneal, spread
        self.embedding = nn.Embedding(spec.vocabulary, embedding)
        self.encoder = nn.LSTM(embedding, encoder, batch_first=True)
        self.encoder_head = nn.Linear(encoder, 2 * latent)
        self.apart = nn.BatchNorm1d(latent, affine=False, eps=1e-9)  # means start close together
        self.decoder = nn.LSTM(embedding + latent, hidden, batch_first=True)
        self.head = nn.Linear(hidden, spec.vocabulary)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of training: where the annealing is
        with torch.no_grad():  # forget gates start open (Gers et al. 2000); the gates' order is input, forget, …
            weights = dict(self.decoder.named_parameters())
            weights["bias_hh_l0"].zero_()
            weights["bias_ih_l0"].zero_()[hidden : 2 * hidden] = 1.0

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of q(z|x) for documents [B, T], each [B, latent]."""
        counted = alive(x).unsqueeze(-1)
        outputs, _ = self.encoder(self.embedding(x))  # [B, T, encoder]
        seen = (outputs * counted).sum(1) / counted.sum(1)
        mean, log_std = self.encoder_head(seen).to(self.embedding.weight.dtype).chunk(2, 1)  # not in bf16
        return (self.spread * self.apart(mean) if self.spread else mean), log_std

    def read(
        self, before: Tensor, z: Tensor, memory: Memory | None, shown: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """Tokens [B, T] after what is remembered -> logits of the token after each [B, T, V], and what is then.

        Of the tokens only those that are ``shown`` [B, T] are read.
        """
        h = self.embedding(before)  # [B, T, embedding]
        if self.word_dropout == 1:
            h = torch.zeros_like(h)
        elif shown is not None:
            h = h * shown.unsqueeze(-1)
        code = z.unsqueeze(1).expand(-1, before.shape[1], -1)
        h, memory = self.decoder(torch.cat([h, code.to(h.dtype)], -1), memory)  # [B, T, hidden]
        return self.head(h), memory

    def log_likelihood(self, x: Tensor, z: Tensor, shown: Tensor | None = None) -> Tensor:
        """log p(x|z) of documents [B, T], each up to and including its end: [B] nats."""
        logits, _ = self.read(F.pad(x, (1, 0))[:, :-1], z, None, shown)  # a document begins after the end of one
        nats = -F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view_as(x)
        return (nats * alive(x)).sum(1)

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """The loss, then a step of the annealing."""
        yield "model", self.loss(batch, generator=generator)
        self.steps += 1

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """The negative ELBO of documents [B, T], nats per document, its KL weighed by how far the annealing is."""
        x = batch.x
        mean, log_std = self.posterior(x)
        shown = None
        if self.training and 0 < self.word_dropout < 1:
            shown = torch.rand(x.shape, generator=generator, device=x.device) >= self.word_dropout
        log_px = self.log_likelihood(x, _drawn(mean, log_std, generator), shown).mean()
        kl = kl_by_dimension(mean, log_std).mean(0)
        weight = (self.steps / self.anneal).clamp(max=1.0) if self.anneal else torch.ones_like(log_px)
        tokens = alive(x).sum().to(kl.dtype) / len(x)  # a document
        return {
            "loss": weight * kl.sum() - log_px,
            "kl": kl.detach().sum(),
            "kl_weight": weight,
            "bits_per_char": (kl.sum() - log_px).detach() / (tokens * math.log(2)),
        }

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """The ELBO from one draw of the code: [B] nats of documents [B, T], each up to and including its end."""
        mean, log_std = self.posterior(batch.x)
        log_px = self.log_likelihood(batch.x, _drawn(mean, log_std, generator))
        return log_px - kl_by_dimension(mean, log_std).sum(1)

    def rate(self, batch: Batch, *, generator: Generator) -> Tensor:
        """KL(q(z|x) || p(z)), what the code says of each document: [B] nats. Draws nothing."""
        return kl_by_dimension(*self.posterior(batch.x)).sum(1)

    def encode(self, x: Tensor) -> Tensor:
        """Documents [B, T], zeros behind their ends, to the posterior's mean: [B, latent]."""
        return self.posterior(x)[0]

    @torch.no_grad()
    def decode(self, code: Tensor) -> Tensor:
        """One document a code, always the same: int64 [B, T], zeros after its end.

        The likeliest tokens would run in circles (Holtzman et al. 2020, 1904.09751). These are drawn from p(x|z) at the
        temperature ``DECODED``, by Gumbel noise of a fixed seed, the same for all codes: what differs is theirs.
        """
        generator = torch.Generator(code.device).manual_seed(0)

        def perturbed(logits: Tensor) -> Tensor:
            return logits / DECODED - torch.empty_like(logits[:1]).exponential_(generator=generator).log()

        return self._written(code, generator, change=perturbed, temperature=0.0)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        generator: Generator,
        cond: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        length: int = 0,
        prompt: str = "",
    ) -> Tensor:
        """int64 [n, T]: documents of codes from the prior that begin with ``prompt``. Knobs: samplers.documents."""
        weight = self.head.weight
        z = torch.randn(n, self.latent, generator=generator, device=weight.device, dtype=weight.dtype)
        knobs: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "length": length}
        return self._written(z, generator, prompt=self.spec.tokens(prompt), **knobs)

    def _written(
        self,
        z: Tensor,
        generator: Generator,
        *,
        prompt: list[int] | None = None,
        change: Callable[[Tensor], Tensor] = lambda logits: logits,
        **knobs: Any,
    ) -> Tensor:
        memory: Memory | None = None

        def follow(tokens: Tensor) -> Tensor:
            nonlocal memory
            logits, memory = self.read(tokens, z, memory)
            return change(logits[:, -1])

        room: dict[str, Any] = {"longest": self.spec.shape[0], "device": z.device}
        return samplers.documents(follow, len(z), prompt=prompt or [], generator=generator, **room, **knobs)


def alive(x: Tensor) -> Tensor:
    """Which tokens [B, T] are part of their document: bool, up to the first end, that one included."""
    ended = x.eq(0)
    return ended.cumsum(1) - ended.long() == 0


def _drawn(mean: Tensor, log_std: Tensor, generator: Generator) -> Tensor:
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + log_std.exp() * noise


Model = SentenceVAE
