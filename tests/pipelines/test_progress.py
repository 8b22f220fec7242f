"""How far stages are, as Prefect's page of the run shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client

from pipelines import progress
from pipelines.children import progress_path


def says(stage: str, text: str) -> None:
    progress_path(stage).parent.mkdir(parents=True, exist_ok=True)
    progress_path(stage).write_text(text)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "EVERY", 0.0)


def shown(updates: progress.Progress, *stages: str) -> None:
    updates.show(stages)
    if updates._thread:
        updates._thread.join(60)


@pytest.mark.parametrize(
    ("text", "share"),
    [('{"step": 3, "total": 4}', 75.0), ('{"step": 5, "total": 4}', 100.0), ('{"step": 0, "total": 0}', 0.0)],
)
def test_share_of_a_stage(here: None, text: str, share: float) -> None:
    says("train@a", text)
    assert progress._share("train@a") == share


def test_what_says_nothing_or_is_just_being_written_has_no_share(here: None) -> None:
    assert progress._share("train@a") is None
    says("train@a", '{"step": 3, "to')
    assert progress._share("train@a") is None


def test_each_stage_is_one_artifact_that_grows(here: None, prefect: None) -> None:
    @flow(name="toy")
    def run() -> None:
        updates = progress.Progress()
        for step in (1, 3):
            says("train@digits-a", json.dumps({"step": step, "total": 4}))
            shown(updates, "train@digits-a", "evaluate@digits-b")  # the other says nothing

    run()
    with get_client(sync_client=True) as client:
        found = [artifact for artifact in client.read_artifacts() if str(artifact.key).startswith("progress-")]
    assert [(artifact.key, artifact.data, artifact.description) for artifact in found] == [
        ("progress-train-digits-a", 75.0, "train@digits-a")
    ]
    assert found[0].flow_run_id


def test_a_server_that_is_away_or_slow_disturbs_nobody(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def away(**options: Any) -> Any:
        asked.append(options)
        raise httpx.ConnectError("nobody answers")

    monkeypatch.setattr(progress, "get_client", away)
    says("train@a", '{"step": 1, "total": 4}')
    updates = progress.Progress()
    shown(updates, "train@a")
    shown(updates, "train@a")
    assert len(asked) == 2
    monkeypatch.setattr(progress, "EVERY", 60.0)
    shown(updates, "train@a")
    shown(updates, "train@a")  # within these
    assert len(asked) == 3
