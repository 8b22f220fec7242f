"""Reading a processed data set: memory-mapped arrays and their description."""

from __future__ import annotations

import os
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
    """A processed data set. ``split(name)`` is memory-mapped uint8 [N, C, H, W]; nothing is read before it is used."""

    folder: Path
    spec: DataSpec
    description: dict[str, Any]  # dataset.json: counts, content hash, licence, source

    def split(self, name: str) -> np.ndarray:
        """The stored examples of a split, memory-mapped and read-only."""
        return read_array(self.folder / f"{name}.npy", mapped=True)

    def labels(self, name: str) -> np.ndarray:
        """int64 [N]; all zero where the data has no labels."""
        return read_array(self.folder / "labels" / f"{name}.npy", mapped=True)


def open_dataset(name: str, root: str | os.PathLike[str] = "data/processed") -> Dataset:
    """Opens data/processed/<name>. Raises UserError where it is not there yet."""
    folder = Path(root) / name
    if not (folder / "dataset.json").exists():
        raise UserError(f"{folder}: no such data set; `genus ingest {name}` makes it")
    description = read_json(folder / "dataset.json")
    return Dataset(folder, DataSpec.from_json(description["spec"]), description)
