"""Writing files so that a killed process leaves either the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genus.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` to write a file or folder to; renames it over ``path`` on success.

    Raises UserError, naming the path, when the disk is full or the folder may not be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        temporary = scratch / path.name
        yield temporary
        replaced = path.is_dir() and not path.is_symlink()
        if replaced:  # a folder cannot be renamed over another
            path.rename(scratch / "old")
        try:
            os.replace(temporary, path)
        except OSError:
            if replaced:
                (scratch / "old").rename(path)
            raise
    except OSError as error:
        if error.filename is None or Path(error.filename).is_relative_to(scratch):
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replaces the file by ``text``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replaces the file by ``value`` as JSON: sorted keys, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON value in a file. Raises UserError, naming the file, where it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def read_yaml(path: str | os.PathLike[str], hint: str) -> Any:
    """The YAML value in a file. Raises UserError, naming file and line, where it is not YAML; ``hint`` if missing."""
    from ruamel.yaml import YAML, YAMLError

    try:
        return YAML(typ="safe").load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {hint}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        where = getattr(getattr(error, "problem_mark", None), "line", None)
        raise UserError(f"{path}: not YAML{f', line {where + 1}' if where is not None else ''}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
