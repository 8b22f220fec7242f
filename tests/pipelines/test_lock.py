"""One run at a time, with real processes: who waits, who is skipped, and that exactly one of many runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from genus.errors import UserError
from pipelines.lock import Busy, one_run_at_a_time
from tests.conftest import ROOT

GENUS = str(Path(sys.executable).parent / "genus")
HOLD = """
import sys, time
from pipelines.lock import one_run_at_a_time
with one_run_at_a_time(if_busy=sys.argv[1], say=lambda line: print(line, flush=True)):
    print("mine", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(if_busy: str, seconds: float) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, if_busy, str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def other(toy: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the toy project's lock."""
    with hold("fail", 120) as process:
        assert process.stdout and process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def test_lock_is_free_again_and_says_nothing_then(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    for _ in range(2):
        with one_run_at_a_time(path):
            assert str(os.getpid()) in path.read_text()
            with pytest.raises(Busy, match=f"process {os.getpid()}, since 2"), one_run_at_a_time(path):
                raise AssertionError("two runs at a time")
    assert path.read_text() == ""


def test_lock_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file/run.lock: cannot be written"),
        one_run_at_a_time(tmp_path / "file/run.lock"),
    ):
        raise AssertionError


def test_wait_says_for_whom_and_ends_when_the_other_is_killed(toy: Path, other: subprocess.Popen[str]) -> None:
    with hold("wait", 0) as waiter:
        assert waiter.stdout
        assert waiter.stdout.readline().startswith(
            f"waiting for another run in this folder: process {other.pid}, since 2"
        )
        time.sleep(0.5)
        assert waiter.poll() is None
        other.kill()
        assert waiter.communicate(timeout=60)[0] == "the other run has ended\nmine\n"
        assert waiter.returncode == 0


def test_genus_run_waits_until_ctrl_c_or_is_skipped(toy: Path, other: subprocess.Popen[str]) -> None:
    command = [GENUS, "run", "--models", "digits-vae", "--if-busy"]
    with subprocess.Popen(
        [*command, "wait"], cwd=toy, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout and run.stderr
        assert f"process {other.pid}, since" in run.stdout.readline()
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=60) == 130
        assert run.stderr.read() == "genus: stopped\n"
    skipped = subprocess.run([*command, "skip"], cwd=toy, capture_output=True, text=True)
    assert skipped.returncode == 0 and skipped.stdout.count("\n") == 1
    assert skipped.stdout.startswith(f"skipped: another run is going on in this folder: process {other.pid}, since 2")
    failed = subprocess.run([*command, "fail"], cwd=toy, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"genus: error: another run is going on in this folder: process {other.pid}, since")


def test_of_many_that_start_at_once_exactly_one_runs(toy: Path) -> None:
    started = [hold("fail", 20) for _ in range(6)]
    said = []
    for process in started:
        assert process.stdout
        said.append(process.stdout.readline())  # all have tried, and the one still holds it
    assert sorted(said) == [""] * 5 + ["mine\n"]
    for process, line in zip(started, said, strict=True):
        process.kill() if line else None
        assert "Busy: another run is going on" in process.communicate()[1] or line
