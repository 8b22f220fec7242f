"""What language models that read symbol by symbol have in common: the data they take, and how they are drawn from."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from genus import samplers
from genus.contract import Family
from genus.data.spec import DataSpec


class TextModel(Family):
    """log p(document) = sum of log p(token | tokens before it); ``head`` gives the logits of the next token.

    Raises ValueError for data that is not text.
    """

    density = "exact"
    kinds: ClassVar[tuple[str, ...]] = ("text",)
    head: nn.Linear

    def __init__(self, spec: DataSpec):
        super().__init__(spec)
        if spec.kind != "text":
            name = type(self).__name__
            raise ValueError(f"{name} is for text, not for data of shape {spec.shape} without an alphabet")

    def reader(self, n: int) -> samplers.Next:
        """Reads ``n`` documents from their beginning on, as samplers.documents asks."""
        raise NotImplementedError

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
        """int64 [n, T]: documents that begin with ``prompt``, zeros after their end. Knobs: samplers.documents.

        From the distribution that ``log_prob`` is of.
        """
        return samplers.documents(
            self.reader(n),
            n,
            prompt=self.spec.tokens(prompt),
            longest=self.spec.shape[0],
            generator=generator,
            device=self.head.weight.device,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            length=length,
        )
