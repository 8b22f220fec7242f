"""A clock that jumps: files from the future or from long ago are judged by their content, and speeds stay speeds."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from genus import progress
from genus.files import read_json
from pipelines import mend
from tests.pipelines.conftest import ran, toy  # noqa: F401 (a fixture)
from tests.survive.test_corruption import content, repro
from tests.test_training import fit


@pytest.mark.parametrize("year", [1970, 2090])
def test_nothing_is_rerun_for_the_time_of_a_file(toy: Path, year: int) -> None:  # noqa: F811
    repro("train@digits-vae")
    before, stages = content(), ran(toy)
    then = datetime(year, 1, 2, tzinfo=UTC).timestamp()
    for path in toy.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))
    assert "up to date" in repro("train@digits-vae")
    assert mend.outputs(["ingest@digits", "train@digits-vae"]) == []
    assert content() == before and ran(toy) == stages


def test_wall_clock_set_back_during_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, start = tmp_path / "progress.json", time.time()
    monkeypatch.setenv("GENUS_PROGRESS", str(target))
    calls = iter(range(1_000_000))
    monkeypatch.setattr(time, "time", lambda: start - 3600 * next(calls))  # an hour back each time it is asked
    speeds = []

    def on_log(row: dict[str, float], speed: dict[str, float]) -> None:
        speeds.append(speed)
        progress.report(int(row["step"]), 100, seconds_left=speed["seconds_left"])

    result = fit(on_log=on_log)
    assert speeds and all(speed["images_per_s"] > 0 and speed["seconds_left"] >= 0 for speed in speeds)
    assert result.timing["train_seconds"] > 0 and read_json(target)["step"] > 0
