"""Stage scorecard: the models of a collection side by side."""

from __future__ import annotations

from pathlib import Path

from genus import config
from genus.errors import UserError
from genus.files import read_json, write_json, write_text


def run(name: str) -> None:
    """Collects the records of collection ``name`` into reports/<report>.json and .html."""
    params = config.load()
    members = params.collection(name)
    section = params.collections[name]

    from genus.evaluation.scorecard import page, scorecard

    found = {path.stem: path for path in sorted(Path(section.records).rglob("*.json"))}
    missing = [member for member in members if member not in found]
    if missing:
        raise UserError(f"{section.records}: no record of {', '.join(missing)}; `genus evaluate {missing[0]}` makes it")
    card = scorecard(section.about, [read_json(found[member]) for member in members])
    write_json(Path("reports") / f"{section.report}.json", card)
    write_text(Path("reports") / f"{section.report}.html", page(card, Path("models")))
