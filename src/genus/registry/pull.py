"""Getting a version out of the registry: found by name, and verified, file by file, before anything of it is used."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from genus import tracking
from genus.errors import UserError, nearest
from genus.files import read_json, replacing, sha256
from genus.registry.package import FORMAT, LEFT_BY_MLFLOW, MANIFEST, contents

PATIENCE = 8.0  # seconds that a server has to answer at all


class Damaged(UserError):
    """A package that is not, or can't be shown to be, what was registered: to fetch it again would not help."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for: a version by its number, or by the alias that points at it."""

    name: str
    alias: str = "champion"
    version: str = ""

    @classmethod
    def parse(cls, reference: str) -> Wanted:
        """From name, name@alias or name/3, with or without MLflow's models:/ before. Raises UserError for others."""
        found = re.fullmatch(r"(?:models:/)?([^\s/@]+)(?:@([^\s/@]+)|/(\d+))?", reference)
        if found is None:
            raise UserError(f"'{reference}' names no model: write name, name@alias or name/3")
        name, alias, version = found.groups(default="")
        return cls(name, "" if version else alias or cls.alias, version.lstrip("0") or version)


@dataclass
class Version:
    """What the registry holds of a version: where its package is, and its tags."""

    name: str
    number: str
    location: str
    tags: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}/{self.number}"


@dataclass
class Entry:
    """What the registry holds under a name."""

    versions: dict[str, Version] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


def find(reference: str) -> Version:
    """The version that ``reference`` names. Raises UserError where there is none, or where the registry is silent."""
    wanted, address = Wanted.parse(reference), tracking.uri()
    entry, names = _look(wanted.name, address)
    if entry is None:
        raise UserError(f"no model '{wanted.name}' in the registry {address}: {nearest(wanted.name, names)}")
    number = wanted.version or entry.aliases.get(wanted.alias)
    if number is None:
        there = ", ".join(f"{alias} (version {version})" for alias, version in sorted(entry.aliases.items()))
        raise UserError(f"{wanted.name} has no alias '{wanted.alias}': there is {there or 'none'}")
    if number not in entry.versions:
        there = ", ".join(sorted(entry.versions, key=int))
        raise UserError(f"{wanted.name} has no version {number}: there is {there or 'none'}")
    return entry.versions[number]


def pull(reference: str, to: str | os.PathLike[str]) -> Path:
    """Puts the package of a version into the folder ``to``, verified, whole or not at all; the folder.

    A package that is there is replaced; any other folder that is not empty is refused. Raises UserError as ``find``
    and ``verify`` do.
    """
    to = Path(to)
    if to.exists() and not (to / MANIFEST).exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to}: is there already and no package: choose another folder")
    version = find(reference)
    _fetch(version, to)
    return to


def open_package(reference: str) -> Path:
    """A verified package folder on this machine: in the registry itself where that is a local one, else in a cache.

    The cache is ~/.cache/genus (XDG_CACHE_HOME), a folder a manifest. Raises UserError as ``find`` and ``verify`` do.
    """
    version = find(reference)
    folder = _folder(version.location)
    if folder is not None:
        verify(folder, version)
        return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genus" / _promised(version)
    if cache.exists():
        with contextlib.suppress(UserError):  # damaged since: fetched anew
            verify(cache, version)
            return cache
    _fetch(version, cache)
    return cache


def verify(folder: Path, version: Version) -> None:
    """Raises Damaged, naming the file, unless ``folder`` holds what was registered: no file changed, missing or more.

    The version's tag vouches for the manifest, and the manifest for all other files.
    """
    promised, manifest = _promised(version), folder / MANIFEST
    if not folder.is_dir():
        raise Damaged(f"{version}: its package is gone: {folder}: no such folder")
    if not manifest.is_file():
        raise Damaged(f"{version}: its package is damaged: {MANIFEST} is missing")
    if sha256(manifest) != promised:
        raise Damaged(f"{version}: {MANIFEST} is not the one that was registered: tampered with or damaged")
    content = read_json(manifest)
    _readable(version, content["format"])
    files, present = content["files"], contents(folder)
    for path in sorted({*files, *present}):
        if path not in present:
            raise Damaged(f"{version}: {path} is missing from its package")
        if path not in files:
            raise Damaged(f"{version}: {path} was not in its package when it was registered")
        if (folder / path).is_symlink() or sha256(folder / path) != files[path]:
            raise Damaged(f"{version}: {path} is not the one that was registered: tampered with or damaged")


def _promised(version: Version) -> str:
    """The manifest's hash that was registered. Raises Damaged where none was, UserError for those of a newer Genus."""
    _readable(version, version.tags.get("genus.format", FORMAT))
    promised = version.tags.get("genus.manifest", "")
    if not re.fullmatch(r"[0-9a-f]{64}", promised):
        raise Damaged(f"{version}: has no manifest to be verified by (made by an older Genus, or not by Genus)")
    return promised


def _readable(version: Version, made: str | int) -> None:
    if not str(made).isdigit() or int(made) > FORMAT:
        raise UserError(f"{version}: made by a newer Genus (format {made}, this one reads {FORMAT}): upgrade")


def _fetch(version: Version, to: Path) -> None:
    """Copies or downloads a package to ``to`` and verifies it there, before the folder gets its name."""
    _promised(version)
    folder = _folder(version.location)
    with replacing(to) as temporary:
        if folder is None:
            _download(version, temporary)
        elif folder.is_dir():
            shutil.copytree(folder, temporary, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        (temporary / LEFT_BY_MLFLOW).unlink(missing_ok=True)
        verify(temporary, version)


def _download(version: Version, to: Path) -> None:
    tracking.client()  # makes this project's store MLflow's
    from mlflow.artifacts import download_artifacts

    to.mkdir()
    with _reaching(tracking.uri()):
        download_artifacts(f"models:/{version}", dst_path=str(to))


def _folder(location: str) -> Path | None:
    """Where a package is on this machine; None where it has to be downloaded."""
    if not location:  # a server knows it
        return None
    parts, database = urllib.parse.urlsplit(location), _database(tracking.uri())
    if parts.scheme == "mlflow-artifacts" and not parts.netloc and database is not None:
        return database.parent / "artifacts" / urllib.parse.unquote(parts.path).lstrip("/")
    if parts.scheme == "file":
        return Path(urllib.request.url2pathname(parts.path))
    return Path(location) if database is not None and not parts.scheme else None


def _database(address: str) -> Path | None:
    return Path(address.removeprefix("sqlite:///")).absolute() if address.startswith("sqlite:///") else None


def _look(name: str, address: str) -> tuple[Entry | None, Iterable[str]]:
    """What the registry holds under ``name``, and the names that it knows.

    A local database's tables are read without importing MLflow, which takes seconds; where they are others, and of
    servers, the client asks.
    """
    database = _database(address)
    if database is not None:
        if not database.exists():
            raise UserError(
                f"{database}: no registry is here: `genus run` makes one, MLFLOW_TRACKING_URI names another"
            )
        try:
            return _read(database, name)
        except sqlite3.OperationalError:
            pass  # tables of another MLflow: its client knows them
        except sqlite3.DatabaseError as error:
            raise UserError(f"{database}: cannot be read: {error}") from error
    _knock(address)
    return _ask(name, address)


def _read(database: Path, name: str) -> tuple[Entry | None, Iterable[str]]:
    """From the tables of MLflow's database. Raises sqlite3.Error where they are others."""
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=20)) as store:
        names = [row[0] for row in store.execute("SELECT name FROM registered_models")]
        if name not in names:
            return None, names
        entry = Entry()
        places = dict(store.execute("SELECT model_id, artifact_location FROM logged_models"))
        kept = "WHERE name = ? AND current_stage != 'Deleted_Internal'"
        rows = store.execute(f"SELECT version, storage_location, source FROM model_versions {kept}", [name])
        for number, location, source in rows:
            place = location or places.get(source.removeprefix("models:/"), source)
            entry.versions[str(number)] = Version(name, str(number), place)
        for number, key, value in store.execute(
            "SELECT version, key, value FROM model_version_tags WHERE name = ?", [name]
        ):
            if str(number) in entry.versions:
                entry.versions[str(number)].tags[key] = value
        aliases = store.execute("SELECT alias, version FROM registered_model_aliases WHERE name = ?", [name])
        entry.aliases = {alias: str(number) for alias, number in aliases}
        return entry, names


def _ask(name: str, address: str) -> tuple[Entry | None, Iterable[str]]:
    """From MLflow's client."""
    client = tracking.client()
    from mlflow.exceptions import MlflowException

    with _reaching(address):
        try:
            aliases = client.get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None, [model.name for model in client.search_registered_models(max_results=1000)]
        versions = {
            str(found.version): Version(name, str(found.version), "", dict(found.tags))
            for found in client.search_model_versions(f"name = '{name}'")
        }
    return Entry(versions, {alias: str(number) for alias, number in aliases.items()}), []


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


@contextlib.contextmanager
def _reaching(address: str) -> Iterator[None]:
    """What MLflow raises, as one line."""
    try:
        yield
    except tracking.problems() as error:
        why = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{address}: the registry cannot be read: {why}") from error
