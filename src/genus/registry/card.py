"""The model card: what a package's README.md tells of its model, in Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

FIRST = (
    *("bits_per_dim", "frechet_distance", "coverage"),
    *("bits_per_char", "word_perplexity", "ngram_bits", "distinct_2", "copied_span"),
    "memorisation",
)  # of the test figures

KINDS = {
    "exact": "the log-probability itself",
    "dequantised": "a lower bound, in expectation, on the log-probability of the discrete data: noise fills each level",
    "elbo": "the evidence lower bound, estimated from one draw of the code: the log-probability is higher",
    "iwae": "an importance-weighted lower bound: tighter than the evidence lower bound, below the log-probability",
    "ode": "a bound along the probability flow, integrated numerically and with an estimated trace",
}


def card(about: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The card of the model that ``about`` (model.json) describes.

    ``facts``, all optional: ``knobs`` of its sample(), whether it ``samples`` or only translates, ``kind`` of its
    likelihood, ``metrics`` and ``timing`` (the files in reports/metrics and reports/timing), ``properties`` (the
    scorecard's rows), ``data`` (dataset.json), ``record`` (of its training).
    """
    return "\n".join(line for part in _sections(about, facts) for line in part) + "\n"


def _sections(about: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[list[str]]:
    metrics, timing, data = (facts.get(key) or {} for key in ("metrics", "timing", "data"))
    yield [f"# {about['name']}", "", _summary(about), ""]
    yield ["## Data", "", *_data(about, data), ""]
    yield ["## Training", "", *_table(_training(about, timing, facts.get("record") or {})), ""]
    figures = [_figure(name, metrics[name]) for name in sorted(metrics, key=_rank) if _measured(metrics[name])]
    yield ["## On the test split", ""]
    if figures:
        heading = ("figure", "value", "95% interval", "kind", "n", "floor")
        what = "documents" if _is_text(about) else "images"
        unit = "bits/char" if _is_text(about) else "bits/dim"
        note = f"`floor` is what as many real {what} score. Unlike kinds of {unit} are not the same quantity."
        yield [*_table(figures, heading), "", note, ""]
    else:
        yield ["Not measured.", ""]
    rows = list(_properties(about["name"], facts.get("properties") or []))
    if rows:
        yield ["## The five properties", "", *_table(rows, ("property", "measured", "value", "interval", "n")), ""]
    samples = facts.get("samples", True)
    yield ["## How to use it", "", *(_use if samples else _translate)(about, facts.get("knobs") or {}), ""]
    yield ["## Limits", "", *_limits(about, metrics, facts.get("kind"), samples), ""]
    yield ["## Licence", "", *_licence(data)]


def _summary(about: Mapping[str, Any]) -> str:
    paper = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", about.get("paper") or "")
    shape = " × ".join(map(str, about["spec"]["shape"]))
    levels = about["spec"]["levels"]
    what = f"{shape} values of {levels} levels" if levels else f"{shape} numbers"
    if _is_text(about):
        what = f"text of {len(about['spec']['alphabet'])} different symbols, a document at a time"
    return f"A generative model of `{about['dataset']}` ({what}). Family `{about['family']}`: {paper or 'no paper'}."


def _data(about: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    lines = [f"- data set `{about['dataset']}`, SHA-256 `{about['data_sha256']}`"]
    if data.get("source"):
        lines.append(f"- source: {data['source']}")
    if data.get("counts"):
        lines.append("- " + ", ".join(f"{part} {count:,}" for part, count in sorted(data["counts"].items())))
    if about["spec"].get("classes"):
        lines.append(f"- classes: {', '.join(about['spec']['classes'])}")
    return lines


def _training(
    about: Mapping[str, Any], timing: Mapping[str, Any], record: Mapping[str, Any]
) -> Iterator[tuple[str, ...]]:
    for key in ("steps", "seed", "budget", "parameters"):
        if key in about:
            yield key, f"{about[key]:,}"
    units = {"train_images_per_s": "images/s", "train_tokens_per_s": "characters/s", "peak_memory_mb": "MB"}
    for key, unit in {"train_seconds": "s", **units}.items():
        value = timing.get(key, record.get(key))
        if isinstance(value, int | float):
            yield key.replace("_", " "), f"{value:,.4g} {unit}"
    for key in ("params", "train"):
        if about.get(key):
            yield {"params": "of the family", "train": "of the training"}[key], f"`{json.dumps(about[key])}`"


def _figure(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    extra = f" ({found['relative']:.3g} of the Gaussian control's)" if _number(found.get("relative")) else ""
    number, floor = found.get("n"), found.get("floor")
    return (
        name.replace("_", " ") + extra,
        f"{found['value']:.4g}",
        _interval(found),
        str(found.get("kind") or ""),
        f"{number:,}" if isinstance(number, int) else "",
        f"{floor:.4g}" if _number(floor) else "",
    )


def _properties(name: str, rows: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        cell = row.get("cells", {}).get(name) or {}
        if _number(cell.get("value")):
            value = f"{cell['value']:.4g} {row.get('unit') or ''}".strip()
            n = cell.get("n")
            kind = f" ({cell['kind']})" if cell.get("kind") else ""
            yield row["property"], row["title"], value + kind, _interval(cell), f"{n:,}" if isinstance(n, int) else ""


def _use(about: Mapping[str, Any], knobs: Mapping[str, Any]) -> list[str]:
    name, what = about["name"], "texts" if _is_text(about) else "images"
    given = "".join(f', "{knob}": {json.dumps(value)}' for knob, value in knobs.items()).lstrip(", ")
    takes = ", ".join(f"`{knob}` (default {value!r})" for knob, value in knobs.items())
    params = f', "params": {{{given}}}' if given else ""
    keywords = f", params={{{given}}}" if given else ""
    return [
        f"One row of input is one sample: the same `seed`, the same {what[:-1]}, whatever else is asked for with it",
        f"(on the same type of processor). {f'Parameters: {takes}; others' if takes else 'Parameters'} are refused.",
        "",
        "```python",
        "import mlflow, pandas  # MLFLOW_TRACKING_URI says where the registry is",
        f'model = mlflow.pyfunc.load_model("models:/{name}@champion")  # or the path of this folder',
        f'{what} = model.predict(pandas.DataFrame({{"seed": range(16)}}){keywords})',
        "",
        "import genus  # where Genus is installed: verifies every file before it is used",
        f'{what} = genus.load("{name}@champion").sample(range(16))',
        "```",
        "",
        "```sh",
        "mlflow models serve -m THIS_FOLDER --env-manager local --port 5001",
        "curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' \\",
        f'  -d \'{{"dataframe_split": {{"columns": ["seed"], "data": [[0], [1]]}}{params}}}\'',
        "```",
    ]


def _translate(about: Mapping[str, Any], knobs: Mapping[str, Any]) -> list[str]:
    name, shape = about["name"], ", ".join(map(str, about["spec"]["shape"]))
    return [
        "It draws nothing of its own: it makes images of one class into images of another. Input and output are",
        f"[N, {shape}] as stored. Parameter: `to`, the class that they become (default {knobs.get('to')!r});",
        "others are refused.",
        "",
        "```python",
        "import mlflow  # MLFLOW_TRACKING_URI says where the registry is",
        f'model = mlflow.pyfunc.load_model("models:/{name}@champion")  # or the path of this folder',
        f'translations = model.predict(images, params={{"to": {json.dumps(knobs.get("to"))}}})',
        "",
        "import genus  # where Genus is installed: verifies every file before it is used",
        f'translations = genus.load("{name}@champion").translate(images)',
        "```",
    ]


def _limits(
    about: Mapping[str, Any], metrics: Mapping[str, Any], density: str | None, samples: bool = True
) -> list[str]:
    stored = "as text" if _is_text(about) else f"as stored, {' × '.join(map(str, about['spec']['shape']))}"
    lines = [
        f"- It knows `{about['dataset']}` {stored}, and nothing else, "
        "with that data's faults and gaps. It is a small model, made to be compared: not for decisions about people.",
    ]
    figure = metrics.get("bits_per_dim") or metrics.get("bits_per_char") or {}
    kind = str(figure.get("kind") or density or "none")
    one, be = ("text", "be") if _is_text(about) else ("image", "look")
    meaning = KINDS.get(kind.split("-")[0])
    if meaning:
        lines.append(f"- Its likelihood is of the kind `{kind}`: {meaning}. A likely {one} need not {be} good.")
    else:
        lines.append(f"- It has no likelihood: it can {'sample' if samples else 'translate'}, not score.")
    if not samples:
        return [*lines, "- An image that is of neither class is translated all the same."]
    copied = metrics.get("memorisation") or {}
    measured = ""
    nearer = "with a longer span of the training text" if _is_text(about) else "nearer to a training image"
    if _number(copied.get("value")):
        verdict = "flagged" if copied.get("flagged") else "not flagged"
        measured = f" Share of samples {nearer} than chance has it: {copied['value']:.3g} ({verdict})."
    lines.append(f"- Nothing filters out samples that repeat a training example.{measured}")
    return lines


def _licence(data: Mapping[str, Any]) -> list[str]:
    given = data.get("licence")
    return ["Code and weights: MIT. Data: " + (f"{given}." if given else "see the data's source.")]


def _is_text(about: Mapping[str, Any]) -> bool:
    return bool(about["spec"].get("alphabet"))


def _rank(name: str) -> tuple[int, str]:
    return (FIRST.index(name) if name in FIRST else len(FIRST)), name


def _measured(found: object) -> bool:
    return isinstance(found, Mapping) and _number(found.get("value"))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found.get("low"), found.get("high")
    return f"{low:.4g} to {high:.4g}" if _number(low) and _number(high) else ""


def _table(rows: Any, heading: tuple[str, ...] = ("", "")) -> list[str]:
    """A Markdown table; a bar within a cell would end it."""
    lines = [heading, tuple("---" for _ in heading), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
