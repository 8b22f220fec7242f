"""Text on its way from a source to tokens: spooled once, so that memory does not grow with its length.

Then three readings of the spool: which symbols the train split has, which makes the alphabet, and each split as tokens.
What is held is some 40 bytes a document.

    train.npy, …          the documents of a split, one after the other, each with its end: uint8 [tokens], uint16 where
                          the alphabet has more than 255 symbols (0 ends a document, k stands for alphabet[k - 1])
    offsets/train.npy, …  int64 [N + 1]: where each document begins, and at last the number of tokens
    table.parquet         a row a document: length in characters, shares of unknown and of control characters, hash
"""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from genus.data.loaders import SPLITS
from genus.data.sources import About, Document
from genus.data.spec import DataSpec
from genus.errors import UserError

CHUNK = 1 << 19  # bytes of text that are worked on at once
ROW_GROUP = 1 << 13  # rows of the table that are written at once
UNKNOWN = "\ufffd"  # Unicode's replacement character, in the place of symbols that are not in the alphabet
POINTS = 0x110000  # of Unicode


class Documents(AbstractContextManager["Documents"]):
    """The documents of a source, in a spool file until their splits are known. What was cut is one until then."""

    unit = "document"
    arrays = tuple(f"{split}.npy" for split in SPLITS) + tuple(f"offsets/{split}.npy" for split in SPLITS)

    def __init__(self, folder: Path, about: About):
        self.folder, self.about = folder, about
        self.spool = folder / "spool"
        self.sizes, self.begins, self.given = array("q"), array("b"), array("b")  # two a part, one a document

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self.given), np.int64)

    def __enter__(self) -> Documents:
        self.file = open(self.spool, "wb")
        return self

    def add(self, document: Document) -> None:
        self.sizes.append(self.file.write(document.text.encode()))
        self.begins.append(not document.goes_on)
        if not document.goes_on:
            self.given.append(SPLITS.index(document.split))

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, where: np.ndarray) -> dict[str, Any]:
        """Makes arrays and table of documents whose splits are ``where``; returns their spec, counts and tokens.

        Raises UserError where the train split has no alphabet or one that is too large.
        """
        begins = np.frombuffer(self.begins, np.int8)
        where = where[np.cumsum(begins) - 1]  # of every part: its document's
        lengths = np.empty(len(where), np.int64)
        (self.folder / "offsets").mkdir()
        with open(self.spool, "rb") as file:
            alphabet = self._alphabet(file, where, lengths)
            spec = DataSpec((int(lengths.max()) + 1,), levels=0, alphabet=alphabet)
            self._write_splits(file, where, lengths, spec)
        self.spool.unlink()
        return {
            "spec": spec.to_json(),
            "counts": {split: int((where == index).sum()) for index, split in enumerate(SPLITS)},
            "tokens": {split: int((lengths[where == index] + 1).sum()) for index, split in enumerate(SPLITS)},
            "cut": int((np.diff(np.flatnonzero(begins), append=len(begins)) > 1).sum()),
        }

    def _alphabet(self, file: BinaryIO, where: np.ndarray, lengths: np.ndarray) -> str:
        """The symbols that are often enough in train, in order; puts every part's number of characters in lengths."""
        train = np.zeros(POINTS, np.int64)
        every = np.zeros(POINTS, bool)
        for index in range(len(SPLITS)):
            for chosen, texts in self._gather(file, where == index):
                lengths[chosen] = [len(text) for text in texts]
                found = np.bincount(_points("".join(texts)))
                every[: len(found)] |= found > 0
                if index == SPLITS.index("train"):
                    train[: len(found)] += found
        known = train >= self.about.least
        if not known.any():
            raise UserError(f"no symbol is {self.about.least:,} times in the train split; lower the option least")
        known[ord(UNKNOWN)] |= (every & ~known).any()
        if (count := int(known.sum())) >= 1 << 16:
            raise UserError(f"an alphabet of {count:,} symbols is more than tokens can tell; raise the option least")
        return "".join(map(chr, np.flatnonzero(known)))

    def _write_splits(self, file: BinaryIO, where: np.ndarray, lengths: np.ndarray, spec: DataSpec) -> None:
        """Every split as tokens and offsets, and the table; all in the source's order."""
        import pyarrow as pa
        from pyarrow import parquet

        kind = token_type(spec)
        of_point = np.full(POINTS, spec.alphabet.find(UNKNOWN) + 1, kind)
        of_point[_points(spec.alphabet)] = np.arange(1, spec.vocabulary, dtype=kind)
        figures = {"length": pa.int64(), "unknown": pa.float64(), "control": pa.float64()}
        schema = pa.schema({"split": pa.string(), **figures, "sha1": pa.string()})
        waiting: list[pa.Table] = []
        with parquet.ParquetWriter(self.folder / "table.parquet", schema) as table:
            for index, split in enumerate(SPLITS):
                ends = np.cumsum(lengths[where == index] + 1)
                np.save(self.folder / "offsets" / f"{split}.npy", np.concatenate([[0], ends]))
                with open(self.folder / f"{split}.npy", "wb") as out:
                    shape = {"fortran_order": False, "shape": (int(ends[-1]),)}
                    np.lib.format.write_array_header_1_0(out, {"descr": kind.str, **shape})
                    for chosen, texts in self._gather(file, where == index):
                        tokens = _with_ends(of_point[_points("".join(texts))], lengths[chosen])
                        out.write(tokens.tobytes())
                        columns = statistics(tokens, spec)
                        waiting.append(pa.table({"split": [split] * len(chosen), **columns}, schema=schema))
                        if sum(map(len, waiting)) >= ROW_GROUP:
                            table.write_table(pa.concat_tables(waiting))
                            waiting.clear()
            if waiting:
                table.write_table(pa.concat_tables(waiting))

    def _gather(self, file: BinaryIO, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Reads the parts that are ``wanted`` from the spool: (their numbers, their texts) by chunks."""
        sizes = np.frombuffer(self.sizes, np.int64)
        members, starts = np.flatnonzero(wanted), np.cumsum(sizes) - sizes
        chunk = np.cumsum(sizes[members]) // CHUNK
        for chosen in np.split(members, np.flatnonzero(np.diff(chunk)) + 1):
            texts = []
            for start, size in zip(starts[chosen].tolist(), sizes[chosen].tolist(), strict=True):
                file.seek(start)
                texts.append(file.read(size).decode())
            yield chosen, texts


def token_type(spec: DataSpec) -> np.dtype:
    """What the tokens of a text are stored as."""
    return np.dtype(np.uint8 if spec.vocabulary <= 256 else np.dtype("<u2"))


def statistics(tokens: np.ndarray, spec: DataSpec) -> dict[str, np.ndarray]:
    """The table's figures of some documents, tokens [n] of which the last ends the last document, to columns [N].

    length in characters; unknown and control: shares of U+FFFD and of control characters besides tabs and ends of
    lines; sha1 of the document's tokens, its end included.
    """
    ends = np.flatnonzero(tokens == 0) + 1
    starts = np.concatenate([[0], ends[:-1]])
    control = [unicodedata.category(symbol) == "Cc" and symbol not in "\n\t" for symbol in spec.alphabet]
    unknown = [symbol == UNKNOWN for symbol in spec.alphabet]
    length = ends - starts - 1

    def share(marked: list[bool]) -> np.ndarray:
        count = np.add.reduceat(np.array([False, *marked])[tokens], starts, dtype=np.int64)
        return count / np.maximum(length, 1)

    hashes = [
        hashlib.sha1(tokens[start:end].tobytes(), usedforsecurity=False).hexdigest()
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    return {"length": length, "unknown": share(unknown), "control": share(control), "sha1": np.array(hashes)}


def _points(text: str) -> np.ndarray:
    """The symbols of a text as Unicode's numbers: uint32 [n]."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _with_ends(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Documents of ``lengths`` tokens, one after the other, with a 0 behind each."""
    ended = np.zeros(len(tokens) + len(lengths), tokens.dtype)
    ended[np.arange(len(tokens)) + np.repeat(np.arange(len(lengths)), lengths)] = tokens
    return ended
