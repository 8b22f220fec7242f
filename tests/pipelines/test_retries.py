"""What may pass is tried again, and nothing else is."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from genus.errors import TransientError, UserError
from genus.stages.register import _may_pass
from pipelines import train
from pipelines.children import Children, StageFailed
from pipelines.run import Result
from tests.pipelines.conftest import ran
from tests.pipelines.test_run import go


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    again = train.one_stage.with_options(retry_delay_seconds=[2.0, 2.0])
    monkeypatch.setattr(train, "one_stage", again)


def new_data_set(toy: Path) -> None:
    params = toy / "params.yaml"
    alone = "options: {}, validation: 0.1, max_broken: 0.01, checks: {}, judge: {steps: 5}}\nmodels:"
    params.write_text(params.read_text().replace("models:", f"  new: {{source: digits, {alone}", 1))


def test_what_may_pass_is_tried_twice_more_and_the_rest_once(
    toy: Path, monkeypatch: pytest.MonkeyPatch, prefect: None, quick: None
) -> None:
    new_data_set(toy)
    monkeypatch.setenv("TOY_PASSING", "ingest@new")
    monkeypatch.setenv("TOY_FAILS", "validate@new")
    status, said = go(datasets=["new"])
    assert ran(toy) == ["ingest@new"] * 3 + ["validate@new"] and status == 2
    assert "retrying  nobody answers yet (attempt 2 of 3 follows)" in said
    assert "retrying  nobody answers yet (attempt 3 of 3 follows)" in said
    assert "failed   validate@new: validate of new is broken on purpose" in said


def test_status_75_is_told_apart_and_travels_between_processes(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_PASSING", "ingest@digits")
    with pytest.raises(StageFailed) as caught:
        Children().run("ingest@digits")
    failure = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 (as Dask does)
    assert failure.transient and failure.user and failure.line == "nobody answers yet"
    assert str(failure) == "ingest@digits: nobody answers yet (log: logs/ingest@digits.log)"


@pytest.mark.parametrize(
    ("kinds", "registry", "status"),
    [
        ("", None, 0),
        ("passing passing", None, 75),
        ("passing mended", None, 2),
        ("passing broken", None, 1),
        ("passing", TransientError("nobody answers"), 75),
        ("passing", UserError("read-only"), 2),
    ],
)
def test_a_run_ends_with_75_where_all_that_failed_may_pass(kinds: str, registry: UserError | None, status: int) -> None:
    failed = [StageFailed(kind, "x", Path("log"), kind != "broken", kind == "passing") for kind in kinds.split()]
    result = Result(tuple(failed), registry=registry)
    assert result.status == status and all(str(part) in str(result) for part in (*failed, registry) if part)


def test_command_ends_with_75(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from genus import cli

    def fails(**_: object) -> None:
        raise TransientError("nobody answers")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 75 and capsys.readouterr().err == "genus: error: nobody answers\n"


def test_store_that_nobody_serves_may_pass_and_one_that_refuses_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(MlflowException) as caught:
        MlflowClient("http://127.0.0.1:9").search_experiments()
    assert _may_pass(caught.value)
    assert not _may_pass(MlflowException("no")) and not _may_pass(PermissionError("no"))
