"""The figures that the expectations are about: one row a split, beside the table of one row an example."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from genus.data.loaders import SPLITS, Dataset

if TYPE_CHECKING:
    import pandas as pd

LOOKED_AT = 10_000  # images of a split whose hash is compared with the table's, evenly spread


def split_table(dataset: Dataset, examples: pd.DataFrame) -> pd.DataFrame:
    """One row a split.

    rows, labels, tabled, counted: its length by the array, the labels, the table and dataset.json; agreeing: share of
    images looked at whose hash and labels are the table's; shared: share of its examples that are in another split
    too; balance: its rarest class over its mean class; drift of mean, std and entropy: see ``drift``.
    """
    import pandas as pd

    classes = max(1, len(dataset.spec.classes))
    of = {split: examples[examples["split"] == split] for split in SPLITS}
    rows: list[dict[str, Any]] = []
    for split in SPLITS:
        images, labels, table = dataset.split(split), dataset.labels(split), of[split]
        others = set().union(*(of[other]["sha1"] for other in SPLITS if other != split))
        per_class = np.bincount(labels[(labels >= 0) & (labels < classes)], minlength=classes)
        rows.append(
            {
                "split": split,
                "shape": "×".join(map(str, images.shape[1:])),
                "type": str(images.dtype),
                "label type": str(labels.dtype),
                "rows": len(images),
                "labels": len(labels),
                "tabled": len(table),
                "counted": dataset.description["counts"].get(split, 0),
                "agreeing": _agreeing(images, labels, table),
                "shared": float(table["sha1"].isin(others).mean()) if len(table) else 0.0,
                "balance": float(per_class.min() / max(per_class.mean(), 1e-9)),
                **{
                    f"drift of {figure}": drift(of["train"][figure].to_numpy(), table[figure].to_numpy())
                    for figure in ("mean", "std", "entropy")
                },
            }
        )
    return pd.DataFrame(rows)


def drift(reference: np.ndarray, other: np.ndarray) -> float:
    """How far two samples' distributions are apart, beyond chance: 0 (alike) to 1 (nothing in common).

    The two-sample Kolmogorov-Smirnov distance, less the distance that two samples of these sizes from one distribution
    exceed once in a thousand times, sqrt(-ln(0.001 / 2) / 2) * sqrt(1/n + 1/m) (Smirnov 1948); at least 0.
    """
    if len(reference) == 0 or len(other) == 0:
        return 0.0  # an empty split is another expectation's matter
    at = np.concatenate([reference, other])
    below = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (reference, other)]
    distance = np.abs(below[0] - below[1]).max()
    chance = np.sqrt(-np.log(0.001 / 2) / 2) * np.sqrt(1 / len(reference) + 1 / len(other))
    return float(max(distance - chance, 0.0))


def _agreeing(images: np.ndarray, labels: np.ndarray, table: pd.DataFrame) -> float:
    """Share of the images looked at whose hash and label are what the table says."""
    if not len(images) == len(labels) == len(table) or len(images) == 0:
        return 0.0
    looked = np.unique(np.linspace(0, len(images) - 1, min(len(images), LOOKED_AT)).astype(np.int64))
    hashes, named = table["sha1"].to_numpy()[looked], table["label"].to_numpy()[looked]
    right = [
        hashlib.sha1(images[row].tobytes(), usedforsecurity=False).hexdigest() == sha1 and labels[row] == label
        for row, sha1, label in zip(looked.tolist(), hashes, named, strict=True)
    ]
    return float(np.mean(right))
