"""Every figure of a model of text: the table of metrics that stands beside the one for images."""

from __future__ import annotations

import inspect
import math
import time
from typing import Any

import numpy as np
import torch

from genus import progress
from genus.contract import Batch, Encodes, Informs, Samples, Scores
from genus.evaluation import constraints
from genus.evaluation.evaluate import Metric, Task, Timing, milliseconds
from genus.evaluation.latent import active_units, rate
from genus.evaluation.text.codes import from_codes
from genus.evaluation.text.documents import Documents
from genus.evaluation.text.quality import Figures, quality, ratio
from genus.training import autocast

TEMPERATURES = (0.5, 0.8, 1.0)  # at which samples are shown
SHOWN = 6  # of each
BATCH_TOKENS = 1 << 17  # most tokens, padding included, that are scored at once


def likelihood(task: Task) -> tuple[Figures, Timing]:
    """Bits a character of test documents, -Σ log_prob / (Σ tokens · ln 2), each document's end being a character.

    And the same as perplexity a word, exp(-Σ log_prob / Σ words): words are what white space parts.
    """
    documents = Documents.stored(task.data, "test", task.count("likelihoods"))
    started = time.monotonic()
    nats = log_probs(task, documents)
    seconds = time.monotonic() - started
    found = ratio(-nats / math.log(2), documents.lengths, seed=task.seed)
    words = np.array([len(text.split()) for text in documents.texts(task.data.spec)])
    told = ratio(-nats, words, seed=task.seed) if words.any() else None
    figures: Figures = {"bits_per_char": found | {"tokens": len(documents.tokens), "kind": task.model.density}}
    if told:
        ends = {key: math.exp(told[key]) for key in ("value", "low", "high")}
        figures["word_perplexity"] = ends | {"n": int(words.sum()), "kind": task.model.density}
    timing = {"likelihood_ms": 1e3 * seconds / documents.n}
    return figures, timing | {"likelihood_tokens_per_s": len(documents.tokens) / seconds}


@torch.inference_mode()
def log_probs(task: Task, documents: Documents) -> np.ndarray:
    """Nats of each document [N], float64. Raises FloatingPointError, naming the first that is not finite."""
    generator, nats = task.generator(11), np.zeros(documents.n)
    order, done = np.argsort(documents.lengths, kind="stable"), 0  # alike in length: little is padding
    while done < len(order):
        rows = order[done : done + task.effort.batch_size]
        longest = int(documents.lengths[rows[-1]])
        rows = rows[: max(1, BATCH_TOKENS // longest)]
        x = torch.from_numpy(documents.padded(rows)).to(task.device)
        with autocast(task.device):
            nats[rows] = task.model.log_prob(Batch(x), generator=generator).double().cpu().numpy()
        done += len(rows)
        progress.report(done, len(order), unit="likelihood")
    if not np.isfinite(nats).all():
        raise FloatingPointError(f"log_prob of test document {int((~np.isfinite(nats)).argmax())} is not finite")
    return nats


def sample_quality(task: Task) -> tuple[Figures, Timing]:
    """All that samples score beside the test split, and what they cost."""
    rows, seconds = task.drawn
    documents = Documents.drawn(rows)
    found = quality(documents, task.data, task.reference, seed=task.seed, memorisation=task.held_out)
    timing = {"sample_ms": 1e3 * seconds / len(rows), "sample_seconds": seconds}
    return found, timing | {"sample_tokens_per_s": len(documents.tokens) / seconds}


def sampling(task: Task) -> tuple[Figures, Timing]:
    """What a character costs in network evaluations and random numbers, and a document in ms at batch 1 and 64."""
    options: dict[str, Any] = {"seed": task.seed, "knobs": task.effort.knobs}
    drawn = constraints.sampled(task.model, **options)
    length = int(Documents.drawn(drawn.cpu().numpy()).lengths[0])
    calls = constraints.evaluations(task.model, **options) / length
    noise = constraints.noise_dims(task.model, **options) / length
    times = {f"sample_ms_{n}": milliseconds(task, n) for n in (1, 64)}
    return {"nfe_per_char": {"value": calls, "n": 1}, "noise_per_char": {"value": noise, "n": 1}}, times


def knob_curve(task: Task) -> tuple[Figures, Timing]:
    """Likelihood and variety of samples at the settings of the knobs that ``evaluate.curve`` names."""
    points, times = [], []
    for knobs in task.settings:
        started = time.monotonic()
        rows = task.tried(knobs)
        times.append(1e3 * (time.monotonic() - started) / len(rows))
        found = quality(Documents.drawn(rows), task.data, task.reference, seed=task.seed)
        kept = {name: found[name]["value"] for name in ("ngram_bits", "distinct_2", "copied_span") if name in found}
        points.append({"knobs": knobs, "n": len(rows)} | kept)
    return ({"curve": {"points": points}}, {"curve_sample_ms": times}) if points else ({}, {})


def shown(task: Task) -> list[dict[str, Any]]:
    """What a model has written: [{label, texts}], from codes of documents with their kind (codes.from_codes)."""
    return samples(task) + from_codes(task)


def samples(task: Task) -> list[dict[str, Any]]:
    """The first samples, nobody chose them, at three temperatures where the model has such a knob: [{label, texts}]."""
    if not isinstance(task.model, Samples):
        return []
    if "temperature" not in inspect.signature(task.model.sample).parameters:
        rows = task.drawn[0][:SHOWN]
        return [{"label": "samples", "texts": Documents.drawn(rows).texts(task.data.spec)}]
    found = []
    for temperature in TEMPERATURES:
        rows = task.draw(SHOWN, seed=task.seed + 12, knobs={"temperature": temperature})
        found.append({"label": f"temperature {temperature:g}", "texts": Documents.drawn(rows).texts(task.data.spec)})
    return found


METRICS = (
    Metric((Scores,), likelihood),
    Metric((Samples,), sample_quality),
    Metric((Samples,), sampling),
    Metric((Samples,), knob_curve),
    Metric((Informs,), rate),
    Metric((Informs, Encodes), active_units),
)
