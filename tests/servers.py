"""Servers as processes on free ports of 127.0.0.1, for as long as a block lasts: MLflow's, Prefect's and others."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: list[str], health: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[Callable[[], str]]:
    """A server, from when it answers at ``health`` until the end of the block, where it is killed with its children.

    Gives what tells all that it has printed. Of somebody's own tracking server it knows nothing.
    """
    inherited = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts uvicorn by name
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            cwd=cwd or folder,
            env=inherited | {"PATH": path, "PYTHONUNBUFFERED": "1"} | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        said = Path(log.name).read_text
        try:
            _wait_for(process, health, said)
            yield said
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], address: str, said: Callable[[], str], limit: float = 180) -> None:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended: {said()}"
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=5).close()
            return
        time.sleep(0.1)
    raise AssertionError(f"{address}: no answer in {limit:.0f} s: {said()}")


@contextlib.contextmanager
def mlflow_server(
    database: str, artifacts: str, environment: Mapping[str, str] | None = None, port: int = 0
) -> Iterator[str]:
    """Tracking, registry and artifacts of a database and a place of artifacts; the address.

    As docs/production.md has it: addresses with passwords go by environment, where `ps` does not show them.
    """
    settings = {
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with _mlflow(["server", "--workers", "1"], "health", settings | dict(environment or {}), port) as address:
        yield address


@contextlib.contextmanager
def local_mlflow(folder: Path, port: int = 0) -> Iterator[str]:
    """The same, kept in a folder of this machine."""
    with mlflow_server(f"sqlite:///{folder / 'mlflow.db'}", str(folder / "artifacts"), port=port) as address:
        yield address


@contextlib.contextmanager
def model_server(package: Path) -> Iterator[str]:
    """`mlflow models serve` of a package, in this environment; the address."""
    with _mlflow(["models", "serve", "-m", str(package), "--env-manager", "local"], "ping", {}) as address:
        yield address


@contextlib.contextmanager
def _mlflow(arguments: list[str], health: str, environment: Mapping[str, str], port: int = 0) -> Iterator[str]:
    port = port or free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with running(command, f"{address}/{health}", environment):
        yield address


@contextlib.contextmanager
def prefect_server(database: str, *options: str) -> Iterator[str]:
    """Prefect's server with its runs in ``database``; gives the address of its API.

    With its services, one of which writes down the tasks, unless ``--no-services`` is among the options.
    """
    port = free_port()
    settings = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}/api"
    with running([*command, *options], f"{address}/health", settings):
        yield address
