"""Register: the store says what the files say, however often it is asked and whatever the store held before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genus import registry, tracking
from genus.errors import UserError
from genus.stages import register
from tests.registry.workspace import MODEL, new_store, workspace, write_figures, write_model, write_params

__all__ = ["workspace"]  # a fixture
pytestmark = pytest.mark.usefixtures("workspace")


def store_content() -> dict[str, Any]:
    """All that a person sees of the store, without what differs from store to store: ids and times."""
    client = tracking.client()
    content: dict[str, Any] = {}
    for experiment in client.search_experiments(filter_string="name != 'Default'"):
        for run in client.search_runs([experiment.experiment_id]):
            tags = {key: value for key, value in run.data.tags.items() if key != "mlflow.log-model.history"}
            history = {
                key: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
            }
            files = sorted(file.path for file in client.list_artifacts(run.info.run_id))
            pictures = len(client.list_artifacts(run.info.run_id, "images"))
            data = [(entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs]
            about = [run.info.status, run.data.params, tags, history, files, pictures, data]
            content.setdefault(f"run {run.info.run_name}", []).append(about)
    for model in client.search_registered_models():
        versions = client.search_model_versions(f"name = '{model.name}'")
        content[f"model {model.name}"] = {
            "aliases": {alias: str(v) for alias, v in client.get_registered_model(model.name).aliases.items()},
            "versions": {str(version.version): (dict(version.tags), version.description) for version in versions},
        }
    return json.loads(json.dumps(content))


def one_model(**metrics: float) -> None:
    write_params(MODEL)
    write_model()
    write_figures(**(metrics or {"bits_per_dim": 3.5, "frechet_distance": 40.0}))


def test_fills_an_empty_store_from_the_files() -> None:
    one_model()
    register.run("smoke")
    content = store_content()
    ((status, params, tags, history, files, pictures, data),) = content[f"run {MODEL}"]
    assert status == "FINISHED"
    assert params["train.batch_size"] == "8" and params["family"] == "vae/vae"
    assert tags["test details/bits_per_dim_kind"] == "elbo" and tags["genus.filled"]
    assert history["loss"] == [[10, 1.0], [20, 0.5], [30, 10 / 30]]
    assert history["rare"] == [[20, 20.0]]
    assert history["test/bits_per_dim"] == [[0, 3.5]] and history["timing/sample_ms"] == [[0, 1.5]]
    assert {"history.csv", "images", "model.json", "samples.png"} <= set(files) and pictures == 2  # and a thumbnail
    assert data == [["digits", ("ab" * 32)[:36]]]
    model = content[f"model {MODEL}"]
    assert model["aliases"] == {"champion": "1"}
    ((tags, _description),) = model["versions"].values()
    assert tags["genus.decision"] == "first champion: bits_per_dim (elbo) 3.5000"
    content_hash = tracking.fingerprint(Path("models") / MODEL)
    assert json.loads(Path("reports/registered/smoke.json").read_text()) == {
        MODEL: {"sha256": content_hash, "metric": "bits_per_dim", "value": 3.5}
    }
    assert registry.status([MODEL, "digits-other"]) == {MODEL: {"version": "1", "aliases": ["champion"]}}


def test_a_second_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one_model()
    register.run("smoke")
    before, report = store_content(), Path("reports/registered/smoke.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "client", lambda: pytest.fail("asked the store, though all is settled"))
        register.run("smoke")
    assert store_content() == before
    monkeypatch.setattr(registry, "settled", lambda files: False)  # neither does doing it all again
    register.run("smoke")
    assert store_content() == before
    assert Path("reports/registered/smoke.json").read_bytes() == report


def test_a_lost_store_is_filled_again_to_the_same(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_model()
    register.run("smoke")
    before, report = store_content(), Path("reports/registered/smoke.json").read_bytes()
    again = workspace / "again"  # another folder, as this process keeps the first database open
    again.mkdir()
    for name in ("models", "reports", "params.yaml"):
        (workspace / name).rename(again / name)
    monkeypatch.chdir(again)
    new_store(again)
    assert registry.status([MODEL]) == {}
    register.run("smoke")
    assert store_content() == before
    assert Path("reports/registered/smoke.json").read_bytes() == report


def test_a_deleted_run_is_made_again() -> None:
    one_model()
    register.run("smoke")
    client = tracking.client()
    found = tracking.find_run(client, "digits", f"attributes.run_name = '{MODEL}'")
    assert found is not None
    client.delete_run(found.info.run_id)
    register.run("smoke")
    assert len(store_content()[f"run {MODEL}"]) == 1


def test_the_run_of_the_training_is_found_by_its_content() -> None:
    one_model()
    with tracking.training_run("digits", MODEL, {}, {"genus.key": "k"}, {"sha256": "ab" * 32}) as run:
        run.log({"step": 10.0, "loss": 1.0})
        run.finished(Path("models") / MODEL)
    register.run("smoke")
    ((_status, _params, tags, history, *_),) = store_content()[f"run {MODEL}"]
    assert "genus.filled" not in tags
    assert history["loss"] == [[10, 1.0]] and history["test/bits_per_dim"] == [[0, 3.5]]


def test_only_the_better_challenger_becomes_champion() -> None:
    one_model(bits_per_dim=3.5)
    register.run("smoke")
    write_model(seed=1)
    write_figures(bits_per_dim=3.6)  # worse
    register.run("smoke")
    model = store_content()[f"model {MODEL}"]
    assert model["aliases"] == {"champion": "1"}
    assert model["versions"]["2"][0]["genus.decision"] == (
        "bits_per_dim (elbo) 3.6000 does not beat version 1: 3.5000 by more than chance, 0.0141"
    )
    assert registry.status([MODEL]) == {MODEL: {"version": "2", "aliases": []}}
    write_model(seed=2)
    write_figures(bits_per_dim=3.4)  # better
    register.run("smoke")
    model = store_content()[f"model {MODEL}"]
    assert model["aliases"] == {"champion": "3"}
    assert model["versions"]["3"][0]["genus.replaces"] == "1"
    write_model(seed=0)  # the files go back to the first: it is known, and no longer the best
    write_figures(bits_per_dim=3.5)
    register.run("smoke")
    model = store_content()[f"model {MODEL}"]
    assert model["aliases"] == {"champion": "3"} and set(model["versions"]) == {"1", "2", "3"}
    assert registry.status([MODEL]) == {MODEL: {"version": "1", "aliases": []}}


def test_other_knobs_make_another_version() -> None:
    one_model()
    register.run("smoke")
    write_params(MODEL, knobs={"temperature": 0.5})
    register.run("smoke")
    versions = store_content()[f"model {MODEL}"]["versions"]
    assert [versions[number][0]["genus.knobs"] for number in "12"] == ["{}", '{"temperature": 0.5}']


def test_what_is_missing_is_named() -> None:
    write_params(MODEL)
    with pytest.raises(UserError, match=f"models/{MODEL}/model.json: no such file"):
        register.run("smoke")
    write_model()
    with pytest.raises(UserError, match=f"reports/metrics/{MODEL}.json: no such file"):
        register.run("smoke")


def test_a_store_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    one_model()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9: the registry cannot be filled: .*tries again$"):
        register.run("smoke")
    assert not Path("reports/registered/smoke.json").exists()
    assert registry.status([MODEL]) == {}
