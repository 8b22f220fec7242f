"""Getting a version out of the registry: found by name, and verified, file by file, before anything of it is used."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from genus import tracking
from genus.errors import UserError
from genus.files import read_json, replacing, sha256
from genus.registry import entries
from genus.registry.entries import Version
from genus.registry.package import FORMAT, LEFT_BY_MLFLOW, MANIFEST, contents


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


def find(reference: str) -> Version:
    """The version that ``reference`` names. Raises UserError where there is none, or where the registry is silent."""
    wanted = Wanted.parse(reference)
    entry = entries.look([wanted.name]).get(wanted.name)
    if entry is None:
        raise entries.unknown(wanted.name)
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
    with entries.reaching():
        download_artifacts(f"models:/{version}", dst_path=str(to))


def _folder(location: str) -> Path | None:
    """Where a package is on this machine; None where it has to be downloaded."""
    if not location:  # a server knows it
        return None
    parts, database = urllib.parse.urlsplit(location), tracking.database()
    if parts.scheme == "mlflow-artifacts" and not parts.netloc and database is not None:
        return database.absolute().parent / "artifacts" / urllib.parse.unquote(parts.path).lstrip("/")
    if parts.scheme == "file":
        return Path(urllib.request.url2pathname(parts.path))
    return Path(location) if database is not None and not parts.scheme else None
