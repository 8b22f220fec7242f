"""A run as a whole, over the real graph with toy stages, through Prefect's test server."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from rich.console import Console

import pipelines.run
from genus.config import load
from genus.errors import TransientError, UserError
from pipelines import outcome
from tests.pipelines.conftest import ran

pytestmark = pytest.mark.usefixtures("prefect")


@pytest.fixture(autouse=True)
def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.run, "_registered", lambda models, collections: dict.fromkeys(models, "1 champion"))


def go(*arguments: object, **options: object) -> tuple[int, str]:
    """Exit status and everything printed."""
    console = Console(record=True, width=200, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    status = pipelines.run.run(*arguments, console=console, **options)  # type: ignore[arg-type]
    return status, console.export_text()


def artifacts() -> list[Any]:
    """The newest of each key on Prefect's pages."""
    with get_client(sync_client=True) as client:
        return client.read_latest_artifacts()


def test_whole_collection_then_nothing_then_one_model(toy: Path) -> None:
    status, said = go("smoke")
    print(said)
    assert status == 0
    order = ran(toy)
    stages = [f"{kind}@digits" for kind in ("ingest", "validate", "judge", "controls")]
    stages += ["scorecard@smoke", "register@smoke"]
    assert sorted(order) == sorted(
        [*stages, *(f"{kind}@digits-{model}" for kind in ("train", "evaluate", "probe") for model in ("glow", "vae"))]
    )
    assert order[:2] == ["ingest@digits", "validate@digits"] and order[-2:] == ["scorecard@smoke", "register@smoke"]
    assert "3.142/dim dequantised" in said and "52.4  0.120   0.50  10,000" in said and "1 champion" in said
    assert "nothing to compare with" in said and "orchestration:" in said
    assert "best density: digits-vae, 3.1 bits/dim\n" in said
    shown = {artifact.key: str(artifact.data) for artifact in artifacts()}
    assert "| bits/dim  | 3.142 elbo |" in shown["scorecard-smoke"]
    assert r"| 7. a \| b | supported | c |" in shown["scorecard-smoke"]
    assert f"file://{toy}/reports/scorecard-smoke.html" in shown["scorecard-smoke-page"]
    # DVC alone agrees that everything is done: the flow leaves what `dvc repro` leaves.
    alone = subprocess.run(["dvc", "repro", "register@smoke"], cwd=toy, capture_output=True, text=True, check=True)
    assert "up to date" in alone.stdout and ran(toy) == order

    status, said = go("smoke")
    assert status == 0 and "nothing has changed: 12 stages" in said and ran(toy) == order

    params = toy / "params.yaml"
    params.write_text(params.read_text().replace("steps: 7", "steps: 8"))
    status, said = go("smoke")
    assert status == 0
    again = ran(toy)[len(order) :]
    assert sorted(again[:3]) == [f"{kind}@digits-vae" for kind in ("evaluate", "probe", "train")]
    assert again[3:] == ["scorecard@smoke", "register@smoke"]


def test_a_parents_change_trains_its_child_anew_and_nothing_else(toy: Path) -> None:
    params = toy / "params.yaml"
    child = params.read_text().replace("flows/glow", "score/distilled").replace("none", "digits-vae", 1)
    params.write_text(child)
    assert go("smoke")[0] == 0
    order = ran(toy)
    assert order.index("train@digits-vae") < order.index("train@digits-glow")
    params.write_text(child.replace("steps: 7", "steps: 8"))  # the parent's
    assert go("smoke")[0] == 0
    again = ran(toy)[len(order) :]
    kinds = ("evaluate", "probe", "train")
    assert sorted(again[:-2]) == sorted(f"{kind}@digits-{model}" for kind in kinds for model in ("glow", "vae"))
    order = ran(toy)
    params.write_text(params.read_text().replace("steps: 5, batch_size: 2", "steps: 6, batch_size: 2", 1))
    assert go("smoke")[0] == 0
    again = ran(toy)[len(order) :]
    assert sorted(again[:-2]) == [f"{kind}@digits-glow" for kind in kinds]


def test_failed_stage_leaves_out_its_descendants_only(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(models: Any, collections: Any) -> Any:
        raise TransientError("http://store: the registry does not answer")

    monkeypatch.setenv("TOY_FAILS", "train@digits-glow")
    with monkeypatch.context() as patch:
        patch.setattr(pipelines.run, "_registered", silent)
        status, said = go("smoke")
        # Both are said: what failed, and that the registry was silent about the rest.
        assert status == 2 and "failed   http://store: the registry does not answer\nfailed in " in said
        with pytest.raises(TransientError, match="does not answer"):  # where nothing else has failed
            go(models=["digits-vae"])
    assert "train@digits-glow: train of digits-glow is broken on purpose (log: logs/train@digits-glow.log)" in said
    assert "evaluate@digits-vae" in ran(toy) and "evaluate@digits-glow" not in ran(toy)
    assert ran(toy)[-2:] == ["scorecard@smoke", "register@smoke"]  # a failed model has its place there
    table = said[said.index("Fréchet") : said.index("seconds  ")]
    assert "digits-vae " in table and "digits-glow " not in table  # no old figures beside a failed model
    # The next run goes on where this one stopped.
    monkeypatch.setenv("TOY_FAILS", "")
    before = len(ran(toy))
    status, said = go(models=["glow", "vae"], datasets=["digits"])
    assert status == 0 and ran(toy)[before:] == ["train@digits-glow", "evaluate@digits-glow"]


def test_force_reruns_the_selected(toy: Path) -> None:
    params = toy / "params.yaml"
    alone = "options: {}, validation: 0.1, max_broken: 0.01, checks: {}, judge: {steps: 5}}\nmodels:"
    params.write_text(params.read_text().replace("models:", f"  new: {{source: digits, {alone}", 1))
    stages = ["ingest@new", "validate@new", "judge@new"]
    assert go(datasets=["new"])[0] == 0 and ran(toy) == stages
    assert go(datasets=["new"], force=True, jobs=1)[0] == 0 and ran(toy) == stages * 2


def test_budget_is_written_into_params_and_said(project: Path) -> None:
    params, said = Path("params.yaml"), list[str]()
    before = params.read_text().splitlines()
    pipelines.run._set_budget(2.5, said.append)
    changed = [(old, new) for old, new in zip(before, params.read_text().splitlines(), strict=True) if old != new]
    assert [new.partition(" #")[0].rstrip() for _, new in changed] == ["budget: 2.5"]
    assert changed[0][1].partition("#")[2] == changed[0][0].partition("#")[2] != ""  # its comment stays
    assert said == ["params.yaml: budget 1 is now 2.5, and stays so: DVC keeps the results of both"]
    pipelines.run._set_budget(2.5, said.append)
    assert len(said) == 1
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"budget: .*must be above 0"):
            pipelines.run.run("smoke", budget=wrong)
    assert load().budget == 2.5


def test_reproduced_compares_with_the_committed_lock(toy: Path) -> None:
    assert go(models=["digits-vae"])[0] == 0
    commit(toy, "dvc.lock")
    status, said = go(models=["digits-vae"])
    # data, origin, validation, judge, controls, four of the model, metrics, pictures; figures of time are no artifacts
    assert status == 0 and "reproduced 11 of 11 artifacts bit for bit" in said
    params = toy / "params.yaml"
    params.write_text(params.read_text().replace("steps: 7", "steps: 8"))
    subprocess.run(["dvc", "repro", "train@digits-vae"], cwd=toy, capture_output=True, check=True)
    compared = str(outcome.reproduced())
    assert compared.startswith("reproduced 8 of 11 artifacts bit for bit")
    assert "differs: models/digits-vae/weights.safetensors" in compared


def commit(folder: Path, *files: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "add", *files], cwd=folder, check=True)
    subprocess.run(["git", *who, "commit", "-qm", "lock"], cwd=folder, check=True)
