"""Any UTF-8 text: a file, or a folder of files, read in sorted order; hidden files and links are passed over.

Nobody vouches for the text: a file that is empty or not UTF-8 is put aside with its reason, lines may be of any length,
and no file is held in memory.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, TextIO

from pydantic import Field

from genus.data.sources import About, Broken, Document
from genus.data.sources._text import Text as Options
from genus.data.sources._text import cut
from genus.errors import UserError

CHUNK = 1 << 16  # characters, or bytes, that are read at once


class Text(Options):
    """``path``: the file or folder; ``suffix``: of a folder's files, how the names of those that are read end.

    ``documents``: what a document is: a line, a paragraph (blank lines stand between two) or a file; empty ones are
    left out. ``limit``: bytes in all that are accepted.
    """

    path: str
    suffix: str = ""
    documents: Literal["line", "paragraph", "file"] = "paragraph"
    limit: int = Field(10_000_000_000, gt=0)
    licence: str = "unknown"

    def about(self) -> About:
        files = self._files()
        size = sum(path.stat().st_size for path in files)
        if size > self.limit:
            raise UserError(f"{self.path}: {size:,} bytes of text, more than the option limit, {self.limit:,}")
        if size == 0:
            raise UserError(f"{self.path}: no text in it" + (f": no files *{self.suffix}" if not files else ": empty"))
        return About(
            spec=None,
            licence=self.licence,
            source=f"text of {Path(self.path).name}, a document a {self.documents}",
            count=0,
            test=self.test,
            kind="text",
            least=self.least,
        )

    def examples(self) -> Iterator[Document | Broken]:
        for path in self._files():
            origin = path.relative_to(self.path).as_posix() if path != Path(self.path) else path.name
            if fault := _fault(path):
                yield Broken(origin, fault, partial(_open, path))
                continue
            with open(path, encoding="utf-8-sig") as file:  # a byte order mark is no text
                for number, pieces in enumerate(_documents(file, self.documents), 1):
                    for text, goes_on in cut(pieces, self.longest):
                        yield Document("train", text, f"{origin}, {self.documents} {number}", goes_on)

    def _files(self) -> list[Path]:
        root = Path(self.path)
        if root.is_file():
            return [root]
        if not root.is_dir():
            raise UserError(f"{root}: no such file or folder; datasets.<name>.options.path says where the text is")
        found = []
        for where, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [Path(where, name) for name in files if name.endswith(self.suffix) and not name.startswith(".")]
        return sorted(path for path in found if path.is_file() and not path.is_symlink())


def _documents(file: TextIO, kind: str) -> Iterator[Iterator[str]]:
    """The documents of a file, each as its pieces, which must be used up before the next is asked for."""
    ended = False  # the file

    def pieces() -> Iterator[str]:
        nonlocal ended
        within = False  # a line, of which only a part has been read
        while piece := file.readline(CHUNK):
            begins, within = not within, not piece.endswith("\n")
            if kind == "paragraph" and begins and not within and not piece.strip():
                return
            yield piece
            if kind == "line" and not within:
                return
        ended = True

    while not ended:
        yield pieces()


def _open(path: Path) -> BinaryIO:
    return open(path, "rb")


def _fault(path: Path) -> str:
    """Why a file cannot be read as text; nothing where it can. Reads all of it, so that none of a bad one is used."""
    decoder, lines, blank = codecs.getincrementaldecoder("utf-8-sig")(), 1, True
    try:
        with open(path, "rb") as file:
            while True:
                part = file.read(CHUNK)
                try:
                    text = decoder.decode(part, final=not part)
                except UnicodeDecodeError as error:
                    line = lines + error.object[: error.start].count(b"\n")
                    return f"not UTF-8: byte 0x{error.object[error.start]:02x} in line {line:,}"
                lines += text.count("\n")
                blank = blank and not text.strip()
                if not part:
                    return "empty" if blank else ""
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


Source = Text
