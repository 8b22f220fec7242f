"""Stage register: makes tracking store and registry say what the files of a collection say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genus import config
from genus.errors import TransientError, UserError
from genus.files import read_json, sha256, write_json
from genus.outbox import waiting
from genus.stages.records import failure_of

if TYPE_CHECKING:
    from genus.registry import Figures
    from genus.tracking import MlflowClient, StoredRun

NEEDS = {  # row of the scorecard that answers a need: alias of the data set's registered model
    "density.bits_per_dim": "best-density",
    "density.bits_per_char": "best-density",
    "capacity.frechet_distance": "best-quality",
    "capacity.ngram_gap": "best-quality",
    "speed.sample_ms_64": "fastest",
    "stability.spread": "most-stable",
}


def run(collection: str) -> None:
    """Registers every model of ``collection`` whose content is new and writes reports/registered/<collection>.json.

    Raises UserError where a file is missing or the store cannot be reached.
    """
    models = config.load().collection(collection)
    write_json(f"reports/registered/{collection}.json", reconcile(models, [collection]))


def reconcile(models: list[str], collections: Iterable[str] = ()) -> dict[str, Any]:
    """Makes the registry say what these models' files say; returns a line of the report for each.

    A new content becomes a version and goes through the gate (genus.registry.gate). The scorecards of ``collections``
    say which model answers which need of their data sets; where two collections speak of one data set, the one that
    is registered last decides.

    A second call changes nothing, and an empty store is filled again from the files. A model whose record says that it
    failed is left out and its line says so. Raises UserError where a file is missing or the store cannot be reached.
    """
    params = config.load()
    failures = {name: failure_of(name, params.model(name)) for name in models}
    models = [name for name in models if not failures[name]]

    from genus import progress, tracking
    from genus.registry import Figures, champions, ensure, gate, settled, versions

    knobs = {name: params.model(name).evaluate.knobs for name in models}
    abouts = {name: read_json(f"models/{name}/model.json") for name in models}
    metrics = {name: read_json(f"reports/metrics/{name}.json") for name in models}
    timing = {name: read_json(f"reports/timing/{name}.json") for name in models}
    contents = {name: tracking.fingerprint(Path("models") / name) for name in models}
    figures = {name: Figures.of(metrics[name]) for name in models}
    table: dict[str, Any] = {name: {"failure": why} for name, why in failures.items() if why}
    table |= {name: _row(contents[name], figures[name]) for name in models}
    reports = {name: report for name in models if (report := _report_of(params, name))}
    pages = {path: sha256(path) for path in set(reports.values())}
    shown = {name: pages[report] for name, report in reports.items()}
    files = {
        name: _hash([contents[name], metrics[name], timing[name], knobs[name], shown.get(name)]) for name in models
    }
    data = {name: gate.data_hash(abouts[name]["dataset"]) for name in models}
    needs = _needs(params, collections)
    late = any(waiting(name, abouts[name].get("key", "")) for name in models)  # something of their trainings
    if not late and settled(files, data, needs):
        return table
    try:
        client = tracking.client()
        # One at a time: two collections may hold the same model, and each would register it.
        with versions.one_at_a_time():
            numbers = {}
            for done, name in enumerate(models, 1):
                found = _run(client, Path("models") / name, abouts[name])
                _evaluation(client, found, metrics[name], timing[name])
                if name in reports:
                    _attach(client, found, reports[name], shown[name])
                _attach_texts(client, found, _texts_of(params, name))
                facts = _facts(params, name) | {"metrics": metrics[name], "timing": timing[name]}
                numbers[name] = ensure(client, Path("models") / name, found, figures[name], knobs[name], facts)
                progress.report(done, len(models), unit="model")
            champions.judge_all(client, numbers)
            for name, number in numbers.items():  # after the rest: where it stands, all the rest does
                client.set_model_version_tag(name, number, "genus.files", files[name])
            for dataset, wanted in needs.items():
                champions.answer(client, dataset, wanted, numbers)
    except tracking.problems() as error:
        raise (TransientError if _may_pass(error) else UserError)(
            f"{tracking.uri()}: the registry cannot be filled: {tracking.why(error)}; `genus register` tries again"
        ) from error
    return table


def _scorecard_of(params: config.Params, collection: str) -> dict[str, Any]:
    """The scorecard of a collection; empty where it has not been made."""
    path = Path("reports") / f"{params.collections[collection].report}.json"
    return read_json(path) if path.exists() else {}


def _needs(params: config.Params, collections: Iterable[str]) -> dict[str, dict[str, str]]:
    """{data set: {alias: model}} as the scorecards of these collections say. Raises UserError for a name of both."""
    found: dict[str, dict[str, str]] = {}
    for collection in collections:
        for advice in _scorecard_of(params, collection).get("advice", []):
            if advice["dataset"] in params.models:
                raise UserError(
                    f"params.yaml: '{advice['dataset']}' is a data set and a model: both are registered by name"
                )
            wanted = found.setdefault(advice["dataset"], {})
            if advice["model"] and advice["key"] in NEEDS:
                wanted[NEEDS[advice["key"]]] = advice["model"]
    return found


def _facts(params: config.Params, name: str) -> dict[str, Any]:
    """What a model's card tells beside its own files: of its data, and the five properties."""
    model = params.model(name)
    described = Path("data/processed") / model.dataset / "dataset.json"
    rows = _scorecard_of(params, model.collection).get("properties", [])
    return {"data": read_json(described) if described.exists() else {}, "properties": rows}


def _may_pass(error: BaseException | None) -> bool:
    """Whether the store may well answer in a while: nobody listens there now, or another process holds it locked."""
    import requests
    from sqlalchemy.exc import OperationalError

    while error is not None:
        if isinstance(error, requests.ConnectionError | requests.Timeout | ConnectionError | TimeoutError):
            return True
        if isinstance(error, OperationalError) and ("locked" in str(error) or "connect" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _report_of(params: config.Params, name: str) -> Path | None:
    """The page on which a model is compared with the others of its collection, where it has been made."""
    path = Path("reports") / f"{params.collections[params.model(name).collection].report}.html"
    return path if path.exists() else None


def _attach(client: MlflowClient, run: StoredRun, report: Path, content: str) -> None:
    """Puts the report among the run's artifacts and says so in its description, unless this one is there already."""
    from genus import tracking

    if run.data.tags.get("genus.report_sha256") != content:
        client.log_artifact(run.info.run_id, str(report), "report")
        where = f"Compared with the others in **Artifacts / report / {report.name}** (`genus report` opens the newest)."
        tracking.add(client, run, {}, {"mlflow.note.content": where, "genus.report_sha256": content})


def _texts_of(params: config.Params, name: str) -> Path:
    """The samples of a model of text, to be read; others have no such file."""
    return Path("reports/pictures") / params.model(name).collection / name / "samples.txt"


def _attach_texts(client: MlflowClient, run: StoredRun, path: Path) -> None:
    """Puts samples among the run's artifacts, unless these are there already."""
    from genus import tracking

    if path.exists() and run.data.tags.get("genus.samples_sha256") != (content := sha256(path)):
        client.log_artifact(run.info.run_id, str(path), "samples")
        tracking.add(client, run, {}, {"genus.samples_sha256": content})


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _row(content: str, figures: Figures | None) -> dict[str, Any]:
    """A model's line of the report: nothing that depends on the store, so equal files give an equal report."""
    if figures is None:
        return {"sha256": content}
    return {"sha256": content, "metric": figures.metric, "value": figures.value}


def _run(client: MlflowClient, folder: Path, about: dict[str, Any]) -> StoredRun:
    """The run that made these files, completed where it lacks something; one made from them where there is none."""
    from genus import tracking

    same = f"tags.`genus.sha256` = '{tracking.fingerprint(folder)}' and attributes.run_name = '{about['name']}'"
    same += " and attributes.status = 'FINISHED'"
    found = tracking.find_run(client, about["dataset"], same)
    if found is None or waiting(about["name"], about.get("key", "")):
        _fill(folder, about)
        found = tracking.find_run(client, about["dataset"], same)
        if found is None:
            raise RuntimeError(f"{folder}: the run that was just made is not in the store")
    return found


def _fill(folder: Path, about: dict[str, Any]) -> None:
    """Completes or makes a run from history.csv, samples.png, model.json and what its training has left on disk."""
    import numpy as np
    import pandas as pd
    from PIL import Image

    from genus import tracking

    described = Path("data/processed") / about["dataset"] / "dataset.json"
    description = read_json(described) if described.exists() else {"spec": about["spec"]}
    params = {key: about[key] for key in ("family", "params", "train", "steps", "seed", "budget", "parameters")}
    with tracking.filled_run(
        dataset=about["dataset"],
        model=about["name"],
        params=params,
        tags={"genus.paper": about["paper"]} | ({"genus.key": about["key"]} if "key" in about else {}),
        description=description | {"sha256": about["data_sha256"]},
    ) as run:
        rows = pd.read_csv(folder / "history.csv").to_dict("records")
        run.complete([{str(name): value for name, value in row.items() if not pd.isna(value)} for row in rows])
        if (folder / "samples.png").exists():
            with Image.open(folder / "samples.png") as picture:
                run.image(np.asarray(picture), about["steps"])
        run.finished(folder)


def _evaluation(client: MlflowClient, run: StoredRun, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
    """Puts the evaluator's figures on the run, where they are not there yet."""
    from genus import tracking

    figures = {f"timing/{name}": float(value) for name, value in timing.items() if _is_number(value)}
    tags = {}
    for name, found in metrics.items():
        for part, value in found.items() if isinstance(found, dict) else {"value": found}.items():
            label = f"test/{name}" if part == "value" else f"test details/{name}_{part}"  # a section each in the UI
            if _is_number(value):
                figures[label] = float(value)
            elif isinstance(value, str) and value:
                tags[label] = value
    new = {name: value for name, value in figures.items() if run.data.metrics.get(name) != value}
    tracking.add(client, run, new, {k: v for k, v in tags.items() if run.data.tags.get(k) != v})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
