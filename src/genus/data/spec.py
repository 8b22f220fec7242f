"""What a data set looks like to a model: shape, levels and the units of ``Batch.x``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing torch takes seconds and 300 MB, which ingest and validate do without
    from torch import Tensor


@dataclass(frozen=True)
class DataSpec:
    """Shape and units of one example.

    Images are stored as uint8 [C, H, W] with ``levels`` = 256 and reach a model as floats in [-1, 1]
    (level k is 2k / (levels - 1) - 1). ``levels`` = 0 means continuous data, kept as it is.

    Text has an ``alphabet``: its symbols, in order. Token 0 ends a document, token k stands for alphabet[k - 1]; a
    document reaches a model as int64 tokens, its end included. ``shape`` is (T,), the tokens of the longest document;
    shorter ones are filled up with zeros, of which only the first is part of the document. ``levels`` is 0.
    """

    shape: tuple[int, ...]
    levels: int = 256
    classes: tuple[str, ...] = field(default=())
    alphabet: str = ""

    @property
    def kind(self) -> str:
        """What an example is: image, vector or text. A family says which kinds it takes."""
        return "text" if self.alphabet else "vector" if self.flat else "image"

    @property
    def vocabulary(self) -> int:
        """Number of different tokens, the end of a document included; 0 where the data is no text."""
        return len(self.alphabet) + 1 if self.alphabet else 0

    @property
    def dims(self) -> int:
        """Numbers in one example, the D of bits/dim."""
        return math.prod(self.shape)

    @property
    def flat(self) -> bool:
        """Whether an example is a vector: an image of one place, [D, 1, 1]. Networks are dense then."""
        return self.shape[1:] == (1, 1)

    def to_float(self, stored: Tensor) -> Tensor:
        """Stored values to the units of ``Batch.x``: floats, or int64 tokens."""
        if self.alphabet:
            return stored.long()
        return stored.float() * (2 / (self.levels - 1)) - 1 if self.levels else stored.float()

    def to_levels(self, x: Tensor) -> Tensor:
        """``Batch.x`` to int64 levels 0 … levels - 1, rounded and clipped."""
        return ((x + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).long()

    def to_stored(self, x: Tensor) -> Tensor:
        """``Batch.x``, or a model's samples, to what would be stored: uint8 for images, uint16 for text."""
        if self.alphabet:
            import torch

            return x.to(torch.uint16)
        return self.to_levels(x).byte() if self.levels else x

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        if not self.alphabet:  # what was made before there was text keeps its bytes
            del value["alphabet"]
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DataSpec:
        return cls(tuple(value["shape"]), value["levels"], tuple(value["classes"]), value.get("alphabet", ""))

    def tokens(self, text: str) -> list[int]:
        """The tokens of a document, without its end. Raises ValueError, naming the symbol, for one that is unknown."""
        known = {symbol: token for token, symbol in enumerate(self.alphabet, 1)}
        for symbol in text:
            if symbol not in known:
                raise ValueError(f"{symbol!r} is not in the alphabet: {self.alphabet!r}")
        return [known[symbol] for symbol in text]

    def text(self, tokens: Iterable[int]) -> str:
        """The document that tokens spell, up to its end."""
        return "".join(self.alphabet[token - 1] for token in takewhile(bool, tokens))
