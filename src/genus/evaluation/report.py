"""The scorecard as one HTML page that needs no other file: pictures inside it, charts as SVG, no request to anywhere.

Here everything is worked out (what is said of a figure, where a mark stands); report.html.j2 only sets it. Names,
failures and texts come from outside and reach the page through the template alone, which escapes them.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from genus.evaluation.scorecard import draws

View = dict[str, Any]
Figure = Mapping[str, Any]
LIMIT = 6_000_000  # bytes of the page: more is slow to open from a mail or a tracking server
MARKS = 8  # colours, and shapes, that the style sheet knows
SLACK = 12  # ends of a log axis closer than this factor are drawn on a linear one

PROPERTIES = {
    "stability": "Does training end well, whatever the seed, rate and batch?",
    "capacity": "How good are samples for the size, and how much of the data do they cover?",
    "density": "Does it say how likely data are, and how well?",
    "constraints": "What must a network be, to be used in it?",
    "speed": "What do training and sampling cost?",
}
VERDICTS = {
    "supported": "all of the interval agrees",
    "contradicted": "all of the interval disagrees",
    "undecided": "the interval lies on both sides",
    "waiting": "no figure yet",
}
CONTROLS = {
    "frechet_distance": ("Fréchet / control", "lower"),
    "kid": ("KID", "lower"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    "density": ("density", "higher"),
    "coverage": ("coverage", "higher"),
    "missing_classes": ("classes missing", "lower"),
    "two_sample": ("two-sample accuracy", "lower"),
    "high_frequency": ("fine detail", ""),
    "memorisation": ("copied", "lower"),
}
TEXT_CONTROLS = {  # of text
    "ngram_bits": ("n-gram bits/char", ""),
    "distinct_1": ("distinct words", ""),
    "distinct_2": ("distinct pairs", ""),
    "distinct_3": ("distinct threes", ""),
    "copied_span": ("longest span from train", ""),
    "memorisation": ("copied", "lower"),
    "tokens": ("characters", ""),
}
USUAL = "judge"  # the features that are meant where no others are named
FEATURES = {"": USUAL, "pixels_": "pixels (PCA)", "backbone_": "pretrained backbone"}


def page(card: Mapping[str, Any], pictures: Path | Sequence[Path]) -> str:
    """The whole page of what ``scorecard.scorecard`` returned.

    ``pictures``: a folder with <model>/*.png and <dataset>/*.png, any of which may be missing, or several such folders,
    of which the first that has a picture counts. A page that would be larger than LIMIT is made without its largest
    pictures, and says so in their place.
    """
    album = Album((pictures,) if isinstance(pictures, Path) else tuple(pictures))
    while True:
        text = _render(card, album)
        over = len(text.encode()) - LIMIT
        if over <= 0 or not album.drop(over):
            return text


def _render(card: Mapping[str, Any], album: Album) -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("genus", "evaluation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "digest": _digest}
    models = card.get("models") or {}
    named = [*(card.get("datasets") or {}), *(record.get("dataset", "") for record in models.values())]
    datasets = [_dataset(card, name, place, album) for place, name in enumerate(dict.fromkeys(named))]
    return environment.get_template("report.html.j2").render(
        card=card, datasets=datasets, verdicts=VERDICTS, shapes=SHAPES
    )


def _digest(script: str) -> str:
    """By this the page's policy knows its own script, and a browser refuses any other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# What is said of a figure


def number(value: Any, digits: int = 3) -> str:
    """A number as people read it: ``digits`` significant digits, thousands apart; a missing one is "none"."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 1e7:
        power = min(int(math.log10(size)) // 3, 5)
        text = f"{value / 1000**power:.{digits}g} {'  MGTP'[power]}"
    elif size >= 1000 or value == int(value):
        text = f"{value:,.0f}"
    elif size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    else:
        text = f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    return text.replace("-", "−")


def said(figure: Figure | None, digits: int = 3) -> View:
    """A figure in words: ``value`` and its ``interval`` ("" where it is exact) with as many decimals as that allows."""
    if figure is None or figure.get("value") is None:
        return {"value": "none", "interval": "", "there": False}
    value, low, high = figure["value"], figure.get("low"), figure.get("high")
    words: View = {"value": number(value, digits), "interval": "", "there": True}
    if low is None and high is None:
        return words | {"interval": "no interval" if figure.get("open") else ""}
    if low is None or high is None:
        end = f"at most {number(high, digits)}" if low is None else f"at least {number(low, digits)}"
        return words | {"interval": end}
    if low == high:
        return words
    if 1e-3 <= max(abs(low), abs(high)) < 1e7:
        half = (high - low) / 2
        power = math.floor(math.log10(half))
        decimals = min(4, max(0, -power + (half < 3.5 * 10**power)))  # of the interval one digit, or two small ones
        words["value"], low, high = (f"{n:,.{decimals}f}".replace("-", "−") for n in (value, low, high))
    else:
        low, high = number(low, digits), number(high, digits)
    return words | {"interval": f"{low} to {high}" if "−" in f"{low}{high}" else f"{low}–{high}"}


def cited(paper: str) -> list[tuple[str, str]]:
    """The text of a citation in pieces, each with the address of the arXiv number that it is, or ""."""
    pieces = re.split(r"((?:arXiv[:\s]*)?\d{4}\.\d{4,5})", paper)
    found = [re.search(r"\d{4}\.\d{4,5}", piece) if place % 2 else None for place, piece in enumerate(pieces)]
    return [
        (piece, f"https://arxiv.org/abs/{match.group()}" if match else "")
        for piece, match in zip(pieces, found, strict=True)
        if piece
    ]


def _metric(record: Figure, name: str) -> View | None:
    """A metric of a record; the Fréchet distance as its share of the Gaussian control's, with floor and interval."""
    figure = (record.get("metrics") or {}).get(name)
    if not figure or figure.get("value") is None:
        return None
    if figure.get("relative") is None:
        return dict(figure)
    scale = figure["relative"] / figure["value"] if figure["value"] else 0.0
    ends = {end: figure[end] * scale for end in ("low", "high", "floor") if figure.get(end) is not None}
    return {**figure, "value": figure["relative"]} | ends


# Pictures


@dataclass
class Album:
    """The pictures of the page as data: URIs; those in ``left_out`` are too large for it."""

    folders: tuple[Path, ...]
    used: dict[Path, int] = field(default_factory=dict)  # the bytes that each takes on the page
    left_out: set[Path] = field(default_factory=set)

    def get(self, *parts: str, shown: int = 256) -> View | None:
        """A picture drawn at most ``shown`` pixels wide: a whole part of its own size, so that pixels stay even."""
        path = self._find(*parts)
        if path is None:
            return None
        data = path.read_bytes()
        if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 33:
            return None
        width, height = struct.unpack(">II", data[16:24])
        size = {"width": width, "height": height, "shown": width / math.ceil(width / shown)}
        if path in self.left_out:
            return size | {"uri": "", "file": "/".join(parts), "bytes": len(data)}
        uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        self.used[path] = len(uri)
        return size | {"uri": uri}

    def _find(self, *parts: str) -> Path | None:
        """The file in the first folder that has it; a name that leads out of a folder has none."""
        for folder in self.folders:
            path = folder.joinpath(*parts)
            if path.resolve().is_relative_to(folder.resolve()) and path.is_file():
                return path
        return None

    def drop(self, over: int) -> bool:
        """Leaves out the largest pictures, until they save ``over`` bytes; whether there was one to leave out."""
        largest = sorted(self.used, key=lambda path: (-self.used[path], path))
        saved = 0
        for path in largest:
            if saved >= over:
                break
            saved += self.used.pop(path)
            self.left_out.add(path)
        return saved > 0


# One data set, from top to bottom


def _dataset(card: Mapping[str, Any], name: str, place: int, album: Album) -> View:
    """Everything that the page says of one data set. ``prefix`` keeps the anchors of several apart."""
    about = (card.get("datasets") or {}).get(name) or {}
    records = {key: record for key, record in (card.get("models") or {}).items() if record.get("dataset") == name}
    models = [_model(key, record, index, album) for index, (key, record) in enumerate(records.items())]
    looks = {model["name"]: model for model in models}
    working = {key: record for key, record in records.items() if not record.get("failure")}
    measured = [
        key
        for key in records
        if key in working or any((row.get("cells") or {}).get(key) for row in card.get("properties") or [])
    ]
    verdicts = [verdict for verdict in card.get("verdicts") or [] if verdict.get("dataset") == name]
    kind = about.get("kind") or "image"
    text = kind == "text"
    known = [row for row in card.get("properties") or [] if kind in (row.get("kinds") or [kind])]
    rows = [_row(row, measured, verdicts) for row in known]
    titles = {row["key"]: row["title"] for row in rows}
    prefix = f"d{place + 1}-" if place else ""
    return {
        "name": name,
        "prefix": prefix,
        "text": text,
        "what": "documents" if text else "images",
        "unit": "bits/char" if text else "bits/dim",
        "alphabet": len(about.get("alphabet") or ""),
        "real_texts": about.get("texts") or [],
        "counts": about.get("counts") or {},
        "judge": {key: _value(found) for key, found in (about.get("judge") or {}).items()},
        "models": models,
        "looks": looks,
        "measured": [looks[key] for key in measured],
        "failed": [model for model in models if model["failure"]],
        "real": album.get(name, "real.png"),
        "advice": _advice(card, name, looks, rows),
        "groups": [
            {"name": title, "about": PROPERTIES.get(title, ""), "rows": [r for r in rows if r["property"] == title]}
            for title in dict.fromkeys([*PROPERTIES, *(row["property"] for row in rows)])
            if any(row["property"] == title for row in rows)
        ],
        "headline": _headline(records, TEXT_HEADLINE if text else HEADLINE),
        "translated": _translated(working),
        "features": _features(working),
        "places": {key: found for key, record in working.items() if (found := _places(record))},
        "verdicts": _verdicts(verdicts, titles, looks),
        "tradeoff": _tradeoff([p for p in card.get("tradeoff") or [] if p.get("dataset") == name], looks),
        "likelihood": _likelihood(working, about.get("anchors") or {}, looks, LIKELIHOOD[text]),
        "iwae": [chart for key, record in working.items() if (chart := _iwae(record, looks[key]))],
        "training": [_training(record, looks[key]) for key, record in working.items() if record.get("history")],
        "probes": _probes(working, looks),
        "inside": [
            inside
            for model in models
            if (inside := (_decoded if text else _inside)(records[model["name"]], model, album))
        ],
        "two_d": _two_d(working, looks, album),
        "controls": _controls(about.get("controls") or {}, name, album, TEXT_CONTROLS if text else CONTROLS),
        "controls_picture": album.get(name, "controls.png", shown=900),
    }


def _value(found: Any) -> Any:
    return found.get("value") if isinstance(found, Mapping) else found


def _model(name: str, record: Figure, index: int, album: Album) -> View:
    """Who a model is, and how it is told from the others: by a colour and by a shape."""
    dataset = record.get("dataset", "")
    return {
        "name": name,
        "short": name.removeprefix(f"{dataset}-") or name,
        "colour": index % MARKS,
        "shape": (index + index // MARKS) % MARKS,
        "family": record.get("family", ""),
        "paper": cited(record.get("paper") or ""),
        "parameters": record.get("parameters"),
        "steps": record.get("steps"),
        "seed": record.get("seed"),
        "sha256": record.get("sha256") or "",
        "failure": record.get("failure") or "",
        "samples": album.get(name, "samples.png") or album.get(name, "translation.png"),
        "draws": draws(record),
        "texts": [part for part in record.get("texts") or [] if not part.get("kind")],
        "classes": _classes((record.get("metrics") or {}).get("missing_classes") or {}),
    }


def _advice(card: Mapping[str, Any], dataset: str, looks: Mapping[str, View], rows: list[View]) -> list[View]:
    """The needs with their winners; ``close`` where the winner's interval meets another's, so that nothing is sure."""
    by_key = {row["key"]: row for row in rows}
    found = []
    for need in card.get("advice") or []:
        if need.get("dataset") != dataset:
            continue
        cells = by_key.get(need.get("key"), {}).get("by_model", {})
        tied = need.get("tied") or []
        others = [m for m in cells if looks[m]["draws"] and m not in tied and m != need.get("model")]
        close = [m for m in others if cells[m]["mark"] == "tied"]
        found.append(
            {
                **need,
                "winner": looks.get(need.get("model") or ""),
                "second": looks.get(need.get("runner_up") or ""),
                "tied": [looks[name]["short"] for name in tied if name in looks],
                "close": [looks[name]["short"] for name in close],
                "row": need.get("key") if need.get("key") in by_key else "",
            }
        )
    return found


# Tables


def _row(row: Figure, models: Sequence[str], verdicts: list[Figure]) -> View:
    """A row of the properties with the cells of ``models``."""
    figures = [(row.get("cells") or {}).get(name) for name in models]
    judged = {verdict.get("id") for verdict in verdicts}
    cells = _cells(figures, row.get("better", ""))
    return {
        "property": row.get("property", ""),
        "key": row.get("key", ""),
        "title": row.get("title", ""),
        "unit": row.get("unit", ""),
        "better": row.get("better", ""),
        "claims": [number for number in row.get("claims") or [] if number in judged],
        "shared": _shared(cells),
        "cells": cells,
        "by_model": dict(zip(models, cells, strict=True)),
    }


def _cells(figures: Sequence[Figure | None], better: str, digits: int = 3) -> list[View]:
    """Figures of one measurement side by side: what each says, where it lies among them, and whether it is the best.

    ``mark``: "best" for the best value, "tied" for one whose interval meets the best one's; none where all are equal.
    """
    known = [figure for figure in figures if figure and _finite(figure.get("value"))]
    spans = [_span(figure) for figure in known]
    axis = Axis.over([end for span in spans for end in span], 0, 100, pad=0.0)
    values = {figure["value"] for figure in known}
    best = (min if better == "lower" else max)(values) if better and len(values) > 1 else None
    reach = [_span(figure) for figure in known if figure["value"] == best]
    cells = []
    for figure in figures:
        cell = said(figure, digits) | {"sort": "", "mark": "", "kind": "", "text": "", "n": None, "floor": None}
        if figure and cell["there"]:
            cell |= {key: figure[key] for key in ("kind", "text", "n", "floor") if figure.get(key) is not None}
            cell["sort"] = figure["value"]
            cell["kind"] = "" if cell["kind"] == USUAL else cell["kind"]
            if _finite(figure["value"]):
                low, high = _span(figure)
                cell |= {"at": axis.at(figure["value"]), "from": axis.at(low), "to": axis.at(high)}
                meets = any(low <= span[1] and span[0] <= high for span in reach)
                cell["mark"] = "" if best is None else "best" if figure["value"] == best else "tied" if meets else ""
        cells.append(cell)
    return cells


def _shared(cells: Sequence[View]) -> list[str]:
    """Takes what all cells have in common (kind, floor, n) out of them, to be said once in the head."""
    there = [cell for cell in cells if cell["there"]]
    words = {"kind": "{}", "floor": "floor {}", "n": "n {}"}
    found = []
    for key, word in words.items():
        values = {"" if cell[key] is None else number(cell[key], 2) for cell in there}
        if len(there) > 1 and len(values) == 1 and (value := values.pop()):
            found.append(word.format(value))
            for cell in there:
                cell[key] = "" if key == "kind" else None
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _span(figure: Figure) -> tuple[float, float]:
    """The interval as far as it is known."""
    low, high = figure.get("low"), figure.get("high")
    value = float(figure["value"])
    return float(low) if _finite(low) else value, float(high) if _finite(high) else value  # type: ignore[arg-type]


class Column(NamedTuple):
    """A column of the table of models. ``part``: the group of the record it is found in."""

    title: str
    note: str
    better: str
    part: str
    name: str


HEADLINE = (
    Column("bits/dim", "and its kind", "lower", "metrics", "bits_per_dim"),
    Column("Fréchet share", "of the Gaussian control's", "lower", "metrics", "frechet_distance"),
    Column("KID", "", "lower", "metrics", "kid"),
    Column("precision", "", "higher", "metrics", "precision"),
    Column("recall", "", "higher", "metrics", "recall"),
    Column("density", "", "higher", "metrics", "density"),
    Column("coverage", "", "higher", "metrics", "coverage"),
    Column("missing", "classes", "lower", "metrics", "missing_classes"),
    Column("two-sample", "0.5: not told apart", "lower", "metrics", "two_sample"),
    Column("ms/image", "sampling", "lower", "timing", "sample_ms"),
    Column("images/s", "training", "higher", "timing", "train_images_per_s"),
    Column("parameters", "", "", "", "parameters"),
)


TEXT_HEADLINE = (
    Column("bits/char", "and its kind", "lower", "metrics", "bits_per_char"),
    Column("perplexity", "a word", "lower", "metrics", "word_perplexity"),
    Column("n-gram bits", "a character of samples", "", "metrics", "ngram_bits"),
    Column("distinct-1", "words", "", "metrics", "distinct_1"),
    Column("distinct-2", "pairs of words", "", "metrics", "distinct_2"),
    Column("distinct-3", "threes of words", "", "metrics", "distinct_3"),
    Column("copied span", "characters", "", "metrics", "copied_span"),
    Column("copied", "share beyond chance", "lower", "metrics", "memorisation"),
    Column("ms/document", "sampling", "lower", "timing", "sample_ms"),
    Column("characters/s", "sampling", "higher", "timing", "sample_tokens_per_s"),
    Column("characters/s", "training", "higher", "timing", "train_tokens_per_s"),
    Column("parameters", "", "", "", "parameters"),
)


TRANSLATED = (
    Column("taken for the target", "by the judge", "higher", "metrics", "translated_accuracy"),
    Column("cycle error", "of white, there and back", "lower", "metrics", "cycle_error"),
    Column("silhouette kept", "intersection over union", "", "metrics", "kept_silhouette"),
    Column("ms/image", "a translation", "lower", "timing", "translate_ms"),
)


def _translated(records: Mapping[str, Figure]) -> View | None:
    """The table of models that translate; a row a direction, and one for both together."""
    rows = []
    for name, record in records.items():
        both = {column.name: _found(record, column) for column in TRANSLATED}
        if not both["translated_accuracy"]:
            continue
        each = {key: (figure or {}).get("ways") or {} for key, figure in both.items()}
        rows.append((name, "both", both))
        for way in each["translated_accuracy"]:
            rows.append((name, way, {key: known.get(way) for key, known in each.items()}))
    if not rows:
        return None
    columns = []
    for column in TRANSLATED:
        cells = _cells([found[column.name] for _, _, found in rows], "")
        for cell, (_, _, found) in zip(cells, rows, strict=True):
            before = (found[column.name] or {}).get("before")
            cell["text"] = "" if before is None else f"{number(before, 2)} before"
        columns.append((column, cells, _shared(cells)))
    return {
        "columns": [(column, shared) for column, _, shared in columns],
        "rows": [
            {"model": name, "way": way, "cells": [cells[place] for _, cells, _ in columns]}
            for place, (name, way, _) in enumerate(rows)
        ],
    }


def _headline(records: Mapping[str, Figure], wanted: Sequence[Column]) -> View:
    """The table of models: a row a model, a column a headline figure."""
    columns = []
    for column in wanted:
        figures = [_found(record, column) for record in records.values()]
        cells = _cells(figures, column.better)
        columns.append((column, cells, _shared(cells)))
    rows = [{"model": name, "cells": [cells[place] for _, cells, _ in columns]} for place, name in enumerate(records)]
    return {"columns": [(column, shared) for column, _, shared in columns], "rows": rows}


def _found(record: Figure, column: Column) -> View | None:
    if column.part == "metrics":
        return _metric(record, column.name)
    group = record.get(column.part) or {} if column.part else record
    return {"value": group[column.name]} if _finite(group.get(column.name)) else None


def _features(records: Mapping[str, Figure]) -> View | None:
    """The sample metrics on other features than the judge's, beside the judge's: does the order depend on them?"""
    spaces = [
        prefix for prefix in FEATURES if any(f"{prefix}kid" in (r.get("metrics") or {}) for r in records.values())
    ]
    if len(spaces) < 2:
        return None
    metrics = ("frechet_distance", "kid", "precision", "recall", "coverage")
    columns, titles = [], []
    for prefix in spaces:
        for metric in metrics:
            title, better = CONTROLS[metric]
            figures = [_metric(record, prefix + metric) for record in records.values()]
            if any(figures):
                cells = _cells(figures, better)
                for cell in cells:
                    cell["kind"] = ""  # it stands in the head
                columns.append(cells)
                titles.append((title, [FEATURES[prefix], *_shared(cells)]))
    rows = [{"model": name, "cells": [cells[i] for cells in columns]} for i, name in enumerate(records)]
    return {"titles": titles, "rows": rows}


def _controls(
    controls: Mapping[str, Figure], dataset: str, album: Album, titles: Mapping[str, tuple[str, str]]
) -> View | None:
    """What sample sets that are known to be bad score: a metric that does not rank them is not to be believed."""
    known = {row: found.get("metrics") or {} for row, found in controls.items()}
    names = [name for name in titles if any(name in metrics for metrics in known.values())]
    if not names:
        return None
    columns = {}
    for name in names:
        figures = [_metric({"metrics": metrics}, name) for metrics in known.values()]
        columns[name] = _cells(figures, titles[name][1])
    heads = [(*titles[name], _shared(columns[name])) for name in names]
    rows = [
        {
            "key": row,
            "title": found.get("title") or row,
            "cells": [columns[name][place] for name in names],
            "flagged": (known[row].get("memorisation") or {}).get("flagged"),
            "picture": album.get(dataset, f"{row}.png", shown=460),
            "texts": found.get("texts") or [],
        }
        for place, (row, found) in enumerate(controls.items())
    ]
    return {"heads": heads, "rows": rows}


def _places(record: Figure) -> list[Figure]:
    probed = ((record.get("probe") or {}).get("constraints") or {}).get("free_places") or {}
    return probed.get("places") or []


# Verdicts


def _verdicts(verdicts: list[Figure], titles: Mapping[str, str], looks: Mapping[str, View]) -> View:
    """The ledger by property, with the reasons in the words of the table and the source that most share told once."""
    sources = [verdict.get("source") or "" for verdict in verdicts]
    source = max(dict.fromkeys(sources), key=sources.count, default="")
    groups: dict[str, list[View]] = {}
    for verdict in sorted(verdicts, key=lambda v: ([*PROPERTIES, v["property"]].index(v["property"]), v["id"])):
        reasons = _reasons(verdict.get("because") or "", titles, looks)
        told = {key for reason in reasons for _, key in reason}
        groups.setdefault(verdict["property"], []).append(
            {
                **verdict,
                "reasons": reasons,
                "own_source": verdict.get("source") if verdict.get("source") != source else "",
                "rows": [
                    key for key in dict.fromkeys(verdict.get("measures") or []) if key in titles and key not in told
                ],
            }
        )
    counts = {name: sum(v.get("verdict") == name for v in verdicts) for name in VERDICTS}
    return {"groups": groups, "counts": counts, "total": len(verdicts), "source": source, "titles": titles}


def _reasons(because: str, titles: Mapping[str, str], looks: Mapping[str, View]) -> list[list[tuple[str, str]]]:
    """A reason a line, in pieces: its text and, where it is the title of a row, the row's key.

    What another model scores stands in the line of what it is compared with.
    """
    lines: list[str] = []
    for part in because.split("; "):
        rival = next((name for name in looks if part.startswith(f"{name} ")), None)
        if rival and lines:
            lines[-1] += f"; {looks[rival]['short']}{part.removeprefix(rival)}"
        elif part:
            lines.append(part)
    lines = [
        re.sub(r"(?<![\w.])-?\d(\.\d+)?e[+-]\d+", lambda found: number(float(found.group())), line) for line in lines
    ]
    keys = "|".join(re.escape(key) for key in sorted(titles, key=len, reverse=True))
    split = [re.split(rf"(?<![\w.])({keys})(?![\w.])", line) if keys else [line] for line in lines]
    return [
        [(titles[piece], piece) if place % 2 else (piece, "") for place, piece in enumerate(pieces) if piece]
        for pieces in split
    ]


# Charts: where everything stands, in pixels of the SVG

SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.7-3.7h7.4v7.4h-7.4z",
    "M0-5L4.7 3.4H-4.7z",
    "M0-5.4L5.4 0L0 5.4L-5.4 0z",
    "M0 5L4.7-3.4H-4.7z",
    "M-1.6-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
    "M-2.5-4.5h5L5 0L2.5 4.5h-5L-5 0z",
    "M0-5.6L1.5-1.6 5.6-1.4 2.4 1.2 3.5 5.2 0 2.9-3.5 5.2-2.4 1.2-5.6-1.4-1.5-1.6z",
)


class Axis(NamedTuple):
    """From values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(
        cls,
        values: Iterable[float],
        start: float,
        end: float,
        *,
        pad: float = 0.06,
        zero: bool = False,
        log: bool | None = None,
    ) -> Axis:
        """An axis that holds ``values``. Logarithmic where they span more than a factor of SLACK, unless it is said."""
        found = [float(value) for value in values if _finite(value)] or [0.0, 1.0]
        low, high = min(found), max(found)
        if log is None:
            log = not zero and low > 0 and high / low > SLACK
        log = log and low > 0
        if log:
            low, high = math.log10(low), math.log10(high)
        elif zero:
            low, high = min(0.0, low), max(0.0, high)
        if low == high:
            low, high = low - (0.5 if not zero else 0), high + 0.5
        room = (high - low) * pad
        return cls(low - (0 if zero and low == 0 else room), high + room, start, end, log)

    def at(self, value: float) -> float:
        """The pixel of a value, kept within the axis."""
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        share = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> list[View]:
        """Round values along the axis, about ``count``, with what stands beside them."""
        values = self._decades(count) if self.log else []
        if len(values) < 2:
            low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
            values = _round_steps(low, high, count)
        return [{"at": self.at(value), "text": _tick(value)} for value in values]

    def _decades(self, count: int) -> list[float]:
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        steps = (1, 2, 5) if 3 * (self.high - self.low) <= 1.5 * count else (1,)
        found = [step * 10.0**power for power in powers for step in steps]
        return [value for value in found if self.low <= math.log10(value) <= self.high]


def _round_steps(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(step * size for step in (1, 2, 5, 10) if 1.2 * step * size >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def _tick(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M" if abs(value) < 1e9 else f"{value / 1e9:g} G"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}").replace("-", "−")


class Point(NamedTuple):
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    strong: bool = False  # on the front, or otherwise to be named
    failed: bool = False  # no value: a cross on the upper edge


class Series(NamedTuple):
    """Points of one model, joined by a line where there are several."""

    look: View
    points: list[Point]


def chart(
    title: str,
    x: str,
    y: str,
    series: Sequence[Series],
    *,
    width: int = 340,
    height: int = 230,
    log_x: bool | None = None,
    log_y: bool | None = None,
    front: bool = False,
    name: bool = False,
    level: float | None = None,
) -> View | None:
    """Points and lines over two axes; None where there is no point.

    ``front``: draws the line through the strong points, the best for their x. ``name``: names them.
    ``level``: a value of y that means something (1: the Gaussian control).
    """
    points = [point for one in series for point in one.points]
    real = [point for point in points if not point.failed]
    if not real:
        return None
    across = Axis.over((p.x for p in points), 50, width - 12, log=log_x)
    ends = [end for p in real for end in (p.y, p.low, p.high) if end is not None and (end > 0 or end == p.y)]
    down = Axis.over([*ends, *([level] if level is not None else [])], height - 38, 26, log=log_y)
    drawn: list[View] = []
    for one in series:
        marks = [_mark(point, across, down) for point in one.points]
        line = " ".join(f"{m['x']},{m['y']}" for m, p in zip(marks, one.points, strict=True) if not p.failed)
        drawn.append({"look": one.look, "line": line if " " in line else "", "marks": marks})
    best = sorted((m["x"], m["y"]) for one in drawn for m in one["marks"] if m["strong"])
    return {
        "title": title,
        "width": width,
        "height": height,
        "x": {"label": x, "ticks": _spaced(across.ticks(max(3, width // 70)))},
        "y": {"label": y, "ticks": down.ticks(5)},
        "series": drawn,
        "front": " ".join(f"{a},{b}" for a, b in best) if front and len(best) > 1 else "",
        "labels": _labels(drawn, width, height) if name else [],
        "level": down.at(level) if level is not None else None,
    }


def _spaced(ticks: list[View]) -> list[View]:
    """Only those ticks of a horizontal axis that leave their neighbours room to be read."""
    kept: list[View] = []
    for tick in ticks:
        if not kept or tick["at"] - kept[-1]["at"] >= 10 + 3.4 * (len(tick["text"]) + len(kept[-1]["text"])):
            kept.append(tick)
    return kept


def _mark(point: Point, across: Axis, down: Axis) -> View:
    words = said({"value": point.y, "low": point.low, "high": point.high})
    both = point.low is not None and point.high is not None
    return {
        "x": across.at(point.x),
        "y": down.end if point.failed else down.at(point.y),
        "low": down.at(point.low) if both and point.low is not None else None,
        "high": down.at(point.high) if both and point.high is not None else None,
        "told_x": number(point.x),
        "told_y": "diverged" if point.failed else words["value"],
        "interval": words["interval"],
        "label": point.label,
        "strong": point.strong,
        "failed": point.failed,
    }


def _labels(drawn: list[View], width: int, height: int) -> list[View]:
    """The models' names beside their strong or last points, where they cover no other mark, line or name."""
    taken = [(m["x"] - 6, m["y"] - 6, m["x"] + 6, m["y"] + 6) for one in drawn for m in one["marks"]]
    taken += [box for one in drawn for box in _along(one["marks"])]
    found = []
    for one in drawn:
        last = one["marks"][-1]
        for mark in one["marks"]:
            name = one["look"]["short"] if len(drawn) > 1 and (mark["strong"] or mark is last) else ""
            text = " · ".join(part for part in (name, mark["label"]) if part)
            if not text:
                continue
            size = 6.6 * len(text)
            tries = []
            for dx, dy, anchor in (
                (13, 4, 0),
                (-13, 4, 1),
                (0, -13, 0.5),
                (0, 21, 0.5),
                (9, -9, 0),
                (9, 17, 0),
                (-9, 17, 1),
            ):
                left = mark["x"] + dx - anchor * size
                tries.append((left, mark["y"] + dy, (left, mark["y"] + dy - 10, left + size, mark["y"] + dy + 3)))
            free = [t for t in tries if not any(_meet(t[2], box) for box in taken) and _within(t[2], width, height)]
            if free or name:
                left, base, box = (free or [t for t in tries if _within(t[2], width, height)] or tries)[0]
                taken.append(box)
                found.append({"x": round(left, 1), "y": round(base, 1), "text": text, "strong": mark["strong"]})
    return found


def _along(marks: list[View]) -> list[Box]:
    """Small boxes along the line through ``marks``, for names to keep clear of."""
    found = []
    for a, b in itertools.pairwise(marks):
        for share in (place / 12 for place in range(2, 11)):
            x, y = (a[key] + share * (b[key] - a[key]) for key in "xy")
            found.append((x - 2, y - 2, x + 2, y + 2))
    return found


Box = tuple[float, float, float, float]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _within(box: Box, width: int, height: int) -> bool:
    return box[0] > 50 and box[2] < width - 2 and box[1] > 14 and box[3] < height - 38


def _tradeoff(points: list[Figure], looks: Mapping[str, View]) -> View | None:
    """Quality against sampling time, once for a wide screen and once for a narrow one."""
    series = []
    for name, look in looks.items():
        own = sorted((p for p in points if p.get("model") == name), key=lambda p: p["sample_ms"])
        found = [
            Point(p["sample_ms"], p["quality"], p.get("low"), p.get("high"), _calls(p), bool(p.get("pareto")))
            for p in own
        ]
        if found:
            series.append(Series(look, found))
    told = {"title": "Quality against sampling time", "x": "ms an image (log)", "y": "Fréchet / control"}
    wide, narrow = (
        chart(
            **told, series=series, width=width, height=height, log_x=True, log_y=True, front=True, name=True, level=1.0
        )
        for width, height in ((860, 440), (350, 360))
    )
    fastest = [looks[p["model"]]["short"] for p in sorted(points, key=lambda p: p["sample_ms"]) if p.get("pareto")]
    return wide and {"wide": wide, "narrow": narrow, "front": list(dict.fromkeys(fastest)), "legend": _looks(series)}


def _calls(point: Figure) -> str:
    calls = point.get("nfe")
    return point.get("label") or "" if not calls else f"{number(calls)} {'call' if calls == 1 else 'calls'}"


def _looks(series: Iterable[Series]) -> list[View]:
    return [one.look for one in series]


LIKELIHOOD = {False: "bits_per_dim", True: "bits_per_char"}  # by whether the data is text


def _likelihood(
    records: Mapping[str, Figure], anchors: Mapping[str, Figure], looks: Mapping[str, View], metric: str
) -> View:
    """Bars of bits a number, best first, before the lines of what known coders need."""
    known = {name: figure for name, record in records.items() if (figure := _metric(record, metric))}
    lines = {name: anchor for name, anchor in anchors.items() if _finite(anchor.get("value"))}
    unit = {"unit": metric.replace("bits_per_", "bits/")}
    order = sorted(known, key=lambda name: known[name]["value"])
    bars = [
        {"look": looks[name], "figure": known[name], **said(known[name], 4), "kind": known[name].get("kind") or ""}
        for name in order
    ]
    return {
        "without": [looks[name]["short"] for name in records if name not in known],
        "anchors": {name: {**anchor, "told": number(anchor["value"])} for name, anchor in lines.items()},
        "wide": _bars(bars, lines, 860) | unit if bars else None,
        "narrow": _bars(bars, lines, 350) | unit if bars else None,
        "others": _other_likelihoods(records, looks),
    }


def _other_likelihoods(records: Mapping[str, Figure], looks: Mapping[str, View]) -> list[View]:
    found = []
    for name, record in records.items():
        for metric, kind in (("iwae_bits_per_dim", "importance-weighted"), ("ode_bits_per_dim", "probability flow")):
            if figure := _metric(record, metric):
                words = said(figure, 4) | {"kind": figure.get("kind") or kind}
                words |= {"look": looks[name], "gap": said(figure.get("gap")), "n": figure.get("n")}
                found.append(words | {"how": _effort(figure)})
    return found


def _effort(figure: Figure) -> str:
    """What a likelihood along the probability flow took, and what it would be by uniform dequantisation."""
    if not figure.get("nfe"):
        return ""
    told = f"{number(figure['nfe'])} evaluations"
    if _finite(figure.get("rtol")):
        told += f", tolerance {figure['rtol']:g}"
    if _finite(figure.get("spread")):
        told += f", an example’s error by the trace’s probes {number(figure['spread'])}"
    if figure.get("uniform"):
        told += f"; dequantised uniformly {number(figure['uniform']['value'], 4)}"
    return told


def _bars(bars: list[View], anchors: Mapping[str, Figure], width: int) -> View:
    """Horizontal bars from zero; the names of the lines on as many storeys as it takes to keep them apart."""
    left, right = (130, 150) if width > 500 else (8, 14)
    step = 34 if width > 500 else 50
    ends = [end for bar in bars for end in _span(bar["figure"])] + [anchor["value"] for anchor in anchors.values()]
    axis = Axis.over(ends, left, width - right, zero=True, log=False, pad=0.02)
    storeys: list[float] = []
    lines: list[View] = []
    for name, anchor in sorted(anchors.items(), key=lambda pair: pair[1]["value"]):
        x, half = axis.at(anchor["value"]), 3.4 * len(text := f"{name} {number(anchor['value'])}")
        middle = min(max(x, half), width - half)
        storey = next((place for place, end in enumerate(storeys) if end < middle - half - 4), len(storeys))
        storeys[storey : storey + 1] = [middle + half]
        lines.append({"x": x, "middle": round(middle, 1), "storey": storey, "text": text})
    top = 16 + 16 * len(storeys)
    drawn = []
    for place, bar in enumerate(bars):
        low, high = _span(bar["figure"])
        drawn.append(
            bar
            | {
                "y": top + place * step + (16 if width <= 500 else 0),
                "end": axis.at(bar["figure"]["value"]),
                "low": axis.at(low),
                "high": axis.at(high),
            }
        )
    bottom = top + len(bars) * step + (6 if width > 500 else 2)
    return {
        "width": width,
        "height": bottom + 36,
        "left": left,
        "right": width - right,
        "top": top,
        "bottom": bottom,
        "bars": drawn,
        "lines": [line | {"y": 12 + 16 * line["storey"]} for line in lines],
        "ticks": axis.ticks(6),
        "beside": width > 500,
    }


def _iwae(record: Figure, look: View) -> View | None:
    """How the bound tightens with the number of importance weights."""
    figure = (record.get("metrics") or {}).get("iwae_bits_per_dim") or {}
    points = [Point(p["k"], p["value"], p.get("low"), p.get("high")) for p in figure.get("points") or []]
    title = f"{look['short']}: bits/dim by importance weights"
    return chart(title, "importance weights k (log)", "bits/dim", [Series(look, points)], log_x=True, height=190)


QUIET = re.compile(r"step|epoch|learning_rate|lr|images?_per_s.*|.*grad_norm|seconds.*")  # of no use as a curve


def _training(record: Figure, look: View) -> View:
    """The curves of a training: the loss, or every group's where each has its own, and up to three other terms."""
    history = record["history"]
    names = [name for name in history if not QUIET.fullmatch(name)]
    heads = [name for name in names if name == "loss"] or [name for name in names if name.endswith("loss")]
    others = [name for name in names if name not in heads][:3]
    steps = history.get("step") or list(range(1, 1 + max((len(history[name]) for name in names), default=0)))
    return {
        "look": look,
        "main": _curves(steps, {name: history[name] for name in heads}, 340, 170),
        "others": [
            {
                "name": name,
                "last": number(_last(history[name])),
                "curve": _curves(steps, {name: history[name]}, 160, 40),
            }
            for name in others
        ],
    }


def _last(values: Sequence[Any]) -> float | None:
    return next((value for value in reversed(values) if _finite(value)), None)


def _curves(steps: Sequence[float], values: Mapping[str, Sequence[Any]], width: int, height: int) -> View | None:
    """Lines of means over bins in a band from the bins' least to their greatest; the first steps may leave the top."""
    bare = height < 100  # a sparkline: no axes
    known = {name: [(s, v) for s, v in zip(steps, row, strict=False) if _finite(v)] for name, row in values.items()}
    known = {name: pairs for name, pairs in known.items() if pairs}
    if not known:
        return None
    order = sorted(value for pairs in known.values() for _, value in pairs)
    top = order[math.ceil(0.98 * (len(order) - 1))]
    box = (1.0, width - 1.0, height - 2.0, 2.0) if bare else (50.0, width - 10.0, height - 24.0, 10.0)
    across = Axis.over([0, *(s for pairs in known.values() for s, _ in pairs)], box[0], box[1], log=False, pad=0.0)
    down = Axis.over([order[0], top], box[2], box[3], log=False)
    lines = []
    for place, (name, pairs) in enumerate(known.items()):
        bins = _binned(pairs, 40 if bare else 110)
        low = [f"{across.at(s)},{down.at(a)}" for s, a, _, _ in bins]
        high = [f"{across.at(s)},{down.at(b)}" for s, _, _, b in bins]
        line = " ".join(f"{across.at(s)},{down.at(m)}" for s, _, m, _ in bins)
        last = number(pairs[-1][1])
        lines.append(
            {"name": name, "line": line, "band": " ".join(low + high[::-1]), "dashed": place > 0, "last": last}
        )
    return {
        "width": width,
        "height": height,
        "lines": lines,
        "x": [] if bare else _spaced(across.ticks(4)),
        "y": [] if bare else down.ticks(4),
        "box": box,
        "cut": order[-1] > top + (down.high - down.low) * 0.1,
    }


def _binned(pairs: list[tuple[float, float]], count: int) -> list[tuple[float, float, float, float]]:
    """(step, least, mean, greatest) of at most ``count`` bins."""
    size = max(1, math.ceil(len(pairs) / count))
    parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    found = []
    for part in parts:
        values = [value for _, value in part]
        found.append((part[len(part) // 2][0], min(values), sum(values) / len(values), max(values)))
    return found


def _probes(records: Mapping[str, Figure], looks: Mapping[str, View]) -> View:
    """What many short trainings found, a chart a question."""
    probes = {name: record["probe"] for name, record in records.items() if record.get("probe")}

    def gathered(find: Any) -> list[Series]:
        found = [Series(looks[name], find(probe)) for name, probe in probes.items()]
        return [series for series in found if series.points]

    quality = "share of control"
    charts = [
        chart("Quality by step", "training steps", quality, gathered(_by_step), level=1.0),
        chart("Quality against size", "parameters (log)", quality, gathered(_by_width), log_x=True, level=1.0),
        chart("Learning rates", "times the model's own (log)", quality, gathered(_by_rate), log_x=True, level=1.0),
        chart("Quality by resolution", "pixels a side", quality, gathered(_by_size), level=1.0),
    ]
    trades = [
        found
        for name, probe in probes.items()
        for parameter, points in (probe.get("vary") or {}).items()
        if (found := _trade(parameter, points, looks[name]))
    ]
    rates = {
        looks[name]["short"]: said((probe.get("stability") or {}).get("usable_learning_rates"))
        for name, probe in probes.items()
    }
    shown = [found for found in charts if found]
    return {"charts": shown + trades, "legend": [looks[name] for name in probes], "rates": rates}


def _by_step(probe: Figure) -> list[Point]:
    return [Point(p["step"], p["quality"]) for p in probe.get("curve") or [] if _finite(p.get("quality"))]


def _by_width(probe: Figure) -> list[Point]:
    points = ((probe.get("capacity") or {}).get("slope") or {}).get("points") or []
    found = [Point(p["parameters"], p["quality"]) for p in points if _finite(p.get("quality"))]
    return sorted(found)


def _by_size(probe: Figure) -> list[Point]:
    points = ((probe.get("capacity") or {}).get("resolution_cost") or {}).get("points") or []
    return [Point(p["size"], p["quality"]) for p in points if _finite(p.get("quality"))]


def _by_rate(probe: Figure) -> list[Point]:
    """The jobs that differ from the first one in nothing but the learning rate."""
    jobs = [found for found in probe.get("jobs") or [] if found.get("job")]
    others = [{key: part for key, part in found["job"].items() if key != "learning_rate"} for found in jobs]
    points = [
        Point(job["job"]["learning_rate"], job.get("quality") or 0.0, failed=not _finite(job.get("quality")))
        for job, other in zip(jobs, others, strict=True)
        if other == others[0] and job["job"].get("learning_rate")
    ]
    return sorted(points) if len(points) > 1 else []


def _trade(parameter: str, points: Sequence[Figure], look: View) -> View | None:
    """Code length against reconstruction as one parameter is turned."""
    found = [
        Point(terms["kl"], terms["reconstruction"], label=_setting(parameter, point.get("value")))
        for point in points
        if {"kl", "reconstruction"} <= set(terms := point.get("terms") or {})
    ]
    title = f"{look['short']}: code length against reconstruction"
    return chart(title, "code length (KL), nats", "reconstruction", [Series(look, sorted(found))], name=True)


def _setting(parameter: str, value: Any) -> str:
    return "its own" if value is None else f"{parameter} {number(value)}"


def _classes(figure: Figure) -> View | None:
    """Bars of what share of the samples the judge puts in each class, before a tick of what the data have."""
    shares, expected = figure.get("histogram") or [], figure.get("expected") or []
    if not shares:
        return None
    top = max([*shares, *expected, 1e-9])
    names = figure.get("names") or [str(place) for place in range(len(shares))]
    step = 224 / len(shares)
    bars = [
        {
            "x": round(place * step + 1, 1),
            "width": round(step - 2, 1),
            "height": round(34 * share / top, 1),
            "tick": round(36 - 34 * expected[place] / top, 1) if place < len(expected) else None,
            "told": f"{names[place] if place < len(names) else place}: {number(100 * share)}%",
        }
        for place, share in enumerate(shares)
    ]
    return {"bars": bars, "missing": figure.get("classes") or [], "count": len(shares)}


# Pictures of what models do


STRIPS = {
    "interpolation": "a row a pair, from one code to the other",
    "reconstruction": "test images and what their codes decode to",
    "trajectory": "a sample on its way, from noise to image",
    "translation": "test images, translated, and back again: one direction, then the other",
    "field": "true and learnt scores over the density",
    "nearest": "samples and their nearest training images",
}


def _inside(record: Figure, look: View, album: Album) -> View | None:
    """A model's strips; the last with the figure of how much it copied."""
    strips = {kind: album.get(look["name"], f"{kind}.png", shown=460) for kind in STRIPS}
    copied = _metric(record, "memorisation")
    if not copied and not any(strips.values()):
        return None
    told = said(copied) | {"flagged": (copied or {}).get("flagged"), "p_value": (copied or {}).get("p_value")}
    return {
        "look": look,
        "strips": [(kind, STRIPS[kind], strip) for kind, strip in strips.items() if strip],
        "without": [kind for kind, strip in strips.items() if not strip],
        "copied": told,
    }


DECODED = {  # of text
    "reconstruction": ("Reconstructions", "a test document, then what its code decodes to"),
    "interpolation": ("Interpolations", "from one test document to another, what the codes between theirs decode to"),
}


def _decoded(record: Figure, look: View, _: Album) -> View | None:
    """What a model of text has decoded from codes of documents: heading, words and [texts] of each kind."""
    parts = [part for part in record.get("texts") or [] if part.get("kind")]
    kinds = {kind: [part["texts"] for part in parts if part["kind"] == kind] for kind in DECODED}
    found = [(*DECODED[kind], texts) for kind, texts in kinds.items() if texts]
    return {"look": look, "kinds": found} if found else None


def _two_d(records: Mapping[str, Figure], looks: Mapping[str, View], album: Album) -> View:
    """A row a known density: the truth once, then what each model made of it, with its KL divergence from the truth."""
    probed = {name: (record.get("probe") or {}).get("two_d") or {} for name, record in records.items()}
    shapes = dict.fromkeys(shape for fits in probed.values() for shape in fits)
    rows = []
    for shape in shapes:
        fits = []
        truth = None
        for name, known in probed.items():
            truth = truth or album.get(name, f"two_d-{shape}-truth.png")
            if shape in known:
                kl = (known[shape] or {}).get("kl")
                fits.append({"look": looks[name], "kl": said(kl), "picture": album.get(name, f"two_d-{shape}.png")})
        rows.append({"shape": shape, "truth": truth, "fits": fits})
    without = [looks[name]["short"] for name, fits in probed.items() if not fits]
    return {"rows": rows, "without": without}
