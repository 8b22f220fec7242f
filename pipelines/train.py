"""The flow: DVC says what depends on what and what has changed, Prefect runs one task a stage, side by side."""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.logging.configuration import setup_logging
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.tasks import exponential_backoff
from rich.console import Console

from genus.config import Params, fixed_threads
from genus.errors import UserError
from genus.files import read_json, write_json
from pipelines import mend, outcome, runner, server
from pipelines.children import GROUPS, LOGS, STATE, Children, Ran, StageFailed, retry_path
from pipelines.plan import TRAINS_OR_SAMPLES, Plan, kind
from pipelines.progress import Progress
from pipelines.reaper import lasting
from pipelines.screen import Screen

PREFECT_LOG = LOGS / "prefect.log"
SECONDS = STATE / "seconds.json"  # what each stage took when it last ran here
RETRIES = int(os.environ.get("GENUS_RETRIES", "2"))  # of a stage that failed for what may pass
RETRY_SECONDS = float(os.environ.get("GENUS_RETRY_SECONDS", "10"))  # before the first, twice as many before the next

_bodies: dict[str, Callable[[], None]] = {}  # what the flows of the runs in this process do
_children: dict[str, Children] = {}  # the processes of the runs that go on in this very process


@dataclass
class Walked:
    """What came of the stages of a run."""

    ran: list[Ran] = field(default_factory=list)
    failed: list[StageFailed] = field(default_factory=list)
    busy: float = 0.0  # seconds in which at least one stage was running
    imports: float = 0.0  # CPU seconds of the server that stages are forked from


class RunFailed(Exception):
    """At least one stage failed; so Prefect, too, shows the flow run as failed."""


def _stages(run: str, waiting: list[str], forced: list[str]) -> None:
    """The flow of a run. Its tasks take it along to their workers, which its body, full of locks, could not follow."""
    _bodies[run]()


def run_stage(stage: str, environment: dict[str, str], force: bool, run: str) -> Ran:
    """Brings one stage up to date: in a thread of the flow, or on a worker of a cluster.

    ``run``: the absolute path of the file that the flow keeps locked while it lasts (``lasting``). Raises StageFailed.
    """
    children = _children.get(run)
    if children is None:  # on a worker
        os.chdir(Path(run).parents[2])
        children = Children(Path(run))
    done = children.run(stage, environment=environment, force=force)
    if not done.ran and mend.outputs([stage]):  # the cache it was taken from is damaged
        done = children.run(stage, environment=environment)
    return done


def _transient(task: Any, task_run: Any, state: Any) -> bool:
    """Whether a stage is to be tried again; leaves the reason for the flow to show."""
    failure = state.result(raise_on_failure=False)
    if not isinstance(failure, StageFailed) or not failure.transient:
        return False
    if task_run.run_count <= RETRIES:
        write_json(retry_path(failure.stage), {"line": failure.line, "attempt": task_run.run_count + 1})
    return True


one_stage = task(
    name="stage",
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(backoff_factor=RETRY_SECONDS),
    retry_condition_fn=_transient,
)(run_stage)


def walk(
    plan: Plan, waiting: Collection[str], forced: Collection[str], params: Params, jobs: int | None, console: Console
) -> Walked:
    """Runs the waiting stages, each as soon as what it needs is done and a place is free, longest way first.

    A stage that fails leaves out what stands downstream of it; the others go on, for their results are no worse, and
    so does the scorecard, where a failed model has its place. GENUS_RUNNER says where they run (pipelines/runner.py);
    raises UserError where that cannot be had.
    """
    walked, children, screen = Walked(), Children(), Screen(plan.stages, console)
    where = runner.wanted()
    slots = Slots(params.threads, params.device, jobs)
    runs, capacity = runner.make(where, len(waiting) if where == "thread" else slots.places)
    if where not in ("thread", "dask"):  # a worker has its own GPU, or none: CUDA_VISIBLE_DEVICES of its environment
        slots = Slots(params.threads, "cpu", min(capacity or 1, jobs or capacity or 1))
    # One name a run: what is left of an earlier one must not take this for its own.
    run = (STATE / "flows" / f"{os.getpid()}-{time.time_ns()}").absolute()
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    seconds = _read_seconds()
    urgency = plan.urgency(seconds)

    def body() -> None:
        with _ending(children):  # inside the flow, for Prefect sets a handler of its own when a flow begins
            in_order()
            _show_scorecards(params, walked)
        if walked.failed:
            raise RunFailed(", ".join(failure.stage for failure in walked.failed))

    def in_order() -> None:
        futures: dict[str, PrefectFuture[Any]] = {}
        running: dict[str, Slot] = {}
        left = list(waiting)
        finished = {stage for stage in plan.stages if stage not in left}
        gone: set[str] = set()  # failed, or left out for that
        progress = Progress()
        while left or running:
            for stage in sorted(left, key=lambda stage: -urgency[stage]):
                slot = slots.take(stage) if (finished | gone).issuperset(plan.upstream[stage]) else None
                if slot:
                    left.remove(stage)
                    running[stage] = slot
                    screen.set(stage, "running")
                    before = [futures[need] for need in plan.upstream[stage] if need in futures and need in finished]
                    future: PrefectFuture[Ran] = one_stage.submit(  # type: ignore[call-overload]
                        stage, slot.environment, stage in forced, str(run), wait_for=before
                    )
                    future.add_done_callback(partial(lambda stage, _: ended.put(stage), stage))
                    futures[stage] = future
            begun = time.monotonic()
            stage = next_ended(running, progress)
            walked.busy += time.monotonic() - begun
            slots.free(running.pop(stage))
            done = _outcome(stage, futures[stage])
            if isinstance(done, StageFailed):
                walked.failed.append(done)
                screen.set(stage, "failed", note=done.line)
                gone.add(stage)
                for lost in plan.lost(gone):
                    gone.add(lost)
                    left.remove(lost)
                    screen.set(lost, "left out", note=f"{stage} failed")
            else:
                walked.ran.append(done)
                screen.set(stage, "done" if done.ran else "cached", seconds=done.seconds)
                finished.add(stage)

    def next_ended(running: Collection[str], progress: Progress) -> str:
        """Waits for the next stage to end; shows meanwhile how far the others are."""
        while True:
            try:
                return ended.get(timeout=0.5)
            except queue.Empty:
                progress.show(running)
                for stage in running:
                    _show_retry(screen, stage)

    for stage in plan.stages:
        if stage not in waiting:
            screen.set(stage, "cached")
    _bodies[str(run)] = body
    if where == "thread":
        _children[str(run)] = children
    with screen, _prefect_into_log(), lasting(run, GROUPS):
        try:
            flow(name="stages", task_runner=runs, persist_result=False)(_stages)(
                str(run), list(waiting), sorted(forced)
            )
        except RunFailed:
            pass  # its stages are in ``walked``
        except httpx.HTTPError as error:
            raise UserError(
                f"Prefect's server no longer answers ({error}); run again to go on: {PREFECT_LOG}"
            ) from error
        finally:
            _bodies.pop(str(run))
            _children.pop(str(run), None)
    write_json(SECONDS, seconds | {done.stage: done.seconds for done in walked.ran if done.ran})
    return walked


def _outcome(stage: str, future: PrefectFuture[Ran]) -> Ran | StageFailed:
    """What came of a stage's task that has ended."""
    future.wait()
    state = future.state
    found = state.result(raise_on_failure=False) if state.is_final() else None
    if isinstance(found, Ran | StageFailed):
        return found
    return StageFailed(stage, "Prefect could not run it", PREFECT_LOG, user=False)


def _show_retry(screen: Screen, stage: str) -> None:
    """Says once why a stage waits to be tried again, and when it no longer does."""
    waits, shown = retry_path(stage).exists(), screen.lines[stage].state == "retrying"
    if waits and not shown:
        retry = read_json(retry_path(stage))
        screen.set(stage, "retrying", note=f"{retry['line']} (attempt {retry['attempt']} of {RETRIES + 1} follows)")
    elif shown and not waits:
        screen.set(stage, "running")


def _show_scorecards(params: Params, walked: Walked) -> None:
    """The scorecards that this run has made, as artifacts of the flow run on Prefect's pages."""
    for done in walked.ran:
        if kind(done.stage) == "scorecard":
            report = params.collections[done.stage.partition("@")[2]].report
            create_markdown_artifact(outcome.markdown(report), key=report, description=f"reports/{report}.html")
            page = Path(f"reports/{report}.html").absolute().as_uri()
            create_link_artifact(page, link_text=f"reports/{report}.html", key=f"{report}-page")


@dataclass(frozen=True)
class Slot:
    """A place to run one stage: some cores, or a GPU."""

    gpu: str | None
    environment: dict[str, str]


class Slots:
    """What can run side by side: cores // threads stages on the CPU, one stage a GPU that trains or samples."""

    def __init__(self, threads: int, device: str, jobs: int | None = None):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        fixed = fixed_threads(threads)
        self._cpu = [Slot(None, fixed)] * (jobs or max(1, cores // threads))
        gpus = [] if device == "cpu" else _gpus()[:jobs]
        self._gpu = [Slot(gpu, fixed | {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus]
        self._has_gpu = bool(gpus)
        self.places = len(self._cpu) + len(self._gpu)

    def take(self, stage: str) -> Slot | None:
        """A place for the stage; None where none is free now."""
        free = self._gpu if self._has_gpu and kind(stage) in TRAINS_OR_SAMPLES else self._cpu
        return free.pop() if free else None

    def free(self, slot: Slot) -> None:
        (self._cpu if slot.gpu is None else self._gpu).append(slot)


def _gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them. Asks the driver: importing torch takes 3 s."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return [str(index) for index, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


@contextmanager
def _ending(children: Children) -> Iterator[None]:
    """Whatever ends the block, a signal or an error, no process of a stage outlives it by more than 5 s.

    Prefect's own handler leaves the children running and waits for a server that may have had the same Ctrl-C, so for
    the time of the block ours takes its place.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        children.stop()
        timer = threading.Timer(1.0, _leave, [128 + number])  # Prefect may wait much longer before it lets go
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        children.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(status: int) -> None:
    server.kill()
    os._exit(status)


@contextmanager
def _prefect_into_log() -> Iterator[None]:
    """Prefect's own lines go to logs/prefect.log for the time of the block: the terminal belongs to the stages."""
    setup_logging()  # now, so that the flow does not put its own handlers back
    LOGS.mkdir(exist_ok=True)
    handler = logging.FileHandler(PREFECT_LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    changed: list[tuple[logging.Logger, list[logging.Handler]]] = []
    names = [name for name in logging.root.manager.loggerDict if name.startswith("prefect")]
    for logger in (logging.root, *(logging.getLogger(name) for name in names)):
        spoken = [old for old in logger.handlers if isinstance(old, PrefectConsoleHandler)]
        if spoken:
            changed.append((logger, logger.handlers))
            logger.handlers = [handler, *(old for old in logger.handlers if old not in spoken)]
    try:
        yield
    finally:
        for logger, handlers in changed:
            logger.handlers = handlers
        handler.close()


def _read_seconds() -> dict[str, float]:
    try:
        return json.loads(SECONDS.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
