"""Deployments: a cron schedule really makes runs, and changed raw data is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from genus import config
from tests.conftest import ROOT

# What `make schedule` does, up to the waiting for the time of the next run; prints the Scheduled runs.
SCHEDULE = """
import asyncio, json, time
from pipelines import schedule, server

server.start(services=True)()
from prefect.client.orchestration import get_client

nightly, manual, watch = schedule.deployments("*/5 * * * *", poll=600, collection="smoke")
ids = {one.name: one.apply() for one in (nightly, manual, watch)}

async def scheduled():
    async with get_client() as client:
        runs = await client.read_flow_runs(limit=100)
        return [run for run in runs if run.state and run.state.is_scheduled()]

deadline, runs = time.monotonic() + 60, []
while not any(run.deployment_id == ids["nightly"] for run in runs) and time.monotonic() < deadline:
    time.sleep(0.5)
    runs = asyncio.run(scheduled())
mine = [run for run in runs if run.deployment_id == ids["nightly"]]
print(json.dumps({
    "when": [run.expected_start_time.isoformat() for run in mine],
    "parameters": [run.parameters for run in mine],
    "manual": sum(run.deployment_id == ids["manual"] for run in runs),
}))
"""


def test_cron_deployment_creates_scheduled_runs(toy: Path) -> None:
    # With SQLAlchemy 2.1 this is what silently does not happen; Prefect's test server has no scheduler to show it.
    environment = os.environ | {"PREFECT_HOME": str(toy / "prefect"), "PYTHONPATH": str(ROOT)}
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run([sys.executable, "-c", SCHEDULE], cwd=toy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["when"], "no Scheduled run within 60 s"
    first = min(datetime.fromisoformat(when) for when in said["when"])
    now = datetime.now(UTC)
    assert now - timedelta(minutes=2) < first < now + timedelta(minutes=6) and first.minute % 5 == 0
    assert said["parameters"][0] == {"collection": "smoke"} and said["manual"] == 0


def test_changed_raw_data_is_seen_until_it_is_brought_in(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import schedule

    params = toy / "params.yaml"
    params.write_text(
        params.read_text().replace("source: digits, options: {}", "source: digits, options: {folder: raw}")
    )
    assert schedule.changed_data(config.load()) == {}  # nothing there yet
    (toy / "raw").mkdir()
    (toy / "raw/a.png").write_bytes(b"a")
    asked = []
    monkeypatch.setattr(schedule, "train", lambda **options: asked.append(options))
    assert schedule.watch_data.fn() == ["digits"]
    assert asked == [{"datasets": ["digits"], "refresh": ["ingest@digits"]}]
    assert schedule.watch_data.fn() == [] and len(asked) == 1
    (toy / "raw/a.png").write_bytes(b"b")

    def fails(**_: object) -> None:
        raise RuntimeError("the run failed")

    monkeypatch.setattr(schedule, "train", fails)
    with pytest.raises(RuntimeError):
        schedule.watch_data.fn()
    assert list(schedule.changed_data(config.load())) == ["digits"]  # tried again at the next look
