"""What the registry holds under its names: read from a local database's tables, else asked of MLflow's client."""

from __future__ import annotations

import contextlib
import http.client
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from genus import tracking
from genus.errors import UserError, nearest

if TYPE_CHECKING:
    from mlflow import MlflowClient

PATIENCE = 8.0  # seconds that a server has to answer at all


@dataclass
class Version:
    """What the registry holds of a version: its tags, and where its package is, if that is not for a server to say."""

    name: str
    number: str
    tags: dict[str, str] = field(default_factory=dict)
    location: str = ""
    lasting: bool = True  # False: the run that made it has been deleted

    def __str__(self) -> str:
        return f"{self.name}/{self.number}"


@dataclass
class Entry:
    """What the registry holds under one name: versions by number, and numbers by alias."""

    versions: dict[str, Version] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


def look(names: Iterable[str]) -> dict[str, Entry]:
    """What the registry holds under each of these names that it knows. Raises UserError where it is silent.

    A local database's tables are read without importing MLflow, which takes seconds; where they are others than those
    of the MLflow that this was written for, and of servers, the client is asked.
    """
    names, address = list(names), tracking.uri()
    with contextlib.suppress(sqlite3.OperationalError), _tables() as store:
        if store is not None:
            return _read(store, names)
    _knock(address)
    with reaching():
        client = tracking.client()
        answers = {name: ask(client, name) for name in names}
    return {name: entry for name, entry in answers.items() if entry is not None}


def ask(client: MlflowClient, name: str) -> Entry | None:
    """What the registry holds under a name, None where it does not know it. Raises what MLflow raises."""
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    versions = client.search_model_versions(f"name = '{name}'")
    return Entry(
        {str(found.version): Version(name, str(found.version), dict(found.tags)) for found in versions},
        {alias: str(number) for alias, number in aliases.items()},
    )


def unknown(name: str) -> UserError:
    """That the registry does not know this name, and which the nearest is that it knows."""
    return UserError(f"no model '{name}' in the registry {tracking.uri()}: {nearest(name, _names())}")


def _names() -> list[str]:
    with contextlib.suppress(sqlite3.OperationalError), _tables() as store:
        if store is not None:
            return [name for (name,) in store.execute("SELECT name FROM registered_models")]
    with reaching():
        return [model.name for model in tracking.client().search_registered_models(max_results=1000)]


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """What MLflow raises, as one line."""
    try:
        yield
    except tracking.problems() as error:
        raise UserError(f"{tracking.uri()}: the registry cannot be used: {tracking.why(error)}") from error


@contextlib.contextmanager
def _tables() -> Iterator[sqlite3.Connection | None]:
    """The local database, to be read only; None where the registry is a server's. Raises UserError where nothing is in
    the database's place, or something else.
    """
    database = tracking.database()
    if database is None:
        yield None
        return
    if not database.exists():
        raise UserError(f"{database}: no registry is here: `genus run` makes one, MLFLOW_TRACKING_URI names another")
    try:
        address = f"{database.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=20)) as store:
            yield store
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise UserError(f"{database}: cannot be read: {error}") from error


def _read(store: sqlite3.Connection, names: list[str]) -> dict[str, Entry]:
    """From the tables of MLflow's database. Raises sqlite3.OperationalError where they are others."""
    these = f"IN ({', '.join('?' * len(names))})"
    known = store.execute(f"SELECT name FROM registered_models WHERE name {these}", names)
    found = {name: Entry() for (name,) in known}
    rows = store.execute(
        "SELECT of.name, of.version, run.lifecycle_stage, of.storage_location, model.artifact_location, of.source "
        "FROM model_versions AS of LEFT JOIN runs AS run ON of.run_id = run.run_uuid "
        "LEFT JOIN logged_models AS model ON of.source = 'models:/' || model.model_id "
        f"WHERE of.current_stage != 'Deleted_Internal' AND of.name {these}",
        names,
    )
    for name, number, stage, *places in rows:
        location = next(filter(None, places))  # a version has a source
        found[name].versions[str(number)] = Version(name, str(number), {}, location, stage == "active")
    for name, number, key, value in store.execute(
        f"SELECT name, version, key, value FROM model_version_tags WHERE name {these}", names
    ):
        if name in found and str(number) in found[name].versions:
            found[name].versions[str(number)].tags[key] = value
    for name, alias, number in store.execute(
        f"SELECT name, alias, version FROM registered_model_aliases WHERE name {these}", names
    ):
        if name in found:
            found[name].aliases[alias] = str(number)
    return {name: found[name] for name in names if name in found}


def _knock(address: str) -> None:
    """Raises UserError within PATIENCE where no server answers: MLflow's client would try for longer."""
    if not address.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return  # it answers, if not this question
    except (OSError, http.client.HTTPException) as error:
        why = str(getattr(error, "reason", None) or error)
        raise UserError(f"{address}: the registry does not answer: {why}") from error
