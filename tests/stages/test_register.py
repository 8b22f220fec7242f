"""Register: the store says what the files say, however often it is asked and whatever the store held before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genus import registry, tracking
from genus.errors import UserError
from genus.registry.champions import rollback
from genus.registry.gate import Trial
from genus.stages import register
from tests.registry.workspace import MODEL, new_store, passing, workspace, write_figures, write_model, write_params

__all__ = ["passing", "workspace"]  # fixtures
pytestmark = pytest.mark.usefixtures("workspace", "passing")
OTHER = "digits-other"


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
        for version in versions:
            version.tags.pop("genus.manifest")  # the package names its run
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
    assert {"history.csv", "images", "model.json", "model_card.md", "samples.png"} <= set(
        files
    ) and pictures == 2  # and a thumbnail
    assert data == [["digits", ("ab" * 32)[:36]]]
    model = content[f"model {MODEL}"]
    assert model["aliases"] == {"champion": "1"}
    ((tags, description),) = model["versions"].values()
    assert tags["genus.decision"] == "it is the first version, and it works" and tags["genus.value"] == "3.5"
    assert "## Gate: champion (first)" in description
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
    monkeypatch.setattr(registry, "settled", lambda *_: False)  # neither does doing it all again
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


def test_a_new_content_is_the_challenger_until_it_wins(passing: list[Any]) -> None:
    one_model()
    register.run("smoke")
    write_model(seed=1)
    register.run("smoke")
    model = store_content()[f"model {MODEL}"]
    assert model["aliases"] == {"champion": "1", "challenger": "2"}
    assert model["versions"]["2"][0]["genus.rule"] == "no data"  # to compare them on
    assert registry.status([MODEL]) == {MODEL: {"version": "2", "aliases": ["challenger"]}}
    passing[:] = [Trial(fault="bad")]
    write_model(seed=2)
    register.run("smoke")
    model = store_content()[f"model {MODEL}"]
    assert model["aliases"] == {"champion": "1", "challenger": "3"}
    assert model["versions"]["3"][0]["genus.decision"] == "it does not work: bad"
    write_model(seed=0)  # the files go back to the first: it is known, and champion
    register.run("smoke")
    model = store_content()[f"model {MODEL}"]
    assert model["aliases"] == {"champion": "1", "challenger": "3"} and set(model["versions"]) == {"1", "2", "3"}
    assert registry.status([MODEL]) == {MODEL: {"version": "1", "aliases": ["champion"]}}


def test_a_killed_register_is_finished_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    one_model()
    from mlflow import MlflowClient

    for method in ("set_registered_model_alias", "update_model_version", "set_model_version_tag"):

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(MlflowClient, method, killed)
            register.run("smoke")
    register.run("smoke")
    assert store_content()[f"model {MODEL}"]["aliases"] == {"champion": "1"}
    assert set(store_content()[f"model {MODEL}"]["versions"]) == {"1"}


def advise(**models: str | None) -> None:
    """The scorecard of the collection, as far as it says who answers which need."""
    rows = {alias.replace("-", "_"): row for row, alias in register.NEEDS.items()}
    advice = [{"dataset": "digits", "key": rows[need], "model": model} for need, model in models.items()]
    Path("reports/scorecard.json").write_text(json.dumps({"advice": advice, "properties": []}))


def needs() -> dict[str, str]:
    """{alias: model/version} of the data set's own registered model."""
    model = store_content().get("model digits", {"aliases": {}})
    tags = {alias: model["versions"][number][0] for alias, number in model["aliases"].items()}
    return {alias: f"{found['genus.model']}/{found['genus.model_version']}" for alias, found in tags.items()}


def test_a_data_set_is_asked_by_need() -> None:
    import mlflow

    write_params(MODEL, OTHER)
    for seed, name in enumerate((MODEL, OTHER)):
        write_model(name, seed=seed)
        write_figures(name, bits_per_dim=3.5)
    advise(best_density=MODEL, fastest=OTHER, best_quality=OTHER, most_stable=None)
    register.run("smoke")
    assert needs() == {"best-density": f"{MODEL}/1", "fastest": f"{OTHER}/1", "best-quality": f"{OTHER}/1"}
    before = store_content()
    assert len(before["model digits"]["versions"]) == 2 and len(list(Path("mlflow").rglob("MLmodel"))) == 2
    register.run("smoke")
    assert store_content() == before
    loaded = mlflow.pyfunc.load_model("models:/digits@fastest", suppress_warnings=True)
    assert loaded.unwrap_python_model().runtime.name == OTHER
    advise(best_density=MODEL, fastest=MODEL)  # a need without an answer loses its alias
    register.run("smoke")
    assert needs() == {"best-density": f"{MODEL}/1", "fastest": f"{MODEL}/1"}
    assert len(store_content()["model digits"]["versions"]) == 2
    with pytest.raises(UserError, match=f"digits is a data set.*name one of {OTHER}, {MODEL}"):
        rollback("digits", "x")


def test_what_does_not_work_answers_no_need(passing: list[Any]) -> None:
    one_model()
    passing[:] = [Trial(fault="bad")]
    advise(best_density=MODEL)
    register.run("smoke")
    assert needs() == {} and store_content()[f"model {MODEL}"]["aliases"] == {"challenger": "1"}
    register.run("smoke")


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
