"""The soak: kill -9 at random moments, again and again; what is left must be as if nothing had happened.

    python -m tests.survive.soak --kills 50 --seed 0    (`make soak`)

Rounds of `genus run` in fresh folders, every second one against a real MLflow server. In a round one process after the
other is killed, drawn from those that are there: the flow, a stage, DVC, the server that stages are forked from,
Prefect's, MLflow's. What was killed is started again at once, until a run ends well. Then every file is compared with
those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CODE = ("src", "pipelines", "models/none", "dvc.yaml", "claims.yaml", ".dvcignore", ".gitignore", ".dvc/config")
MODELS = ("digits-vae", "digits-gan", "digits-glow")
TIMED = ("reports/timing/", "reports/records/", "reports/scorecard", "reports/data_docs/")  # hold times, or pages of it
OUTPUTS = ("data", "models", "reports")
SETTLES = 20.0  # seconds in which what a killed process has started must have ended
HANGS = 300.0  # seconds after which a run that nobody disturbs is said to hang


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--gap", type=float, help="most seconds between two kills; a third of an undisturbed run")
    options.add_argument("--budget", type=float, default=6.0, help="multiplies every model's steps")
    options.add_argument("--keep", action="store_true", help="leave the folders of the rounds")
    given = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="genus-soak-"))
    print(f"in {folder}", flush=True)
    try:
        found = soak(folder, given.kills, given.seed, given.gap, given.budget)
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(found)
    sys.exit(bool(found.problems))


@dataclass
class Found:
    """What the soak has seen."""

    kills: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    runs: int = 0
    resumes: int = 0  # trainings that went on from a checkpoint
    compared: int = 0  # files
    mismatches: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)  # a run that failed undisturbed, lost metrics …
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        return [*self.mismatches, *self.orphans, *self.other]

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.kills.most_common())
        return "\n".join(
            [
                f"kills {self.kills.total()} ({kinds}) in {self.runs} runs and {self.rounds} rounds",
                f"resumes {self.resumes}",
                f"mismatches {len(self.mismatches)} in {self.compared} files",
                f"orphans {len(self.orphans)}",
                f"other problems {len(self.other)}",
                f"seconds {self.seconds:.0f}",
                *self.problems,
            ]
        )


def soak(folder: Path, kills: int, seed: int, gap: float | None, budget: float) -> Found:
    """Rounds until so many processes have been killed. Never stops at a problem: all are in what it returns."""
    found, started, chance = Found(), time.monotonic(), random.Random(seed)
    wanted = workspace(folder / "undisturbed", budget)
    run = Running(wanted, {})
    if run.wait(HANGS):
        raise SystemExit(f"a run that nobody disturbed fails:\n{run.output()}")
    seconds = time.monotonic() - started
    gap = gap or seconds / 3  # on a busy machine nothing but imports would be hit otherwise
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    hashes = files(wanted)
    while found.kills.total() < kills:
        found.rounds += 1
        place = workspace(folder / f"round-{found.rounds}", budget)
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Mlflow.running(place.with_suffix(".mlflow"))) if found.rounds % 2 else None
            one_round(place, server, chance, kills, gap, found)
            verify(place, server, hashes, found)
        print(f"round {found.rounds}: {found.kills.total()} kills, {len(found.problems)} problems", flush=True)
        if not found.problems:
            shutil.rmtree(place)
    found.seconds = time.monotonic() - started
    return found


def one_round(place: Path, server: Mlflow | None, chance: random.Random, kills: int, gap: float, found: Found) -> None:
    """Runs, killing something every few seconds, until one run ends well."""
    while True:
        if server:
            server.start()
        waiting = {path.parent.name for path in place.glob(".genus/checkpoints/*/*.safetensors")}
        begun, disturbed = time.time(), False
        run = Running(place, server.environment if server else {})
        found.runs += 1
        while found.kills.total() < kills and run.wait(chance.uniform(0, gap)) is None:
            victims = processes(place) | ({"mlflow": [server.pid]} if server and server.pid else {})
            kinds = sorted(victims)
            kind = chance.choices(kinds, [3 if kind in ("flow", "stage") else 1 for kind in kinds])[0]
            if kind == "mlflow" and server:
                disturbed |= server.kill()
                server.start()
            else:
                disturbed |= kill(chance.choice(victims[kind]))
            found.kills[kind] += 1
            print(f"kill {found.kills.total()}: {kind}", flush=True)
            if kind == "flow":
                break
        status = run.wait(HANGS)
        for model in waiting:
            progress = place / ".genus/progress" / f"train@{model}.json"
            found.resumes += progress.exists() and progress.stat().st_mtime > begun
        if status is None:
            found.other.append(f"{place.name}: a run hangs; it was killed\n{run.output()}")
            run.process.kill()
        elif status == 0:
            return
        elif not disturbed:
            found.other.append(f"{place.name}: a run that nobody disturbed ends with status {status}\n{run.output()}")
            if len(found.other) > 3:
                return


def verify(place: Path, server: Mlflow | None, wanted: dict[str, str], found: Found) -> None:
    """Compares a round's folder with the undisturbed one: processes, files, lock, registry."""
    deadline = time.monotonic() + SETTLES
    while processes(place) and time.monotonic() < deadline:
        time.sleep(0.2)
    for kind, pids in processes(place).items():
        for pid in pids:
            found.orphans.append(f"{place.name}: {kind} {pid} {command(pid)}")
            kill(pid)
    there = files(place)
    found.compared += len(wanted)
    found.mismatches += [f"{place.name}: {path} is missing" for path in wanted.keys() - there.keys()]
    found.mismatches += [f"{place.name}: {path} should not be there" for path in there.keys() - wanted.keys()]
    for path in wanted.keys() & there.keys():
        if wanted[path] != there[path] and not path.startswith(TIMED):
            found.mismatches.append(f"{place.name}: {path} differs")
    if server:
        server.start()
        server.answers()
    again = Running(place, server.environment if server else {})
    if again.wait(HANGS) or "nothing has changed" not in again.output():
        found.other.append(f"{place.name}: a further run finds something to do\n{again.output()}")
    address = server.address if server else f"sqlite:///{place}/mlflow/mlflow.db"
    found.other += [f"{place.name}: {problem}" for problem in registry(place, address, MODELS)]


def registry(place: Path, address: str, models: Iterable[str]) -> Iterator[str]:
    """What is wrong with the runs and the registry of a workspace in which each model has been registered once."""
    import pandas
    from mlflow import MlflowClient

    client = MlflowClient(address, address)
    (experiment,) = client.search_experiments(filter_string="name = 'digits'")
    runs = client.search_runs([experiment.experiment_id])
    for model in models:
        try:
            version = client.get_model_version_by_alias(model, "champion")
        except Exception as error:  # noqa: BLE001 (whatever it is: the model has no champion)
            yield f"{model} has no champion: {error}"
            continue
        if len(client.search_model_versions(f"name = '{model}'")) != 1:
            yield f"{model} has several versions of the same content"
        mine = [run for run in runs if run.info.run_name == model]
        for run in mine:
            if run.info.status == "RUNNING":
                yield f"run {run.info.run_id} of {model} still runs"
        done = [run for run in mine if run.info.run_id == version.run_id and run.info.status == "FINISHED"]
        if not done:
            yield f"{model}'s version names no finished run"
            continue
        history = pandas.read_csv(place / "models" / model / "history.csv")
        for column in history.columns.drop("step"):
            kept = history.loc[history[column].notna(), "step"].tolist()
            logged = sorted({metric.step for metric in client.get_metric_history(version.run_id, column)})
            if logged != kept:
                yield f"{model}: {len(logged)} of {len(kept)} values of {column} are in the store"


def workspace(place: Path, budget: float) -> Path:
    """A project with this code and tiny settings, a git repository as a clone would be."""
    for name in CODE:
        source, target = ROOT / name, place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, target)
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params |= {"budget": budget, "datasets": {"digits": params["datasets"]["digits"] | {"judge": {"steps": 60}}}}
    params["collections"] = {"smoke": params["collections"]["smoke"]}
    params["models"] = {name: params["models"][name] for name in MODELS}
    for model in params["models"].values():
        model["evaluate"] = {"samples": 100, "likelihoods": 50, "weighed": 10, "weights": 4, "flowed": 4}
        model["probe"] = {"size": 8, "steps": 20, "samples": 100, "seeds": 2, "batch": 1, "outliers": 0}
        model["probe"] |= {"learning_rates": [], "widths": [], "sizes": [], "two_d": []}
    YAML(typ="safe").dump(params, place / "params.yaml")
    git = ["git", "-c", "user.name=soak", "-c", "user.email=soak@localhost"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "soak"]):
        subprocess.run([*git, *arguments], cwd=place, check=True)
    return place


class Running:
    """A ``genus run`` of a workspace's own code."""

    def __init__(self, place: Path, environment: dict[str, str]):
        self.log = place.with_suffix(".log")
        variables = os.environ | {
            "PYTHONPATH": str(place / "src"),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_HOME": str(place.parent / "prefect"),
            "GENUS_CHECKPOINT_SECONDS": "0.2",
            **environment,
        }
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [BIN / "genus", "run", "--collection", "smoke"],
                cwd=place,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> int | None:
        """The exit status; None where it has not ended by then."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


class Mlflow:
    """A real MLflow server that can be killed and started again."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.environment = {"MLFLOW_TRACKING_URI": self.address}
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    @contextlib.contextmanager
    def running(cls, folder: Path) -> Iterator[Mlflow]:
        """One whose first start has ended, for as long as the block."""
        folder.mkdir()
        server = cls(folder)
        server.start()
        try:
            server.answers()
            yield server
        finally:
            server.kill()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process and self._process.poll() is None else 0

    def start(self) -> None:
        """Starts it where it does not run."""
        if self.pid:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", self.address.rpartition(":")[2], "--backend-store-uri", f"sqlite:///{self.folder}/db"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--artifacts-destination", str(self.folder / "artifacts")],
                cwd=self.folder,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> bool:
        """SIGKILL to it and its workers, and waits until it has ended; whether it ran."""
        if not self.pid:  # killpg(0) would be our own group
            return False
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return True

    def answers(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def kill(pid: int) -> bool:
    """SIGKILL; whether there was somebody to kill."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def processes(place: Path) -> dict[str, list[int]]:
    """What runs in a workspace, this process aside, by kind."""
    found: dict[str, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")).is_relative_to(place):
                pid = int(entry.name)
                said = command(pid)
                if said and pid != os.getpid():  # nothing is said by a zombie
                    found.setdefault(_kind(pid, said), []).append(pid)
    return found


def _kind(pid: int, said: str) -> str:
    kinds = {"genus.forkserver": "forkserver", "genus run": "flow", "repro": "dvc", "prefect": "prefect"}
    kind = next((kind for mark, kind in kinds.items() if mark in said), "stage")
    # A fork has its server's command line; what a fork of it has forked is a stage.
    above = command(parent(pid))
    return "stage" if kind == "forkserver" and "genus.forkserver" in above else kind


def command(pid: int) -> str:
    """The command line of a process; empty where it has none or has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def files(place: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file in the output folders, temporary ones included, and the hashes of dvc.lock."""
    found = {}
    for path in sorted(path for top in OUTPUTS for path in (place / top).rglob("*")):
        if path.is_file():
            found[str(path.relative_to(place))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif re.match(r"\..+\..{8}\.\d+$", path.name):
            found[str(path.relative_to(place))] = "left over"
    lock: dict[str, Any] = YAML(typ="safe").load((place / "dvc.lock").read_text(encoding="utf-8"))
    for stage, entry in lock["stages"].items():
        for out in entry["outs"]:
            if not out["path"].startswith(TIMED):
                found[f"dvc.lock: {stage}: {out['path']}"] = json.dumps(out, sort_keys=True)
    return found


if __name__ == "__main__":
    main()
