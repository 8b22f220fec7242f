"""The five properties as one table: a row a measurement, a cell a model. Claims and report speak of its keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Record = Mapping[str, Any]
Figure = Mapping[str, Any]
STABLE = "stability.spread"
NOISE = 0.1  # seconds on a machine that does other things too are known to about a tenth


IMAGES, TEXT = ("image", "vector"), ("text",)  # kinds of data, as DataSpec names them


class Row(NamedTuple):
    """One measurement. ``key``: <property>.<name>. ``better``: lower, higher or, where it is neither, empty.

    ``kinds``: of data that it is made on. What has another unit on other data is another row.
    """

    key: str
    title: str
    unit: str
    better: str
    find: Callable[[Record], Figure | None]
    kinds: tuple[str, ...] = IMAGES + TEXT


def _metric(name: str, part: str = "value") -> Callable[[Record], Figure | None]:
    def find(record: Record) -> Figure | None:
        figure = record.get("metrics", {}).get(name)
        if figure is None or part == "value":
            return figure
        if figure.get(part) is None or isinstance(figure[part], dict):
            return figure.get(part)
        # A share of something that is the same for all, as of the control's: the interval scales with the value.
        scale = figure[part] / figure["value"] if figure["value"] else 0.0
        ends = {end: figure[end] * scale for end in ("low", "high") if figure.get(end) is not None}
        told = {key: figure[key] for key in ("n", "kind", "open") if key in figure}
        return {"value": figure[part], **told, **ends}

    return find


def _timing(name: str) -> Callable[[Record], Figure | None]:
    def find(record: Record) -> Figure | None:
        value = record.get("timing", {}).get(name)
        return None if value is None else {"value": value, "low": value * (1 - NOISE), "high": value * (1 + NOISE)}

    return find


def _probe(section: str, name: str) -> Callable[[Record], Figure | None]:
    def find(record: Record) -> Figure | None:
        return ((record.get("probe") or {}).get(section) or {}).get(name)

    return find


def _two_d(record: Record) -> Figure | None:
    """KL(truth || model) of the worst fitted 2-D set."""
    known = ((record.get("probe") or {}).get("two_d") or {}).items()
    found = [fit["kl"] | {"kind": name} for name, fit in known if fit.get("kl")]
    return max(found, key=lambda figure: figure["value"], default=None)


def _ngram_gap(record: Record) -> Figure | None:
    """How far the n-gram model's bits/char of samples lie from those of real text, to either side."""
    figure = record.get("metrics", {}).get("ngram_bits")
    if figure is None:
        return None
    low, value, high = (figure[end] - figure["floor"] for end in ("low", "value", "high"))
    ends = {"low": 0.0 if low <= 0 <= high else min(abs(low), abs(high)), "high": max(abs(low), abs(high))}
    return {"value": abs(value), **ends, "n": figure["n"]}


def _seconds_to_quality(record: Record) -> Figure | None:
    """Seconds of the probe's first training until samples were as good as the Gaussian control's.

    They became so somewhere between two points of the learning curve: that is the interval.
    """
    curve = (record.get("probe") or {}).get("curve") or []
    seconds = record.get("timing", {}).get("probe_curve_seconds") or []
    before = 0.0
    for point, second in zip(curve, seconds, strict=False):
        if point["quality"] <= 1:
            return {"value": second, "low": before * (1 - NOISE), "high": second * (1 + NOISE), "n": 1}
        before = second
    return None


def _parameters(record: Record) -> Figure | None:
    return {"value": record["parameters"]} if "parameters" in record else None


ROWS = (
    Row("stability.diverged", "short trainings that diverge", "share", "lower", _probe("stability", "diverged")),
    Row(
        "stability.spread", "spread of the quality across seeds", "IQR / median", "lower", _probe("stability", "spread")
    ),
    Row("stability.spikes", "loss spikes above 5 σ", "per 1,000 steps", "lower", _probe("stability", "spikes")),
    Row("stability.gradient_ratio", "gradient norm, p99 / median", "×", "lower", _probe("stability", "gradient_ratio")),
    Row(
        "stability.usable_learning_rates",
        "width of the usable learning rates",
        "decades",
        "higher",
        _probe("stability", "usable_learning_rates"),
    ),
    Row(
        "stability.small_batch_cost",
        "small batches: quality lost",
        "×",
        "lower",
        _probe("stability", "small_batch_cost"),
    ),
    Row(
        "stability.small_batch_spread",
        "small batches: spread across seeds",
        "IQR / median",
        "lower",
        _probe("stability", "small_batch_spread"),
    ),
    Row("stability.outlier_cost", "planted outliers: quality lost", "×", "lower", _probe("stability", "outlier_cost")),
    Row(
        "stability.outlier_bits",
        "planted outliers: likelihood lost",
        "bits/dim",
        "lower",
        _probe("stability", "outlier_bits"),
        IMAGES,
    ),
    Row(
        "stability.outlier_bits_per_char",
        "planted outliers: likelihood lost",
        "bits/char",
        "lower",
        _probe("stability", "outlier_bits"),
        TEXT,
    ),
    Row(
        "stability.outlier_pull",
        "one outlier in a batch of 32: how far it turns the gradient",
        "of its norm",
        "lower",
        _probe("stability", "outlier_pull"),
    ),
    Row("capacity.parameters", "parameters", "", "", _parameters),
    Row(
        "capacity.flops",
        "training operations an image, in the probe",
        "FLOP",
        "lower",
        _probe("capacity", "flops"),
        IMAGES,
    ),
    Row(
        "capacity.flops_per_char",
        "training operations a character, in the probe",
        "FLOP",
        "lower",
        _probe("capacity", "flops"),
        TEXT,
    ),
    Row(
        "capacity.frechet_distance",
        "Fréchet distance / Gaussian control",
        "share",
        "lower",
        _metric("frechet_distance", "relative"),
        IMAGES,
    ),
    Row(
        "capacity.ngram_gap",
        "samples’ likelihood by an n-gram model: away from real text’s",
        "bits/char",
        "lower",
        _ngram_gap,
        TEXT,
    ),
    Row("capacity.slope", "quality a doubling of the parameters", "×", "lower", _probe("capacity", "slope")),
    Row(
        "capacity.flops_slope",
        "quality a doubling of the training operations",
        "×",
        "lower",
        _probe("capacity", "flops_slope"),
    ),
    Row(
        "capacity.at_equal_parameters",
        "quality at 200,000 parameters, in the probe",
        "share of control",
        "lower",
        _probe("capacity", "at_equal_parameters"),
    ),
    Row(
        "capacity.resolution_cost",
        "quality from the smallest to the largest size",
        "×",
        "lower",
        _probe("capacity", "resolution_cost"),
        IMAGES,
    ),
    Row("capacity.coverage", "coverage", "share", "higher", _metric("coverage"), IMAGES),
    Row("capacity.recall", "recall", "share", "higher", _metric("recall"), IMAGES),
    Row("capacity.missing_classes", "classes missing", "", "lower", _metric("missing_classes"), IMAGES),
    Row("capacity.distinct_2", "different ones of 500 pairs of words", "share", "", _metric("distinct_2"), TEXT),
    Row("capacity.copied_span", "longest span copied from train", "characters", "", _metric("copied_span"), TEXT),
    Row("capacity.active_units", "numbers of the code that are in use", "share", "higher", _metric("active_units")),
    Row("capacity.codes_used", "tokens of the code that are in use", "share", "higher", _metric("codes_used"), IMAGES),
    Row(
        "capacity.disentanglement",
        "mutual information gap of the code",
        "share",
        "higher",
        _metric("mutual_information_gap"),
        IMAGES,
    ),
    Row(
        "capacity.asked_accuracy",
        "samples that the judge takes for the class asked for",
        "share",
        "higher",
        _metric("asked_accuracy"),
        IMAGES,
    ),
    Row(
        "capacity.generated_accuracy",
        "accuracy of a classifier taught by samples alone",
        "share",
        "higher",
        _metric("generated_accuracy"),
        IMAGES,
    ),
    Row(
        "capacity.translated_accuracy",
        "translations that the judge takes for the target",
        "share",
        "higher",
        _metric("translated_accuracy"),
        IMAGES,
    ),
    Row(
        "capacity.cycle_error",
        "error of what is translated back",
        "of white",
        "lower",
        _metric("cycle_error"),
        IMAGES,
    ),
    Row(
        "capacity.kept_silhouette",
        "silhouette that a translation keeps",
        "intersection over union",
        "",
        _metric("kept_silhouette"),
        IMAGES,
    ),
    Row("capacity.high_frequency", "fine detail beside the data's", "×", "", _metric("high_frequency"), IMAGES),
    Row("capacity.memorisation", "samples copied from train", "share", "lower", _metric("memorisation")),
    Row("density.bits_per_dim", "bits/dim of the test split", "bits/dim", "lower", _metric("bits_per_dim"), IMAGES),
    Row("density.bits_per_char", "bits/char of the test split", "bits/char", "lower", _metric("bits_per_char"), TEXT),
    Row("density.word_perplexity", "perplexity a word", "", "lower", _metric("word_perplexity"), TEXT),
    Row("density.iwae", "bits/dim, importance-weighted", "bits/dim", "lower", _metric("iwae_bits_per_dim"), IMAGES),
    Row("density.ode", "bits/dim by the probability flow", "bits/dim", "lower", _metric("ode_bits_per_dim"), IMAGES),
    Row("density.gap", "gap of the bound", "bits/dim", "lower", _metric("iwae_bits_per_dim", "gap"), IMAGES),
    Row("density.two_d", "KL from a known 2-D density (worst set)", "nats", "lower", _two_d, IMAGES),
    Row(
        "density.score_error",
        "error of the score above a cell’s noise",
        "share",
        "lower",
        _metric("score_error"),
        IMAGES,
    ),
    Row("density.rate", "what the code says of an example", "nats", "", _metric("rate")),
    Row("density.likelihood_ms", "a likelihood", "ms", "lower", _timing("likelihood_ms")),
    Row(
        "density.kl_trade",
        "code length against reconstruction",
        "rank correlation",
        "",
        _probe("density", "kl_trade"),
        IMAGES,
    ),
    Row(
        "constraints.free_places",
        "places where any module may stand",
        "share of kinds",
        "higher",
        _probe("constraints", "free_places"),
    ),
    Row(
        "constraints.jacobian",
        "density by a Jacobian: error against autograd",
        "nats",
        "",
        _probe("constraints", "jacobian"),
        IMAGES,
    ),
    Row(
        "constraints.inverse_error", "largest error of the inverse", "levels", "lower", _metric("inverse_error"), IMAGES
    ),
    Row("constraints.latent_share", "size of the code beside the data's", "×", "", _metric("latent_share"), IMAGES),
    Row("constraints.noise_dims", "random numbers a sample", "", "", _metric("noise_dims"), IMAGES),
    Row("constraints.noise_per_char", "random numbers a character", "", "", _metric("noise_per_char"), TEXT),
    Row("constraints.networks", "networks trained against each other", "", "lower", _probe("constraints", "networks")),
    Row(
        "constraints.trained_share",
        "parameters that sampling uses",
        "share",
        "higher",
        _probe("constraints", "trained_share"),
    ),
    Row("speed.train", "training images a second", "1/s", "higher", _timing("train_images_per_s"), IMAGES),
    Row("speed.train_tokens", "training characters a second", "1/s", "higher", _timing("train_tokens_per_s"), TEXT),
    Row(
        "speed.seconds_to_quality",
        "seconds until as good as the control, in the probe",
        "s",
        "lower",
        _seconds_to_quality,
    ),
    Row("speed.sample_ms_1", "a sample, one at a time", "ms", "lower", _timing("sample_ms_1")),
    Row("speed.sample_ms_64", "a sample, 64 at a time", "ms", "lower", _timing("sample_ms_64")),
    Row("speed.sample_tokens", "sampled characters a second", "1/s", "higher", _timing("sample_tokens_per_s"), TEXT),
    Row("speed.translate_ms", "a translation", "ms", "lower", _timing("translate_ms"), IMAGES),
    Row("speed.nfe", "network evaluations a sample", "", "lower", _metric("nfe"), IMAGES),
    Row("speed.nfe_per_char", "network evaluations a character", "", "lower", _metric("nfe_per_char"), TEXT),
    Row("speed.memory", "peak memory of the training", "MiB", "lower", _timing("peak_memory_mb")),
)


def table(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """All rows with the cells of these models; None where a model has nothing to measure."""
    return [
        {
            "property": row.key.split(".")[0],
            "key": row.key,
            "title": row.title,
            "unit": row.unit,
            "better": row.better,
            "kinds": list(row.kinds),
            "cells": {name: _cell(row.find(record)) for name, record in records.items()},
        }
        for row in ROWS
    ]


def _cell(figure: Figure | None) -> dict[str, Any] | None:
    """What a cell needs of a figure; the rest stands in the record. An end that is None makes the figure open."""
    if figure is None or figure.get("value") is None:
        return None
    kept = ("value", "low", "high", "n", "kind", "text", "floor", "open")
    cell = {key: figure[key] for key in kept if figure.get(key) is not None}
    ends = [key in figure and figure[key] is None for key in ("low", "high")]
    return cell | ({"open": True} if any(ends) else {})


class Need(NamedTuple):
    """A question that people have, and the row that answers it, where the data are of its kind.

    ``then``: rows that decide between equals.
    """

    need: str
    key: str
    note: str
    then: tuple[str, ...] = ()
    kinds: tuple[str, ...] = IMAGES + TEXT


NEEDS = (
    Need(
        "best density",
        "density.bits_per_dim",
        "the lowest bits/dim of the test split; bounds of unlike kinds are of unlike tightness",
    ),
    Need("best density", "density.bits_per_char", "the lowest bits/char of the test split"),
    Need(
        "best samples", "capacity.frechet_distance", "the lowest Fréchet distance, as a share of the Gaussian control's"
    ),
    Need(
        "most natural samples",
        "capacity.ngram_gap",
        "how far samples are from real text in the bits/char of an n-gram model",
    ),
    Need("fastest sampling", "speed.sample_ms_64", "milliseconds a sample, 64 at a time"),
    Need("fastest training", "speed.train", "training images a second"),
    Need("fastest training", "speed.train_tokens", "training characters a second"),
    Need("most stable", STABLE, "the smallest spread of the quality across seeds, among those none of which is lost"),
    Need(
        "fewest constraints",
        "constraints.free_places",
        "the largest share of inner places that take any module; then the fewest networks, and the most of them used",
        ("constraints.networks", "constraints.trained_share"),
        IMAGES,  # a recurrent layer has no place inside that could be tried
    ),
)


def advice(rows: list[dict[str, Any]], kind: str = "image") -> list[dict[str, Any]]:
    """For each need that these rows answer the best model and its runner-up, with their figures; None where nobody has
    one.

    ``tied``: models whose intervals meet the best one's, so that nobody knows which of them is better.
    """
    by_key = {row["key"]: row for row in rows}
    needs = [need for need in NEEDS if need.key in by_key and kind in need.kinds]
    lost = {m for m, cell in by_key["stability.diverged"]["cells"].items() if cell and cell["value"] > 0}
    found = []
    for need in needs:
        judged = [by_key[key] for key in (need.key, *need.then)]
        known = [m for m, cell in judged[0]["cells"].items() if cell and not (need.key == STABLE and m in lost)]
        order = sorted(known, key=lambda model: [_worse(row, model) for row in judged])
        entry: dict[str, Any] = {"need": need.need, "key": need.key, "note": need.note}
        for place, label in enumerate(("model", "runner_up")):
            name = order[place] if len(order) > place else None
            entry[label] = name
            said = _said(judged[0]["cells"][name], judged[0]["unit"]) if name else ""
            entry["figure" if label == "model" else "runner_up_figure"] = said
        entry["tied"] = [model for model in order[1:] if all(_meet(row, order[0], model) for row in judged)]
        found.append(entry)
    return found


def _worse(row: Mapping[str, Any], model: str) -> float:
    """What to sort by, best first; a model without the figure comes last."""
    cell = row["cells"].get(model)
    return math.inf if not cell else -cell["value"] if row["better"] == "higher" else cell["value"]


def _meet(row: Mapping[str, Any], one: str, other: str) -> bool:
    """Whether the intervals of two models meet; an end that is not known reaches everything."""
    ends = []
    for model in (one, other):
        cell = row["cells"].get(model)
        if not cell:
            return False
        exact = not cell.get("open") and "low" not in cell and "high" not in cell
        low, high = (cell["value"],) * 2 if exact else (cell.get("low", -math.inf), cell.get("high", math.inf))
        ends.append((low, high))
    return ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1]


def _said(cell: Figure, unit: str) -> str:
    value = cell["value"]
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    kind = f" ({cell['kind']})" if cell.get("kind") and unit in ("bits/dim", "bits/char") else ""
    return f"{number} {unit}{kind}".strip()
