"""Stage scorecard: the models of a collection side by side, and what textbooks say of them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from genus import config
from genus.errors import UserError
from genus.files import read_json, sha256, write_json, write_text
from genus.stages.records import record_of


def run(name: str) -> None:
    """Collects the records and probes of collection ``name`` into reports/<report>.json and .html.

    Beside them, for `dvc plots`, quality against sampling time as .csv: DVC draws no lists that lie deeper in a JSON.

    A model that failed is shown with its failure. Raises UserError where there is no figure of any model.
    """
    params = config.load()
    members = params.collection(name)
    section = params.collections[name]

    from genus.evaluation import claims
    from genus.evaluation.report import page
    from genus.evaluation.scorecard import scorecard

    records = {member: _record(member, params.models[member]) for member in members}
    if all(record.get("failure") for record in records.values()):
        why = "; ".join(f"{member}: {record['failure']}" for member, record in records.items())
        raise UserError(f"{section.records}: no model of '{name}' has figures: {why}")
    datasets = {record["dataset"]: _dataset(record["dataset"]) for record in records.values()}
    card = scorecard(section.about, records, datasets, claims.read())
    collections = dict.fromkeys(params.models[member].collection for member in members)
    pictures = [Path("reports") / kind / part for kind in ("pictures", "probes") for part in collections]
    write_json(Path("reports") / f"{section.report}.json", card)
    write_text(Path("reports") / f"{section.report}.csv", _table(card["tradeoff"]))
    write_text(Path("reports") / f"{section.report}.html", page(card, [*pictures, Path("reports/controls")]))


def _table(points: list[dict[str, Any]]) -> str:
    """Rows as CSV; a head alone where there are none."""
    text = io.StringIO()
    rows = csv.DictWriter(
        text, ["dataset", "model", "label", "sample_ms", "quality", "low", "high", "n", "nfe", "pareto"]
    )
    rows.writeheader()
    rows.writerows(points)
    return text.getvalue()


def _dataset(name: str) -> dict[str, Any]:
    """What is known of a data set itself: sizes, judge, coders and control sets."""
    described = read_json(Path("data/processed") / name / "dataset.json")
    judge = read_json(Path("data/judge") / name / "judge.json")
    known = read_json(Path("reports/controls") / name / "controls.json")
    text = described["kind"] == "text"
    if text:
        from genus.evaluation.text.controls import TITLES
    else:
        from genus.evaluation.controls import TITLES
    figures = ("order", "grams", "bits_per_char", "span") if text else ("accuracy", "control", "floor")
    return {
        "kind": described["kind"],
        "counts": described["counts"],
        "judge": {key: judge[key] for key in figures},
        "anchors": known["anchors"],
        "controls": {row: known["controls"][row] for row in TITLES if row in known["controls"]},  # best first
    } | ({"texts": known["texts"], "alphabet": described["spec"]["alphabet"]} if text else {})


def _record(name: str, model: config.Model) -> dict[str, Any]:
    """What is known of a model: its evaluation and its probe, or why there is none."""
    path, weights = record_of(name, model), Path("models") / name / "weights.safetensors"
    record: dict[str, Any] = {"name": name, "family": model.family, "dataset": model.dataset}
    record |= read_json(path) if path.exists() else {"failure": f"not measured; logs/evaluate@{name}.log may say why"}
    if not record.get("failure") and not (weights.exists() and sha256(weights) == record["sha256"]):
        # DVC removes what a stage is to make anew: a training that ended half way leaves the older model's record.
        record = {key: record[key] for key in ("name", "family", "dataset")}
        record["failure"] = f"not trained to the end; logs/train@{name}.log may say why"
    probe = Path("reports/probes") / model.collection / name / "probe.json"
    seconds = Path("reports/timing/probe") / f"{name}.json"
    if probe.exists():
        record["probe"] = read_json(probe)
        record["timing"] = record.get("timing", {}) | (read_json(seconds) if seconds.exists() else {})
    return record
