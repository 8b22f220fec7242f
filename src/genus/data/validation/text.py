"""What must hold of a text, as Great Expectations' expectations, and the figures of its splits that they are about."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from genus.config import Section
from genus.data.documents import token_type
from genus.data.loaders import SPLITS, Dataset
from genus.data.spec import DataSpec
from genus.data.validation.tables import LOOKED_AT, drift

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.expectations import Expectation

CHUNK = 1 << 22  # tokens that are looked at at once
TABLED_AT_ONCE = 512  # documents whose symbols are counted at once


class TextChecks(Section):
    """Limits of the suite: ``datasets.<name>.checks`` in params.yaml, where the data is text."""

    unknown: float = Field(0.001, ge=0, le=1)  # share of symbols that are not in the alphabet
    control: float = Field(0.001, ge=0, le=1)  # share of documents with control characters
    duplicates: float = Field(0.01, ge=0, le=1)  # share of a split's documents that are in another split too
    repeats: float = Field(0.05, ge=0, le=1)  # share of documents that are there more than once; a warning
    drift: float = Field(0.1, ge=0, le=1)  # of lengths (tables.drift) and symbols (symbol_drift); half is a warning
    rows: int = Field(100, ge=1)  # fewest documents in a split; a warning


def of_documents(spec: DataSpec, counts: dict[str, int], checks: TextChecks) -> list[Expectation]:
    """Expectations on table.parquet, one row a document."""
    import great_expectations.expectations as gxe
    from great_expectations.expectations.metadata_types import FailureSeverity

    columns, longest = ["split", "length", "unknown", "control", "sha1"], spec.shape[0] - 1
    return [
        gxe.ExpectTableColumnsToMatchSet(column_set=columns, exact_match=True, notes="columns of the table"),
        gxe.ExpectTableRowCountToEqual(value=sum(counts.values()), notes="as many rows as dataset.json counts"),
        gxe.ExpectColumnDistinctValuesToEqualSet(column="split", value_set=list(SPLITS), notes="splits"),
        gxe.ExpectColumnMinToBeBetween(column="length", min_value=1, notes="no empty documents"),
        gxe.ExpectColumnMaxToBeBetween(
            column="length", min_value=longest, max_value=longest, notes="the longest document, as dataset.json says"
        ),
        gxe.ExpectColumnMeanToBeBetween(
            column="unknown", min_value=0, max_value=checks.unknown, notes="share of symbols outside of the alphabet"
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="control", max_value=0, mostly=1 - checks.control, notes="no control characters"
        ),
        gxe.ExpectColumnValuesToMatchRegex(column="sha1", regex="^[0-9a-f]{40}$", notes="a hash for every document"),
        gxe.ExpectColumnProportionOfUniqueValuesToBeBetween(
            column="sha1",
            min_value=1 - checks.repeats,
            severity=FailureSeverity.WARNING,
            notes="few documents are there twice",
        ),
    ]


def of_splits(spec: DataSpec, checks: TextChecks) -> list[Expectation]:
    """Expectations on the table of ``split_table``, one row a split."""
    import great_expectations.expectations as gxe
    from great_expectations.expectations.metadata_types import FailureSeverity

    same = [
        ("rows", "counted", "documents and dataset.json"),
        ("rows", "tabled", "documents and table.parquet"),
        ("tokens", "counted tokens", "tokens and dataset.json"),
        ("tokens", "tabled tokens", "tokens and table.parquet"),
    ]
    drifts = [
        gxe.ExpectColumnMaxToBeBetween(
            column=f"drift of {figure}", max_value=limit, severity=severity, notes="splits look alike: drift from train"
        )
        for figure in ("length", "symbols")
        for limit, severity in ((checks.drift, FailureSeverity.CRITICAL), (checks.drift / 2, FailureSeverity.WARNING))
    ]
    return [
        gxe.ExpectColumnValuesToBeInSet(column="type", value_set=[str(token_type(spec))], notes="type of the tokens"),
        gxe.ExpectColumnValuesToBeInSet(column="offset type", value_set=["int64"], notes="type of the offsets"),
        *(gxe.ExpectColumnPairValuesToBeEqual(column_A=a, column_B=b, notes=about) for a, b, about in same),
        gxe.ExpectColumnMinToBeBetween(
            column="ended", min_value=1.0, notes="share of the documents that end where the next begins, and only there"
        ),
        gxe.ExpectColumnMaxToBeBetween(column="top", max_value=spec.vocabulary - 1, notes="largest token"),
        gxe.ExpectColumnMinToBeBetween(
            column="agreeing", min_value=1.0, notes="share of the documents that are what the table says"
        ),
        gxe.ExpectColumnMaxToBeBetween(
            column="unknown", max_value=checks.unknown, notes="share of a split's symbols outside of the alphabet"
        ),
        gxe.ExpectColumnMaxToBeBetween(
            column="shared", max_value=checks.duplicates, notes="share of a split that is in another split too"
        ),
        gxe.ExpectColumnMinToBeBetween(
            column="rows",
            min_value=checks.rows,
            severity=FailureSeverity.WARNING,
            notes="documents in the smallest split",
        ),
        *drifts,
    ]


def split_table(dataset: Dataset, documents: pd.DataFrame) -> pd.DataFrame:
    """One row a split.

    rows, tabled, counted: its documents by the offsets, the table and dataset.json, and the same of its tokens; ended:
    share of its documents whose last token, and no other, is the end; top: its largest token; agreeing: share of the
    documents looked at whose hash is the table's; unknown: share of its symbols that are not in the alphabet; shared:
    share of its documents that are in another split too; drift of length: see tables.drift; of symbols: symbol_drift.
    """
    import pandas as pd

    of = {split: documents[documents["split"] == split] for split in SPLITS}
    symbols = {split: _counts(dataset, split) for split in SPLITS}
    rows: list[dict[str, Any]] = []
    for split in SPLITS:
        tokens, offsets, table = dataset.split(split), dataset.offsets(split), of[split]
        others = set().union(*(of[other]["sha1"] for other in SPLITS if other != split))
        length = table["length"].to_numpy()
        rows.append(
            {
                "split": split,
                "type": str(tokens.dtype),
                "offset type": str(offsets.dtype),
                "rows": len(offsets) - 1,
                "tabled": len(table),
                "counted": dataset.description["counts"].get(split, 0),
                "tokens": len(tokens),
                "tabled tokens": int(length.sum()) + len(table),
                "counted tokens": dataset.description.get("tokens", {}).get(split, 0),
                "ended": _ended(tokens, offsets),
                "top": max((int(part.max()) for part in _parts(tokens)), default=0),
                "agreeing": _agreeing(dataset, split, table),
                "unknown": float((table["unknown"] * length).sum() / max(length.sum(), 1)),
                "shared": float(table["sha1"].isin(others).mean()) if len(table) else 0.0,
                "drift of length": drift(of["train"]["length"].to_numpy(), length),
                "drift of symbols": 0.0 if split == "train" else symbol_drift(symbols["train"], symbols[split]),
            }
        )
    return pd.DataFrame(rows)


def symbol_drift(reference: np.ndarray, other: np.ndarray) -> float:
    """How far the symbols' frequencies of two samples of documents are apart, beyond chance: 0 to 1.

    ``reference`` and ``other``: counts [N, V] of each symbol in each document. The total-variation distance, less
    1.5 times what it is on average for two samples of such documents from one source: documents, not symbols, are
    independent, so the variance of a frequency is that of a ratio of sums over documents.
    """
    if not reference.any() or not other.any():
        return 0.0  # an empty split is another expectation's matter
    frequencies, variances = zip(
        *(_frequencies(counts.astype(np.float64)) for counts in (reference, other)), strict=True
    )
    distance = np.abs(frequencies[0] - frequencies[1]).sum() / 2
    chance = math.sqrt(2 / math.pi) * np.sqrt(variances[0] + variances[1]).sum() / 2  # E|x| of a normal
    return float(max(distance - 1.5 * chance, 0.0))


def _frequencies(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each symbol's share of all, and its variance (Cochran 1977, equation 6.4)."""
    lengths = counts.sum(1)
    share = counts.sum(0) / lengths.sum()
    # The sum over documents of (count - share * length)², without that table.
    squares = (counts**2).sum(0) - 2 * share * (counts * lengths[:, None]).sum(0) + share**2 * (lengths**2).sum()
    return share, np.maximum(squares, 0) / lengths.sum() ** 2


def _looked_at(dataset: Dataset, split: str) -> np.ndarray:
    """Documents that are looked at one by one, evenly spread."""
    count = dataset.count(split)
    return np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(np.int64))


def _sound(tokens: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether the offsets are of these tokens."""
    whole = tokens.ndim == offsets.ndim == 1 and tokens.dtype.kind == "u" and len(offsets) > 1
    return bool(whole and offsets[0] == 0 and offsets[-1] == len(tokens) and (np.diff(offsets) > 0).all())


def _parts(tokens: np.ndarray) -> list[np.ndarray]:
    return [tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK)]


def _ended(tokens: np.ndarray, offsets: np.ndarray) -> float:
    if not _sound(tokens, offsets):
        return 0.0
    good = int((tokens[offsets[1:] - 1] == 0).sum())
    stray = sum(int((part == 0).sum()) for part in _parts(tokens)) - good
    return max(good - stray, 0) / (len(offsets) - 1)


def _agreeing(dataset: Dataset, split: str, table: pd.DataFrame) -> float:
    """Share of the documents looked at whose hash is what the table says."""
    tokens, offsets = np.asarray(dataset.split(split)), dataset.offsets(split)
    if not _sound(tokens, offsets) or len(table) != len(offsets) - 1:
        return 0.0
    looked = _looked_at(dataset, split)
    right = [
        hashlib.sha1(tokens[start:end].tobytes(), usedforsecurity=False).hexdigest() == sha1
        for start, end, sha1 in zip(offsets[looked], offsets[looked + 1], table["sha1"].to_numpy()[looked], strict=True)
    ]
    return float(np.mean(right))


def _counts(dataset: Dataset, split: str) -> np.ndarray:
    """How often each symbol is in each of the documents looked at: [n, V], without their ends."""
    tokens, offsets = np.asarray(dataset.split(split)), dataset.offsets(split)
    size = dataset.spec.vocabulary
    if not _sound(tokens, offsets):
        return np.zeros((1, size - 1), np.int64)
    looked, found = _looked_at(dataset, split), []
    for start in range(0, len(looked), TABLED_AT_ONCE):
        some = dataset.documents(split, looked[start : start + TABLED_AT_ONCE])
        cells = np.minimum(some, size - 1) + size * np.arange(len(some), dtype=np.int64)[:, None]
        found.append(np.bincount(cells.ravel(), minlength=size * len(some)).reshape(-1, size)[:, 1:])
    return np.concatenate(found)
