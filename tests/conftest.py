"""What several tests share: one Prefect server a session, and a project folder to run in."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genus.config import fixed_threads
from genus.quiet import quieten
from tests.servers import prefect_server

quieten()  # before any test imports the libraries that would ask somebody's server
os.environ |= fixed_threads(1)  # and those that would take every core: as the stages do
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background: what tests
    signal.signal(signal.SIGINT, signal.default_int_handler)  # start would inherit it, and Ctrl-C could not be tried
ROOT = Path(__file__).parents[1]
# Files of few tests that take long: a worker that came to one of them last would go on for a minute alone.
LONG = (
    "pipelines/test_run",
    "test_parallel",  # beside it, as it needs no Prefect: the database of that takes a while to make
    "pipelines/test_",
    "test_store",
    "test_ui",
    "registry/test_",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, in the order of LONG; workers take files in the order in which they stand."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT / "tests").as_posix()
        return next((number for number, start in enumerate(LONG) if path.startswith(start)), len(LONG))

    items.sort(key=place)


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a Prefect server that has just been started, to be copied: to make one takes twice as long as
    to start a server, so all the processes of a session share it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path = shared / "prefect.db"
    with open(shared / "prefect.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            new = shared / "new.db"
            with prefect_server(f"sqlite+aiosqlite:///{new}", "--no-services"):
                pass
            with contextlib.closing(sqlite3.connect(new)) as store:  # takes in what a killed server left beside it
                store.execute("PRAGMA journal_mode = DELETE")
            new.rename(path)
    return path


@pytest.fixture(scope="session")
def prefect(prefect_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server with a database of its own, for every test that runs a flow."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    own = shutil.copy(prefect_database, tmp_path_factory.mktemp("prefect") / "prefect.db")
    with (
        prefect_server(f"sqlite+aiosqlite:///{own}", "--no-services") as address,
        temporary_settings({PREFECT_API_URL: address}),
    ):
        yield
        for worker in (APILogWorker, EventsWorker):
            worker.drain_all()  # sends what is left, while somebody is there


def new_project(folder: Path) -> None:
    """Puts this repository's code, graph and parameters into an empty folder, under git and DVC."""
    for name in ("dvc.yaml", "params.yaml", "claims.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".dvc").mkdir()
    shutil.copytree(ROOT / "models" / "none", folder / "models" / "none")
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    # Only for DVC to hash; what runs is the installed package.
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)


@pytest.fixture(scope="module")  # while it is open no other test of the process could run an event loop
def browser() -> Iterator[Any]:
    """Chromium, for pages as people see them; skips the tests that need it where there is none."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(chromium).exists():
        pytest.skip("there is no Chromium on this machine to open the page in")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


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
