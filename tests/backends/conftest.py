"""What the tests of the production backends share: one server of each kind, and a project trained on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from genus import forkserver
from genus.config import fixed_threads
from tests.backends import servers
from tests.conftest import new_project

MODEL = "digits-vae"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[str], str]]:
    """A PostgreSQL of this session: ``postgres("name")`` makes a database and gives its address."""
    if servers.binaries() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install genus[production]")
    with servers.postgres() as new_database:
        yield new_database


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, str]]:
    """An S3 server of this session with the bucket ``servers.BUCKET``: the environment by which it is found."""
    pytest.importorskip("moto.server", reason="moto is not installed: pip install genus[dev]")
    pytest.importorskip("dvc_s3", reason="dvc-s3 is not installed: pip install genus[production]")
    with servers.s3() as environment:
        yield environment


class Trained(NamedTuple):
    """A project whose one model was trained by DVC and registered on an MLflow server before PostgreSQL and S3."""

    folder: Path
    tracking: str  # the server's address
    database: str  # the server's database


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, postgres: Callable[[str], str], s3: dict[str, str]
) -> Iterator[Trained]:
    """The digits' VAE, twenty steps of it, with all that its evaluation needs; about half a minute.

    Of the S3 server's keys its processes know nothing: only MLflow's server has them.
    """
    folder, database = tmp_path_factory.mktemp("trained"), postgres("mlflow")
    new_project(folder)
    _one_small_model(folder / "params.yaml")
    forks = folder / ".genus/forks.sock"
    with servers.mlflow(database, s3) as address:
        with forkserver.running(forks, fixed_threads(1)):  # else each stage does its own imports
            variables = {"MLFLOW_TRACKING_URI": address, forkserver.VARIABLE: str(forks)}
            call(folder, "dvc", "repro", f"evaluate@{MODEL}", **variables)
        call(folder, "genus", "register", "smoke", MLFLOW_TRACKING_URI=address)
        yield Trained(folder, address, database)


def _one_small_model(path: Path) -> None:
    from genus.files import read_yaml

    params = read_yaml(path, "")
    params["datasets"] = {"digits": params["datasets"]["digits"] | {"judge": {"steps": 30}}}
    model = params["models"][MODEL]
    model["train"]["steps"] = 20
    model["evaluate"] = {"samples": 100, "likelihoods": 100, "weighed": 10, "weights": 4}
    params["models"] = {MODEL: model}
    path.write_text(json.dumps(params))  # JSON is YAML too


def call(folder: Path, *command: str, **environment: str) -> str:
    """Runs a command of this Python's environment in a folder as a person types it; what it printed. Must succeed.

    The servers that somebody's own environment names are not asked.
    """
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env=inherited | {"PATH": path} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
