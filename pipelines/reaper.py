"""What ends a run's processes when the run itself is gone, even by ``kill -9``: a small process that outlives it.

Its standard input is a pipe that only the process which started it holds: when that one ends, however it ends, the
kernel closes the pipe. Run as a script it needs nothing but the standard library, and 20 ms.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

GRACE = 3.0  # seconds that a group has to end by itself
EVERY = 0.5  # seconds between two looks at whether a run elsewhere is still there


class Reaper:
    """The side of the process whose children are to end with it. It runs for as long as there is a group to watch."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._groups: dict[int, str] = {}  # group -> what was said to add it
        self._process: subprocess.Popen[bytes] | None = None

    def add(self, group: int, *, lock: Path | None = None, run: Path | None = None) -> None:
        """Ends the process group when this process is gone.

        ``lock``: a file whose lock is shared for as long as the group is watched. ``run``: the file that a run, perhaps
        on another machine, keeps locked while it lasts (``lasting``): the group ends with that run as well.
        """
        paths = {"lock": str(lock.absolute()) if lock else None, "run": str(run.absolute()) if run else None}
        with self._mutex:
            self._groups[group] = json.dumps({"add": group, **paths})
            self._say(self._groups[group])

    def remove(self, group: int) -> None:
        """Forgets a group that has ended."""
        with self._mutex:
            if self._groups.pop(group, None) is None:
                return
            self._say(json.dumps({"remove": group}))
            if not self._groups and self._process and self._process.stdin:
                self._process.stdin.close()
                self._process.wait()
                self._process = None

    def _say(self, line: str) -> None:
        if self._process is not None and self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(f"{line}\n".encode())
                return
            self._process.wait()  # somebody has killed it: another one takes over
        # Every descriptor of ours is closed in it, and its pipe is in no other child: Popen's way by default.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write("".join(f"{group}\n" for group in self._groups.values()).encode())


REAPER = Reaper()


def let_go(lock: Path) -> None:
    """Waits until no group is watched any more that was added with this lock."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def lasting(run: Path, locks: Path) -> Iterator[None]:
    """Keeps ``run`` locked while the block lasts, once every group has ended that is left of an earlier run."""
    run.parent.mkdir(parents=True, exist_ok=True)
    for lock in locks.glob("*.lock"):
        let_go(lock)
    for killed in run.parent.iterdir():
        killed.unlink()
    with run.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            run.unlink(missing_ok=True)


def end(groups: Iterable[int], grace: float = GRACE) -> None:
    """Ends process groups: politely, and after ``grace`` seconds for good."""
    left = [group for group in groups if _signal(group, signal.SIGTERM)]
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and (left := [group for group in left if _signal(group, 0)]):
        time.sleep(0.05)
    for group in left:
        _signal(group, signal.SIGKILL)


def _signal(group: int, number: int) -> bool:
    """Whether there was anybody to signal."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _started(process: int) -> str:
    """When a process began, in ticks since the machine did: a process id alone may be somebody else's by now."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _gone(run: str) -> bool:
    """Whether nobody holds a run's file locked any more."""
    try:
        with open(run, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


class _Watched:
    """A process group, and what was said with it."""

    def __init__(self, add: int, lock: str | None, run: str | None):
        self.group, self.run, self.started = add, run, _started(add)
        self._file = None
        if lock:
            self._file = open(lock, "a")  # noqa: SIM115 (held until the group is forgotten)
            fcntl.flock(self._file, fcntl.LOCK_SH)

    def ours(self) -> bool:
        """False where another process has the group's number by now. A group may outlive its leader."""
        return _started(self.group) in ("", self.started)

    def close(self) -> None:
        if self._file:
            self._file.close()


def main() -> None:
    os.chdir("/")  # keep no folder in use
    watched: dict[int, _Watched] = {}
    text = b""
    while True:
        ready, _, _ = select.select([0], [], [], EVERY if any(item.run for item in watched.values()) else None)
        if ready:
            part = os.read(0, 1 << 16)
            if not part:
                break
            *lines, text = (text + part).split(b"\n")
            for said in map(json.loads, lines):
                if "add" in said:
                    watched[said["add"]] = _Watched(**said)
                elif said["remove"] in watched:
                    watched.pop(said["remove"]).close()
        end(item.group for item in watched.values() if item.run and _gone(item.run) and item.ours())
    end(item.group for item in watched.values() if item.ours())


if __name__ == "__main__":
    main()
