"""The processes of a run: one a stage, each its own group, all ended when the run ends, whatever ended it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from genus import forkserver
from genus.errors import TransientError
from genus.files import is_full
from pipelines.reaper import GRACE, REAPER, end, let_go

STATE = Path(".genus")
LOGS = Path("logs")
GROUPS = STATE / "groups"  # a file a stage, locked while somebody still watches its processes
FORKS = STATE / "forks.sock"
REPRO = Path(__file__).with_name("repro.py")


@dataclass(frozen=True)
class Ran:
    """A stage that ended well. ``ran`` is False where DVC found nothing to do or had the result in its cache."""

    stage: str
    ran: bool
    seconds: float  # the process, from its start to its end
    work: float  # of these, the stage's own work


class StageFailed(Exception):
    """A stage's process ended badly.

    ``user`` is True where the user can mend it (exit status 2), ``transient`` where trying again may (75).
    """

    def __init__(self, stage: str, line: str, log: Path, user: bool, transient: bool = False):
        super().__init__(stage, line, log, user, transient)  # all of it: it also comes from processes of a cluster
        self.stage, self.line, self.log, self.user, self.transient = stage, line, log, user, transient

    def __str__(self) -> str:
        return f"{self.stage}: {self.line} (log: {self.log})"


def log_path(stage: str) -> Path:
    return LOGS / f"{stage}.log"


def progress_path(stage: str) -> Path:
    """Where a running stage says how far it is (genus.progress)."""
    return STATE / "progress" / f"{stage}.json"


def retry_path(stage: str) -> Path:
    """Where it stands, while a stage waits to be tried again, why."""
    return STATE / "retry" / f"{stage}.json"


def work_path(stage: str) -> Path:
    """Where a stage leaves the seconds of its own work when it is done (genus.cli)."""
    return STATE / "work" / f"{stage}.json"


class Children:
    """The running stages' processes. They end with this process, and with the run that keeps ``run`` locked."""

    def __init__(self, run: Path | None = None) -> None:
        self._of = run
        self._lock = threading.Lock()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped = False

    def run(self, stage: str, *, force: bool = False, environment: dict[str, str] | None = None) -> Ran:
        """``dvc repro --single-item STAGE`` in a process of its own, its output in logs/<stage>.log.

        Raises StageFailed with the one line that says what was wrong.
        """
        log, progress, work, lock = log_path(stage), progress_path(stage), work_path(stage), GROUPS / f"{stage}.lock"
        for path in (log, progress, work, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        for path in (progress, work, retry_path(stage)):
            path.unlink(missing_ok=True)
        let_go(lock)  # by who ends what a killed worker of a cluster has left behind
        # The global flag stands first; without it a lock that is busy for a moment loses the stage's result.
        command = [sys.executable, "-P", str(REPRO), "--wait-for-lock", "repro", "--single-item"]
        command += ["--force", stage] if force else [stage]
        variables = os.environ | (environment or {})
        variables |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "GENUS_PROGRESS": str(progress),
            "GENUS_WORK": str(work),
            forkserver.VARIABLE: str(FORKS),  # where no server listens a stage does its own imports
        }
        started = time.monotonic()
        with log.open("wb") as out:
            with self._lock:
                if self._stopped:
                    raise StageFailed(stage, "stopped", log, user=False)
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=variables,
                    start_new_session=True,
                )
                REAPER.add(process.pid, lock=lock, run=self._of)
                self._running[stage] = process
            status = process.wait()
            end([process.pid])  # what a killed process of DVC has left running
            REAPER.remove(process.pid)
            with self._lock:
                self._running.pop(stage, None)
        seconds = time.monotonic() - started
        text = log.read_text(encoding="utf-8", errors="replace")
        if status:
            line, user = _what_was_wrong(text, status, self._stopped)
            transient = not self._stopped and _ended_with(text) == TransientError.STATUS
            raise StageFailed(stage, line, log, user, transient)
        return Ran(stage, f"Running stage '{stage}'" in text, seconds, _read(work).get("seconds", 0.0))

    def stop(self, grace: float = GRACE) -> None:
        """Ends every process of every stage: politely, and after ``grace`` seconds for good. Starts no more."""
        with self._lock:
            self._stopped = True
            running = list(self._running.values())
        for process in running:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and any(_alive(process) for process in running):
            time.sleep(0.05)
        for process in running:
            _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)  # start_new_session made the process the leader of its group


def _alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether anything of the process's group is left, the process itself or what it started."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _what_was_wrong(text: str, status: int, stopped: bool) -> tuple[str, bool]:
    """The one line of a stage's log that says why it failed, and whether the user can mend it."""
    if stopped:
        return "stopped", False
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for mark, user in (("genus: error: ", True), ("genus: ", False)):
        for line in reversed(lines):
            if line.startswith(mark):
                return line.removeprefix(mark), user
    if not lines and is_full(LOGS):
        return f"{LOGS}: cannot be written: {os.strerror(errno.ENOSPC)}", True
    killed = -status if status < 0 else {-signal.SIGKILL: 9, 128 + signal.SIGKILL: 9}.get(_ended_with(text), 0)
    if killed:
        return f"killed by signal {killed}", False
    # A traceback ends with the exception, and DVC's own lines follow it.
    mine = [line for line in lines if not line.startswith(("ERROR: failed to reproduce", "Use `dvc", "> "))]
    line = mine[-1] if mine and "Traceback" in text else lines[-1] if lines else "nothing in the log"
    return f"{line} (exit status {status})", False


def _ended_with(text: str) -> int:
    """The exit status of the stage itself, as DVC tells it in its log; 0 where it does not."""
    told = re.findall(r"^ERROR: failed to reproduce .* exited with (-?\d+)$", text, re.MULTILINE)
    return int(told[-1]) if told else 0


def _read(path: Path) -> dict[str, float]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
