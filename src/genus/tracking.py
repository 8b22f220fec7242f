"""Runs, metrics and pictures in MLflow: the only file that talks to its tracking API.

The files are the truth and the tracking store a view of them. So a store that cannot be reached never loses a
training: one warning, what was to be logged stays on disk (genus.outbox) and is tried again now and then; what has not
arrived at its end the next ``genus register`` brings to the same run, from there and from ``models/<model>/``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from genus import artifacts
from genus.errors import UserError
from genus.files import read_json, sha256
from genus.outbox import Entry, Outbox

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

STORE = Path("mlflow")  # under the project's folder: the database, and artifacts/ beside it
EVERY = 2.0  # seconds between two writes of one run
PAUSE = 30.0  # seconds before a store that could not be reached is tried again, then twice that, and so on
LONGEST_PAUSE = 600.0
_BATCH = 1000  # most metrics that log_batch takes at once

Action = Callable[["MlflowClient", str], object]  # something to do to a run, by its id


def uri() -> str:
    """Where tracking and registry are: MLFLOW_TRACKING_URI, else the SQLite database of this project's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{artifacts.SQLITE}{(STORE / 'mlflow.db').absolute()}"


def database() -> Path | None:
    """The file of the tracking store, None where it is on a server."""
    address = uri()
    return Path(address.removeprefix(artifacts.SQLITE)) if address.startswith(artifacts.SQLITE) else None


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
    address, path = uri(), database()
    if path is None or path.exists():
        return address
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{path}: the tracking store cannot be made: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():  # else another process made it while this one waited
            _create(path)
    return address


def _create(path: Path) -> None:
    """A new store, made aside and renamed: a killed creation leaves no database with half its tables."""
    import mlflow  # noqa: F401 (sets up its logging, which the next lines quieten)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    store = SqlAlchemyStore(f"{artifacts.SQLITE}{temporary}", f"{artifacts.SCHEME}:/")
    store.engine.dispose()
    os.replace(temporary, path)


def client() -> MlflowClient:
    """MLflow's client for this project's store, which is made where it is missing."""
    address = prepare()
    import mlflow
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what it prints at length it raises as well
    artifacts.register()
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


def why(error: Exception) -> str:
    """What MLflow raised, in one line that says what to do where that is known."""
    text, path = str(error).strip() or type(error).__name__, database()
    if path and ("malformed" in text or "is not a database" in text):
        return f"damaged: move the folder {os.path.relpath(path.parent)} away, and `genus register` fills a new one"
    if "readonly database" in text:
        return "read-only: nothing can be written to it"
    return text.splitlines()[0][:200]


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """What a trained model is: SHA-256 over its weights and model.json. Raises UserError where one is missing.

    But for its ``key``, which stands for all that a training depends on, the trainer's code too: a comment changed
    there trains anew, but what comes out equal is no new version.
    """
    weights, described = Path(folder) / "weights.safetensors", Path(folder) / "model.json"
    for path in (weights, described):
        if not path.exists():
            raise UserError(f"{path}: no such file; train the model first")
    about = {name: value for name, value in read_json(described).items() if name != "key"}
    return hashlib.sha256(f"{sha256(weights)} {json.dumps(about, sort_keys=True)}".encode()).hexdigest()


@dataclass
class Begun:
    """A run in the store, and what it has: the last step of its metrics (-1: none) and the steps of its pictures."""

    client: MlflowClient
    run_id: str
    last_row: int = -1
    pictures: set[int] = field(default_factory=set)


class Run:
    """One run, buffered: nothing here raises for a store that cannot be reached, if ``patient``.

    ``begin`` finds or makes the run and says what it has already: what a resumed training repeats is left out.
    """

    def __init__(self, begin: Callable[[], Begun], outbox: Outbox, *, patient: bool = True):
        self._begin, self._outbox, self._patient = begin, outbox, patient
        self._begun: Begun | None = None
        self._rows = outbox.rows()
        self._actions: list[Action] = [self._showing(pixels, step) for step, pixels in outbox.pictures().items()]
        self._next, self._pause = 0.0, PAUSE  # when to write next; how long to wait if that fails
        self._warned = False
        self.flush()

    def log(self, row: dict[str, float]) -> None:
        """Keeps a row of the history, ``row["step"]`` being its step; written with the next batch."""
        step, entry = int(row["step"]), (int(time.time() * 1000), row)
        if step not in self._rows:
            self._rows[step] = entry
            self._outbox.add(entry)
        if time.monotonic() >= self._next:
            self.flush()

    def complete(self, rows: list[dict[str, float]]) -> None:
        """Writes those rows of a whole history that are not in the store."""

        def fill(client: MlflowClient, run_id: str) -> None:
            there = {metric.step for metric in client.get_metric_history(run_id, "learning_rate")}
            now = int(time.time() * 1000)
            _write(client, run_id, [(now, row) for row in rows if int(row["step"]) not in there])

        self._do(fill)

    def image(self, pixels: np.ndarray, step: int) -> None:
        """Logs a grid of samples, uint8 [H, W] or [H, W, 3], for the slider of pictures by step."""
        self._outbox.keep(pixels, step)
        self._do(self._showing(pixels, step))

    def _showing(self, pixels: np.ndarray, step: int) -> Action:
        def show(client: MlflowClient, run_id: str) -> None:
            assert self._begun is not None
            if step not in self._begun.pictures:
                client.log_image(run_id, pixels, key="samples", step=step)
                self._begun.pictures.add(step)
            self._outbox.picture_arrived(step)

        return show

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

        def close(client: MlflowClient, run_id: str) -> None:
            client.set_terminated(run_id, status)
            self._outbox.close()

        self._actions.append(close)
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
        away: tuple[type[Exception], ...] = (*problems(), UserError)
        try:
            if self._begun is None:
                self._begun = self._begin()
            client, run_id = self._begun.client, self._begun.run_id
            if self._rows:
                _write(client, run_id, [entry for step, entry in self._rows.items() if step > self._begun.last_row])
                self._begun.last_row = max(self._begun.last_row, *self._rows)
                self._rows = {}
                self._outbox.rows_arrived()
            while self._actions:
                self._actions[0](client, run_id)
                self._actions.pop(0)
            self._pause = PAUSE
        except away as error:
            if not self._patient:
                raise
            self._next = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            if not self._warned:
                said = f"{why(error)}; training goes on, `genus register` completes the run"
                print(f"warning: tracking store: {said}", file=sys.stderr)
            self._warned = True


def _write(client: MlflowClient, run_id: str, entries: list[Entry]) -> None:
    """Writes whole rows at a time: after a kill a step is there with all its metrics or not at all."""
    from mlflow.entities import Metric

    batch: list[Metric] = []
    for when, row in entries:
        metrics = [Metric(name, value, when, int(row["step"])) for name, value in row.items() if name != "step"]
        if len(batch) + len(metrics) > _BATCH:  # writing one twice does no harm: it has the same time and step
            client.log_batch(run_id, metrics=batch)
            batch = []
        batch += metrics
    if batch:
        client.log_batch(run_id, metrics=batch)


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
    ``genus.key`` that was not finished is continued. SIGTERM ends the block as SystemExit, so that the run is
    closed as KILLED; after a kill that nothing can catch it stays RUNNING until the training is resumed.
    """
    outbox = Outbox(model, tags.get("genus.key", ""))
    about = outbox.begin({"params": params, "tags": _environment() | tags, "description": description})
    with _terminated_by_exception():
        run = Run(lambda: _begin(dataset, model, **about), outbox)
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
    """A run completed afterwards, or made from files without this process's environment. Raises what MLflow raises.

    The run is that of the training with the tag ``genus.key``, and gets what that training has left on disk.
    """
    outbox = Outbox(model, tags.get("genus.key", ""))
    made = {"params": params, "tags": tags | {"genus.filled": "from files"}, "description": description}
    about = outbox.begun() or made
    run = Run(lambda: _begin(dataset, model, **about), outbox, patient=False)
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
) -> Begun:
    """Continues the run of this very training, or an unfinished one with this ``genus.key``, or makes one."""
    from mlflow.entities import DatasetInput, InputTag, Param

    store, run = client(), None
    for tag, also in (("genus.training", ""), ("genus.key", " and attributes.status != 'FINISHED'")):
        if run is None and tags.get(tag):
            same = f"tags.`{tag}` = '{tags[tag]}' and attributes.run_name = '{model}'"
            run = find_run(store, dataset, same + also)
    if run is None:
        run = store.create_run(_experiment(store, dataset), run_name=model, tags=tags)
    else:
        store.update_run(run.info.run_id, status="RUNNING")
        if "genus.training" in tags:
            store.set_tag(run.info.run_id, "genus.training", tags["genus.training"])
    run_id = run.info.run_id
    if not (run.inputs and run.inputs.dataset_inputs):  # it is new, or the store went away at this moment
        flat = _flatten(params)
        store.log_batch(run_id, params=[Param(name, str(value)[:500]) for name, value in flat.items()])
        shown = DatasetInput(_dataset(dataset, description), [InputTag("mlflow.data.context", "training")])
        store.log_inputs(run_id, [shown])
    return Begun(store, run_id, _last_row(store, run), _pictures(store, run_id))


def _experiment(store: MlflowClient, name: str) -> str:
    """The id of the experiment, made where it is missing (perhaps by another process at this moment)."""
    from mlflow.exceptions import MlflowException

    found = store.get_experiment_by_name(name)
    if found is None:
        # A server keeps artifacts where it wants; a database on disk keeps them beside itself (genus.artifacts).
        place = f"{artifacts.SCHEME}:/{name}" if database() else None
        kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI's pages for training, not for agents
        try:
            return store.create_experiment(name, place, tags=kind)
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


def _pictures(store: MlflowClient, run_id: str) -> set[int]:
    """The steps that a run's pictures have; MLflow keeps them in their names, samples+step+400+…"""
    names = [item.path for item in store.list_artifacts(run_id, "images")]
    return {int(name.split("+")[2]) for name in names if name.endswith("compressed.webp")}  # written last


def _dataset(name: str, description: dict[str, Any]) -> Any:
    """The data set as MLflow shows it: name, content hash, source, shape and counts."""
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


def serve(port: int = 5000, models: Iterable[str] = ()) -> None:
    """Replaces this process by MLflow's web server for this project's store, on 127.0.0.1 only.

    Prints the addresses of the experiments, of the newest runs of ``models`` side by side, and of the registry; where
    runs are kept on a server already, its addresses and nothing more. Raises UserError where no page can be had.
    """
    address, path = prepare(), database()
    if path is None and not address.startswith(("http://", "https://")):
        raise UserError(f"runs are kept at {address} (MLFLOW_TRACKING_URI): open the server that serves it")
    if path is not None and _taken(port):
        raise UserError(f"port {port} is in use: is `genus ui` running already? Else choose another: --port {port + 1}")
    server = re.sub(r"//[^/@]*@", "//", address).rstrip("/")  # without a password, which is for programs
    here = f"http://127.0.0.1:{port}" if path else server
    try:
        pages = _pages(client(), set(models))
    except problems() as error:
        raise UserError(f"{address}: {why(error)}") from error
    for name, page in pages:
        print(f"{name:<28}  {here}/#/{page}")
    if path is None:
        return
    print("Ctrl-C ends it", flush=True)
    # Its job processes, seven of 240 MB each, serve features that nobody uses here.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", address, "--artifacts-destination", str(path.absolute().parent / "artifacts")]
    os.execve(sys.executable, command, environment)


def _taken(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return True
    return False


def _pages(store: MlflowClient, models: set[str]) -> list[tuple[str, str]]:
    """(what, page under #/) of each experiment, of its newest runs of ``models`` side by side, and of the registry."""
    pages = []
    for experiment in store.search_experiments(filter_string="name != 'Default'", order_by=["name ASC"]):
        number = experiment.experiment_id
        pages.append((experiment.name, f"experiments/{number}/runs"))
        finished = "attributes.status = 'FINISHED'"
        newest: dict[str, str] = {}
        for run in store.search_runs([number], finished, order_by=["start_time DESC"], max_results=1000):
            if run.info.run_name in models:
                newest.setdefault(run.info.run_name, run.info.run_id)
        if len(newest) > 1:
            which = urllib.parse.quote(f"attributes.run_id IN ({', '.join(map(repr, newest.values()))})")
            charts = f"experiments/{number}/runs?compareRunsMode=CHART&searchFilter={which}"
            pages.append((f"{experiment.name}, compared", charts))
    return [*pages, ("registry", "models")]
