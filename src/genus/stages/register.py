"""Stage register: makes tracking store and registry say what the files of a collection say."""

from __future__ import annotations

import fcntl
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genus import config
from genus.errors import UserError
from genus.files import read_json, sha256, write_json
from genus.stages.records import failure_of

if TYPE_CHECKING:
    from genus.registry import Figures
    from genus.tracking import MlflowClient, StoredRun


def run(collection: str) -> None:
    """Registers every model of ``collection`` whose content is new and writes reports/registered/<collection>.json.

    Raises UserError where a file is missing or the store cannot be reached.
    """
    write_json(f"reports/registered/{collection}.json", reconcile(config.load().collection(collection)))


def reconcile(models: list[str]) -> dict[str, Any]:
    """Makes the registry say what these models' files say; returns a line of the report for each.

    A second call changes nothing, and an empty store is filled again from the files. A model whose record says that it
    failed is left out and its line says so. Raises UserError where a file is missing or the store cannot be reached.
    """
    params = config.load()
    failures = {name: failure_of(name, params.model(name)) for name in models}
    models = [name for name in models if not failures[name]]

    from genus import progress, tracking
    from genus.registry import Figures, register, settled

    knobs = {name: params.model(name).evaluate.knobs for name in models}
    abouts = {name: read_json(f"models/{name}/model.json") for name in models}
    metrics = {name: read_json(f"reports/metrics/{name}.json") for name in models}
    timing = {name: read_json(f"reports/timing/{name}.json") for name in models}
    contents = {name: tracking.fingerprint(Path("models") / name) for name in models}
    figures = {name: Figures.of(metrics[name], abouts[name]["data_sha256"]) for name in models}
    table: dict[str, Any] = {name: {"failure": why} for name, why in failures.items() if why}
    table |= {name: _row(contents[name], figures[name]) for name in models}
    reports = {name: report for name in models if (report := _report_of(params, name))}
    pages = {path: sha256(path) for path in set(reports.values())}
    shown = {name: pages[report] for name, report in reports.items()}
    files = {
        name: _hash([contents[name], metrics[name], timing[name], knobs[name], shown.get(name)]) for name in models
    }
    if settled(files):
        return table
    Path(".genus").mkdir(exist_ok=True)
    client = tracking.client()
    try:
        # One at a time: two collections may hold the same model, and each would register it.
        with open(".genus/register.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for done, name in enumerate(models, 1):
                found = _run(client, Path("models") / name, abouts[name])
                _evaluation(client, found, metrics[name], timing[name])
                if name in reports:
                    _attach(client, found, reports[name], shown[name])
                register(client, Path("models") / name, found, figures[name], knobs[name], files[name])
                progress.report(done, len(models), unit="model")
    except tracking.problems() as error:
        why = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"{tracking.uri()}: the registry cannot be filled: {why}; `genus register` tries again"
        ) from error
    return table


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


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _row(content: str, figures: Figures | None) -> dict[str, Any]:
    """A model's line of the report: nothing that depends on the store, so equal files give an equal report."""
    if figures is None:
        return {"sha256": content}
    return {"sha256": content, "metric": figures.metric, "value": figures.value}


def _run(client: MlflowClient, folder: Path, about: dict[str, Any]) -> StoredRun:
    """The run that made these files, or one made from them where the store has none."""
    from genus import tracking

    same = f"tags.`genus.sha256` = '{tracking.fingerprint(folder)}' and attributes.run_name = '{about['name']}'"
    found = tracking.find_run(client, about["dataset"], same)
    if found is None:
        _fill(folder, about)
        found = tracking.find_run(client, about["dataset"], same)
        if found is None:
            raise RuntimeError(f"{folder}: the run that was just made is not in the store")
    return found


def _fill(folder: Path, about: dict[str, Any]) -> None:
    """A run from history.csv, samples.png and model.json."""
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
        tags={"genus.paper": about["paper"]},
        description=description | {"sha256": about["data_sha256"]},
    ) as run:
        for row in pd.read_csv(folder / "history.csv").to_dict("records"):
            run.log({str(name): value for name, value in row.items() if not pd.isna(value)})
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
