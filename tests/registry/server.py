"""MLflow's own servers, as processes on free loopback ports."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int = 0) -> Iterator[str]:
    """Tracking, registry and artifacts, kept in ``folder``; the address. Killed at the end of the block."""
    arguments = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    arguments += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
    with _serving(["server", *arguments], "/health", folder.parent / "server.log", port) as address:
        yield address


@contextlib.contextmanager
def model_server(package: Path, log: Path) -> Iterator[str]:
    """`mlflow models serve` of a package, in this environment; the address."""
    with _serving(["models", "serve", "-m", str(package), "--env-manager", "local"], "/ping", log) as address:
        yield address


@contextlib.contextmanager
def _serving(arguments: list[str], alive: str, log: Path, port: int = 0) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", port)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONUNBUFFERED": "1"}
    settings["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it starts uvicorn by name
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"} | settings
    command = [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, cwd=log.parent, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address + alive, timeout=5).close()
                break
            time.sleep(0.2)
        else:
            raise AssertionError(f"{address} does not answer: {log.read_text()}")
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
