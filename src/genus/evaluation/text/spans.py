"""The longest span that documents have in common with the training text: what was copied, character for character."""

from __future__ import annotations

import functools

import numpy as np

from genus.evaluation.text.documents import Documents

BITS = 22  # of the filter's address, through which most windows of train go no further
PART = 1 << 21  # tokens of train that are worked on at once


def longest_spans(documents: Documents, train: np.ndarray) -> np.ndarray:
    """How many consecutive symbols of each document stand somewhere in ``train`` as well, at most: int64 [N].

    A span ends where a document does. ``train`` [T] may be memory-mapped, and is read once, from front to back.
    """
    rows = [part[part > 0].astype(np.int64) for part in np.split(documents.tokens, documents.offsets[1:-1])]
    hashed, longest = [Hashed(row) for row in rows], np.zeros(len(rows), np.int64)
    overlap = max((len(row) for row in rows), default=0)
    for start in range(0, len(train), PART):
        part = Hashed(np.asarray(train[start : start + PART + overlap], np.int64))
        longest = _longer(hashed, part, longest)
    return longest


def _longer(rows: list[Hashed], part: Hashed, low: np.ndarray) -> np.ndarray:
    """The longest spans [N], where those of ``low`` are known: by doubled steps, then by halves, all rows at once."""
    low, high, step = low.copy(), np.array([row.size for row in rows]), np.ones(len(rows), np.int64)
    while (open_ := np.flatnonzero(low < high)).size:
        tried = np.where(step, np.minimum(low + step, high), (low + high + 1) // 2)
        length = int(tried[open_].min())
        asked = open_[tried[open_] == length]
        there = _occur([rows[i] for i in asked], part, length)
        low[asked[there]] = length
        high[asked[~there]] = length - 1
        step[asked] = np.where(there, 2 * step[asked], 0)
    return low


def _occur(rows: list[Hashed], part: Hashed, length: int) -> np.ndarray:
    """Whether a window of ``length`` tokens of each row stands in ``part``: bool [N]. By 64-bit hashes."""
    own = [row.windows(length) for row in rows]
    wanted, place_of = np.unique(np.concatenate(own), return_inverse=True)
    filter_, shift = np.zeros(1 << BITS, bool), np.uint64(64 - BITS)
    filter_[wanted >> shift] = True
    windows = part.windows(length)
    windows = windows[filter_[windows >> shift]]
    found = np.zeros(len(wanted), bool)
    place = np.searchsorted(wanted, windows).clip(max=len(wanted) - 1)
    found[place[wanted[place] == windows]] = True
    return np.logical_or.reduceat(found[place_of], np.cumsum([0, *(len(part) for part in own[:-1])]))


class Hashed:
    """Tokens, ready for a hash of each window of any length.

    Σ v(token) b^place over the window, divided by b^start; modulo 2^64, where every odd b has an inverse.
    """

    def __init__(self, tokens: np.ndarray):
        self.size = len(tokens)
        base, _, values = _constants(1 << max(10, self.size.bit_length()))
        self.sums = np.zeros(self.size + 1, np.uint64)
        np.cumsum(values[tokens] * base[: self.size], out=self.sums[1:])

    def windows(self, length: int) -> np.ndarray:
        """uint64 [size - length + 1]; none where it is shorter."""
        n = max(0, self.size - length + 1)
        inverse = _constants(1 << max(10, self.size.bit_length()))[1]
        return (self.sums[length : length + n] - self.sums[:n]) * inverse[:n]


@functools.cache
def _constants(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Powers of a random odd number and of its inverse, and a random number for each token."""
    b, powers = 0x9E3779B97F4A7C15, []
    for factor in (b, pow(b, -1, 1 << 64)):
        table = np.full(size, factor, np.uint64)
        table[0] = 1
        powers.append(np.cumprod(table))
    return powers[0], powers[1], np.random.default_rng(0).integers(1 << 63, size=1 << 16, dtype=np.uint64)
