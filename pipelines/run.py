"""One run, from names to the final table. Knows no Prefect: that is imported only when something has to be done."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from genus import config, forkserver, notify
from genus.errors import TransientError, UserError
from genus.files import write_text
from genus.quiet import quieten
from pipelines import mend, outcome, plan, server
from pipelines.children import FORKS, StageFailed
from pipelines.lock import Busy, IfBusy, one_run_at_a_time


@dataclass(frozen=True)
class Result:
    """What came of a run: all is well where neither a stage failed nor the run was skipped."""

    failed: tuple[StageFailed, ...] = ()
    skipped: str = ""  # for which other run
    registry: UserError | None = None  # why it does not say what the files say, beside what failed

    @property
    def status(self) -> int:
        """The exit status: 75 where all that failed may be well in a while, 2 where the user can mend it."""
        if not self.failed:
            return 0
        if all(failure.transient for failure in self.failed) and not _lasting(self.registry):
            return TransientError.STATUS
        return 2 if all(failure.user for failure in self.failed) else 1

    def __str__(self) -> str:
        if self.failed:
            silent = f"; {self.registry}" if self.registry else ""
            return f"{len(self.failed)} failed: {'; '.join(map(str, self.failed))}{silent}"
        return f"skipped: {self.skipped}" if self.skipped else "all is up to date"


def _lasting(trouble: UserError | None) -> bool:
    return trouble is not None and not isinstance(trouble, TransientError)


def run(collection: str = "tour", models: Collection[str] = (), datasets: Collection[str] = (), **options: Any) -> int:
    """``genus run``: ``carry_out`` with its notification; returns the exit status."""
    result = carry_out(collection, models, datasets, **options)
    if result.failed:
        notify.send("failure", str(result), run="genus run")
    return result.status


def carry_out(
    collection: str = "tour",
    models: Collection[str] = (),
    datasets: Collection[str] = (),
    *,
    jobs: int | None = None,
    force: bool = False,
    refresh: Collection[str] = (),
    budget: float | None = None,
    if_busy: IfBusy = "fail",
    console: Console | None = None,
) -> Result:
    """Brings a collection, or the models and data sets named, up to date.

    ``jobs``: stages side by side, default the cores divided by the threads a stage uses. ``force`` reruns every
    selected stage, ``refresh`` the stages it names. ``budget`` is written into params.yaml first, and stays there:
    files made with one budget beside a params.yaml that says another would be a lie. ``if_busy``: what to do where
    another run is going on in this folder. Raises UserError for what the user can mend.

    Where DVC says that nothing has changed, Prefect is not even imported: its server would cost more than the rest.
    """
    quieten()
    # A file or a pipe has no width of its own: 150 columns hold the table.
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 150)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    config.load()  # what is wrong in it is said before the wait for another run
    if budget is not None and not 0 < budget < float("inf"):
        raise UserError(f"budget: {budget:g}: it multiplies every model's steps, so it must be above 0")
    try:
        with one_run_at_a_time(if_busy=if_busy, say=say):
            if budget is not None:
                _set_budget(budget, say)
            return _bring_up_to_date(collection, models, datasets, jobs, force, refresh, console)
    except Busy as busy:
        if if_busy != "skip":
            raise
        say(f"skipped: {busy}")
        return Result(skipped=str(busy))


def _set_budget(budget: float, say: Callable[[str], None]) -> None:
    """Writes the budget into params.yaml, says so, and leaves every other line as it is."""
    before = config.load().budget
    if budget == before:
        return
    path = Path("params.yaml")
    text, line = path.read_text(encoding="utf-8"), f"budget: {budget:.15g}"
    changed, found = re.subn(r"^budget:[^#\n]*?(?=[ \t]*(#|$))", line, text, count=1, flags=re.MULTILINE)
    write_text(path, changed if found else f"{line}\n{text}")
    say(f"params.yaml: budget {before:g} is now {budget:g}, and stays so: DVC keeps the results of both")


def _bring_up_to_date(
    collection: str,
    models: Collection[str],
    datasets: Collection[str],
    jobs: int | None,
    force: bool,
    refresh: Collection[str],
    console: Console,
) -> Result:
    started = time.monotonic()
    params = config.load()
    for line in mend.records():
        console.print(line, markup=False, soft_wrap=True)
    todo = plan.make(params, collection=collection, models=models, datasets=datasets)
    damaged = mend.outputs(todo.stages, todo.changed)
    if damaged:
        for path in damaged:
            console.print(f"{path}: not what dvc.lock says: restored or made again", markup=False, soft_wrap=True)
        todo = plan.make(params, collection=collection, models=models, datasets=datasets)
    forced = set(todo.stages) if force else set(refresh)
    waiting = todo.waiting(forced)
    walked = None
    if waiting:
        ready = server.start()
        with _forkserver(params, waiting) as end_forkserver:
            _check_models(params, waiting)  # imports torch, and the next line Prefect, while the servers start
            from pipelines.train import walk

            ready()
            walked = walk(todo, waiting, forced, params, jobs, console)
            walked.imports = end_forkserver()
        for failure in walked.failed:
            console.print(f"failed   {failure}", style="red", markup=False, soft_wrap=True)
    else:
        console.print(f"nothing has changed: {len(todo.stages)} stages are up to date")
    ran = [done.stage for done in walked.ran] if walked else []
    current = [stage for stage in todo.stages if stage in ran or stage not in waiting]
    trouble = _finish(params, todo, current, ran, console)
    elapsed = time.monotonic() - started
    if walked and walked.ran:
        console.print(f"seconds  {outcome.seconds_by_stage(walked.ran)}", markup=False, soft_wrap=True)
        cost = outcome.Cost.of(walked.ran, elapsed - walked.busy, walked.imports)
        console.print(str(cost), markup=False, soft_wrap=True)
    result = Result(tuple(walked.failed) if walked else (), registry=trouble)
    if result.failed and trouble:
        console.print(f"failed   {trouble}", style="red", markup=False, soft_wrap=True)
    console.print(f"{'failed' if result.failed or trouble else 'done'} in {elapsed:.1f} s")
    if trouble and not result.failed:
        raise trouble
    return result


def _forkserver(params: config.Params, waiting: Collection[str]) -> AbstractContextManager[Callable[[], float]]:
    """The server that the stages are forked from, where there are enough of them to be worth its start.

    GENUS_FORKSERVER=none says that there is to be none: each stage does its own imports.
    """
    several = sum(plan.kind(stage) in plan.TRAINS_OR_SAMPLES for stage in waiting) > 1
    if several and forkserver.AVAILABLE and os.environ.get(forkserver.VARIABLE) != config.NONE:
        return forkserver.running(FORKS, config.fixed_threads(params.threads))
    return nullcontext(lambda: 0.0)


def _check_models(params: config.Params, stages: Collection[str]) -> None:
    """Finds a misspelt family or parameter of the models to be trained before anything is started."""
    names = [stage.partition("@")[2] for stage in stages if plan.kind(stage) == "train"]
    if names:
        from genus.contract import check_params

        for name in names:
            try:
                model = params.models[name]
                check_params(model.family, model.params, model.parent != config.NONE)
            except UserError as error:
                raise UserError(f"params.yaml: models.{name}: {error}") from error


def _finish(
    params: config.Params, todo: plan.Plan, current: Collection[str], ran: Collection[str], console: Console
) -> UserError | None:
    """Makes the registry say what the files say, then prints the table, the comparison and where to look next.

    Only of the stages that are ``current``: a new model beside the figures of the old one would be a lie. Returns what
    kept the registry from it: the rest is to be seen all the same.
    """
    models = [model for model in todo.models if f"evaluate@{model}" in current]
    trouble, versions = None, {}
    if models:
        try:
            # A lost or new tracking store is filled again even when every stage is cached.
            done = all(f"register@{name}" in ran for name in todo.collections) and todo.collections
            versions = _registered(models, None if done else todo.collections)
        except UserError as error:
            trouble = error
        console.print(outcome.results(models, versions))
    console.print(str(outcome.reproduced(set(todo.stages).intersection(current))), markup=False, soft_wrap=True)
    for name in todo.collections:
        for line in outcome.advice(params.collections[name].report):
            console.print(line, markup=False, soft_wrap=True)
    reports = [f"reports/{params.collections[name].report}.html" for name in todo.collections]
    outcome.where_to_look(console, models, [report for report in reports if Path(report).exists()])
    return trouble


def _registered(models: list[str], collections: list[str] | None) -> dict[str, str]:
    """``3 champion`` for each model that the registry has, after it was made to say what the files say.

    ``collections`` are those whose scorecards answer needs; None where the registry says all that already.
    """
    from genus import registry
    from genus.stages import register

    if collections is not None:
        register.reconcile(models, collections)
    known = registry.status(models)
    return {model: " ".join([known[model]["version"], *known[model]["aliases"]]) for model in known}
