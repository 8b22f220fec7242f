"""The tracking store as files and as a server: it can be moved, be away, be read-only or be damaged."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import tomllib
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from genus import outbox, registry, tracking
from genus.errors import TransientError, UserError
from genus.stages import ingest, register
from tests.registry.workspace import MODEL, new_store, passing, workspace, write_figures, write_model, write_params
from tests.servers import free_port, local_mlflow
from tests.survive.test_disk import mount
from tests.test_tracking import PICTURE, row, runs, start, steps

__all__ = ["mount", "passing", "workspace"]  # fixtures
ROOT = Path(__file__).parents[1]


def registered() -> None:
    """A trained model in this project's store, run, package and all."""
    write_params(MODEL)
    write_model()
    write_figures(frechet_distance=40.0)
    with start(model=MODEL) as run:
        run.log(row(1))
        run.image(PICTURE, 1)
        run.finished(Path("models") / MODEL)
    register.run("smoke")


def texts(database: Path) -> list[str]:
    """Every text in every table."""
    with contextlib.closing(sqlite3.connect(database)) as store:
        tables = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return [
            value
            for table in tables
            for line in store.execute(f'SELECT * FROM "{table}"')
            for value in line
            if isinstance(value, str)
        ]


def python(code: str, *arguments: str | Path, folder: Path, **environment: str) -> str:
    """What another process prints that has neither this project's folder nor its code imported."""
    settings = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "PYTHONPATH")} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CONSUMER = """
import sys, mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
client = mlflow.MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
grids = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
client.download_artifacts(run.info.run_id, "samples.png", ".")
model = mlflow.pyfunc.load_model("models:/digits-vae@champion", suppress_warnings=True)
print(len(grids), model.predict(pandas.DataFrame({"seed": [1, 2]})).shape)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("passing")
def test_a_store_can_be_moved(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    registered()
    there, cwd = tmp_path_factory.mktemp("other machine"), tmp_path_factory.mktemp("cwd")
    found = texts(Path("mlflow/mlflow.db"))
    assert "mlflow-artifacts:/digits" in found
    assert not [text for text in found if text.startswith(("/", "file:")) or str(workspace) in text]
    picture = Path("models", MODEL, "samples.png").read_bytes()
    shutil.move("mlflow", there / "mlflow")
    with local_mlflow(there / "mlflow") as address:
        assert python(CONSUMER, address, folder=cwd) == "2 (2, 1, 8, 8)"
    assert (cwd / "samples.png").read_bytes() == picture
    # And without a server, where Genus is installed: MLflow finds the files by the entry point of pyproject.toml.
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (points,) = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in of.items()) for group, of in wanted.items()]
    (cwd / "genus_here-1.dist-info").mkdir()
    (cwd / "genus_here-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: genus_here\nVersion: 1\n")
    (cwd / "genus_here-1.dist-info/entry_points.txt").write_text(points)
    path = f"{cwd}{os.pathsep}{ROOT / 'src'}"
    address = f"sqlite:///{there / 'mlflow/mlflow.db'}"
    assert python(CONSUMER, address, folder=cwd, PYTHONPATH=path) == "2 (2, 1, 8, 8)"


def training(log: str) -> subprocess.Popen[bytes]:
    """`genus train`, its output in a file."""
    command = [sys.executable, "-c", "from genus.cli import main; main()", "train", MODEL]
    environment = os.environ | {"GENUS_CHECKPOINT_SECONDS": "0.2"}
    with open(log, "w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def until(happened: Callable[[], Any], process: subprocess.Popen[bytes], log: str) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, Path(log).read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def arrived(database: Path) -> int:
    """The last step that a server has got."""
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=20)) as store:
        return int(store.execute("SELECT coalesce(max(step), 0) FROM metrics").fetchone()[0])


@pytest.mark.slow
@pytest.mark.usefixtures("passing")
def test_a_server_that_dies_during_a_training_gets_all_of_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server dies, then the training, which goes on without a server; `genus register` completes the first run."""
    monkeypatch.chdir(tmp_path)
    params = (ROOT / "params.yaml").read_text()
    Path("params.yaml").write_text(re.sub(r"^budget: .*$", "budget: 3", params, flags=re.M))
    ingest.run("digits")
    new_store(tmp_path)
    store, port = tmp_path / "mlflow", free_port()
    left = outbox.FOLDER / MODEL
    with local_mlflow(store, port) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        process = training("first.log")
        until(lambda: arrived(store / "mlflow.db"), process, "first.log")
    late = arrived(store / "mlflow.db")
    until(lambda: any(left.glob("*/*.png")), process, "first.log")  # drawn when the server was dead
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = training("second.log")
    assert process.wait(120) == 0, Path("second.log").read_text()
    warnings = [line for line in Path("second.log").read_text().splitlines() if "tracking store" in line]
    assert len(warnings) == 1 and "training goes on, `genus register` completes the run" in warnings[0]

    assert arrived(store / "mlflow.db") == late
    write_params(MODEL)
    write_figures(frechet_distance=40.0)
    with pytest.raises(TransientError, match="the registry cannot be filled"):
        register.run("smoke")
    with local_mlflow(store, port):
        (before,) = runs(MODEL)
        assert before.info.status == "RUNNING"
        register.run("smoke")
        (run,) = runs(MODEL)
        assert (run.info.run_id, run.info.status) == (before.info.run_id, "FINISHED")
        assert not left.exists() and "genus.filled" not in run.data.tags and "mlflow.source.name" in run.data.tags
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/") and run.data.params["family"] == "vae/vae"
        assert registry.status([MODEL]) == {MODEL: {"version": "1", "aliases": ["champion"]}}
        history = pd.read_csv(f"models/{MODEL}/history.csv")
        for name in {*history.columns, "images_per_s"} - {"step"}:  # the speed stands in no file: it was kept as well
            assert steps(run, name) == list(history["step"]), name
        last = int(history["step"].iloc[-1])
        pictures = [file.path for file in tracking.client().list_artifacts(run.info.run_id, "images")]
        wanted = [round(last * k / 5) for k in range(1, 6)]
        assert sorted(int(name.split("+")[2]) for name in pictures if name.endswith(".png")) == wanted
        loaded = mlflow.pyfunc.load_model(f"models:/{MODEL}@champion", suppress_warnings=True)  # through its proxy
        assert loaded.predict(pd.DataFrame({"seed": [1, 2]})).shape == (2, 1, 8, 8)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("//", "//name:secret@"))
        capsys.readouterr()
        tracking.serve()  # nothing to serve: it says what to open
        pages = re.findall(r"(http\S+)$", capsys.readouterr().out, re.MULTILINE)
        assert pages == [f"{address}/#/experiments/{run.info.experiment_id}/runs", f"{address}/#/models"]


def test_what_a_killed_process_had_on_disk_is_not_written_twice(workspace: Path) -> None:
    """The last write arrived, and the kill came before it was noted."""
    with pytest.raises(SystemExit), start():
        raise SystemExit  # stopped, to be continued
    with start() as run:
        for step in range(1, 5):
            run.log(row(step))
        run.image(PICTURE, 3)
        run.flush()
        kept = outbox.Outbox("m", "k")
        for step in (3, 4):
            kept.add((1, row(step)))
        with open(kept.folder / "rows.jsonl", "a") as file:
            file.write('\n[1, {"step": 6.0, "lo')  # cut
        kept.add((1, row(5) | {"speed": 5.0}))
        kept.keep(PICTURE, 3)
        (kept.folder / "4.png").write_bytes(b"cut")
        shutil.copytree(kept.folder, "left")
    shutil.copytree("left", kept.folder)
    assert outbox.waiting("m", "k") and not outbox.waiting("m", "other") and not outbox.waiting("m", "")
    with tracking.filled_run("digits", "m", {}, {"genus.key": "k"}, {}) as again:
        again.complete([row(step) for step in range(1, 8)])
    (stored,) = runs()
    assert steps(stored) == [1, 2, 3, 4, 5, 6, 7] and stored.info.status == "FINISHED"
    assert steps(stored, "speed") == [5]
    assert len(tracking.client().list_artifacts(stored.info.run_id, "images")) == 2  # and its thumbnail
    assert not outbox.waiting("m", "k")


def test_make_clean_keeps_the_store_and_what_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = {outbox.FOLDER / "m/k/rows.jsonl", Path("mlflow/mlflow.db"), Path("data/raw/a.png"), Path("params.yaml")}
    gone = {Path(".genus/checkpoints/m/k.safetensors"), Path(".genus/run.lock"), Path("models/m/model.json")}
    for path in kept | gone:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for _ in range(2):  # and where there is nothing to be cleaned
        subprocess.run(["make", "-s", "-f", ROOT / "Makefile", "clean"], check=True)
        assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()} == kept
    shutil.rmtree(".genus")
    subprocess.run(["make", "-s", "-f", ROOT / "Makefile", "clean"], check=True)


@pytest.mark.usefixtures("passing")
def test_a_read_only_store_is_one_warning_and_later_complete(
    workspace: Path, mount: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    database = Path("mlflow/mlflow.db").read_bytes()
    mount("-t", "tmpfs", "-o", "size=64m", "none", workspace / "mlflow")
    Path("mlflow/mlflow.db").write_bytes(database)
    mount("-o", "remount,ro", workspace / "mlflow")
    write_params(MODEL)
    folder = write_model()
    about = json.loads((folder / "model.json").read_text()) | {"key": "k"}
    (folder / "model.json").write_text(json.dumps(about))
    write_figures(frechet_distance=40.0)
    with start(model=MODEL) as run:
        for step in (10, 20, 30):
            run.log(row(step))
        run.image(PICTURE, 10)
        run.finished(folder)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == (
        "warning: tracking store: read-only: nothing can be written to it; "
        "training goes on, `genus register` completes the run"
    )
    with pytest.raises(UserError, match=r"mlflow.db: the registry cannot be filled: read-only: ") as caught:
        register.run("smoke")
    assert not isinstance(caught.value, TransientError) and "\n" not in str(caught.value)
    mount("-o", "remount,rw", workspace / "mlflow")
    (workspace / "again").symlink_to("mlflow")  # by another name, as this process keeps what it has opened to read
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace}/again/mlflow.db")
    register.run("smoke")
    (stored,) = runs(MODEL)
    assert stored.info.status == "FINISHED" and steps(stored) == [10, 20, 30]
    assert "env.machine" in stored.data.tags  # what it was trained with, not filled in
    assert len(tracking.client().list_artifacts(stored.info.run_id, "images")) == 4


@pytest.mark.parametrize("size", [0.5, 0.02, "garbage"])
def test_a_damaged_store_is_one_line_that_says_what_to_do(
    workspace: Path, size: float | str, capsys: pytest.CaptureFixture[str]
) -> None:
    database = Path("mlflow/mlflow.db")
    content = database.read_bytes()
    database.write_bytes(b"no database " * 1000 if isinstance(size, str) else content[: int(len(content) * size)])
    write_params(MODEL)
    write_model()
    write_figures(frechet_distance=40.0)
    with start() as run:
        run.log(row(1))
    (warning,) = capsys.readouterr().err.splitlines()
    hint = "damaged: move the folder mlflow away, and `genus register` fills a new one"
    assert hint in warning
    for call in (lambda: register.run("smoke"), lambda: tracking.serve(free_port())):
        with pytest.raises(UserError, match=f"mlflow.db: .*{re.escape(hint)}") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_pages_are_named_and_a_busy_port_is_one_line(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in ("a", "b", "b", "other"):
        with start(key=model, model=model) as run:
            run.log(row(1))
    (a,), newest = runs("a"), runs("b")[0]
    called: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: called.append(arguments))
    port = free_port()
    tracking.serve(port, ["a", "b", "absent"])
    said = dict(re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines() if "http" in line)
    base = f"http://127.0.0.1:{port}/#/"
    number = a.info.experiment_id
    assert said["digits"] == f"{base}experiments/{number}/runs" and said["registry"] == f"{base}models"
    which = urllib.parse.parse_qs(said["digits, compared"].partition("?")[2])
    assert which["compareRunsMode"] == ["CHART"]
    assert set(re.findall(r"'(\w+)'", which["searchFilter"][0])) == {a.info.run_id, newest.info.run_id}
    ((_, command, environment),) = called
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    busy = rf"^port {port} is in use: .*--port {port + 1}$"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(UserError, match=busy):
        tracking.serve(port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9: "):
        tracking.serve(port)
    assert len(called) == 1
