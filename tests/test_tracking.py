"""Tracking: nothing is lost and nothing is said twice, whoever is killed and whatever is away."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException

from genus import tracking
from genus.errors import UserError
from tests.registry.workspace import workspace

__all__ = ["workspace"]  # a fixture
DESCRIPTION = {"sha256": "cd" * 32, "spec": {"shape": [1, 8, 8]}, "counts": {"train": 9}}
PICTURE = np.zeros((8, 8), np.uint8)
# Not forks of this process: they would have its locks, but not the threads of other tests that hold them.
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["torch", "pandas", "mlflow.store.tracking.sqlalchemy_store"])  # once for all: seconds


def start(key: str = "k", model: str = "m", **params: Any) -> Any:
    return tracking.training_run("digits", model, params, {"genus.key": key}, DESCRIPTION)


def row(step: int) -> dict[str, float]:
    return {"step": float(step), "learning_rate": 0.1, "loss": 1 / step}


def runs(model: str = "m") -> list[Any]:
    client = tracking.client()
    experiment = client.get_experiment_by_name("digits")
    found = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{model}'") if experiment else []
    return list(found)


def steps(run: Any, metric: str = "loss") -> list[int]:
    return sorted(entry.step for entry in tracking.client().get_metric_history(run.info.run_id, metric))


def in_process(target: Callable[..., None], *arguments: Any) -> Any:
    process = CLEAN.Process(target=target, args=arguments)
    process.start()
    return process


def is_killed_at_step_50() -> None:
    with start() as run:
        for step in range(1, 51):
            run.log(row(step))
            if step in (20, 40):
                run.image(PICTURE, step)
        run.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def trains_until_told(ready: Any) -> None:
    with start() as run:
        run.log(row(1))
        ready.set()
        time.sleep(60)


def trains_40_steps(number: int) -> None:
    with start(key=str(number), model=f"m{number}", number=number, train={"steps": 40}) as run:
        for step in range(1, 41):
            run.log(row(step) | {"a_grad_norm": float(number), "b_grad_norm": float(step)})
            if step % 10 == 0:
                run.flush()
            if step % 20 == 0:
                run.image(PICTURE, step)


def test_a_run_holds_what_a_reviewer_looks_for(workspace: Path) -> None:
    Path("requirements.lock").write_text("torch==1\n")
    subprocess.run("git init -q . && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x", shell=True)
    with start(family="f", train={"steps": 5, "betas": {"first": 0.9}}) as run:
        for step in range(1, 6):
            run.log(row(step))
        run.image(PICTURE, 5)
        run.tag(**{"genus.note": 7})
        run.artifact("requirements.lock")
    (stored,) = runs()
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"family": "f", "train.steps": "5", "train.betas.first": "0.9"}
    assert steps(stored) == [1, 2, 3, 4, 5]
    expected = {"genus.key", "genus.note", "env.python", "env.torch", "env.machine", "env.threads", "env.device"}
    expected |= {"mlflow.source.git.commit", "genus.uncommitted", "genus.requirements_sha256"}
    assert expected <= set(stored.data.tags)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert stored.data.tags["mlflow.source.git.commit"] == head
    (data,) = stored.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", ("cd" * 32)[:36])
    names = [file.path for file in tracking.client().list_artifacts(stored.info.run_id)]
    assert {"images", "requirements.lock"} <= set(names)


def test_rows_are_written_in_batches(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    sizes = []
    real = MlflowClient.log_batch

    def counting(self: Any, run_id: str, metrics: Any = (), **rest: Any) -> Any:
        sizes.append(len(metrics))
        return real(self, run_id, metrics=metrics, **rest)

    with start() as run:
        monkeypatch.setattr(MlflowClient, "log_batch", counting)
        monkeypatch.setattr(run, "_next", time.monotonic() + 60)
        for step in range(1, 1201):
            run.log(row(step))
        assert sizes == []
    assert sizes == [1000, 1000, 400]
    assert steps(runs()[0]) == list(range(1, 1201))


def test_a_training_that_raises_has_failed(workspace: Path) -> None:
    with pytest.raises(ZeroDivisionError), start() as run:
        run.log(row(1))
        1 / 0  # noqa: B018
    (stored,) = runs()
    assert stored.info.status == "FAILED" and steps(stored) == [1]


def test_a_killed_training_goes_on_in_the_same_run(workspace: Path) -> None:
    process = in_process(is_killed_at_step_50)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (stored,) = runs()
    assert stored.info.status == "RUNNING" and steps(stored)[-1] == 50
    with start() as run:  # from the checkpoint at step 30: 31 … 50 come a second time
        for step in range(31, 81):
            run.log(row(step))
            if step in (40, 60):
                run.image(PICTURE, step)
    (stored,) = runs()
    assert stored.info.status == "FINISHED"
    assert steps(stored) == list(range(1, 81))
    pictures = {file.path.split("+")[2] for file in tracking.client().list_artifacts(stored.info.run_id, "images")}
    assert pictures == {"20", "40", "60"}
    assert len(tracking.client().list_artifacts(stored.info.run_id, "images")) == 6  # each with its thumbnail
    with start() as run:  # trained again from the beginning: a run of its own
        run.log(row(1))
    with start(key="other") as run:
        run.log(row(1))
    assert len(runs()) == 3


def test_sigterm_closes_the_run_as_killed(workspace: Path) -> None:
    ready = CLEAN.Event()
    process = in_process(trains_until_told, ready)
    assert ready.wait(60)
    assert process.pid
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 128 + signal.SIGTERM
    (stored,) = runs()
    assert stored.info.status == "KILLED" and steps(stored) == [1]


def test_eight_trainings_at_once_and_no_store_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)

    processes = [in_process(trains_40_steps, number) for number in range(8)]
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0] * 8
    metrics = pictures = 0
    for number in range(8):
        (stored,) = runs(f"m{number}")
        assert stored.info.status == "FINISHED"
        assert stored.data.params == {"number": str(number), "train.steps": "40"}
        for name in stored.data.metrics:
            found = steps(stored, name)
            assert found == list(range(1, 41)), (number, name)
            metrics += len(found)
        pictures += len(tracking.client().list_artifacts(stored.info.run_id, "images"))
    assert (metrics, pictures) == (8 * 40 * 4, 8 * 2 * 2)  # none lost, none twice; each picture with its thumbnail
    assert {path.name for path in (tmp_path / "mlflow").iterdir()} == {"mlflow.db", "mlflow.lock", "artifacts"}
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow", ".genus"}  # nothing of MLflow's own defaults beside
    assert not list((tmp_path / ".genus/runs").iterdir())


def test_a_store_that_is_away_loses_no_training(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    began = time.monotonic()
    with start() as run:
        for step in range(1, 100):
            run.log(row(step))
            run.image(PICTURE, step)
    assert time.monotonic() - began < 20
    warnings = [line for line in capsys.readouterr().err.splitlines() if "tracking store" in line]
    assert len(warnings) == 1 and "training goes on" in warnings[0] and "genus register" in warnings[0]


def test_what_could_not_be_written_comes_later(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, away = tracking._begin, [True]

    def begin(*arguments: Any, **more: Any) -> Any:
        if away[0]:
            raise MlflowException("no route to the store")
        return real(*arguments, **more)

    monkeypatch.setattr(tracking, "_begin", begin)
    monkeypatch.setattr(tracking, "PAUSE", 0.0)
    with start() as run:
        run.log(row(1))
        run.image(PICTURE, 1)
        run.tag(note="early")
        away[0] = False
        run.log(row(2))
    (stored,) = runs()
    assert stored.info.status == "FINISHED" and steps(stored) == [1, 2]
    assert stored.data.tags["note"] == "early"
    assert len(tracking.client().list_artifacts(stored.info.run_id, "images")) == 2


def test_a_model_is_its_weights_and_description_whatever_code_trained_it(tmp_path: Path) -> None:
    def written(weights: bytes = b"w", **about: Any) -> str:
        (tmp_path / "weights.safetensors").write_bytes(weights)
        (tmp_path / "model.json").write_text(json.dumps(about))
        return tracking.fingerprint(tmp_path)

    first = written(name="m", steps=30, key="of the trainer as it was")
    assert written(steps=30, key="of the trainer with a comment", name="m") == first
    assert (
        len({first, written(b"v", name="m", steps=30), written(name="m", steps=31), written(name="n", steps=30)}) == 4
    )
    for name in ("weights.safetensors", "model.json"):
        (tmp_path / name).rename(tmp_path / "away")
        with pytest.raises(UserError, match=f"{name}: no such file; train the model first"):
            tracking.fingerprint(tmp_path)
        (tmp_path / "away").rename(tmp_path / name)


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("mlflow").write_text("in the way")
    with pytest.raises(UserError, match=r"mlflow.db: the tracking store cannot be made: "):
        tracking.prepare()
