"""Where stages run: threads or the workers of a Dask cluster, and the GPUs they are given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from genus.errors import UserError
from pipelines import runner
from pipelines.train import Slots
from tests.conftest import ROOT
from tests.pipelines.conftest import processes_of, ran
from tests.pipelines.test_processes import GENUS, wait_until

RUN = """
import sys
import pipelines.run as run
run._registered = lambda models, collections: {}  # a toy model is not for the registry
sys.exit(run.run(models=["digits-vae"], jobs=2))
"""
TIMED = ("reports/timing/", "reports/records/", "reports/scorecard")


def environment(**more: str) -> dict[str, str]:
    from prefect.settings import PREFECT_API_URL

    return os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value() or "", "PYTHONPATH": str(ROOT)} | more


def lock(toy: Path) -> dict[str, Any]:
    """Stage -> path -> hash of what is the same in every run."""
    stages = YAML(typ="safe").load((toy / "dvc.lock").read_text())["stages"]
    return {
        name: {out["path"]: out["md5"] for out in stage.get("outs", []) if not out["path"].startswith(TIMED)}
        for name, stage in stages.items()
    }


@pytest.mark.slow
def test_two_worker_processes_end_in_the_same_lock_as_dvc_alone(toy: Path, prefect: None) -> None:
    pytest.importorskip("prefect_dask", reason="the optional extra genus[dask]")
    locks = []
    for command in ([sys.executable, "-c", RUN], ["dvc", "repro", "evaluate@digits-vae"]):
        variables = environment(GENUS_RUNNER="dask")
        done = subprocess.run(command, cwd=toy, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert processes_of(toy) == []
        locks.append(lock(toy))
        assert len(ran(toy)) == 6
        (toy / "dvc.lock").unlink()
        (toy / "ran.txt").unlink()
        subprocess.run(
            ["rm", "-rf", ".dvc/cache", ".dvc/tmp", "data", "models/digits-vae", "reports"], cwd=toy, check=True
        )
    assert locks[0] == locks[1] and len(locks[0]) == 6


@pytest.mark.slow
def test_stages_on_a_cluster_that_is_there_end_with_a_killed_flow(
    toy: Path, prefect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed", reason="the optional extra genus[dask]")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # as somebody who starts workers has it
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", memory_limit=0
    ) as cluster:
        command = [GENUS, "run", "--models", "digits-vae", "--runner", f"dask:{cluster.scheduler_address}"]
        monkeypatch.setenv("TOY_SECONDS", "600")
        variables = environment()
        with open(toy / "said.txt", "wb") as said:
            run = subprocess.Popen(command, cwd=toy, env=variables, stdout=said, stderr=said, start_new_session=True)
        wait_until(lambda: "ingest@digits" in ran(toy), 120)
        run.kill()
        run.wait(10)
        wait_until(lambda: not [line for line in processes_of(toy) if "stage.py" in line or "repro.py" in line], 30)


def test_runner_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner.wanted() == "thread" and runner.wanted("dask:tcp://a:1") == "dask:tcp://a:1"
    monkeypatch.setenv(runner.VARIABLE, "dask")
    assert runner.wanted() == "dask"
    for wrong in ("ray", "dask:host", "thread:4"):
        with pytest.raises(UserError, match=f"runner {wrong}: write thread, dask, or"):
            runner.wanted(wrong)
    monkeypatch.setattr(runner, "WAITS", 1)
    with pytest.raises(UserError, match="no Dask scheduler answers"):
        runner.make("dask:tcp://127.0.0.1:9", 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'genus\[dask\]'"):
        runner.wanted("dask")


def test_each_gpu_that_the_driver_lists_takes_one_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: B (UUID: y)'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    slots = Slots(threads=1, device="auto", jobs=4)
    taken = [slots.take(f"train@{name}") for name in "abc"]
    assert [slot and slot.environment["CUDA_VISIBLE_DEVICES"] for slot in taken] == ["1", "0", None]
    assert "CUDA_VISIBLE_DEVICES" not in (slots.take("ingest@d") or taken[0]).environment  # type: ignore[union-attr]
