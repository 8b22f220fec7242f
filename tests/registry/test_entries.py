"""What the registry holds, read from its tables and asked of MLflow's client."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from genus import registry, tracking
from genus.errors import UserError
from genus.registry import entries
from tests.registry.workspace import MODEL, publish, workspace

__all__ = ["workspace"]  # a fixture: pytest finds it by its name


def test_the_tables_say_what_the_client_says(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish()
    publish(seed=1, alias="challenger")
    publish("digits-other", alias="other")
    client = tracking.client()
    client.create_registered_model("digits-empty")
    client.delete_model_version(MODEL, publish(seed=2, alias="gone"))
    names = [MODEL, "digits-other", "digits-empty", "digits-unknown"]
    asked = {name: entry for name in names if (entry := entries.ask(client, name))}
    monkeypatch.setattr(entries, "ask", lambda *_: pytest.fail("the tables are not as this MLflow has them"))
    read = entries.look(names)
    assert list(read) == list(asked) == names[:3]
    for name, entry in read.items():
        assert entry.aliases == asked[name].aliases
        assert {n: v.tags for n, v in entry.versions.items()} == {n: v.tags for n, v in asked[name].versions.items()}
    assert read[MODEL].aliases["champion"] == "1" and set(read[MODEL].versions) == {"1", "2"}
    assert all(version.location and version.lasting for version in read[MODEL].versions.values())


def test_versions_whose_run_is_gone_can_be_pulled_but_are_not_taken_for_registered(workspace: Path) -> None:
    publish()
    (run,) = tracking.client().search_runs([tracking.client().get_experiment_by_name("digits").experiment_id])
    assert registry.status([MODEL]) == {MODEL: {"version": "1", "aliases": ["challenger", "champion"]}}
    tracking.client().delete_run(run.info.run_id)
    assert not entries.look([MODEL])[MODEL].versions["1"].lasting
    assert registry.status([MODEL]) == {}


def test_tables_of_another_mlflow_are_left_to_its_client(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish()
    there = entries.look([MODEL])[MODEL]
    with contextlib.closing(sqlite3.connect("mlflow/mlflow.db")) as store, store:
        store.execute("ALTER TABLE registered_model_aliases RENAME TO aliases_of_registered_models")
    asked: list[str] = []
    monkeypatch.setattr(entries, "ask", lambda client, name: asked.append(name) or there)
    assert entries.look([MODEL]) == {MODEL: there} and asked == [MODEL]


def test_a_silent_registry_is_one_line(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9: the registry does not answer: .*refused"):
        entries.look([MODEL])
    assert registry.status([MODEL]) == {}


def test_the_tables_are_read_without_mlflow(workspace: Path) -> None:
    publish()
    code = f"""
import sys
from genus.registry import entries, status
print(*entries.look([{MODEL!r}]), *status([{MODEL!r}]), "mlflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [MODEL, MODEL, "False"], done.stderr
