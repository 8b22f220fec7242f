"""``genus schedule``: the flows as deployments, every night, when the raw data has changed, and by hand.

Schedules need a server that goes on while nothing runs: the one PREFECT_API_URL names, else one is started here.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any
from zoneinfo import ZoneInfo

import httpx
from prefect import serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments import run_deployment
from prefect.exceptions import PrefectException
from prefect.schedules import Cron, Schedule

from genus import config
from genus.errors import UserError
from pipelines import flows, server, watch

ONE = ConcurrencyLimitConfig(limit=1)
ONE_OR_NONE = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)


def deployments(cron: Schedule, collection: str) -> list[Any]:  # RunnerDeployment, or so Prefect says, a coroutine
    """Nightly, manual, data-changed: none of them runs twice at a time, and the lock keeps them apart."""
    what = {"collection": collection}
    return [
        flows.train.to_deployment("nightly", schedule=cron, parameters=what, concurrency_limit=ONE, paused=False),
        flows.train.to_deployment("manual", parameters=what, concurrency_limit=ONE),
        flows.watch_data.to_deployment("data-changed", concurrency_limit=ONE_OR_NONE),
    ]


def parse(cron: str, timezone: str) -> Schedule:
    """Raises UserError for what is no cron line or no time zone."""
    try:
        ZoneInfo(timezone)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"--timezone: {timezone!r} is no time zone; one is Europe/Zurich") from error
    try:
        return Cron(cron, timezone=timezone)
    except ValueError as error:
        raise UserError(f"--cron: {cron!r} is not minute, hour, day, month, weekday; '0 3 * * *' is at 3:00") from error


def run(cron: str, poll: float, collection: str, timezone: str, port: int) -> None:
    """Serves the deployments until Ctrl-C. Raises UserError for what the user can mend."""
    schedule = parse(cron, timezone)
    config.load().collection(collection)
    if not server.named() and _taken(port):
        raise UserError(f"port {port} is taken, perhaps by the schedule of another folder: give another by --port")
    server.start(port=port, services=True)()
    with _watching(poll):
        serve(*deployments(schedule, collection))


@contextlib.contextmanager
def _watching(poll: float) -> Iterator[None]:
    """Looks at the raw data every ``poll`` seconds; only where it has changed a run of ``data-changed`` is started."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(poll):
            try:
                if watch.changed(config.load()):
                    run_deployment("watch-data/data-changed", timeout=0)
            except (UserError, OSError, RuntimeError, PrefectException, httpx.HTTPError) as error:
                # params.yaml is just being edited, a file was moved, the server does not answer: looked at again.
                print(f"genus: warning: raw data: {' '.join(str(error).split())}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
