"""The scorecard: the records of a collection's models side by side, as data and as a page for people."""

from __future__ import annotations

import base64
import csv
from pathlib import Path
from typing import Any

Record = dict[str, Any]
PALETTE = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e")


def scorecard(about: str, records: list[Record]) -> dict[str, Any]:
    """What stands in reports/scorecard.json: the records in order, and the best model of each metric."""
    best: dict[str, str] = {}
    for metric in ("bits_per_dim", "frechet_distance", "kid"):
        measured = [record for record in records if metric in record["metrics"]]
        for dataset in dict.fromkeys(record["dataset"] for record in measured):
            rivals = [record for record in measured if record["dataset"] == dataset]
            best[f"{dataset}/{metric}"] = min(rivals, key=lambda record: record["metrics"][metric]["value"])["name"]
    return {"about": about, "best": best, "models": records}


def page(card: dict[str, Any], models: Path) -> str:
    """The scorecard as one HTML page that needs no other file: table, sample grids and loss curves."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("genus", "evaluation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    shown = [
        record
        | {
            "picture": _picture(models / record["name"] / "samples.png"),
            "curve": _curve(models / record["name"] / "history.csv", PALETTE[index % len(PALETTE)]),
        }
        for index, record in enumerate(card["models"])
    ]
    return environment.get_template("scorecard.html.j2").render(card=card, models=shown)


def _picture(path: Path) -> str | None:
    return base64.b64encode(path.read_bytes()).decode() if path.exists() else None


def _curve(path: Path, colour: str, width: int = 320, height: int = 120) -> dict[str, Any] | None:
    """The training loss against steps as the points of an SVG line, cut at the 98th percentile to be readable."""
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    name = "loss" if rows and "loss" in rows[0] else next((key for key in rows[0] if key.endswith("_loss")), None)
    if name is None:
        return None
    steps, values = [float(row["step"]) for row in rows], [float(row[name]) for row in rows]
    top, bottom = sorted(values)[int(0.98 * (len(values) - 1))], min(values)
    span = (top - bottom) or 1.0
    points = " ".join(
        f"{width * step / steps[-1]:.1f},{height * (1 - (min(value, top) - bottom) / span):.1f}"
        for step, value in zip(steps, values, strict=True)
    )
    return {
        "points": points,
        "width": width,
        "height": height,
        "colour": colour,
        "name": name,
        "top": f"{top:.4g}",
        "bottom": f"{bottom:.4g}",
        "steps": int(steps[-1]),
    }
