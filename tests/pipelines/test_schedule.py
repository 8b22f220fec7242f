"""Deployments: `genus schedule` and a real worker, the flows that they run, and changed raw data."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from genus import config, notify
from genus.data import origin
from genus.errors import UserError
from pipelines import flows, schedule, watch
from pipelines.lock import one_run_at_a_time
from tests.conftest import ROOT
from tests.pipelines.conftest import processes_of, ran
from tests.servers import free_port

BIN = Path(sys.executable).parent
QUICK = {"PREFECT_RUNNER_POLL_FREQUENCY": "1", "PREFECT_WORKER_QUERY_SECONDS": "1"}  # 10 and 10 otherwise
TELL = f"{sys.executable} -c \"print(input(), file=open('told.jsonl', 'a'))\""
# A data set that no model learns yet, from pictures in raw/.
NEW = (
    "  new: {source: image_folder, options: {path: raw, size: 8}, validation: 0.1, max_broken: 0.01, checks: {}, "
    "judge: {steps: 5}}\nmodels:"
)


@pytest.fixture
def fed(toy: Path) -> Path:
    """The toy project with its own copy of the flows and a data set of raw files, whose origin ``ingest`` notes."""
    shutil.copytree(ROOT / "pipelines", toy / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.yaml", toy)
    params, stage = toy / "params.yaml", toy / "stage.py"
    params.write_text(params.read_text().replace("models:", NEW, 1))
    toys = 'json.dumps({"files": 0, "sha256": ""})'
    assert toys in stage.read_text()
    real = "json.dumps(origin.content(origin.roots(open_source(given.source, given.options))))"
    stage.write_text(
        "import sys\nfrom genus import config\nfrom genus.data import origin\n"
        "from genus.data.sources import open_source\n"
        "given = config.load().datasets.get(sys.argv[2])\n" + stage.read_text().replace(toys, real)
    )
    (toy / "raw").mkdir()
    (toy / "raw/a.png").write_bytes(b"a")
    return toy


@pytest.fixture
def home(fed: Path, prefect_database: Path) -> str:
    """A PREFECT_HOME for a server of the test's own."""
    (fed / "prefect").mkdir()
    shutil.copy(prefect_database, fed / "prefect/prefect.db")
    return str(fed / "prefect")


def told_of(folder: Path) -> list[dict[str, Any]]:
    """What TELL was told of."""
    path = folder / "told.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextmanager
def started(folder: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the folder, its output in <command's name>.out; ended as Ctrl-C would at the end of the block."""
    with (folder / f"{Path(command[0]).name}-{command[1]}.out").open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job of the background ignores it
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(look: Callable[[], Any], seconds: float = 120) -> Any:
    """What ``look`` gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := look():
                return found
        except httpx.TransportError:
            time.sleep(0.2)  # the server is just starting
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s")


def ask(api: str, what: str, **body: Any) -> Any:
    for _ in range(30):
        answer = httpx.post(f"{api}/{what}", json=body, timeout=30)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # its database is busy with somebody else
            break
        time.sleep(1)
    answer.raise_for_status()
    return answer.json()


def runs_of(api: str, deployment: str) -> list[dict[str, Any]]:
    return ask(api, "flow_runs/filter", deployments={"name": {"any_": [deployment]}})


def ended(api: str, deployment: str) -> list[dict[str, Any]]:
    return [run for run in runs_of(api, deployment) if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED")]


@pytest.mark.slow
def test_schedule_makes_cron_runs_and_runs_when_data_has_changed(fed: Path, home: str) -> None:
    # With SQLAlchemy 2.1 it is the cron runs that silently do not happen.
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    environment = os.environ | QUICK | {"PREFECT_HOME": home, notify.VARIABLE: TELL}
    environment.pop("PREFECT_API_URL", None)
    minute = (datetime.now(UTC) + timedelta(minutes=30)).minute  # not while the test runs
    command = (str(BIN / "genus"), "schedule", "--cron", f"{minute} * * * *", "--poll", "1", "--collection", "smoke")
    with started(fed, *command, "--port", str(port), **environment) as process:
        nightly = until(lambda: runs_of(api, "nightly"))
        first = min(datetime.fromisoformat(run["expected_start_time"]) for run in nightly)
        assert timedelta() < first - datetime.now(UTC) <= timedelta(minutes=31) and first.minute == minute
        assert nightly[0]["parameters"] == {"collection": "smoke"} and nightly[0]["state_type"] == "SCHEDULED"
        assert runs_of(api, "manual") == []

        [changed] = until(lambda: ended(api, "data-changed"))
        assert changed["state_name"] == "Completed" and changed["state"]["message"] == "all is up to date"
        assert ran(fed) == ["ingest@new", "validate@new", "judge@new"]
        time.sleep(2)  # some more looks
        assert len(ended(api, "data-changed")) == 1

        # A run that is killed is a crash that somebody is told of.
        (fed / "stage.py").write_text("import time\nopen('ran.txt', 'a').write('slow')\ntime.sleep(120)\n")
        [manual] = ask(api, "deployments/filter", deployments={"name": {"any_": ["manual"]}})
        parameters = {"datasets": ["new"], "force": True}

        def begin(number: int) -> None:
            ask(api, f"deployments/{manual['id']}/create_flow_run", parameters=parameters, state={"type": "SCHEDULED"})
            until(lambda: "".join(ran(fed)).count("slow") == number)

        begin(1)
        [run] = [one for one in psutil.Process(process.pid).children() if "prefect.engine" in one.cmdline()]
        run.kill()
        assert until(lambda: ended(api, "manual"))[0]["state_type"] == "CRASHED"
        [told] = until(lambda: told_of(fed))
        assert told["event"] == "failure" and "SIGKILL" in told["text"]
        begin(2)  # is going on when the schedule is told to end
    until(lambda: not processes_of(fed), 60)  # neither of the run nor of the schedule


@pytest.mark.slow
def test_worker_runs_the_deployments_of_prefect_yaml(fed: Path, home: str) -> None:
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    environment = os.environ | QUICK | {"PREFECT_HOME": home, "PREFECT_API_URL": api}
    prefect = str(BIN / "prefect")

    def call(*words: str) -> None:
        done = subprocess.run([prefect, *words], cwd=fed, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    assert str(ROOT) not in (fed / "prefect.yaml").read_text()
    with started(fed, prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port), **environment):
        until(lambda: ask(api, "work_pools/filter") == [])
        call("work-pool", "create", "genus", "--type", "process")
        call("--no-prompt", "deploy", "--all")
        deployed = {one["name"]: one for one in ask(api, "deployments/filter")}
        assert sorted(deployed) == ["data-changed", "manual", "nightly"]
        assert all(one["global_concurrency_limit"]["limit"] == 1 for one in deployed.values())
        assert {one["schedules"][0]["schedule"].get("cron") for one in deployed.values() if one["schedules"]} == {
            "0 3 * * *",
            None,
        }
        form = deployed["manual"]["parameter_openapi_schema"]["properties"]
        assert form["if_busy"]["enum"] == ["fail", "wait", "skip"] and form["force"]["type"] == "boolean"
        assert "params.yaml" in form["budget"]["description"]
        with started(fed, prefect, "worker", "start", "--pool", "genus", "--type", "process", **environment):
            manual = f"deployments/{deployed['manual']['id']}/create_flow_run"
            ask(api, manual, parameters={"datasets": ["new"], "budget": 2}, state={"type": "SCHEDULED"})
            [done] = until(lambda: ended(api, "manual"))
    assert done["state_name"] == "Completed", done["state"]
    assert ran(fed) == ["ingest@new", "validate@new", "judge@new"]
    assert (fed / "data/judge/new/weights").read_text() == "new"
    assert "\nbudget: 2\n" in (fed / "params.yaml").read_text()
    assert processes_of(fed) == []


@pytest.mark.parametrize("wrong", [{"cron": "61 3 * * *"}, {"timezone": "Mars"}, {"collection": "nigthly"}])
def test_what_is_wrong_with_a_schedule_is_named(toy: Path, wrong: dict[str, str]) -> None:
    right = {"cron": "0 3 * * *", "poll": 600, "collection": "smoke", "timezone": "UTC", "port": 0}
    with pytest.raises(UserError, match=re.escape(next(iter(wrong.values())))):
        schedule.run(**right | wrong)


def test_schedule_of_another_folder_is_not_joined(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two schedules on one server would overwrite each other's deployments.
    monkeypatch.setattr(schedule.server, "named", lambda: False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken"):
            schedule.run("0 3 * * *", 600, "smoke", "UTC", port)


def test_wrong_cron_is_one_line(toy: Path, genus: Callable[..., Any]) -> None:
    done = genus("schedule", "--cron", "nightly")
    assert done.returncode == 2 and done.stderr.startswith("genus: error: --cron: 'nightly' is not minute, hour")
    assert done.stderr.count("\n") == 1


def test_failed_run_names_its_stages_and_somebody_is_told(
    toy: Path, prefect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_FAILS", "train@digits-glow,train@digits-vae")
    monkeypatch.setenv(notify.VARIABLE, TELL)
    state = flows.train(models=["glow", "vae"], datasets=["digits"], return_state=True)
    assert state.is_failed() and state.message
    assert state.message.startswith("2 failed: train@digits-")
    for stage in ("train@digits-glow", "train@digits-vae"):
        line = f"{stage}: train of {stage.partition('@')[2]} is broken on purpose (log: logs/{stage}.log)"
        assert line in state.message
    [told] = told_of(toy)
    assert told["event"] == "failure" and told["text"].endswith(state.message)
    assert told["run"].startswith("train/") and told["text"].startswith(f"{told['run']}: 2 failed: ")

    state = flows.train(models=["nobody"], return_state=True)
    assert state.is_failed() and "unknown model 'nobody'" in (state.message or "")
    assert len(told_of(toy)) == 2


def test_skipped_run_says_for_whom(toy: Path, prefect: None) -> None:
    with one_run_at_a_time():
        state = flows.train(datasets=["digits"], if_busy="skip", return_state=True)
    assert state.is_completed() and state.name == "Skipped"
    assert f"skipped: another run is going on in this folder: process {os.getpid()}, since" in (state.message or "")
    assert ran(toy) == []


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SETTLED", 0.0)


def test_changed_data_is_seen_until_it_is_ingested(
    fed: Path, settled: None, prefect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fed / "raw/a.png").rename(fed / "a.png")
    assert watch.changed(config.load()) == {}  # no raw files: nothing has changed
    assert flows.watch_data(return_state=True).message == "the raw data is what was ingested"
    (fed / "a.png").rename(fed / "raw/a.png")
    assert list(watch.changed(config.load())) == ["new"]
    # Content that cannot be ingested is not tried again at every look.
    monkeypatch.setenv("TOY_FAILS", "ingest@new")
    assert flows.watch_data(return_state=True).is_failed() and ran(fed) == ["ingest@new"]
    assert watch.changed(config.load()) == {}
    monkeypatch.setenv("TOY_FAILS", "judge@new")
    (fed / "raw/b.png").write_bytes(b"b")
    assert flows.watch_data(return_state=True).is_failed()
    assert ran(fed)[1:] == ["ingest@new", "validate@new", "judge@new"]
    assert watch.changed(config.load()) == {}  # it is ingested; the rest is for the next run
    # The truth is what DVC holds, and not what was looked at here.
    (fed / "data/origin/new.json").write_text('{"files": 1, "sha256": "0"}')
    assert list(watch.changed(config.load())) == ["new"]


def test_files_are_read_only_where_the_file_system_says_that_they_changed(
    fed: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(origin, "content", lambda places, real=origin.content: read.append(places) or real(places))
    first = watch.changed(config.load())
    assert watch.changed(config.load()) == first and read == [["raw"]]
    (fed / "raw/a.png").touch()
    assert watch.changed(config.load()) == first and len(read) == 2  # read again, and the same
    (fed / "raw/a.png").write_bytes(b"A")
    assert watch.changed(config.load())["new"] != first["new"] and len(read) == 3


def test_files_that_are_being_written_are_left_alone(fed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch.changed(config.load()) == {}  # the fixture has just written them
    monkeypatch.setattr(watch.time, "time", lambda real=time.time: real() + 11)
    assert list(watch.changed(config.load())) == ["new"]


def test_origin_counts_names_and_content(tmp_path: Path) -> None:
    import gzip

    def of(**files: bytes) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, data in files.items():
            (folder / name.replace("_", ".")).write_bytes(data)
        return origin.content([str(folder)])["sha256"]

    one = of(a=b"x", b=b"y")
    assert of(a=b"x", b=b"y") == one  # wherever the folder is
    assert len({one, of(a=b"y", b=b"x"), of(a=b"x"), of(a=b"x", c=b"y")}) == 4
    # Mirrors compress the same content differently.
    assert of(a=b"x", b_gz=gzip.compress(b"y", 1, mtime=1)) == of(a_gz=gzip.compress(b"x", 9), b=b"y") == one
    assert of(b_gz=b"no gzip") == of(b=b"no gzip")
