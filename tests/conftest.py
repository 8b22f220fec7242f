"""What several tests share: one Prefect server a session, and a project folder to run in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from genus.config import fixed_threads
from genus.quiet import quieten

quieten()  # before any test imports the libraries that would ask somebody's server
os.environ |= fixed_threads(1)  # and those that would take every core: as the stages do
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def prefect() -> Iterator[None]:
    """A Prefect server with a database of its own, for every test that runs a flow."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):  # a cold database takes 20 s
        yield


def new_project(folder: Path) -> None:
    """Puts this repository's code, graph and parameters into an empty folder, under git and DVC."""
    for name in ("dvc.yaml", "params.yaml", "claims.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    # Only for DVC to hash; what runs is the installed package.
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project around this repository's code, graph and parameters; the working directory of the test."""
    new_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def genus(project: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``genus("run", "--models", "x")`` in the project's folder, as a person types it."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "genus"), *arguments]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)

    return call
