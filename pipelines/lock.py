"""One pipeline run at a time in a workspace: DVC does not keep two of them apart."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal, TextIO

from genus.errors import UserError
from pipelines.children import STATE

LOCK = STATE / "run.lock"
IfBusy = Literal["fail", "wait", "skip"]


class Busy(UserError):
    """Another run is going on; the message names its process and since when."""


@contextlib.contextmanager
def one_run_at_a_time(
    path: Path = LOCK, if_busy: IfBusy = "fail", say: Callable[[str], object] = print
) -> Iterator[None]:
    """Holds the run's lock, which the kernel releases however the process ends.

    Where another process holds it: ``wait`` says for whom and goes on when that one has ended, a signal ends the wait;
    the others raise Busy, and it is the caller who makes of it a failure or a skipped run.
    Raises UserError where the file cannot be written.
    """
    with _open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = _who(file)
            if if_busy != "wait":
                raise Busy(f"another run is going on in this folder: {who}") from error
            say(f"waiting for another run in this folder: {who}")
            fcntl.flock(file, fcntl.LOCK_EX)
            say("the other run has ended")
        file.truncate(0)
        file.write(f"process {os.getpid()}, since {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _open(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _who(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip() or "a process that is just starting"
