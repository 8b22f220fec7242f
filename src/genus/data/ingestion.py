"""From a source to ``data/processed/<dataset>/``: streamed, so that memory does not grow with the size of the data.

First pass: every good example is appended to one spool file. Then its number decides its split, and a second pass
gathers each split from the spool, in chunks, into memory-mappable arrays and the table of per-example statistics.
What is said of images here is done for text in documents.py.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import zipfile
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from genus import progress
from genus.config import Dataset
from genus.data import origin
from genus.data.documents import Documents
from genus.data.loaders import SPLITS
from genus.data.sources import About, Broken, Example, open_source
from genus.errors import UserError
from genus.files import replacing, sha256, write_json

CHUNK = 1 << 19  # bytes of images, and
ROWS = 1 << 10  # images that are worked on at once
ROW_GROUP = 1 << 13  # rows of the table that are written at once
KEPT = 1000  # broken files that are copied; the table names all
TEST_SEED = 0  # a carved test split does not follow the seed: figures of different seeds stay comparable


def ingest(name: str, config: Dataset, seed: int, root: str | os.PathLike[str] = "data") -> dict[str, Any]:
    """Makes ``<root>/processed/<name>`` from its source and returns its description (dataset.json).

    What the source was then is said in ``<root>/origin/<name>.json``, beside the data and not in it: training does not
    depend on it.
    Broken examples go to ``<root>/quarantine/<name>`` with their reasons. The same source, options and seed give the
    same bytes. Raises UserError, and leaves what was there before, where the source cannot be had, more than
    ``config.max_broken`` of it is broken, or the disk is full.
    """
    source = open_source(config.source, config.options)
    about = source.about()
    raw = origin.content(origin.roots(source))  # before it is read: a later change must not go unnoticed
    quarantine = Path(root) / "quarantine" / name
    with replacing(Path(root) / "processed" / name) as folder:
        folder.mkdir(parents=True)
        kind = Documents if about.kind == "text" else _Images
        with _Quarantine(quarantine) as broken, kind(folder, about) as good:
            for number, example in enumerate(source.examples(), 1):
                if isinstance(example, Broken):
                    broken.add(example)
                else:
                    good.add(example)  # type: ignore[arg-type]
                progress.report(number, about.count if number <= about.count else number + 1, unit=good.unit)
        _judge_broken(name, broken, len(good.given), config.max_broken)
        given, labels = np.frombuffer(good.given, np.int8), np.frombuffer(good.labels, np.int64)
        where = _carve(given, labels, about.test, config.validation, seed, f"data set '{name}'")
        description = good.write(where) | {
            "name": name,
            "kind": about.kind,
            "quarantined": broken.count,
            "sha256": _content(folder, good.arrays),
            "licence": about.licence,
            "source": about.source,
        }
        text = json.dumps(description, indent=2, sort_keys=True) + "\n"
        (folder / "dataset.json").write_text(text, encoding="utf-8")
    write_json(Path(root) / "origin" / f"{name}.json", raw)
    return description


class _Images(AbstractContextManager["_Images"]):
    """The images of a source, in a spool file until their splits are known."""

    unit = "image"
    arrays = tuple(f"{split}.npy" for split in SPLITS) + tuple(f"labels/{split}.npy" for split in SPLITS)

    def __init__(self, folder: Path, about: About):
        assert about.spec is not None
        self.folder, self.spec = folder, about.spec
        self.spool = folder / "spool"
        self.labels, self.given = array("q"), array("b")

    def __enter__(self) -> _Images:
        self.file = open(self.spool, "wb")
        return self

    def add(self, example: Example) -> None:
        self.file.write(_checked(example, self.spec.shape).tobytes())
        self.labels.append(example.label)
        self.given.append(SPLITS.index(example.split))

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, where: np.ndarray) -> dict[str, Any]:
        """Makes the arrays and the table of images whose splits are ``where``; returns their spec and counts."""
        (self.folder / "labels").mkdir()
        labels = np.frombuffer(self.labels, np.int64)
        _write_splits(self.folder, self.spool, labels, where, self.spec.shape, self.spec.levels)
        self.spool.unlink()
        counts = {split: int((where == index).sum()) for index, split in enumerate(SPLITS)}
        return {"spec": self.spec.to_json(), "counts": counts}


def statistics(images: np.ndarray, levels: int) -> dict[str, np.ndarray]:
    """The table's figures of some images, uint8 [N, ...] to columns [N].

    All come from exact histograms: mean and standard deviation in levels, entropy in bits a pixel. Of the entropy, six
    decimals: in its last digits processors differ, and with them would the hash of the data.
    Raises ValueError where a pixel is not below ``levels``.
    """
    flat = images.reshape(len(images), -1)
    if flat.max() >= levels:
        raise ValueError(f"level {flat.max()} where the data set has {levels}")
    cells = flat + levels * np.arange(len(flat), dtype=np.int64)[:, None]
    histogram = np.bincount(cells.ravel(), minlength=len(flat) * levels).reshape(len(flat), levels)
    level = np.arange(levels)
    mean = histogram @ level / flat.shape[1]
    share = histogram / flat.shape[1]
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    return {
        "mean": mean,
        "std": np.sqrt(np.maximum(histogram @ level**2 / flat.shape[1] - mean**2, 0)),
        "min": (histogram > 0).argmax(1),
        "max": levels - 1 - (histogram > 0)[:, ::-1].argmax(1),
        "entropy": -(share * logs).sum(1).round(6) + 0.0,  # + 0.0: no negative zero
        "sha1": np.array([hashlib.sha1(row.tobytes(), usedforsecurity=False).hexdigest() for row in flat]),
    }


def _checked(example: Example, shape: tuple[int, ...]) -> np.ndarray:
    if example.image.shape != shape or example.image.dtype != np.uint8:
        found = f"{example.image.dtype} {example.image.shape}"
        raise TypeError(f"{example.origin}: the source gave {found}, and promised uint8 {shape}")
    return example.image


def _judge_broken(name: str, broken: _Quarantine, good: int, allowed: float) -> None:
    """Raises UserError where nothing is left or more than the allowed share is broken."""
    total = good + broken.count
    if total == 0:
        raise UserError(f"data set '{name}': its source holds no examples")
    if broken.count > allowed * total:
        raise UserError(
            f"data set '{name}': {broken.count:,} of {total:,} examples are broken ({broken.count / total:.1%}, "
            f"max_broken is {allowed:.1%}), the first: {broken.first}; all in {broken.table}"
        )


def _carve(given: np.ndarray, labels: np.ndarray, test: float, validation: float, seed: int, what: str) -> np.ndarray:
    """The split of each example, as an index into SPLITS: what the source says, else a random share of each class.

    Only the examples' numbers are shuffled, never the examples.
    """
    where = given.copy()
    for split, share, split_seed in (("test", test, TEST_SEED), ("validation", validation, seed)):
        if not (where == SPLITS.index(split)).any():
            train = np.flatnonzero(where == SPLITS.index("train"))
            shuffled = np.random.default_rng(split_seed).permutation(train)
            by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
            evenly = np.linspace(0, len(train), round(share * len(train)), endpoint=False).astype(np.int64)
            where[by_class[evenly]] = SPLITS.index(split)
    for index, split in enumerate(SPLITS):
        if not (where == index).any():
            raise UserError(f"{what}: {len(where):,} examples are too few: none is left for the {split} split")
    return where


def _write_splits(
    folder: Path, spool: Path, labels: np.ndarray, where: np.ndarray, shape: tuple[int, ...], levels: int
) -> None:
    """Gathers every split from the spool into arrays and the table, rows of both in the source's order."""
    import pyarrow as pa
    from pyarrow import parquet

    numbers = {"label": pa.int64(), "mean": pa.float64(), "std": pa.float64(), "min": pa.int64(), "max": pa.int64()}
    schema = pa.schema({"split": pa.string(), **numbers, "entropy": pa.float64(), "sha1": pa.string()})
    waiting: list[pa.Table] = []
    with parquet.ParquetWriter(folder / "table.parquet", schema) as table, open(spool, "rb") as file:
        for index, split in enumerate(SPLITS):
            members = np.flatnonzero(where == index)
            np.save(folder / "labels" / f"{split}.npy", labels[members])
            with open(folder / f"{split}.npy", "wb") as out:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(members), *shape)}
                np.lib.format.write_array_header_1_0(out, header)
                for chosen, images in _gather(file, members, shape):
                    out.write(images.tobytes())
                    columns = {"split": [split] * len(chosen), "label": labels[chosen], **statistics(images, levels)}
                    waiting.append(pa.table(columns, schema=schema))
                    if sum(map(len, waiting)) >= ROW_GROUP:
                        table.write_table(pa.concat_tables(waiting))
                        waiting.clear()
        if waiting:
            table.write_table(pa.concat_tables(waiting))


def _gather(file: BinaryIO, members: np.ndarray, shape: tuple[int, ...]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads chosen rows of the spool: (their numbers, uint8 [n, *shape]) by chunks.

    Read, not memory-mapped: mapped pages would count as this process's memory.
    """
    size = int(np.prod(shape))
    rows = min(ROWS, max(1, CHUNK // size))
    for start in range(0, len(members), rows):
        chosen = members[start : start + rows]
        images = np.empty((len(chosen), *shape), np.uint8)
        for row, number in zip(images, chosen.tolist(), strict=True):
            file.seek(number * size)
            file.readinto(row)  # type: ignore[attr-defined]
        yield chosen, images


def _content(folder: Path, arrays: tuple[str, ...]) -> str:
    """One hash of all arrays of a data set."""
    return hashlib.sha256("\n".join(f"{name} {sha256(folder / name)}" for name in arrays).encode()).hexdigest()


class _Quarantine(AbstractContextManager["_Quarantine"]):
    """Collects broken examples in a folder: copies, and reasons.csv. The folder goes when nothing is broken.

    A side output for people; DVC does not hash it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.table = folder / "reasons.csv"
        self.count = 0
        self.first = ""

    def __enter__(self) -> _Quarantine:
        shutil.rmtree(self.folder, ignore_errors=True)  # what an earlier ingest found
        return self

    def add(self, broken: Broken) -> None:
        """Raises UserError where the folder cannot be written."""
        self.count += 1
        copy = ""
        try:
            if self.count == 1:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.first = f"{broken.origin}: {broken.reason}"
                self._row("file", "origin", "reason")
            if broken.open is not None and self.count <= KEPT:
                copy = f"{self.count:06d}-{re.sub(r'[^A-Za-z0-9._-]', '_', broken.origin)[-80:]}"
                # What a damaged zip entry gives before its checksum fails is kept.
                with broken.open() as file, open(self.folder / copy, "wb") as out, suppress(zipfile.BadZipFile):
                    shutil.copyfileobj(file, out)
            self._row(copy, broken.origin, broken.reason)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

    def _row(self, *cells: str) -> None:
        with open(self.table, "a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(cells)

    def __exit__(self, *_: object) -> None:
        return None
