"""Deployments of the flow: every night, when the raw data has changed, and by hand. ``make schedule``.

    python -m pipelines.schedule --cron "0 3 * * *" --poll 600 --collection tour

Schedules need a server that goes on while nothing runs: the one PREFECT_API_URL names, else one is started here and
its pages are on http://127.0.0.1:4200. ``prefect deployment run 'train/manual'`` starts a run by hand, with the
parameters of pipelines.train.train.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from genus import config
from genus.errors import UserError
from genus.files import write_json
from genus.quiet import quieten

quieten()

from prefect import flow  # noqa: E402 (its settings are read when it is imported)

from pipelines import server  # noqa: E402
from pipelines.children import STATE  # noqa: E402
from pipelines.train import train  # noqa: E402

SEEN = STATE / "sources.json"  # content of each data set's raw files when it was last brought in


def content(dataset: config.Dataset) -> str:
    """SHA-256 over names and bytes of the local files that a data set's options name; empty where there are none."""
    digest, found = hashlib.sha256(), False
    for value in dataset.options.values():
        root = Path(value) if isinstance(value, str) else Path()
        if root == Path() or not root.exists():
            continue
        for path in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
            digest.update(str(path.relative_to(root)).encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            found = True
    return digest.hexdigest() if found else ""


def changed_data(params: config.Params) -> dict[str, str]:
    """Data sets whose raw files differ from what was last brought in, with their content now."""
    seen = json.loads(SEEN.read_text(encoding="utf-8")) if SEEN.exists() else {}
    now = {name: content(dataset) for name, dataset in params.datasets.items()}
    return {name: value for name, value in now.items() if value and value != seen.get(name)}


@flow(name="watch-data")
def watch_data() -> list[str]:
    """Looks at the raw data; where it has changed, ingests it anew and brings its models up to date."""
    changed = changed_data(config.load())
    if changed:
        train(datasets=list(changed), refresh=[f"ingest@{name}" for name in changed])
        # Only now: a run that failed is tried again at the next look.
        seen = json.loads(SEEN.read_text(encoding="utf-8")) if SEEN.exists() else {}
        write_json(SEEN, seen | changed)
    return list(changed)


def deployments(
    cron: str, poll: float, collection: str
) -> list[Any]:  # RunnerDeployment, or so Prefect says, a coroutine
    """The three deployments; none of them runs twice at a time."""
    return [
        train.to_deployment("nightly", cron=cron, parameters={"collection": collection}, concurrency_limit=1),
        train.to_deployment("manual", parameters={"collection": collection}, concurrency_limit=1),
        watch_data.to_deployment("data-changed", interval=timedelta(seconds=poll), concurrency_limit=1),
    ]


def main() -> None:
    """Serves the deployments until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.schedule", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cron", default="0 3 * * *", help="when the nightly run starts (default: %(default)s)")
    parser.add_argument("--poll", type=float, default=600, help="seconds between looks at raw data (%(default)s)")
    parser.add_argument("--collection", default="tour", help="what the nightly run builds (%(default)s)")
    asked = parser.parse_args()
    from prefect import serve

    try:
        config.load().collection(asked.collection)
        server.start(port=4200, services=True)()
        serve(*deployments(asked.cron, asked.poll, asked.collection), limit=1)
    except UserError as error:
        print(f"genus: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
