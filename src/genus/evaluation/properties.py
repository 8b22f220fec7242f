"""The five properties as one table: a row a measurement, a cell a model. Claims and report speak of its keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Record = Mapping[str, Any]
Figure = Mapping[str, Any]
NOISE = 0.1  # seconds on a machine that does other things too are known to about a tenth


class Row(NamedTuple):
    """One measurement. ``key``: <property>.<name>. ``better``: lower, higher or, where it is neither, empty."""

    key: str
    title: str
    unit: str
    better: str
    find: Callable[[Record], Figure | None]


def _metric(name: str, part: str = "value") -> Callable[[Record], Figure | None]:
    def find(record: Record) -> Figure | None:
        figure = record.get("metrics", {}).get(name)
        if figure is None or part == "value":
            return figure
        if isinstance(figure.get(part), dict):
            return figure[part]
        scale = figure[part] / figure["value"] if figure["value"] else 0.0
        ends = {end: figure[end] * scale for end in ("low", "high") if figure.get(end) is not None}
        return {"value": figure[part], "n": figure["n"], "kind": figure.get("kind", ""), **ends}

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


def _trade(record: Record) -> Figure | None:
    """Rank correlation of code length and reconstruction error where a parameter of the family was varied."""
    for points in ((record.get("probe") or {}).get("vary") or {}).values():
        terms = [point["terms"] for point in points if point["terms"] and {"kl", "reconstruction"} <= set(point["terms"])]
        if len(terms) > 2:
            from scipy import stats

            found = stats.spearmanr([term["kl"] for term in terms], [term["reconstruction"] for term in terms])
            return {"value": float(found.statistic), "n": len(terms), "kind": "rank correlation"}
    return None


def _seconds_to_quality(record: Record) -> Figure | None:
    """Seconds of the probe's first training until samples were as good as the Gaussian control's."""
    curve = (record.get("probe") or {}).get("curve") or []
    seconds = record.get("timing", {}).get("probe_curve_seconds") or []
    for point, second in zip(curve, seconds, strict=False):
        if point["quality"] <= 1:
            return {"value": second, "low": second * (1 - NOISE), "high": second * (1 + NOISE), "n": 1}
    return None


def _parameters(record: Record) -> Figure | None:
    return {"value": record["parameters"]} if "parameters" in record else None


ROWS = (
    Row("stability.diverged", "short trainings that diverge", "share", "lower", _probe("stability", "diverged")),
    Row("stability.spread", "spread of the quality across seeds", "IQR / median", "lower", _probe("stability", "spread")),
    Row("stability.spikes", "loss spikes above 5 σ", "per 1,000 steps", "lower", _probe("stability", "spikes")),
    Row("stability.gradient_ratio", "gradient norm, p99 / median", "×", "lower", _probe("stability", "gradient_ratio")),
    Row(
        "stability.usable_learning_rates",
        "width of the usable learning rates",
        "decades",
        "higher",
        _probe("stability", "usable_learning_rates"),
    ),
    Row("stability.small_batch_cost", "small batches: quality lost", "×", "lower", _probe("stability", "small_batch_cost")),
    Row(
        "stability.small_batch_spread",
        "small batches: spread across seeds",
        "IQR / median",
        "lower",
        _probe("stability", "small_batch_spread"),
    ),
    Row("stability.outlier_cost", "planted outliers: quality lost", "×", "lower", _probe("stability", "outlier_cost")),
    Row(
        "stability.outlier_pull",
        "gradient of an outlier, beside a usual image's",
        "×",
        "lower",
        _probe("stability", "outlier_pull"),
    ),
    Row("capacity.parameters", "parameters", "", "", _parameters),
    Row("capacity.flops", "training operations an image, in the probe", "FLOP", "lower", _probe("capacity", "flops")),
    Row("capacity.frechet_distance", "Fréchet distance / Gaussian control", "share", "lower", _metric("frechet_distance", "relative")),
    Row("capacity.slope", "quality a doubling of the parameters", "×", "lower", _probe("capacity", "slope")),
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
    ),
    Row("capacity.coverage", "coverage", "share", "higher", _metric("coverage")),
    Row("capacity.recall", "recall", "share", "higher", _metric("recall")),
    Row("capacity.missing_classes", "classes missing", "", "lower", _metric("missing_classes")),
    Row("capacity.high_frequency", "fine detail beside the data's", "×", "", _metric("high_frequency")),
    Row("capacity.memorisation", "samples copied from train", "share", "lower", _metric("memorisation")),
    Row("density.bits_per_dim", "bits/dim of the test split", "bits/dim", "lower", _metric("bits_per_dim")),
    Row("density.iwae", "bits/dim, importance-weighted", "bits/dim", "lower", _metric("iwae_bits_per_dim")),
    Row("density.ode", "bits/dim by the probability flow", "bits/dim", "lower", _metric("ode_bits_per_dim")),
    Row("density.gap", "gap of the bound", "bits/dim", "lower", _metric("iwae_bits_per_dim", "gap")),
    Row("density.two_d", "KL from a known 2-D density (worst set)", "nats", "lower", _two_d),
    Row("density.likelihood_ms", "a likelihood", "ms", "lower", _timing("likelihood_ms")),
    Row("density.kl_trade", "code length against reconstruction", "rank correlation", "", _trade),
    Row(
        "constraints.free_places",
        "places where any module may stand",
        "share of kinds",
        "higher",
        _probe("constraints", "free_places"),
    ),
    Row("constraints.jacobian", "density by a Jacobian: error against autograd", "nats", "", _probe("constraints", "jacobian")),
    Row("constraints.inverse_error", "largest error of the inverse", "levels", "lower", _metric("inverse_error")),
    Row("constraints.latent_share", "size of the code beside the data's", "×", "", _metric("latent_share")),
    Row("constraints.noise_dims", "random numbers a sample", "", "", _metric("noise_dims")),
    Row("constraints.networks", "networks trained against each other", "", "lower", _probe("constraints", "networks")),
    Row("constraints.trained_share", "parameters that sampling uses", "share", "higher", _metric("trained_share")),
    Row("speed.train", "training images a second", "1/s", "higher", _timing("train_images_per_s")),
    Row("speed.seconds_to_quality", "seconds until as good as the control, in the probe", "s", "lower", _seconds_to_quality),
    Row("speed.sample_ms_1", "a sample, one at a time", "ms", "lower", _timing("sample_ms_1")),
    Row("speed.sample_ms_64", "a sample, 64 at a time", "ms", "lower", _timing("sample_ms_64")),
    Row("speed.nfe", "network evaluations a sample", "", "lower", _metric("nfe")),
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
            "cells": {name: _cell(row.find(record)) for name, record in records.items()},
        }
        for row in ROWS
    ]


def _cell(figure: Figure | None) -> dict[str, Any] | None:
    """What a cell needs of a figure; the rest stands in the record."""
    if figure is None or figure.get("value") is None:
        return None
    kept = ("value", "low", "high", "n", "kind", "text", "floor", "open")
    return {key: figure[key] for key in kept if figure.get(key) is not None}


class Need(NamedTuple):
    """A question that people have, and the rows that answer it: the first that decides, the others beside it."""

    need: str
    key: str
    note: str


NEEDS = (
    Need("best density", "density.bits_per_dim", "the lowest bits/dim of the test split; unlike kinds are bounds of unlike tightness"),
    Need("best samples", "capacity.frechet_distance", "the lowest Fréchet distance, as a share of the Gaussian control's"),
    Need("fastest sampling", "speed.sample_ms_64", "milliseconds a sample, 64 at a time"),
    Need("fastest training", "speed.train", "training images a second"),
    Need("most stable", "stability.spread", "the smallest spread of the quality across seeds, none diverged"),
    Need("fewest constraints", "constraints.free_places", "the largest share of inner places that take any module"),
)


def advice(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each need the best model and its runner-up, each with its figure; None where nobody has one."""
    by_key = {row["key"]: row for row in rows}
    found = []
    for need in NEEDS:
        row = by_key[need.key]
        sign = -1 if row["better"] == "higher" else 1
        out = {m for m, cell in by_key["stability.diverged"]["cells"].items() if cell and cell["value"] > 0}
        known = [(m, cell) for m, cell in row["cells"].items() if cell and not (need.need == "most stable" and m in out)]
        order = sorted(known, key=lambda pair: sign * pair[1]["value"])
        entry: dict[str, Any] = {"need": need.need, "key": need.key, "note": need.note}
        for place, label in ((0, "model"), (1, "runner_up")):
            name, cell = order[place] if len(order) > place else (None, None)
            entry[label] = name
            entry["figure" if place == 0 else "runner_up_figure"] = _said(cell, row["unit"]) if cell else ""
        tied = [m for m, cell in order[1:] if order[0][1]["value"] == cell["value"]]
        entry["tied"] = tied
        found.append(entry)
    return found


def _said(cell: Figure, unit: str) -> str:
    value = cell["value"]
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    kind = f" ({cell['kind']})" if cell.get("kind") and unit == "bits/dim" else ""
    return f"{number} {unit}{kind}".strip()
