"""Writing files so that a killed process leaves either the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genus.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` to write a file or folder to; renames it over ``path`` on success.

    What a killed process has left of an earlier try goes first. Raises UserError, naming the path, when the disk is
    full or the folder may not be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=f".{os.getpid()}", dir=path.parent))
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
            raise UserError(f"{path}: cannot be written: {_why(error, scratch)}") from error
        raise
    except Exception as error:
        if "(os error " not in str(error):  # so safetensors, which has an exception of its own, words the system's
            raise
        raise UserError(f"{path}: cannot be written: {_why(error, scratch)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _clear(path: Path) -> None:
    """Removes what processes that are no more have left beside ``path``: a kill -9 leaves no time for that."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.*"):
        writer = left.suffix.removeprefix(".")
        if writer.isdecimal() and not _alive(int(writer)):
            if (left / "old").exists() and not path.exists():  # killed between the two renames
                (left / "old").rename(path)
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _why(error: Exception, folder: Path) -> str:
    """The system's words, also where a library has its own: NumPy says how many numbers are missing, no more."""
    number = getattr(error, "errno", None) or (errno.ENOSPC if is_full(folder) else None)
    return os.strerror(number) if number else str(error)


def is_full(folder: str | os.PathLike[str]) -> bool:
    """Whether the disk of a folder has no room left."""
    return shutil.disk_usage(folder).free < 1 << 16


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


def read_array(path: str | os.PathLike[str], mapped: bool = False) -> np.ndarray:
    """The array in a .npy file, read or memory-mapped. Raises UserError, naming the file, where it is none."""
    import numpy as np

    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: unreadable array: {error}") from error


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError, naming the file, where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged: {error}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
