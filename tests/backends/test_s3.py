"""Artifacts and the DVC remote on an S3-compatible store, behind a registry on PostgreSQL."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from pathlib import Path

import pytest

from tests.backends import servers
from tests.backends.conftest import MODEL, Trained, call

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # servers and trainings: a minute on two idle cores

# Somebody who wants a model: the tracking server's address is all that they know.
CONSUMER = f"""
import hashlib, mlflow, pandas
model = mlflow.pyfunc.load_model("models:/{MODEL}@champion")
images = model.predict(pandas.DataFrame({{"seed": [3, 5]}}))
print(images.shape, images.dtype, hashlib.sha256(images.tobytes()).hexdigest())
"""


@pytest.fixture
def bucket(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The bucket's address; the S3 server is in this test's environment."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    return f"s3://{servers.BUCKET}"


def test_a_registry_on_postgresql_and_s3_serves_whoever_knows_its_address(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import mlflow
    import pandas as pd

    from genus.registry import package

    assert not (trained.folder / "mlflow").exists()  # nothing went to a store beside the project
    said = call(tmp_path, sys.executable, "-c", CONSUMER, MLFLOW_TRACKING_URI=trained.tracking)

    monkeypatch.chdir(trained.folder)
    package(Path("models") / MODEL, tmp_path / "package")
    images = mlflow.pyfunc.load_model(str(tmp_path / "package")).predict(pd.DataFrame({"seed": [3, 5]}))
    assert said.strip() == f"(2, 1, 8, 8) uint8 {hashlib.sha256(images.tobytes()).hexdigest()}"


def test_rows_are_in_postgresql_and_files_in_s3(trained: Trained, bucket: str):
    import psycopg2

    stored = {key.rpartition("/")[2] for key in servers.keys("mlflow/")}
    assert {"weights.safetensors", "MLmodel", "history.csv"} <= stored, stored

    def ask(query: str) -> list[tuple[object, ...]]:
        with contextlib.closing(psycopg2.connect(trained.database)) as store, store.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()

    assert ask("SELECT name, status FROM runs") == [(MODEL, "FINISHED")]
    assert not ask("SELECT * FROM tags WHERE key = 'genus.filled'")  # it is the training's own
    assert ask("SELECT max(step) FROM metrics WHERE key = 'loss'") == [(20,)]
    assert ("champion",) in ask(f"SELECT alias FROM registered_model_aliases WHERE name = '{MODEL}'")


def test_a_clone_pulls_the_models_and_fills_its_registry_without_training(
    trained: Trained, bucket: str, tmp_path: Path
):
    here, there = trained.folder, tmp_path / "clone"
    call(here, "dvc", "remote", "add", "-d", "store", f"{bucket}/dvc")
    call(here, "dvc", "remote", "modify", "store", "endpointurl", os.environ["AWS_ENDPOINT_URL"])
    call(here, "dvc", "push", "--with-deps", f"evaluate@{MODEL}")
    as_somebody = ("git", "-c", "user.name=tests", "-c", "user.email=tests@localhost")
    call(here, "git", "add", ".")
    call(here, *as_somebody, "commit", "-q", "-m", "trained")
    call(tmp_path, "git", "clone", "-q", str(here), "clone")
    weights = Path("models") / MODEL / "weights.safetensors"
    assert not (there / weights).exists()

    call(there, "dvc", "pull", "--with-deps", f"evaluate@{MODEL}")
    call(there, "genus", "register", "smoke")
    assert (there / weights).read_bytes() == (here / weights).read_bytes()
    assert not (there / ".genus/checkpoints").exists()  # what a training leaves first
    said = call(there, "dvc", "status", f"evaluate@{MODEL}")
    assert "up to date" in said, said

    from mlflow import MlflowClient

    store = f"sqlite:///{there}/mlflow/mlflow.db"
    client = MlflowClient(store, store)
    version = client.get_model_version_by_alias(MODEL, "champion")
    run = client.get_run(version.run_id)
    assert run.data.tags["genus.filled"] == "from files"  # no training of this clone made it
    assert client.get_metric_history(version.run_id, "loss")[-1].step == 20
    assert "test/bits_per_dim" in run.data.metrics
