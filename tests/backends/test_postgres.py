"""Prefect's runs on PostgreSQL, and what must not be seen of its address."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from genus.files import read_yaml
from tests.backends.conftest import call
from tests.pipelines.conftest import ran, toy  # noqa: F401 (a fixture)
from tests.servers import prefect_server


@pytest.mark.slow
@pytest.mark.timeout(900)  # a quarter of a minute on two idle cores
def test_a_run_and_its_tasks_are_kept_on_postgresql(postgres: Callable[[str], str], toy: Path):  # noqa: F811
    params = read_yaml("params.yaml", "")
    del params["models"]["digits-glow"]  # one model's stages will do
    Path("params.yaml").write_text(json.dumps(params))
    with prefect_server(postgres("prefect").replace("postgresql://", "postgresql+asyncpg://")) as address:
        call(toy, "genus", "run", "--collection", "smoke", PREFECT_API_URL=address)
        stages = ran(toy)
        (flow,) = _ask(address, "flow_runs")
        tasks = _ask(address, "task_runs")
        deadline = time.monotonic() + 60
        while sum(task["state_type"] == "COMPLETED" for task in tasks) < len(stages) and time.monotonic() < deadline:
            time.sleep(0.5)  # the server writes them down a little after they have ended
            tasks = _ask(address, "task_runs")
    assert flow["state_type"] == "COMPLETED", flow["state"]
    assert "register@smoke" in stages
    assert [task["state_type"] for task in tasks] == ["COMPLETED"] * len(stages)


def _ask(address: str, what: str) -> list[dict]:
    request = urllib.request.Request(f"{address}/{what}/filter", b"{}", {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_no_line_shows_the_password_of_an_address(genus: Callable[..., subprocess.CompletedProcess[str]], monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://genus:secret@127.0.0.1:1/mlflow")
    done = genus("ui")
    assert done.returncode == 2
    assert "postgresql://genus:…@127.0.0.1:1/mlflow" in done.stderr
    assert "secret" not in done.stdout + done.stderr
