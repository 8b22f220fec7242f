"""Runs, metrics and pictures in MLflow: the only file that talks to its tracking API.

The files are the truth and the tracking store a view of them. So a store that cannot be reached never loses a
training: one warning, what was to be logged stays in memory and is tried again now and then, and what never arrives
is filled in from ``models/<model>/`` by ``genus register``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from genus.errors import UserError
from genus.files import sha256

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

STORE = Path("mlflow")  # under the project's folder: the database, and artifacts/ beside it
EVERY = 2.0  # seconds between two writes of one run
PAUSE = 30.0  # seconds before a store that could not be reached is tried again
_BATCH = 1000  # most metrics that log_batch takes at once

Action = Callable[["MlflowClient", str], object]  # something to do to a run, by its id


def uri() -> str:
    """Where tracking and registry are: MLFLOW_TRACKING_URI, else the SQLite database of this project's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(STORE / 'mlflow.db').absolute()}"


def prepare() -> str:
    """Creates the local store where there is none, once, however many processes ask; returns its address.

    Cheap when it exists: MLflow is then not even imported. Raises UserError where the folder cannot be written.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault(
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"
    )  # else a server that is down holds a training for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    address = uri()
    if not address.startswith("sqlite:///"):
        return address
    database = Path(address.removeprefix("sqlite:///"))
    if database.exists():
        return address
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = open(database.with_suffix(".lock"), "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{database}: the tracking store cannot be made: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():  # else another process made it while this one waited
            _create(database)
    return address


def _create(database: Path) -> None:
    """A new store, made aside and renamed: a killed creation leaves no database with half its tables."""
    import mlflow  # noqa: F401 (sets up its logging, which the next lines quieten)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    temporary = database.with_name(f".{database.name}.{os.getpid()}")
    store = SqlAlchemyStore(f"sqlite:///{temporary}", str(database.parent / "artifacts"))
    store.engine.dispose()
    os.replace(temporary, database)


def client() -> MlflowClient:
    """MLflow's client for this project's store, which is made where it is missing."""
    address = prepare()
    import mlflow
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # Its registry looks a version's package up through this global, which is an environment variable besides:
    # as such it would outlive a change of folder.
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(address)
    if given is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    return MlflowClient(address, address)


def problems() -> tuple[type[Exception], ...]:
    """What MLflow raises where a store cannot be reached, is locked or refuses."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """What a trained model is: SHA-256 over its weights and model.json. Raises UserError where one is missing."""
    digest = hashlib.sha256()
    for name in ("weights.safetensors", "model.json"):
        try:
            digest.update(bytes.fromhex(sha256(Path(folder) / name)))
        except FileNotFoundError as error:
            raise UserError(f"{Path(folder) / name}: no such file; train the model first") from error
    return digest.hexdigest()


class Run:
    """One run, buffered: nothing here raises for a store that cannot be reached.

    ``begin`` finds or makes the run and returns the client, the run's id, the last step of its metrics and the last
    of its pictures (-1: none): what a resumed training repeats is left out.
    """

    def __init__(self, begin: Callable[[], tuple[MlflowClient, str, int, int]], *, patient: bool = True):
        self._begin, self._patient = begin, patient
        self._client: MlflowClient | None = None
        self._id = ""
        self._last_row = self._last_image = -1
        self._rows: list[tuple[int, dict[str, float]]] = []  # time in ms, row
        self._actions: list[Action] = []
        self._next = 0.0  # when to write next
        self._warned = False
        self.flush()

    def log(self, row: dict[str, float]) -> None:
        """Keeps a row of the history, ``row["step"]`` being its step; written with the next batch."""
        self._rows.append((int(time.time() * 1000), row))
        if time.monotonic() >= self._next:
            self.flush()

    def complete(self, rows: list[dict[str, float]]) -> None:
        """Writes those rows of a whole history that are not in the store: a killed process takes what it has buffered
        with it, and a resumed one begins after its checkpoint."""

        def fill(client: MlflowClient, run_id: str) -> None:
            there = {metric.step for metric in client.get_metric_history(run_id, "learning_rate")}
            self._rows = [(int(time.time() * 1000), row) for row in rows if int(row["step"]) not in there]
            self._last_row = -1
            self._write_rows(client)

        self._do(fill)

    def image(self, pixels: np.ndarray, step: int) -> None:
        """Logs a grid of samples, uint8 [H, W] or [H, W, 3], for the slider of pictures by step."""

        def log_image(client: MlflowClient, run_id: str) -> None:
            if step > self._last_image:
                client.log_image(run_id, pixels, key="samples", step=step)

        self._do(log_image)

    def tag(self, **tags: object) -> None:
        """Sets tags of the run."""
        from mlflow.entities import RunTag

        batch = [RunTag(name, str(value)) for name, value in tags.items()]
        self._do(lambda client, run_id: client.log_batch(run_id, tags=batch))

    def artifact(self, path: str | os.PathLike[str]) -> None:
        """Copies a file to the run."""
        self._do(lambda client, run_id: client.log_artifact(run_id, os.fspath(path)))

    def finished(self, folder: str | os.PathLike[str]) -> None:
        """Ties the run to what it made, ``models/<model>/``, by content: so ``genus register`` finds it again."""
        for name in ("model.json", "history.csv", "samples.png"):
            if (Path(folder) / name).exists():
                self.artifact(Path(folder) / name)
        self.tag(**{"genus.sha256": fingerprint(folder)})

    def end(self, status: str) -> None:
        """Writes what is left and closes the run as FINISHED, FAILED or KILLED."""
        self._actions.append(lambda client, run_id: client.set_terminated(run_id, status))
        if self._warned and status != "FINISHED":
            return  # a store that is away must not hold up a process that was told to stop
        self.flush()

    def _do(self, action: Action) -> None:
        self._actions.append(action)
        if not self._warned or time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Writes all that waits, rows first; keeps what could not be written."""
        self._next = time.monotonic() + EVERY
        try:
            if self._client is None:
                self._client, self._id, self._last_row, self._last_image = self._begin()
            self._write_rows(self._client)
            while self._actions:
                self._actions[0](self._client, self._id)
                self._actions.pop(0)
        except problems() as error:
            if not self._patient:
                raise
            self._next = time.monotonic() + PAUSE
            if not self._warned:
                why = str(error).strip().splitlines()[0][:200]
                print(
                    f"warning: tracking store: {why}; training goes on, `genus register` fills the run in",
                    file=sys.stderr,
                )
            self._warned = True

    def _write_rows(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        rows = [(when, row) for when, row in self._rows if row["step"] > self._last_row]
        metrics = [
            Metric(name, value, when, int(row["step"]))
            for when, row in rows
            for name, value in row.items()
            if name != "step"
        ]
        for start in range(0, len(metrics), _BATCH):  # writing one twice does no harm: it has the same time and step
            client.log_batch(self._id, metrics=metrics[start : start + _BATCH])
        self._rows = []
        if rows:
            self._last_row = int(rows[-1][1]["step"])


@contextlib.contextmanager
def training_run(
    dataset: str,
    model: str,
    params: dict[str, Any],
    tags: dict[str, str],
    description: dict[str, Any],
) -> Iterator[Run]:
    """The run of one training: experiment ``dataset``, run name ``model``; ended whatever ends the block.

    ``params`` may be nested (names are joined by dots); ``description`` is dataset.json. A run with the same tag
    ``genus.key`` that was stopped or failed is continued. SIGTERM ends the block as SystemExit, so that the run is
    closed as KILLED; after a kill that nothing can catch it stays RUNNING until the training is resumed.
    """
    tags = _environment() | tags
    with _terminated_by_exception():
        run = Run(lambda: _begin(dataset, model, params, tags, description))
        try:
            yield run
        except (KeyboardInterrupt, SystemExit):
            run.end("KILLED")
            raise
        except BaseException:
            run.end("FAILED")
            raise
        run.end("FINISHED")


@contextlib.contextmanager
def filled_run(
    dataset: str,
    model: str,
    params: dict[str, Any],
    tags: dict[str, str],
    description: dict[str, Any],
) -> Iterator[Run]:
    """A run made afterwards from files, without this process's environment. Raises what MLflow raises."""
    tags = tags | {"genus.filled": "from files"}
    run = Run(lambda: _begin(dataset, model, params, tags, description), patient=False)
    try:
        yield run
    except BaseException:
        with contextlib.suppress(*problems()):
            run.end("FAILED")
        raise
    run.end("FINISHED")


def find_run(client: MlflowClient, dataset: str, filter_string: str) -> StoredRun | None:
    """The newest run of a data set's experiment that fits an MLflow filter."""
    experiment = client.get_experiment_by_name(dataset)
    if experiment is None:
        return None
    found = client.search_runs([experiment.experiment_id], filter_string, max_results=1, order_by=["start_time DESC"])
    return found[0] if found else None


def add(client: MlflowClient, run: StoredRun, metrics: dict[str, float], tags: dict[str, str]) -> None:
    """Puts figures without a step, and tags, on a run that is there. Raises what MLflow raises."""
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    if metrics or tags:
        client.log_batch(
            run.info.run_id,
            metrics=[Metric(name, value, now, 0) for name, value in metrics.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )


def _begin(
    dataset: str, model: str, params: dict[str, Any], tags: dict[str, str], description: dict[str, Any]
) -> tuple[MlflowClient, str, int, int]:
    """Continues the run with this ``genus.key``, or makes one."""
    from mlflow.entities import DatasetInput, InputTag, Param

    store = client()
    key = tags.get("genus.key")
    if key:
        same = f"tags.`genus.key` = '{key}' and attributes.run_name = '{model}'"
        stopped = find_run(store, dataset, f"{same} and attributes.status != 'FINISHED'")
        if stopped is not None:
            run_id = stopped.info.run_id
            store.update_run(run_id, status="RUNNING")
            return store, run_id, _last_row(store, stopped), _last_image(store, run_id)
    run_id = store.create_run(_experiment(store, dataset), run_name=model, tags=tags).info.run_id
    flat = _flatten(params)
    store.log_batch(run_id, params=[Param(name, str(value)[:500]) for name, value in flat.items()])
    store.log_inputs(
        run_id, [DatasetInput(_dataset(dataset, description), [InputTag("mlflow.data.context", "training")])]
    )
    return store, run_id, -1, -1


def _experiment(store: MlflowClient, name: str) -> str:
    """The id of the experiment, made where it is missing (perhaps by another process at this moment)."""
    from mlflow.exceptions import MlflowException

    found = store.get_experiment_by_name(name)
    if found is None:
        address = uri()
        # A server keeps artifacts where it wants; a database on disk keeps them beside itself.
        beside = Path(address.removeprefix("sqlite:///")).parent / "artifacts" / name
        kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI's pages for training, not for agents
        try:
            return store.create_experiment(name, str(beside) if address.startswith("sqlite:///") else None, tags=kind)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = store.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def _last_row(store: MlflowClient, run: StoredRun) -> int:
    """The last step that a run's metrics have."""
    names = run.data.metrics
    return max(
        (metric.step for name in names for metric in store.get_metric_history(run.info.run_id, name)), default=-1
    )


def _last_image(store: MlflowClient, run_id: str) -> int:
    """The last step that a run's pictures have; MLflow keeps it in their names, samples+step+400+…"""
    names = [item.path for item in store.list_artifacts(run_id, "images")]
    return max((int(name.split("+")[2]) for name in names), default=-1)


def _dataset(name: str, description: dict[str, Any]) -> Any:
    """The data set as MLflow shows it: name, content hash, source, shape and counts."""
    import json

    from mlflow.entities import Dataset

    content = description.get("sha256") or hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    short = {key: value for key, value in description.items() if key != "spec"}
    return Dataset(
        name=name,
        digest=content[:36],  # the most that MLflow takes
        source_type="local",
        source=json.dumps({"uri": f"data/processed/{name}"}),
        schema=json.dumps({"spec": description.get("spec", {})}),
        profile=json.dumps(short)[:10_000],
    )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one: {"train": {"steps": 9}} is {"train.steps": 9}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _environment() -> dict[str, str]:
    """What a run was made with: code, versions, locks, machine."""
    import torch

    cuda = torch.cuda.is_available()
    tags = {
        "mlflow.source.name": "genus train",
        "mlflow.source.type": "LOCAL",
        "env.python": platform.python_version(),
        "env.torch": torch.__version__,
        "env.machine": f"{_processor()}, {os.cpu_count()} cores",
        "env.threads": str(torch.get_num_threads()),
        "env.device": torch.cuda.get_device_name() if cuda else "cpu",
    }
    for name, path in {"genus.requirements_sha256": "requirements.lock", "genus.dvc_lock_sha256": "dvc.lock"}.items():
        if Path(path).exists():
            tags[name] = sha256(path)
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["genus.uncommitted"] = "yes" if _git("status", "--porcelain", "--untracked-files=no") else "no"
    return tags


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _git(*arguments: str) -> str:
    """What git prints; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


@contextlib.contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that ``finally`` runs. Only where nobody else handles it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        ours = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if ours:
            signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever runs that one decides
        ours = False
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def serve(port: int = 5000) -> None:
    """Replaces this process by MLflow's web server for this project's store, on 127.0.0.1 only.

    Raises UserError where runs are kept on a server already: its own pages are the ones to open.
    """
    address = prepare()
    if not address.startswith("sqlite:///"):
        raise UserError(f"runs are kept at {address} (MLFLOW_TRACKING_URI): open that address")
    artifacts = Path(address.removeprefix("sqlite:///")).parent / "artifacts"
    here = f"http://127.0.0.1:{port}"
    print(f"experiments  {here}/#/experiments\nregistry     {here}/#/models\nCtrl-C ends it", flush=True)
    # Its job processes, seven of 240 MB each, serve features that nobody uses here.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", address, "--artifacts-destination", str(artifacts)]
    os.execve(sys.executable, command, environment)
