"""Which raw files a data set was made from: ``data/origin/<dataset>.json``, so that changed data is noticed.

DVC cannot watch the raw files themselves: a source fetches them while it runs, or has none.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from genus.data.sources import Source
from genus.files import sha256

Stat = list[tuple[str, int, int, int]]  # path, bytes, nanoseconds of modification and of change


def roots(source: Source) -> list[str]:
    """The local folders and files that a source reads: its options ``folder`` and ``path``, given or default."""
    named = (getattr(source, option, None) for option in ("folder", "path"))
    return [root for root in named if isinstance(root, str)]


def stat(places: list[str]) -> Stat:
    """What the file system says of every file there, sorted; links are not followed below the places themselves."""
    found: Stat = []

    def add(entry: os.DirEntry[str] | Path) -> None:
        about = entry.stat()
        found.append((os.fspath(entry), about.st_size, about.st_mtime_ns, about.st_ctime_ns))

    def walk(folder: str) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    walk(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    add(entry)

    for place in places:
        if os.path.isdir(place):
            walk(place)
        elif os.path.isfile(place):
            add(Path(place))
    return sorted(found)


def content(places: list[str]) -> dict[str, Any]:
    """``sha256`` over the names, from their place on, and the bytes of all files there, and the number of ``files``.

    What gzip has compressed counts as what it holds: the mirrors of one data set compress it differently.
    """
    digest, files = hashlib.sha256(), stat(places)
    for path, *_ in files:
        place = next(place for place in places if Path(path).is_relative_to(place))
        digest.update(f"{Path(path).relative_to(place).as_posix().removesuffix('.gz')}\0{_sha256(path)}\n".encode())
    return {"files": len(files), "sha256": digest.hexdigest()}


def _sha256(path: str) -> str:
    if path.endswith(".gz"):
        with suppress(EOFError, gzip.BadGzipFile, zlib.error), gzip.open(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    try:
        return sha256(path)
    except OSError as error:  # the source may well pass the file over
        return error.strerror or "unreadable"
