"""The scorecard as data: what stands in reports/scorecard.json and on the page made of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from genus.evaluation import claims as ledger
from genus.evaluation import properties

Record = dict[str, Any]


def scorecard(
    about: str, records: Mapping[str, Record], datasets: Mapping[str, Any], claims: list[ledger.Claim]
) -> dict[str, Any]:
    """All figures of a collection: its models' records, what the data set itself scores, properties and verdicts.

    ``records``: the evaluation of a model with its probe; one with a ``failure`` has only a name and a family.
    ``datasets``: what the judge stage found of each. Verdicts and advice are given for each data set by itself.
    """
    kinds = {dataset: known.get("kind", "image") for dataset, known in datasets.items()}
    rows = [row for row in properties.table(records) if not kinds or set(row["kinds"]) & set(kinds.values())]
    verdicts, advice = [], []
    for dataset, kind in kinds.items():
        members = {name: record for name, record in records.items() if record["dataset"] == dataset}
        # What is said and asked of models is about drawing examples: one that only translates has no part in that.
        generators = {name: record for name, record in members.items() if draws(record)}
        known = [row for row in rows if kind in row["kinds"]]
        own = [row | {"cells": {name: row["cells"][name] for name in generators}} for row in known]
        families = {name: record["family"] for name, record in generators.items() if not record.get("failure")}
        failed = {name: record["family"] for name, record in generators.items() if record.get("failure")}
        cells = {row["key"]: row["cells"] for row in own}
        asked = [claim for claim in claims if _speaks_of(claim, cells, {**families, **failed}, kind)]
        for verdict in ledger.judge(asked, families, cells, failed):
            verdicts.append({"dataset": dataset} | verdict)
        advice += [{"dataset": dataset} | need for need in properties.advice(own, kind)]
    for row in rows:
        row["claims"] = sorted({v["id"] for v in verdicts if row["key"] in v["measures"]})
    return {
        "about": about,
        "datasets": dict(datasets),
        "models": dict(records),
        "properties": rows,
        "verdicts": verdicts,
        "advice": advice,
        "tradeoff": tradeoff(records),
    }


def draws(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a model that draws examples, as far as it says; a failure does not."""
    return "samples" in record.get("can", ["samples"])


def _speaks_of(claim: ledger.Claim, measures: Collection[str], families: Mapping[str, str], kind: str) -> bool:
    """Whether a claim is about data of this kind: its measures are made on it. And of text, about one of the models:
    most claims are about images, where a family that is not among the models is waited for.
    """
    about = kind != "text" or any(ledger.within(family, claim.families) for family in families.values())
    return about and all(condition.measure in measures for condition in claim.all)


def tradeoff(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Quality against sampling time: a point a model, and one for each setting of a knob that was tried.

    Quality is the Fréchet distance as a share of the Gaussian control's. A point is ``pareto`` when no other of its
    data set is both faster and better.
    """
    points = []
    for name, record in records.items():
        metrics, timing = record.get("metrics", {}), record.get("timing", {})
        curve = (metrics.get("curve") or {}).get("points", [])
        tried = [
            (point, ms, _label(point["knobs"]))
            for point, ms in zip(curve, timing.get("curve_sample_ms", []), strict=False)
        ]
        own = metrics.get("frechet_distance")
        if own and "sample_ms" in timing:
            scale = own["relative"] / own["value"] if own["value"] else 0.0
            ends = {end: own[end] * scale for end in ("low", "high") if own.get(end) is not None}
            calls = (metrics.get("nfe") or {}).get("value")
            tried.append(({"relative": own["relative"], "calls": calls, "n": own["n"]} | ends, timing["sample_ms"], ""))
        for point, ms, label in tried:
            if point.get("relative") is not None:
                points.append(
                    {
                        "dataset": record["dataset"],
                        "model": name,
                        "label": label,
                        "sample_ms": ms,
                        "quality": point["relative"],
                        "low": point.get("low"),
                        "high": point.get("high"),
                        "n": point.get("n"),
                        "nfe": point.get("calls"),
                    }
                )
    for point in points:
        point["pareto"] = not any(
            other["dataset"] == point["dataset"]
            and other["sample_ms"] <= point["sample_ms"]
            and other["quality"] <= point["quality"]
            and (other["sample_ms"], other["quality"]) != (point["sample_ms"], point["quality"])
            for other in points
        )
    return points


def _label(knobs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in knobs.items())
