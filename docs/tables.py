"""Puts what was measured here into README's tables, which stand between `<!-- figures: X -->` and `<!-- end -->`.

python docs/tables.py

X is a collection (its records must be there: `genus run --collection X`; X-text where some of its models are of text),
`evaluations` (quality against what a sample costs, of the collections tour and score), `claims` (the default
collection's), or what a benchmark has kept in benchmarks/results: `budget-10`, `modes`, `wgan-loss`, `beta`, `peers`,
`quantisers`.
A table whose figures are not there stays as it is, and is named.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from genus import config
from genus.evaluation.scorecard import draws
from genus.files import read_json, write_text

README = Path("README.md")
Entry = dict[str, Any]


def main() -> None:
    made = {"claims": claims, "evaluations": evaluations, "budget-10": lambda: larger("10")}
    made |= {"modes": modes, "wgan-loss": wgan_loss, "beta": beta, "peers": peers, "quantisers": quantisers}
    for name in config.load().collections:
        made |= {name: partial(collection, name), f"{name}-text": partial(of_text, name)}

    def table(found: re.Match[str]) -> str:
        name, before = found[1], found[2]
        lines = made[name]()
        print(f"{name}: {f'{len(lines) - 2} rows' if lines else 'no figures here, left as it was'}")
        return f"<!-- figures: {name} -->\n" + ("\n".join(lines) + "\n" if lines else before) + "<!-- end -->"

    text = README.read_text(encoding="utf-8")
    write_text(README, re.sub(r"<!-- figures: ([\w-]+) -->\n(.*?)<!-- end -->", table, text, flags=re.S))


def measured(name: str) -> list[Entry]:
    """The records of a collection's models that did not fail; none, unless all of them were evaluated here."""
    paths = [Path("reports/records") / name / f"{model}.json" for model in sorted(config.load().collection(name))]
    if not all(path.exists() for path in paths):
        return []
    records = [read_json(path) for path in paths]
    return [record for record in records if not record.get("failure")]


def collection(name: str) -> list[str]:
    """The models of a collection, the best likelihood first, those without one by their Fréchet distance.

    Of text where all are of text; else those of text are left out. What only some models have is a column of its own;
    those that translate and draw nothing have a table of their own below it.
    """
    images = [record for record in measured(name) if "bits_per_char" not in record["metrics"]]
    if not images:
        return of_text(name)
    others = [record for record in images if not draws(record)]
    images = [record for record in images if draws(record)]
    further = {key: of for key, of in FURTHER.items() if any(key in record["metrics"] for record in images)}
    headings = "model|family|paper|parameters|bits/dim, kind|Fréchet distance (floor)|share of the Gaussian control"
    headings += "|n|coverage|steps / s|images/s|ms/sample"
    headings = "|".join([headings, *(heading for heading, _ in further.values())])
    several = len({record["dataset"] for record in images}) > 1  # then a model's whole name is needed
    rows = []
    for record in sorted(images, key=quality):
        metrics, timing = record["metrics"], record["timing"]
        rows.append(
            [
                record["name"] if several else record["name"].removeprefix(f"{record['dataset']}-"),
                record["family"].partition("/")[0],
                linked(record["paper"]),
                f"{record['parameters']:,}",
                bits(metrics),
                *frechet(metrics),
                number(metrics.get("coverage"), "{:.2f}"),
                f"{record['steps']:,} / {timing['train_seconds']:.0f}",
                f"{timing['train_images_per_s']:,.0f}",
                f"{timing['sample_ms']:.2f}" if "sample_ms" in timing else "–",
                *(number(metrics.get(key), form) for key, (_, form) in further.items()),
            ]
        )
    return [*markdown(headings, rows), *([""] if rows and others else []), *translations(others)]


def translations(records: list[Entry]) -> list[str]:
    """A row a direction."""
    headings = "model|direction|paper|parameters|taken for the target (before; real ones)|n"
    headings += "|error there and back, of white|silhouette kept|steps / s|ms/image"
    rows = []
    for record in sorted(records, key=lambda record: record["name"]):
        metrics, timing = record["metrics"], record["timing"]
        for way, found in metrics["translated_accuracy"]["ways"].items():
            cycle, kept = (metrics[key]["ways"][way] for key in ("cycle_error", "kept_silhouette"))
            rows.append(
                [
                    record["name"].removeprefix(f"{record['dataset']}-"),
                    way,
                    linked(record["paper"]),
                    f"{record['parameters']:,}",
                    f"{interval(found, '{:.2f}')} ({found['before']:.2f}; {found['floor']:.2f})",
                    f"{found['n']:,}",
                    interval(cycle, "{:.3f}"),
                    interval(kept, "{:.2f}"),
                    f"{record['steps']:,} / {timing['train_seconds']:.0f}",
                    f"{timing['translate_ms']:.2f}",
                ]
            )
    return markdown(headings, rows)


def interval(figure: Entry, form: str) -> str:
    return f"{form.format(figure['value'])}, {form.format(figure['low'])} to {form.format(figure['high'])}"


FURTHER = {  # of a metric: its heading, its form
    "asked_accuracy": ("judged as asked for", "{:.1%}"),
}


def evaluations() -> list[str]:
    """Quality against what a sample costs: samplers of many steps and those of few, at their settings of the knobs."""
    rows = []
    tour, score = measured("tour"), measured("score")
    for record in [*tour, *score] if tour and score else []:
        metrics, timing = record["metrics"], record["timing"]
        if not record["family"].startswith("score/") or "asked_accuracy" in metrics:
            continue
        name = record["name"].removeprefix(f"{record['dataset']}-")
        own = {"calls": metrics["nfe"]["value"], "n": metrics["frechet_distance"]["n"], "knobs": {}}
        own |= metrics["frechet_distance"]
        points = [(own, timing["sample_ms"])]
        if "curve" in metrics:
            points += zip(metrics["curve"]["points"], timing["curve_sample_ms"], strict=True)
        for point, milliseconds in sorted(points, key=lambda point: point[0]["calls"]):
            knobs = ", ".join(f"{knob} {value}" for knob, value in point["knobs"].items()) or "as trained"
            share = f"{point['relative']:.3f}" if "relative" in point else "–"
            rows.append([name, knobs, f"{point['calls']:.0f}", share, f"{point['n']:,}", f"{milliseconds:.2f}"])
    return markdown("model|knobs|network evaluations|share of the Gaussian control|n|ms/sample", rows)


def quality(record: Entry) -> tuple[float, float]:
    metrics = record["metrics"]
    found = metrics.get("bits_per_dim") or metrics.get("ode_bits_per_dim") or {"value": 99.0}  # those of text: last
    return found["value"], metrics.get("frechet_distance", {"value": 1e9})["value"]


def of_text(name: str) -> list[str]:
    """The models of text of a collection, the best likelihood first."""
    records = [record for record in measured(name) if "bits_per_char" in record["metrics"]]
    headings = "model|paper|parameters|bits/char, kind|perplexity a word|distinct-2|longest copied span"
    headings += "|n-gram bits of samples|steps / s|characters/s"
    rows = []
    for record in sorted(records, key=lambda record: record["metrics"]["bits_per_char"]["value"]):
        metrics, timing = record["metrics"], record["timing"]
        rows.append(
            [
                record["name"].removeprefix(f"{record['dataset']}-"),
                linked(record["paper"]),
                f"{record['parameters']:,}",
                f"{metrics['bits_per_char']['value']:.3f} {metrics['bits_per_char']['kind']}",
                number(metrics.get("word_perplexity"), "{:,.0f}"),
                *(beside(metrics.get(key), form) for key, form in SCORED.items()),
                f"{record['steps']:,} / {timing['train_seconds']:.0f}",
                f"{timing['train_tokens_per_s']:,.0f}",
            ]
        )
    return markdown(headings, rows)


SCORED = {"distinct_2": "{:.2f}", "copied_span": "{:.0f}", "ngram_bits": "{:.2f}"}


def larger(budget: str) -> list[str]:
    """What benchmarks/budget.py has kept."""
    path = Path(f"benchmarks/results/budget-{budget}.json")
    headings = (
        "`budget: 10`|parameters|likelihood, kind|Fréchet distance (floor)|share of the Gaussian control|n|steps / s"
    )
    rows = []
    models = read_json(path)["models"] if path.exists() else {}
    for name, entry in sorted(models.items(), key=lambda model: quality(model[1])):
        metrics = entry["metrics"]
        likelihood = bits(metrics)
        if of_text := metrics.get("bits_per_char"):
            likelihood = f"{of_text['value']:.3f} bits/char {of_text['kind']}"
        spent = f"{entry['steps']:,} / {entry['train_seconds']:.0f}"
        rows.append([name, f"{entry['parameters']:,}", likelihood, *frechet(metrics), spent])
    return markdown(headings, rows)


def kept(name: str) -> Entry:
    """What a benchmark has kept; nothing where it has not been run."""
    path = Path(f"benchmarks/results/{name}.json")
    return read_json(path) if path.exists() else {}


def modes() -> list[str]:
    """benchmarks/modes.py."""
    rows = [
        [loss.removeprefix("gan/"), ", ".join(map(str, found["modes"])), f"{found['high_quality'][0]:.0%}"]
        for loss, found in sorted(kept("modes").get("losses", {}).items(), key=lambda entry: -entry[1]["modes"][0])
    ]
    return markdown("loss|modes found of 25|samples within three standard deviations of one", rows)


def wgan_loss() -> list[str]:
    """benchmarks/wgan_loss.py."""
    rows = []
    for name, run in kept("wgan_loss").items():
        for key, of in (("near", "near its best at each point"), ("online", "as it is in training")):
            found = run["rank_correlation"][key]
            rows.append(
                [name, of, f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})", str(found["n"])]
            )
    return markdown("training|critic|rank correlation of loss and Fréchet distance|points", rows)


def beta() -> list[str]:
    """benchmarks/beta_curve.py: the comparisons that were fixed before their seeds were run."""
    rows, low, high = [], 1.0, 1.0
    for answer in kept("beta-curve").get("answers", ()):
        low, high = answer["betas"]
        for key, name in (("mutual_information_gap", "MIG"), ("dci", "DCI")):
            found = answer[key]
            plain, heavy = (sum(values) / len(values) for values in found["values"])  # a list a beta
            difference = f"{found['difference']:+.3f} (at least {found['low']:.3f})"
            row = [f"{answer['steps']:,}", name, f"{plain:.3f}", f"{heavy:.3f}", difference]
            rows.append([*row, f"{found['p_value']:.2g}", str(found["n"])])
    return markdown(f"steps||β = {low:g}|β = {high:g}|difference (97.5%)|p, one-sided|seeds", rows)


def peers() -> list[str]:
    """benchmarks/peers.py."""
    rows = [
        [name, f"{race['ratio']:.2f} ({' to '.join(f'{end:.2f}' for end in race['quartiles'])})", race["equal"]]
        for name, race in kept("peers").get("races", {}).items()
    ]
    return markdown("beside|our images/s as a multiple of theirs (quartiles)|what is equal", rows)


def quantisers() -> list[str]:
    """benchmarks/quantisers.py. Of the two grids, the coarse one first."""
    rows = []
    for name, run in kept("quantisers").items():
        used = " / ".join(f"{share:.0%}" for share in run["used"])
        perplexity = " / ".join(f"{value:.1f}" for value in run["perplexity"])
        shares = [f"{run[key]:.3f}" for key in ("reconstruction_share", "sample_share")]
        rows.append(
            [name, str(run["entries"]), used, perplexity, number(run["reconstruction_error"], "{:.1f}"), *shares]
        )
    headings = "quantiser|entries|used, coarse / fine|perplexity|error of reconstructions, levels|share of the control"
    return markdown(f"{headings}|that of the prior's samples", rows)


def claims() -> list[str]:
    """The verdicts of the default collection."""
    path = Path("reports/scorecard.json")
    rows = []
    for verdict in read_json(path)["verdicts"] if path.exists() else ():
        because = re.sub(r"\b(stability|capacity|density|constraints|speed)\.", "", verdict["because"])
        because = because.replace(f"{verdict['dataset']}-", "").replace("_", " ")
        rows.append([str(verdict["id"]), verdict["claim"], verdict["verdict"], because])
    return markdown("|claim|verdict|measured", rows)


def bits(metrics: Entry) -> str:
    if found := metrics.get("bits_per_dim"):
        return f"{found['value']:.3f} {found['kind']}"
    if found := metrics.get("ode_bits_per_dim"):
        return f"{found['value']:.2f} {found['kind']} (n {found['n']})"
    return "–"


def frechet(metrics: Entry) -> list[str]:
    """Distance and floor, share of the control, n."""
    found = metrics.get("frechet_distance")
    if not found:
        return ["–", "–", "–"]
    return [f"{found['value']:.1f} ({found['floor']:.2f})", f"{found['relative']:.3f}", f"{found['n']:,}"]


def number(figure: Entry | None, form: str) -> str:
    return form.format(figure["value"]) if figure else "–"


def beside(figure: Entry | None, form: str) -> str:
    """A figure with what real documents score."""
    if not figure:
        return "–"
    return form.format(figure["value"]) + (f" ({form.format(figure['floor'])})" if "floor" in figure else "")


def linked(paper: str) -> str:
    """The arXiv numbers of a paper's line as links; the line itself where it has none."""
    numbers = re.findall(r"\d{4}\.\d{5}|\d{4}\.\d{4}", paper)
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in numbers) or paper


def markdown(headings: str, rows: list[list[str]]) -> list[str]:
    """A table with the headings between bars; nothing where there are no rows."""
    if not rows:
        return []
    lines = [f"| {' | '.join(row)} |" for row in (headings.split("|"), *rows)]
    return [lines[0], "|" + "---|" * len(headings.split("|")), *lines[1:]]


if __name__ == "__main__":
    main()
