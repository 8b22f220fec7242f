"""Any folder or zip of pictures: ``class/picture.png``, ``train/class/picture.png``, or pictures alone.

Sub-folders are the classes; folders train, validation and test above them are the splits. Other files are passed
over. Nobody vouches for the pictures: links are not followed, a zip is read without unpacking it, sizes are limited
before anything is decoded.
DVC does not watch the folder: after a change to it, `dvc repro --force --single-item ingest@NAME` reads it again.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Protocol, cast

from pydantic import Field

from genus.data.loaders import SPLITS
from genus.data.sources import About, Broken, Example
from genus.data.sources._images import MAX_BYTES, SUFFIXES, Look, Unusable, decode
from genus.data.spec import DataSpec
from genus.errors import UserError

SPLIT_FOLDERS = {split: split for split in SPLITS} | {"val": "validation", "valid": "validation"}
MAX_RATIO = 1000  # a zip entry that grows more than this on unpacking is a bomb


class _Entry(NamedTuple):
    """A picture file. ``refused``: why it is not even opened, or nothing."""

    path: PurePosixPath  # relative to the folder or zip
    refused: str
    open: Callable[[], AbstractContextManager[BinaryIO]]


class _Tree(Protocol):
    def entries(self) -> Iterator[_Entry]: ...


class ImageFolder(Look):
    """``path``: the folder or zip; ``test``: share that becomes the test split where there is no folder for it."""

    path: str
    test: float = Field(0.1, gt=0, lt=1)
    licence: str = "unknown"

    def about(self) -> About:
        count = sum(1 for _ in self._tree().entries())
        if count == 0:
            raise UserError(f"{self.path}: no pictures in it; expected class/picture with one of {' '.join(SUFFIXES)}")
        return About(
            spec=DataSpec(self.shape, levels=256, classes=tuple(self._classes())),
            licence=self.licence,
            source=f"pictures in {Path(self.path).name}, {self.crop} to {self.size}×{self.size} {self.mode}",
            count=count,
            test=self.test,
        )

    def examples(self) -> Iterator[Example | Broken]:
        numbers = {name: number for number, name in enumerate(self._classes())}
        for entry in self._tree().entries():
            split, label = _split_and_class(entry.path)
            reason, copy = entry.refused, None
            if numbers and not label:
                reason = reason or "in no class folder, where others are"
            if not reason:
                try:
                    with entry.open() as file:
                        image = decode(file, self)
                except Unusable as error:
                    reason, copy = str(error), entry.open
                except (zipfile.BadZipFile, OSError) as error:
                    reason = f"cannot be read: {error}"
            yield (
                Broken(str(entry.path), reason, copy)
                if reason
                else Example(split, image, numbers.get(label, 0), str(entry.path))
            )

    def _classes(self) -> list[str]:
        return sorted({_split_and_class(entry.path)[1] for entry in self._tree().entries()} - {""})

    def _tree(self) -> _Tree:
        path = Path(self.path)
        if path.is_dir():
            return _Folder(path)
        if path.exists():
            return _Zip(path)
        raise UserError(f"{path}: no such folder or zip; datasets.<name>.options.path says where the pictures are")


def _split_and_class(path: PurePosixPath) -> tuple[str, str]:
    """What the folders above a picture say: its split (train unless it is said) and its class (or nothing)."""
    folders = list(path.parts[:-1])
    split = SPLIT_FOLDERS[folders.pop(0)] if folders and folders[0] in SPLIT_FOLDERS else "train"
    return split, folders[0] if folders else ""


def _is_picture(path: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return not hidden and path.name.lower().endswith(SUFFIXES)


class _Folder:
    """A folder, walked in sorted order, holding one folder's names at a time."""

    def __init__(self, root: Path):
        self.root = root

    def entries(self) -> Iterator[_Entry]:
        for where, folders, files in os.walk(self.root, onerror=_unreadable):
            folders.sort()
            links = [name for name in folders if os.path.islink(os.path.join(where, name))]
            for name in sorted(files + links):
                path = Path(where, name)
                relative = PurePosixPath(path.relative_to(self.root).as_posix())
                if name in links or _is_picture(relative):
                    yield _Entry(relative, _refused_file(path), partial(_open_file, path))


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _open_file(path: Path) -> BinaryIO:
    return path.open("rb")


def _refused_file(path: Path) -> str:
    """Why a file is not opened."""
    if path.is_symlink():
        return "a symbolic link, which is not followed"
    size = path.stat().st_size
    return f"{size:,} bytes, more than {MAX_BYTES:,}" if size > MAX_BYTES else ""


class _Zip:
    """A zip, read in place. Raises UserError where it is damaged or an entry's path leaves it.

    A single folder that holds everything (as made by zipping a folder) is passed over: it is no class.
    """

    def __init__(self, path: Path):
        try:
            self.zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise UserError(f"{path}: not a zip, or truncated: {error}") from error
        self.infos: dict[PurePosixPath, zipfile.ZipInfo] = {}
        for info in sorted(self.zip.infolist(), key=lambda info: info.filename):
            name = PurePosixPath(info.filename.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts or ":" in "".join(name.parts[:1]):
                raise UserError(f"{path}: unsafe: its entry '{info.filename}' leaves the folder; nothing was read")
            if not info.is_dir() and _is_picture(name):
                self.infos[name] = info
        tops = {name.parts[0] for name in self.infos}
        if len(tops) == 1 and not tops & set(SPLIT_FOLDERS) and all(len(name.parts) > 1 for name in self.infos):
            self.infos = {PurePosixPath(*name.parts[1:]): info for name, info in self.infos.items()}

    def entries(self) -> Iterator[_Entry]:
        for name, info in self.infos.items():
            yield _Entry(name, _refused_entry(info), partial(self._open, info))

    @contextlib.contextmanager
    def _open(self, info: zipfile.ZipInfo) -> Iterator[BinaryIO]:
        try:
            with self.zip.open(info) as file:
                yield cast(BinaryIO, file)
        except (zlib.error, EOFError, NotImplementedError) as error:
            raise zipfile.BadZipFile(f"damaged in the zip: {error}") from error


def _refused_entry(info: zipfile.ZipInfo) -> str:
    """Why an entry of a zip is not opened, from what the zip says of it (unpacking stops at the size it says)."""
    if info.flag_bits & 1:
        return "encrypted"
    if info.external_attr >> 16 & 0o170000 == 0o120000:
        return "a symbolic link, which is not followed"
    if info.file_size > MAX_BYTES:
        return f"{info.file_size:,} bytes, more than {MAX_BYTES:,}"
    if info.file_size > MAX_RATIO * max(1, info.compress_size):
        return f"unpacks to {info.file_size:,} bytes from {info.compress_size:,}: a zip bomb"
    return ""


Source = ImageFolder
