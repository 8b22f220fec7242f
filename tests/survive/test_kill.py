"""kill -9 at random moments, a few; `make soak` does the same to whole runs, many times."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from genus import forkserver
from pipelines import mend
from tests.pipelines.conftest import toy  # noqa: F401 (a fixture)
from tests.registry.workspace import new_store, small_params
from tests.survive import soak
from tests.survive.test_corruption import content

MODEL = "digits-vae"
PARAMS = {
    "collections": {
        "smoke": {"about": "a", "report": "scorecard"} | {name: name for name in ("records", "probes", "pictures")}
    },
    "datasets": {"digits": {"source": "digits"}},
    "models": {
        MODEL: {
            "family": "vae/vae",
            "dataset": "digits",
            "collection": "smoke",
            "params": small_params("vae/vae"),
            "train": {"steps": 400, "batch_size": 32},
        }
    },
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="finds processes in /proc"),
]


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A server that stages are forked from: without it each start imports for seconds."""
    path = tmp_path_factory.mktemp("forks") / "forks.sock"
    with forkserver.running(path, {"OMP_NUM_THREADS": "1"}):
        deadline = time.monotonic() + 120
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield path


def start(stage: list[str], folder: Path, forks: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {forkserver.VARIABLE: str(forks), "GENUS_CHECKPOINT_SECONDS": "0"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "log").open("wb") as log:
        command = [Path(sys.executable).parent / "genus", *stage]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def test_killed_stages_end_in_the_same_bytes(tmp_path: Path, forks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance, kills, resumed = random.Random(0), 0, 0
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
        (folder / "params.yaml").write_text(json.dumps(PARAMS))
        new_store(folder)
    # Each stage, and what is there while it is at work.
    for stage, begun, times in (
        (["ingest", "digits"], "data/processed/.digits.*/digits/spool", 2),
        (["train", MODEL], f".genus/checkpoints/{MODEL}/*.safetensors", 3),
    ):
        assert start(stage, undisturbed, forks).wait(240) == 0, (undisturbed / "log").read_text()
        for _ in range(times):
            since, process = time.time(), start(stage, killed, forks)
            while process.poll() is None and not any(path.stat().st_mtime > since for path in killed.glob(begun)):
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.2))
            victims = [pid for pids in soak.processes(killed).values() for pid in pids]
            kills += bool(victims) and soak.kill(chance.choice(victims))
            process.wait(60)
            resumed += any(killed.glob(f".genus/checkpoints/{MODEL}/*.safetensors"))
        assert start(stage, killed, forks).wait(240) == 0, (killed / "log").read_text()
    found = {}
    for folder in (undisturbed, killed):
        monkeypatch.chdir(folder)
        found[folder] = content()
    assert found[killed] == found[undisturbed]  # nothing more, nothing less, the same bytes
    assert kills >= 2 and resumed >= 1, (kills, resumed)
    deadline = time.monotonic() + 30
    while soak.processes(killed):
        assert time.monotonic() < deadline, soak.processes(killed)
        time.sleep(0.1)


def test_killed_dvc_goes_on(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("TOY_SECONDS", "0.5")
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", f"evaluate@{MODEL}"]
    chance, kills = random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(chance.uniform(0.5, 2.0))
        except subprocess.TimeoutExpired:
            process.kill()  # the stage that it was running goes on
            process.wait()
            kills += 1
    list(mend.records())  # as every run begins
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before = content()
    assert "up to date" in subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert before == content() and f"reports/metrics/{MODEL}.json" in before and kills >= 2
