"""A Prefect server for as long as it is needed, where the user has none of their own.

Prefect would start one by itself, but only when a flow begins, after importing all of its server into this process,
and would leave it behind when this process is killed: together 15 s of nothing at the start of every run.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from genus.errors import UserError
from pipelines.children import LOGS
from pipelines.reaper import REAPER

_ours: list[subprocess.Popen[bytes]] = []
_lock = threading.Lock()  # of _ours
_RESTARTS = 3
_settings = ExitStack()  # the server's address, until this process ends


def start(port: int = 0, services: bool = False) -> Callable[[], None]:
    """Starts a server on 127.0.0.1 and returns at once; call what it returns to wait until flows can be run.

    ``services``: also what makes the scheduled runs of deployments. Where PREFECT_API_URL, the active profile or a
    test names a server, that one is used. The server ends with this process, after Prefect has sent its last lines;
    where it is killed before, it is started again, and Prefect's own retries bridge the gap.
    """
    if named():
        return lambda: None
    port = port or _free_port()
    address = f"http://127.0.0.1:{port}/api"
    LOGS.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    command += [] if services else ["--no-services"]
    quiet = {} if services else {"PREFECT_UI_ENABLED": "false"}
    (LOGS / "prefect-server.log").unlink(missing_ok=True)

    def begin() -> subprocess.Popen[bytes]:
        with (LOGS / "prefect-server.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | quiet,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is ours: the server must still take what the flow says at its end
            )
        REAPER.add(process.pid)
        _ours.append(process)
        return process

    with _lock:
        process = begin()
    atexit.register(kill)  # before Prefect is imported, so after what Prefect itself does at the exit

    def ready() -> None:
        from prefect.settings import PREFECT_API_URL, temporary_settings

        _wait_for(process, address)
        _settings.enter_context(temporary_settings({PREFECT_API_URL: address}))
        threading.Thread(target=_keep, args=(process, begin), daemon=True).start()

    return ready


def kill() -> None:
    """Ends the server; also for a process that has no time for its exit handlers."""
    with _lock:
        while _ours:
            process = _ours.pop()
            _kill_group(process)


def _keep(process: subprocess.Popen[bytes], begin: Callable[[], subprocess.Popen[bytes]]) -> None:
    """Starts a server again that somebody else has killed."""
    for _ in range(_RESTARTS):
        process.wait()
        with _lock:
            if process not in _ours:
                return  # it was us
            _ours.remove(process)
            _kill_group(process)
            process = begin()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with what it has started
    process.wait()
    REAPER.remove(process.pid)


def named() -> bool:
    if "prefect" in sys.modules:
        from prefect.settings import PREFECT_API_URL

        return bool(PREFECT_API_URL.value())
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    profiles = home / "profiles.toml"
    known = profiles.read_text(encoding="utf-8") if profiles.exists() else ""
    if "PREFECT_API_URL" in known:  # perhaps of another profile than the active one: only Prefect knows
        from prefect.settings import PREFECT_API_URL

        return bool(PREFECT_API_URL.value())
    return bool(os.environ.get("PREFECT_API_URL"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(process: subprocess.Popen[bytes], address: str, limit: float = 120) -> None:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise UserError(f"Prefect's server does not start: {LOGS}/prefect-server.log says why")
