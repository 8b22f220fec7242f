"""Stage scorecard: the models of a collection side by side, and what textbooks say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genus import config
from genus.errors import UserError
from genus.files import read_json, write_json, write_text


def run(name: str) -> None:
    """Collects the records and probes of collection ``name`` into reports/<report>.json and .html.

    A model that failed is shown with its failure. Raises UserError where there is no record of any model.
    """
    params = config.load()
    section = params.collections[name] if name in params.collections else None
    members = params.collection(name)
    assert section is not None  # collection() has refused the name

    from genus.evaluation import claims
    from genus.evaluation.report import page
    from genus.evaluation.scorecard import scorecard

    records = {member: _record(params, member) for member in members}
    if all(record.get("failure") for record in records.values()):
        raise UserError(f"{section.records}: no record of {members[0]}; `genus evaluate {members[0]}` makes it")
    datasets = {}
    for dataset in dict.fromkeys(record["dataset"] for record in records.values()):
        counts = read_json(f"data/processed/{dataset}/dataset.json")["counts"]
        judged = Path("data/judge") / dataset
        about = read_json(judged / "judge.json")
        datasets[dataset] = {
            "counts": counts,
            "judge": {key: about[key] for key in ("accuracy", "control", "floor") if key in about},
            "anchors": about.get("anchors", {}),
            "controls": read_json(judged / "controls.json") if (judged / "controls.json").exists() else {},
        }
    card = scorecard(section.about, records, datasets, claims.read())
    write_json(Path("reports") / f"{section.report}.json", card)
    write_text(Path("reports") / f"{section.report}.html", page(card))


def _record(params: config.Params, name: str) -> dict[str, Any]:
    """What is known of a model: its evaluation and its probe, or that it has none."""
    model = params.models[name]
    path = Path("reports/records") / model.collection / f"{name}.json"
    probe = Path("reports/probes") / model.collection / name / "probe.json"
    seconds = Path("reports/timing/probe") / f"{name}.json"
    found = read_json(path) if path.exists() else {"failure": f"not measured: logs/train@{name}.log may say why"}
    record = {"name": name, "family": model.family, "dataset": model.dataset} | found
    if probe.exists():
        record["probe"] = read_json(probe)
        if seconds.exists():
            record["timing"] = record.get("timing", {}) | read_json(seconds)
    return record
