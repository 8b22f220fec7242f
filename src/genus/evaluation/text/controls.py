"""Sets of documents whose quality is known beforehand, and coders whose rate is: what any honest metric must rank."""

from __future__ import annotations

import bz2
import lzma
import zlib
from typing import Any

import numpy as np

from genus import progress
from genus.data.loaders import Dataset
from genus.evaluation.text.documents import Documents
from genus.evaluation.text.quality import Figures, copied, quality
from genus.evaluation.text.reference import Reference
from genus.evaluation.text.spans import longest_spans

SAMPLES = 500  # documents of each set, where the data are as many
LONGEST = 1000  # tokens of a drawn document
SHOWN = 3  # of each set, on the report
PRIMED = 16_000_000  # tokens of train, at most, that a coder is given beforehand
TITLES = {
    "held_out": "held-out documents: the best there is",
    "ngram": "drawn from the n-gram model",
    "unigram": "symbols drawn by their frequencies",
    "one_document": "one held-out document, again and again",
    "copycat": "training documents, returned as samples",
}


def control_sets(data: Dataset, reference: Reference, *, seed: int) -> dict[str, Documents]:
    """The sets by name, at most ``SAMPLES`` documents each, in the order of ``TITLES``."""
    held_out = Documents.stored(data, "validation", SAMPLES)
    offsets = np.asarray(data.offsets("train"))
    rows = np.random.default_rng(seed).permutation(len(offsets) - 1)[:SAMPLES]
    train, longest = data.split("train"), min(LONGEST, data.spec.shape[0])

    ngram = reference.ngram.draw(held_out.n, longest=longest, random=np.random.default_rng(seed))
    chance = np.bincount(train, minlength=data.spec.vocabulary) / len(train)
    unigram = np.random.default_rng(seed).choice(len(chance), (held_out.n, longest), p=chance)
    return {
        "held_out": held_out,
        "ngram": Documents.drawn(ngram),
        "unigram": Documents.drawn(unigram),
        "one_document": held_out.take([0] * held_out.n),
        "copycat": Documents.of(np.asarray(train[offsets[row] : offsets[row + 1]]) for row in rows),
    }


def controls(data: Dataset, reference: Reference, *, seed: int) -> tuple[dict[str, Any], list[str]]:
    """{set: {"title", "metrics", "texts"}} with all sample metrics; and the first documents of test, to be read."""
    sets = control_sets(data, reference, seed=seed)
    best = copied(longest_spans(sets["held_out"], data.split("train")), reference.spans, None)
    found: dict[str, dict[str, Any]] = {}
    for done, (name, documents) in enumerate(sets.items(), 1):
        figures: Figures = quality(documents, data, reference, seed=seed, memorisation=best)
        texts = documents.texts(data.spec, SHOWN)
        found[name] = {"title": TITLES[name], "metrics": figures, "texts": texts}
        progress.report(done, len(sets), unit="control")
    return found, Documents.stored(data, "test", 2 * SHOWN).texts(data.spec)


def anchors(data: Dataset, reference: Reference) -> dict[str, dict[str, Any]]:
    """Bits a character of the test split by coders that everybody knows: what a model of text has to beat.

    The coders are given the documents with a line feed behind each, for its end. What some are told of train beforehand
    is free of charge.
    """
    spec, ngram = data.spec, reference.ngram
    test = Documents.stored(data, "test")
    counts = np.bincount(data.split("train"), minlength=spec.vocabulary) + 1
    rate = -np.log2(counts / counts.sum())
    stream = np.array([0, len(test.tokens)])
    text = _bytes(test, spec)
    known = _bytes(_first(data, PRIMED), spec)
    zipped = zlib.compressobj(9, wbits=-15, zdict=known[-32768:])  # all that its window holds
    extreme = 9 | lzma.PRESET_EXTREME

    def xz(content: bytes) -> int:
        return 8 * len(lzma.compress(content, preset=extreme))

    bits = {
        "unigram": float(rate[test.tokens].sum()),
        "n-gram": float(ngram.bits(test.tokens, test.offsets).sum()),
        "n-gram, stream": float(ngram.bits(test.tokens, stream).sum()),
        "gzip": 8 * len(zlib.compress(text, 9)),
        "gzip, primed": 8 * len(zipped.compress(text) + zipped.flush()),
        "bzip2": 8 * len(bz2.compress(text, 9)),
        "xz": xz(text),
        "xz, primed": xz(known + text) - xz(known),
    }
    texts = {
        "unigram": "symbols by their frequencies in train",
        "n-gram": f"{ngram.order}-gram model fitted to train, each document by itself",
        "n-gram, stream": "the same, each document after those before it",
        "gzip": "the whole split",
        "gzip, primed": "the whole split, after the last 32 kB of train",
        "bzip2": "the whole split",
        "xz": "the whole split",
        "xz, primed": "the whole split, after train",
    }
    return {name: {"value": bits[name] / len(test.tokens), "n": test.n, "text": told} for name, told in texts.items()}


def _first(data: Dataset, most: int) -> Documents:
    offsets = np.asarray(data.offsets("train"))
    offsets = offsets[: int(np.searchsorted(offsets, most, side="right"))]
    return Documents(np.asarray(data.split("train")[: offsets[-1]]), offsets)


def _bytes(documents: Documents, spec: Any) -> bytes:
    return "".join(f"{text}\n" for text in documents.texts(spec)).encode()
