"""Documents side by side: one array of tokens and where each document begins."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from genus.data.loaders import Dataset
from genus.data.spec import DataSpec


class Documents(NamedTuple):
    """Document i is ``tokens[offsets[i] : offsets[i + 1]]``, its end (0) included; a sample may have come to none."""

    tokens: np.ndarray  # [T]
    offsets: np.ndarray  # int64 [N + 1]

    @classmethod
    def of(cls, parts: Iterable[np.ndarray]) -> Documents:
        parts = list(parts)
        lengths = [len(part) for part in parts]
        return cls(np.concatenate([np.zeros(0, np.int64), *parts]), np.cumsum([0, *lengths]))

    @classmethod
    def drawn(cls, rows: np.ndarray) -> Documents:
        """From samples [N, T] that are padded with zeros after their ends."""
        ends = rows == 0
        lengths = np.where(ends.any(1), ends.argmax(1) + 1, rows.shape[1])
        return cls.of(row[:length] for row, length in zip(rows, lengths, strict=True))

    @classmethod
    def stored(cls, data: Dataset, split: str, most: int | None = None) -> Documents:
        """The documents of a split; or ``most`` of them, chosen at random, always the same ones: a corpus has an order.

        Fewer are the first ones of more.
        """
        tokens, offsets = data.split(split), np.asarray(data.offsets(split))
        if most is None or most >= len(offsets) - 1:
            return cls(np.asarray(tokens), offsets)
        rows = np.random.default_rng(0).permutation(len(offsets) - 1)[:most]
        return cls.of(np.asarray(tokens[offsets[row] : offsets[row + 1]]) for row in rows)

    @property
    def n(self) -> int:
        """How many."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each: int64 [N]."""
        return np.diff(self.offsets)

    def take(self, rows: Iterable[int]) -> Documents:
        return Documents.of(self.tokens[self.offsets[row] : self.offsets[row + 1]] for row in rows)

    def totals(self, values: np.ndarray) -> np.ndarray:
        """Sums over each document of a value a token: [N]."""
        return np.add.reduceat(values, self.offsets[:-1]) if self.n else np.zeros(0)

    def padded(self, rows: Iterable[int]) -> np.ndarray:
        """These documents as int64 [n, T], zeros after their ends."""
        rows = list(rows)
        table = np.zeros((len(rows), max((int(self.lengths[row]) for row in rows), default=0)), np.int64)
        for place, row in enumerate(rows):
            part = self.tokens[self.offsets[row] : self.offsets[row + 1]]
            table[place, : len(part)] = part
        return table

    def texts(self, spec: DataSpec, most: int | None = None) -> list[str]:
        """What they spell, the first ``most`` of them."""
        ends = self.offsets[: None if most is None else most + 1]
        return [spec.text(self.tokens[a:b].tolist()) for a, b in itertools.pairwise(ends)]
