"""What documents score beside real ones: the same figures for a model's samples and for the controls."""

from __future__ import annotations

from typing import Any

import numpy as np

from genus.data.loaders import Dataset
from genus.errors import UserError
from genus.evaluation import metrics
from genus.evaluation.text.documents import Documents
from genus.evaluation.text.reference import Reference
from genus.evaluation.text.spans import longest_spans

Figures = dict[str, dict[str, Any]]  # metric: {"value", "low", "high", "n", "floor", "kind", …}

CHUNK = 500  # word n-grams that are counted at a time: a longer text repeats itself more
GRAMS = (1, 2, 3)
COMMON = 0.05  # share of held-out documents that have a longer span in common with train than is called chance
DRAWS = 1000  # of the bootstrap


def quality(
    documents: Documents, data: Dataset, reference: Reference, *, seed: int, memorisation: dict[str, Any] | None = None
) -> Figures:
    """All sample metrics of documents; each floor is what as many documents of the test split score.

    ``memorisation``: the figure of held-out documents, which says what is no copying. Raises UserError where there are
    fewer than two.
    """
    if documents.n < 2:
        raise UserError(f"{documents.n} documents are too few to measure: right would be at least 2")
    test = Documents.stored(data, "test", documents.n)
    spans = longest_spans(documents, data.split("train"))
    found = distinct(documents.texts(data.spec), test.texts(data.spec))
    found |= {"copied_span": _spans(spans, reference), "memorisation": copied(spans, reference.spans, memorisation)}
    # Of itself it says little: samples of a low temperature are likelier than real text. Beside the floor it does.
    bits = documents.totals(reference.ngram.bits(documents.tokens, documents.offsets))
    floor = reference.ngram.bits(test.tokens, test.offsets).sum() / len(test.tokens)
    found["ngram_bits"] = ratio(bits, documents.lengths, seed=seed) | {"floor": float(floor), "kind": "n-gram"}
    value, low, high = metrics.mean_interval(documents.lengths)
    ends = {"low": max(low, 0.0), "high": high, "n": documents.n, "floor": float(test.lengths.mean())}
    return found | {"tokens": {"value": value} | ends}


def ratio(totals: np.ndarray, counts: np.ndarray, *, seed: int) -> dict[str, Any]:
    """Σ totals / Σ counts, as bits a token, with its 95% interval by bootstrap over documents."""
    random = np.random.default_rng(seed)
    n, drawn = len(totals), []
    for _ in range(DRAWS):
        rows = random.integers(n, size=n)
        drawn.append(totals[rows].sum() / counts[rows].sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": float(totals.sum() / counts.sum()), "low": float(low), "high": float(high), "n": n}


def distinct(texts: list[str], real: list[str]) -> Figures:
    """The share of different ones among ``CHUNK`` consecutive word n-grams (distinct-n, Li et al. 2016, 1510.03055).

    The mean over chunks, so that unlike amounts of text compare (Covington & McFall 2010). A model that says the same
    again and again is low, one that strings letters together high: the floor is what ``real`` texts have. None for
    texts that have no n-grams.
    """
    found: Figures = {}
    for n in GRAMS:
        grams, beside = (_grams(part, n) for part in (texts, real))
        size = min(CHUNK, len(grams) // 2, len(beside) // 2)
        if size:
            value, low, high = metrics.mean_interval(_shares(grams, size))
            ends = {"low": max(low, 0.0), "high": min(high, 1.0), "n": len(grams)}
            found[f"distinct_{n}"] = {"value": value} | ends | {"floor": float(_shares(beside, size).mean())}
            found[f"distinct_{n}"] |= {"kind": "words"}
    return found


def _grams(texts: list[str], n: int) -> list[tuple[str, ...]]:
    """All word n-grams within documents, in order."""
    words = [text.split() for text in texts]
    return [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]


def _shares(grams: list[tuple[str, ...]], size: int) -> np.ndarray:
    """The share of different ones in each full chunk."""
    return np.array([len(set(grams[i : i + size])) / size for i in range(0, len(grams) - size + 1, size)])


def copied(spans: np.ndarray, real: np.ndarray, held_out: dict[str, Any] | None) -> dict[str, Any]:
    """Share of documents that have a longer span in common with train than chance has it: 0 is chance, 1 every one.

    ``real``: the spans of held-out documents, of which a share of ``COMMON`` is longer than what is allowed. Flagged
    where the interval lies above that of held-out documents.
    """
    from scipy import stats

    limit, n = np.quantile(real, 1 - COMMON, method="higher"), len(spans)
    chance = float((real > limit).mean())
    hits = int((spans > limit).sum())
    value, low, high = ((end - chance) / (1 - chance) for end in (hits / n, *metrics.wilson(hits, n)))
    p_value = float(stats.binom.sf(hits - 1, n, chance)) if chance else float(hits == 0)
    figure = {"value": value, "low": low, "high": high, "n": n, "kind": f"spans above {limit}", "p_value": p_value}
    if held_out is not None:
        figure |= {"floor": held_out["value"], "flagged": low > held_out["high"]}
    return figure


def _spans(spans: np.ndarray, reference: Reference) -> dict[str, Any]:
    """The longest span that each document has in common with train, in characters: mean and greatest."""
    value, low, high = metrics.mean_interval(spans)
    found = {"value": value, "low": max(low, 0.0), "high": high, "n": len(spans), "most": int(spans.max())}
    return found | {"floor": float(reference.spans.mean()), "floor_most": int(reference.spans.max())}
