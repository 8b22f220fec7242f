"""A run's processes, from outside: the lock, the end of the children, the one line of a mistake."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genus import forkserver, outbox
from genus.config import NONE
from pipelines.children import Children, StageFailed
from pipelines.reaper import Reaper, lasting, let_go
from tests.conftest import ROOT
from tests.pipelines.conftest import processes_of, ran

GENUS = str(Path(sys.executable).parent / "genus")


def wait_until(holds: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
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


def test_stage_gets_its_environment_and_its_work_is_read(toy: Path) -> None:
    (toy / "stage.py").write_text(
        "import json, os, pathlib\n"
        "keys = ('PATH', 'OMP_NUM_THREADS', 'GENUS_PROGRESS')\n"
        "pathlib.Path('data/processed/digits').mkdir(parents=True)\n"
        "pathlib.Path('data/processed/digits/x').write_text('x')\n"
        "pathlib.Path('data/origin').mkdir(parents=True)\n"
        "pathlib.Path('data/origin/digits.json').write_text('{}')\n"
        "pathlib.Path('said.json').write_text(json.dumps({k: os.environ[k] for k in keys}))\n"
        "pathlib.Path(os.environ['GENUS_WORK']).write_text(json.dumps({'seconds': 0.01}))\n"
    )
    done = Children().run("ingest@digits", environment={"OMP_NUM_THREADS": "3"})
    said = json.loads((toy / "said.json").read_text())
    assert done.ran and done.work == 0.01 and done.seconds > 0.01
    assert said["OMP_NUM_THREADS"] == "3" and said["GENUS_PROGRESS"] == ".genus/progress/ingest@digits.json"
    assert said["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert not Children().run("ingest@digits").ran  # nothing has changed


def pids_of(toy: Path, mark: str) -> list[int]:
    """The processes of the toy project with ``mark`` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.name != str(os.getpid()) and Path(os.readlink(entry / "cwd")) == toy:
                found += [int(entry.name)] if mark.encode() in (entry / "cmdline").read_bytes() else []
    return found


@pytest.mark.parametrize("victim", ["stage.py", "repro.py"])
def test_killed_stage_is_one_line_and_leaves_nothing(toy: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    monkeypatch.setenv("TOY_SECONDS", "60")
    failures: list[StageFailed] = []

    def run() -> None:
        try:
            Children().run("ingest@digits")
        except StageFailed as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: ran(toy), 60)
    # The stage itself is the last of those that name it: a shell is before it.
    os.kill(max(pids_of(toy, victim)) if victim == "stage.py" else min(pids_of(toy, victim)), signal.SIGKILL)
    thread.join(30)
    assert [failure.line for failure in failures] == ["killed by signal 9"] and not processes_of(toy)
    monkeypatch.setenv("TOY_SECONDS", "0")
    assert Children().run("ingest@digits").ran  # the next run goes on
    assert (toy / "data/processed/digits/train.npy").read_text() == "digits"


@pytest.mark.slow
def test_killed_flow_and_killed_server(
    toy: Path, forks: Path, monkeypatch: pytest.MonkeyPatch, prefect: None, prefect_database: Path
) -> None:
    """With a Prefect server of its own, which is started again when it is killed, and ends with the flow."""
    from prefect.settings import PREFECT_API_URL

    monkeypatch.setenv("TOY_SECONDS", "600")
    monkeypatch.setenv("PREFECT_HOME", str(toy / "prefect"))
    (toy / "prefect").mkdir()
    shutil.copy(prefect_database, toy / "prefect/prefect.db")
    command = [GENUS, "run", "--models", "digits-vae"]
    with open(toy / "said.txt", "wb") as said:
        run = subprocess.Popen(command, cwd=toy, stdout=said, stderr=said, start_new_session=True)
    wait_until(lambda: "ingest@digits" in ran(toy), 200)
    first = pids_of(toy, "server\0start")
    assert pids_of(toy, "genus.forkserver")
    os.kill(first[0], signal.SIGKILL)
    wait_until(lambda: set(pids_of(toy, "server\0start")) - set(first), 30)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait(10) == -signal.SIGKILL
    wait_until(lambda: not processes_of(toy), 30)
    assert not (toy / "data/processed/digits/train.npy").exists()
    # The next run does what was left undone, and leaves alone what a training has kept for the tracking store.
    waits = toy / outbox.FOLDER / "digits-vae/key/begin.json"
    waits.parent.mkdir(parents=True)
    waits.write_text("{}")
    monkeypatch.setenv("TOY_SECONDS", "0")
    monkeypatch.setenv(forkserver.VARIABLE, NONE)
    monkeypatch.setenv("PREFECT_API_URL", PREFECT_API_URL.value() or "")
    again = subprocess.run(command, cwd=toy, capture_output=True, text=True)
    assert "done " in again.stdout and "train@digits-vae" in ran(toy), again.stdout + again.stderr
    assert (toy / "models/digits-vae/weights.safetensors").read_text() == "digits-vae 7" and waits.exists()


REAPED = """
import signal, subprocess, sys, time
from pathlib import Path
from pipelines.reaper import REAPER
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
children = [subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True, stdout=subprocess.PIPE)
            for _ in range(3)]
for child in children:
    child.stdout.readline()
    REAPER.add(child.pid, lock=Path("group.lock"))
if sys.argv[1:]:
    REAPER._process.kill()
    time.sleep(0.5)
REAPER.remove(children[0].pid)
print(*(child.pid for child in children), REAPER._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("reaper_killed", [False, True])
def test_groups_end_with_a_killed_process_and_only_those_still_watched(tmp_path: Path, reaper_killed: bool) -> None:
    command = [sys.executable, "-c", REAPED, *(["x"] if reaper_killed else [])]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE) as process:
        assert process.stdout
        free, *watched, reaper = map(int, process.stdout.readline().split())
        began = Path(f"/proc/{reaper}/status").read_text()
        assert int(began.partition("VmRSS:")[2].split()[0]) < 15_000  # kB
        process.kill()
        process.stdout.close()
    try:
        let_go(tmp_path / "group.lock")  # held until all have ended
        wait_until(lambda: all(ended(pid) for pid in (*watched, reaper)), 30)
        assert not ended(free)
    finally:
        os.kill(free, signal.SIGKILL)


def test_groups_end_with_a_run_elsewhere(tmp_path: Path) -> None:
    """What a worker of a cluster has started, while the worker lives on."""
    reaper, run = Reaper(), tmp_path / "runs" / "1"
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        with lasting(run, tmp_path):
            reaper.add(process.pid, run=run)
            time.sleep(1.5)
            assert process.poll() is None
        assert process.wait(30) == -signal.SIGTERM
    reaper.remove(process.pid)
    assert reaper._process is None


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
