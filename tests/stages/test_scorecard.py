"""From data to the report on the digits, stage by stage, with a model that diverges among those that do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from genus.errors import UserError
from genus.stages import controls, evaluate, ingest, judge, register, scorecard, train
from genus.stages.records import failure_of
from genus.training import NonFiniteLoss
from tests.registry.workspace import new_store, small_params

ROOT = Path(__file__).parents[2]
GOOD, BAD, ABSENT = "digits-vae", "digits-wild", "digits-absent"


def section(**changes: Any) -> dict[str, Any]:
    effort = {"samples": 60, "weighed": 10, "weights": 4}
    return {
        "family": "vae/vae",
        "dataset": "digits",
        "collection": "smoke",
        "params": small_params("vae/vae"),
        "train": {"steps": 30, "batch_size": 16},
        "evaluate": effort,
    } | changes


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder in which one model was trained and evaluated and another one has diverged."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        new_store(folder)
        shutil.copy(ROOT / "claims.yaml", folder)
        wild = section(train={"steps": 30, "batch_size": 16, "learning_rate": 1e30})
        folders = {kind: f"reports/{kind}/smoke" for kind in ("records", "probes", "pictures")}
        content = {
            "collections": {"smoke": {"about": "a test", "report": "scorecard-smoke", **folders}},
            "datasets": {"digits": {"source": "digits", "validation": 0.3, "judge": {"steps": 60}}},
            "models": {GOOD: section(), BAD: wild, ABSENT: section()},
        }
        Path("params.yaml").write_text(json.dumps(content))
        ingest.run("digits")
        judge.run("digits")
        controls.run("digits")
        train.run(GOOD)
        evaluate.run(GOOD)
        with pytest.raises(NonFiniteLoss):
            train.run(BAD)
        yield folder


def card() -> dict[str, Any]:
    scorecard.run("smoke")
    return json.loads(Path("reports/scorecard-smoke.json").read_text())


def test_a_model_that_diverged_has_its_place_and_the_rest_stands(project: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(project)
    found = card()
    assert found["models"][BAD]["failure"].startswith("train: step ")
    assert found["models"][ABSENT]["failure"].startswith("not measured; logs/evaluate@digits-absent.log")
    assert found["models"][GOOD]["metrics"]["bits_per_dim"]["kind"] == "elbo"
    assert set(found["datasets"]["digits"]) == {"kind", "counts", "judge", "anchors", "controls"}
    page = Path("reports/scorecard-smoke.html").read_text()
    assert found["models"][BAD]["failure"] in page and "data:image/png;base64" in page


def test_same_files_same_bytes(project: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(project)
    card()
    before = [Path(f"reports/scorecard-smoke.{kind}").read_bytes() for kind in ("json", "html")]
    card()
    assert before == [Path(f"reports/scorecard-smoke.{kind}").read_bytes() for kind in ("json", "html")]


def test_evaluating_again_gives_the_same_bytes(project: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(project)
    figures = Path(f"reports/metrics/{GOOD}.json")
    pictures = sorted(Path(f"reports/pictures/smoke/{GOOD}").iterdir())
    before = [path.read_bytes() for path in (figures, *pictures)]
    evaluate.run(GOOD)
    assert len(pictures) == 4 and before == [path.read_bytes() for path in (figures, *pictures)]


def test_a_record_of_other_weights_is_no_figure(project: Path, monkeypatch: Any) -> None:
    """A training that was killed: DVC had removed the weights, and the record is still that of the older ones."""
    monkeypatch.chdir(project)
    weights = Path(f"models/{GOOD}/weights.safetensors")
    content = weights.read_bytes()
    try:
        weights.unlink()
        with pytest.raises(UserError, match="no model of 'smoke' has figures: digits-vae: not trained to the end"):
            scorecard.run("smoke")
    finally:
        weights.write_bytes(content)


def test_the_registry_takes_what_there_is_and_has_the_report(project: Path, monkeypatch: Any) -> None:
    from genus import tracking

    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    card()
    table = register.reconcile([GOOD, BAD])
    assert table[BAD] == {"failure": failure_of(BAD, section_of(BAD))} and table[GOOD]["metric"] == "bits_per_dim"
    client = tracking.client()
    run = tracking.find_run(client, "digits", f"attributes.run_name = '{GOOD}'")
    assert run is not None and "report / scorecard-smoke.html" in run.data.tags["mlflow.note.content"]
    listed = [item.path for item in client.list_artifacts(run.info.run_id, "report")]
    assert listed == ["report/scorecard-smoke.html"]


def section_of(name: str) -> Any:
    from genus import config

    return config.load().model(name)
