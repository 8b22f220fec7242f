"""What samples of text are measured against: made once by the judge stage, read by every evaluation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genus.data.loaders import Dataset
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.evaluation.text.documents import Documents
from genus.evaluation.text.ngram import ORDER, NGram
from genus.evaluation.text.spans import longest_spans
from genus.files import read_array, read_json, replacing, write_json

FITTED = 16_000_000  # tokens of train, at most, that the n-gram model is fitted to: it is held in memory
SPANS = 2000  # test documents whose longest span in common with train is looked for


@dataclass(frozen=True)
class Reference:
    """The judge of text, and of held-out documents the longest spans [≤ SPANS] that they have in common with train."""

    ngram: NGram
    spans: np.ndarray


def make_reference(data: Dataset, folder: Path, *, order: int = ORDER) -> Reference:
    """Fits the n-gram model to train, measures test documents against train, and writes both to ``folder``.

    The test split is read here to be measured against, never to choose anything.
    """
    ngram = NGram.fit(np.asarray(data.split("train")[:FITTED]), data.spec.vocabulary, order)
    test = Documents.stored(data, "test")
    spans = longest_spans(Documents.stored(data, "test", SPANS), data.split("train"))
    bits = ngram.bits(test.tokens, test.offsets)
    with replacing(folder) as temporary:
        temporary.mkdir()
        ngram.save(temporary / "ngram.safetensors")
        np.save(temporary / "spans-test.npy", spans)
        write_json(
            temporary / "judge.json",
            {
                "spec": data.spec.to_json(),
                "order": ngram.order,
                "grams": sum(len(table.keys) for table in ngram.tables),
                "bits_per_char": float(bits.mean()),
                "span": float(spans.mean()),
                "data_sha256": data.description["sha256"],
            },
        )
    return Reference(ngram, spans)


def open_reference(data: Dataset, folder: str | os.PathLike[str]) -> Reference:
    """Reads what the judge stage left. Raises UserError where it is not there, or is of other data."""
    folder = Path(folder)
    if not (folder / "judge.json").exists() or not (folder / "ngram.safetensors").exists():
        raise UserError(f"{folder}: no n-gram model yet; `genus judge {data.folder.name}` fits it")
    if DataSpec.from_json(read_json(folder / "judge.json")["spec"]) != data.spec:
        raise UserError(f"{folder}: the n-gram model is of other data; `genus judge {data.folder.name}` fits it again")
    return Reference(NGram.load(folder / "ngram.safetensors"), read_array(folder / "spans-test.npy"))
