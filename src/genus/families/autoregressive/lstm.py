"""A recurrent language model: long short-term memory (Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735).

Gates and training as Zaremba et al. 2014, "Recurrent Neural Network Regularization", arXiv:1409.2329: the text runs in
parallel streams, the memory goes from each window to the next, gradients stop there (truncated back-propagation), and
dropout is on the connections that are not recurrent, one mask a window (Merity et al. 2018, arXiv:1708.02182, 4.1).

Differences from these:
- The end of a document empties the memory: an input that is 1 there holds input and forget gates shut. So documents are
  independent, in training as in ``log_prob``, though they come in one stream.
- The other forget gates start open, at a bias of 1 (Gers et al. 2000).
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus import samplers
from genus.contract import Batch, Terms
from genus.data.spec import DataSpec
from genus.families.autoregressive._text import TextModel

SHUT = -1000.0  # added to a gate: nothing else that it adds up comes near, so its sigmoid and its gradient are 0

Memory = tuple[tuple[Tensor, Tensor], ...]  # of each layer output and cell, both [1, B, hidden]


class LSTM(TextModel):
    """log p(document) = sum of log p(token | all tokens before it), exactly; the loss is in nats per token.

    ``hidden``: cells a layer. ``embedding``: numbers a token becomes. ``context``: tokens a window, that is how far
    gradients go back; what the model remembers has no such limit. ``dropout``: share of each layer's inputs and of the
    outputs that training sets to zero.
    Raises ValueError for data that is not text.
    """

    paper = "Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735; Zaremba et al. 2014, arXiv:1409.2329"
    widths = ("hidden",)
    carried: Tensor

    def __init__(
        self,
        spec: DataSpec,
        *,
        hidden: int = 256,
        layers: int = 1,
        embedding: int = 64,
        context: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__(spec)
        self.hidden, self.context, self.dropout = hidden, context, dropout
        self.embedding = nn.Embedding(spec.vocabulary, embedding)
        self.layers = nn.ModuleList(
            nn.LSTM((hidden if layer else embedding) + 1, hidden, batch_first=True) for layer in range(layers)
        )
        self.head = nn.Linear(hidden, spec.vocabulary)
        # What each stream remembers: [layers, output or cell, rows, hidden]. Packages do without.
        self.register_buffer("carried", torch.zeros(layers, 2, 0, hidden), persistent=False)
        with torch.no_grad():
            for layer in self._layers():
                weights = dict(layer.named_parameters())  # in them the gates' order is input, forget, cell, output
                weights["bias_hh_l0"].zero_()
                weights["bias_ih_l0"].zero_()[hidden : 2 * hidden] = 1.0
                weights["weight_ih_l0"][: 2 * hidden, -1] = SHUT

    def initialise(self, batch: Batch, *, generator: Generator) -> None:
        """Makes room for what the streams of ``batch`` will carry."""
        self.carried = self.carried.new_zeros(len(self.layers), 2, len(batch.x), self.hidden)

    def restart(self) -> None:
        """Forgets what is carried: the next batch goes on from none."""
        self.carried.zero_()

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """Mean over the tokens of windows [B, T + 1], all but the first of each; row b goes on where its last ended."""
        if self.carried.shape[2] != len(batch.x):
            self.initialise(batch, generator=generator)
        before = self._memory(self.carried.clone())  # what backward needs, and the buffer is about to change
        logits, memory = self.read(batch.x[:, :-1], before, generator if self.training else None)
        with torch.no_grad():
            self.carried.copy_(torch.stack([torch.cat(layer) for layer in memory]))
        loss = F.cross_entropy(logits.flatten(0, 1), batch.x[:, 1:].flatten())
        return {"loss": loss, "bits_per_char": loss.detach() / math.log(2)}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """[B] nats of documents [B, T], each up to and including its end; draws nothing. Flat memory for long ones."""
        x = batch.x
        nats = self.head.weight.new_zeros(len(x))
        seen = F.pad(x, (1, 0))[:, :-1]  # a document begins after the end of one
        alive = seen.eq(0).cumsum(1).eq(1)  # up to the first end, that one included
        memory = self.blank(len(x))
        for inputs, targets, counted in zip(*(part.split(256, 1) for part in (seen, x, alive)), strict=True):
            if not counted.any():
                break
            logits, memory = self.read(inputs, memory)
            log_p = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            nats = nats + (log_p.view_as(targets) * counted).sum(1)
        return nats

    def blank(self, rows: int) -> Memory:
        """What is remembered at the start, and after the end of a document: nothing."""
        return self._memory(self.head.weight.new_zeros(len(self.layers), 2, rows, self.hidden))

    def read(self, x: Tensor, memory: Memory, generator: Generator | None = None) -> tuple[Tensor, Memory]:
        """Tokens [B, T] after what is remembered -> logits of the token after each [B, T, V], and what is then.

        With a ``generator`` things are dropped.
        """
        ended = x.eq(0).unsqueeze(-1).to(self.embedding.weight.dtype)
        h, kept = self.embedding(x), []  # [B, T, embedding]
        for layer, before in zip(self._layers(), memory, strict=True):
            h, after = layer(torch.cat([self._drop(h, generator), ended], -1), before)  # [B, T, hidden]
            kept.append(after)
        return self.head(self._drop(h, generator)), tuple(kept)

    def reader(self, n: int) -> samplers.Next:
        """Reads ``n`` documents, their memory at hand."""
        memory = self.blank(n)

        def follow(tokens: Tensor) -> Tensor:
            nonlocal memory
            logits, memory = self.read(tokens, memory)
            return logits[:, -1]

        return follow

    def _layers(self) -> list[nn.LSTM]:
        return cast("list[nn.LSTM]", list(self.layers))

    def _memory(self, stored: Tensor) -> Memory:
        """[layers, 2, B, hidden] as the layers want it."""
        return tuple((output.unsqueeze(0), cell.unsqueeze(0)) for output, cell in stored.unbind())

    def _drop(self, h: Tensor, generator: Generator | None) -> Tensor:
        if generator is None or not self.dropout:
            return h
        kept = torch.rand(len(h), 1, h.shape[-1], generator=generator, device=h.device) >= self.dropout
        return h * kept / (1 - self.dropout)


Model = LSTM
