"""Reading a processed data set: memory-mapped arrays and their description."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.files import read_array, read_json

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Dataset:
    """A processed data set; nothing is read before it is used.

    ``split(name)`` is memory-mapped uint8 [N, C, H, W]; of text all tokens of the split, one document after the other,
    which ``documents`` gives one by one.
    """

    folder: Path
    spec: DataSpec
    description: dict[str, Any]  # dataset.json: counts, content hash, licence, source

    def split(self, name: str) -> np.ndarray:
        """The stored examples of a split, memory-mapped and read-only; text: its tokens, uint8 or uint16 [tokens]."""
        return read_array(self.folder / f"{name}.npy", mapped=True)

    def labels(self, name: str) -> np.ndarray:
        """int64 [N]; all zero where the data has no labels."""
        if self.spec.kind == "text":
            return np.zeros(self.count(name), np.int64)
        return read_array(self.folder / "labels" / f"{name}.npy", mapped=True)

    def count(self, name: str) -> int:
        """How many examples a split has."""
        return len(self.offsets(name)) - 1 if self.spec.kind == "text" else len(self.split(name))

    def offsets(self, name: str) -> np.ndarray:
        """Text: int64 [N + 1], where in ``split`` each document begins; the last is where the last one has ended."""
        return read_array(self.folder / "offsets" / f"{name}.npy", mapped=True)

    def documents(self, name: str, rows: slice | Sequence[int] | np.ndarray = slice(None)) -> np.ndarray:
        """Text: the documents of the given rows, [n, T] as stored, filled up with zeros behind their ends."""
        tokens, offsets = np.asarray(self.split(name)), np.asarray(self.offsets(name))
        starts, ends = offsets[:-1][rows], offsets[1:][rows]
        padded = np.zeros((len(starts), self.spec.shape[0]), tokens.dtype)
        for row, start, end in zip(padded, starts.tolist(), ends.tolist(), strict=True):
            row[: end - start] = tokens[start:end]
        return padded


def open_dataset(name: str, root: str | os.PathLike[str] = "data/processed") -> Dataset:
    """Opens data/processed/<name>. Raises UserError where it is not there yet."""
    folder = Path(root) / name
    if not (folder / "dataset.json").exists():
        raise UserError(f"{folder}: no such data set; `genus ingest {name}` makes it")
    description = read_json(folder / "dataset.json")
    return Dataset(folder, DataSpec.from_json(description["spec"]), description)
