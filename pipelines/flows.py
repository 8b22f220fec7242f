"""What deployments run: ``train``, and ``watch_data`` where the raw data has changed. prefect.yaml names both."""

from __future__ import annotations

import io
import logging
from typing import Annotated, Any

from genus.quiet import quieten

quieten()  # before Prefect, which reads its settings when it is imported

from prefect import flow, get_run_logger  # noqa: E402
from prefect.client.schemas.objects import FlowRun, State  # noqa: E402
from prefect.flows import Flow  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402
from pydantic import Field  # noqa: E402
from rich.console import Console  # noqa: E402

from genus import config, notify  # noqa: E402
from pipelines import run, watch  # noqa: E402
from pipelines.lock import IfBusy  # noqa: E402


def tell(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """The hook of every flow run that ends badly, whatever ended it."""
    name = f"{flow.name}/{flow_run.name}"
    notify.send("failure", f"{name}: {state.message or state.name}", run=name)


@flow(name="train", on_failure=[tell], on_crashed=[tell])
def train(
    collection: str = "tour",
    models: list[str] | None = None,
    datasets: list[str] | None = None,
    budget: Annotated[float | None, Field(gt=0)] = None,
    jobs: Annotated[int | None, Field(ge=1)] = None,
    force: bool = False,
    if_busy: IfBusy = "wait",
) -> State[Any]:
    """Bring a collection up to date, as `genus run` does.

    Args:
        collection: The collection of params.yaml to build and register.
        models: Only these models.
        datasets: Only the models of these data sets.
        budget: Multiplies every model's steps. It is written into params.yaml and stays there.
        jobs: Stages side by side; none means as many as the cores allow.
        force: Rerun the selected stages even if nothing changed.
        if_busy: What to do while another run goes on in this folder.
    """  # Prefect's form shows these lines
    return _state(
        run.carry_out(
            collection,
            models or (),
            datasets or (),
            budget=budget,
            jobs=jobs,
            force=force,
            if_busy=if_busy,
            console=_console(),
        )
    )


@flow(name="watch-data", on_failure=[tell], on_crashed=[tell])
def watch_data(if_busy: IfBusy = "skip") -> State[Any]:
    """Where raw data differs from what was ingested, ingest it anew and bring its models up to date.

    Args:
        if_busy: What to do while another run goes on in this folder.
    """
    changed = watch.changed(config.load())
    if not changed:
        return Completed(message="the raw data is what was ingested")
    refresh = [f"ingest@{name}" for name in changed]
    result = run.carry_out(datasets=list(changed), refresh=refresh, if_busy=if_busy, console=_console())
    watch.give_up({name: changed[name] for name in changed if f"ingest@{name}" in {f.stage for f in result.failed}})
    return _state(result)


def _state(result: run.Result) -> State[Any]:
    """What Prefect's pages show: which stages failed and why, or for which other run this one was skipped."""
    if result.failed:
        return Failed(message=str(result))
    return Completed(name="Skipped" if result.skipped else None, message=str(result))


def _console() -> Console:
    """What `genus run` prints, as the log of the flow run."""
    return Console(file=_Log(get_run_logger()), width=150, highlight=False)


class _Log(io.StringIO):
    """A text file whose lines are a logger's."""

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[logging.Logger]):
        super().__init__()
        self._logger, self._rest = logger, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self._logger.info("%s", line)
        return len(text)
