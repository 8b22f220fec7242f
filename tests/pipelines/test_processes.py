"""A run's processes, from outside: the lock, the end of the children, the one line of a mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genus.errors import UserError
from pipelines.children import Children, StageFailed, one_run_at_a_time
from tests.pipelines.conftest import processes_of, ran

GENUS = str(Path(sys.executable).parent / "genus")


def wait_until(holds: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_every_process_within_5_s(
    toy: Path, monkeypatch: pytest.MonkeyPatch, prefect: None, number: signal.Signals
) -> None:
    from prefect.settings import PREFECT_API_URL

    monkeypatch.setenv("TOY_SECONDS", "60")
    environment = os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value() or ""}
    command = [GENUS, "run", "--models", "digits-vae"]
    with subprocess.Popen(
        command, cwd=toy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as run:
        wait_until(lambda: "ingest@digits" in ran(toy), 60)
        # Meanwhile a second run says which process and since when.
        second = subprocess.run([GENUS, "run", "--models", "digits-vae"], cwd=toy, capture_output=True, text=True)
        assert second.returncode == 2
        assert second.stderr.startswith(
            f"genus: error: another run is going on in this folder: process {run.pid}, since"
        )
        assert second.stderr.count("\n") == 1
        started = time.monotonic()
        run.send_signal(number)
        status = run.wait(timeout=10)
        wait_until(lambda: not processes_of(toy), 5 - (time.monotonic() - started))
    assert status == 128 + number
    # Nothing is lost or locked: the same command goes on.
    monkeypatch.setenv("TOY_SECONDS", "0")
    again = subprocess.run(["dvc", "repro", "validate@digits"], cwd=toy, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr


def test_stopped_children_are_killed_with_what_they_started(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    (toy / "stage.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen('ran.txt', 'w').write('x')\n"
        "time.sleep(60)\n"
    )
    children, failures = Children(), []

    def run() -> None:
        try:
            children.run("ingest@digits")
        except StageFailed as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: ran(toy), 30)
    started = time.monotonic()
    children.stop(grace=1)
    thread.join(5)
    assert time.monotonic() - started < 5 and [failure.line for failure in failures] == ["stopped"]
    wait_until(lambda: not processes_of(toy), 1)
    with pytest.raises(StageFailed, match="stopped"):  # and no other is started
        children.run("validate@digits")


def test_stage_without_a_line_of_its_own_shows_the_last_one(toy: Path) -> None:
    (toy / "stage.py").write_text("raise RuntimeError('the disk is on fire')\n")
    with pytest.raises(StageFailed) as caught:
        Children().run("ingest@digits")
    assert caught.value.line == "RuntimeError: the disk is on fire (exit status 255)" and not caught.value.user
    assert "Traceback" in caught.value.log.read_text()


def test_lock_is_free_again_and_says_nothing_then(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    for _ in range(2):
        with one_run_at_a_time(path):
            assert str(os.getpid()) in path.read_text()
            with pytest.raises(UserError, match=f"process {os.getpid()}, since 2"), one_run_at_a_time(path):
                raise AssertionError("two runs at a time")
    assert path.read_text() == ""


def test_stage_gets_its_environment_and_its_work_is_read(toy: Path) -> None:
    (toy / "stage.py").write_text(
        "import json, os, pathlib\n"
        "keys = ('PATH', 'OMP_NUM_THREADS', 'GENUS_PROGRESS')\n"
        "pathlib.Path('data/processed/digits').mkdir(parents=True)\n"
        "pathlib.Path('data/processed/digits/x').write_text('x')\n"
        "pathlib.Path('said.json').write_text(json.dumps({k: os.environ[k] for k in keys}))\n"
        "pathlib.Path(os.environ['GENUS_WORK']).write_text(json.dumps({'seconds': 0.01}))\n"
    )
    done = Children().run("ingest@digits", environment={"OMP_NUM_THREADS": "3"})
    said = json.loads((toy / "said.json").read_text())
    assert done.ran and done.work == 0.01 and done.seconds > 0.01
    assert said["OMP_NUM_THREADS"] == "3" and said["GENUS_PROGRESS"] == ".genus/progress/ingest@digits.json"
    assert said["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert not Children().run("ingest@digits").ran  # nothing has changed
