"""Where stages run: in this process's threads, or on the workers of a Dask cluster with the same folder."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from genus.errors import UserError

VARIABLE = "GENUS_RUNNER"
WAITS = 10  # seconds for a scheduler to answer
# A worker's own lines of Prefect would come between those of the stages; its pages have them.
QUIET = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}


def wanted(text: str | None = None) -> str:
    """``text``, else GENUS_RUNNER, else ``thread``. Raises UserError where it is not one that can be had here."""
    name = text or os.environ.get(VARIABLE) or "thread"
    kind, _, address = name.partition(":")
    if kind not in ("thread", "dask") or (":" in name and (kind == "thread" or "://" not in address)):
        raise UserError(f"runner {name}: write thread, dask, or dask:tcp://HOST:PORT for a cluster that is there")
    if kind == "dask" and not importlib.util.find_spec("prefect_dask"):
        raise UserError(f"runner {name}: needs Prefect's integration of Dask: pip install 'genus[dask]'")
    return name


def make(name: str, jobs: int) -> tuple[Any, int | None]:
    """Prefect's task runner, and how many stages a cluster that is there takes at once (None: it is ours to say).

    Raises UserError where no cluster answers.
    """
    kind, _, address = name.partition(":")
    if kind == "thread":
        from prefect.task_runners import ThreadPoolTaskRunner

        return ThreadPoolTaskRunner(max_workers=jobs), None
    import distributed
    from prefect_dask import DaskTaskRunner

    if not address:
        local = {"n_workers": jobs, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
        return DaskTaskRunner(
            cluster_kwargs=local | {"memory_limit": 0, "env": QUIET, "silence_logs": "CRITICAL"}
        ), jobs
    try:
        with distributed.Client(address, timeout=WAITS) as client:
            threads = sum(client.nthreads().values())
    except (OSError, ValueError) as error:  # a time-out is an OSError
        raise UserError(f"runner {name}: no Dask scheduler answers there") from error
    if not threads:
        raise UserError(f"runner {name}: the cluster has no workers")
    return DaskTaskRunner(address=address), threads
