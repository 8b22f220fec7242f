"""A run as a whole, over the real graph with toy stages, through Prefect's test server."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from rich.console import Console

import pipelines.run
from tests.pipelines.conftest import ran

pytestmark = pytest.mark.usefixtures("prefect")


@pytest.fixture(autouse=True)
def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.run, "_registered", lambda models, reconcile: dict.fromkeys(models, "1 champion"))


def go(*arguments: object, **options: object) -> tuple[int, str]:
    """Exit status and everything printed."""
    console = Console(record=True, width=200, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    status = pipelines.run.run(*arguments, console=console, **options)  # type: ignore[arg-type]
    return status, console.export_text()


def test_whole_collection_then_nothing_then_one_model(toy: Path) -> None:
    status, said = go("smoke")
    print(said)
    assert status == 0
    order = ran(toy)
    assert sorted(order) == sorted(
        ["ingest@digits", "validate@digits", "judge@digits", "train@digits-glow", "train@digits-vae"]
        + ["evaluate@digits-glow", "evaluate@digits-vae", "scorecard@smoke", "register@smoke"]
    )
    assert order[:2] == ["ingest@digits", "validate@digits"] and order[-2:] == ["scorecard@smoke", "register@smoke"]
    assert "3.142 dequantised" in said and "52.4, share 0.12, floor 0.5, n 10,000" in said and "1 champion" in said
    assert "nothing to compare with" in said and "orchestration:" in said
    # DVC alone agrees that everything is done: the flow leaves what `dvc repro` leaves.
    alone = subprocess.run(["dvc", "repro", "register@smoke"], cwd=toy, capture_output=True, text=True, check=True)
    assert "up to date" in alone.stdout and ran(toy) == order

    status, said = go("smoke")
    assert status == 0 and "nothing has changed: 9 stages" in said and ran(toy) == order

    params = toy / "params.yaml"
    params.write_text(params.read_text().replace("steps: 7", "steps: 8"))
    status, said = go("smoke")
    assert status == 0
    assert ran(toy)[len(order) :] == ["train@digits-vae", "evaluate@digits-vae", "scorecard@smoke", "register@smoke"]
