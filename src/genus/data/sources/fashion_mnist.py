"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747): 70,000 grey 28×28 pictures of ten kinds of clothes.

Had from, in this order: a local folder, torchvision's mirrors, the Debian package. They compress the same four files
differently, so what is verified is the SHA-256 of the decompressed content.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from genus.config import Section
from genus.data.sources import About, Example
from genus.data.sources._debian import TIMEOUT, unpack
from genus.data.spec import DataSpec
from genus.errors import TransientError, UserError
from genus.files import replacing

CONTENT = {  # SHA-256 of the decompressed files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SPLITS = {"train": "train", "test": "t10k"}
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
PACKAGE = "dataset-fashion-mnist"
IMAGES = 1000  # read at once


class FashionMnist(Section):
    """``folder``: where the four IDX files are, or are put when downloaded; as they are or with ``.gz``."""

    folder: str = "data/raw/fashion-mnist"

    def about(self) -> About:
        missing = [name for name in CONTENT if self._local(name) is None]
        if missing:
            self._fetch(missing)
        return About(
            spec=DataSpec((1, 28, 28), levels=256, classes=CLASSES),
            licence="MIT",
            source="Fashion-MNIST, Zalando Research (Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747)",
            count=70_000,
        )

    def examples(self) -> Iterator[Example]:
        for split, prefix in SPLITS.items():
            images = read_idx(self._path(f"{prefix}-images-idx3-ubyte"), (28, 28), IMAGES)
            labels = read_idx(self._path(f"{prefix}-labels-idx1-ubyte"), (), IMAGES)
            number = 0
            for some, their in zip(images, labels, strict=True):
                for image, label in zip(some[:, None], their.tolist(), strict=True):
                    yield Example(split, image, label, f"{split} {number}")
                    number += 1

    def _local(self, name: str) -> Path | None:
        """The file in the folder, compressed or not."""
        for path in (Path(self.folder) / name, Path(self.folder) / f"{name}.gz"):
            if path.exists():
                return path
        return None

    def _path(self, name: str) -> Path:
        path = self._local(name)
        if path is None:
            raise UserError(f"{self.folder}/{name}.gz: no such file")
        return path

    def _fetch(self, missing: list[str]) -> None:
        """Brings the missing files into the folder, from the mirrors or else from the Debian package."""
        for fetch in (_from_mirrors, _from_package):
            with tempfile.TemporaryDirectory(prefix="genus-") as scratch:
                try:
                    found = fetch(missing, Path(scratch))
                except (OSError, subprocess.SubprocessError):
                    continue  # not to be had this way: try the next
                for name, path in found.items():
                    for _ in read_idx(path, None, IMAGES, name):
                        pass  # verified before it is kept
                    with replacing(Path(self.folder) / f"{name}.gz") as target:
                        shutil.copyfile(path, target)
                return
        raise TransientError(
            f"{self.folder}: {', '.join(missing)} not there and no network. Three ways to get Fashion-MNIST: "
            f"copy its four .gz files into {self.folder}; or go online, so that torchvision's mirror answers; "
            f"or on Debian or Ubuntu make `apt-get download {PACKAGE}` work (as root: apt-get update)"
        )


def read_idx(path: Path, shape: tuple[int, ...] | None, rows: int, name: str | None = None) -> Iterator[np.ndarray]:
    """Streams an IDX file, gzipped or not, as uint8 arrays of up to ``rows`` examples each.

    Raises UserError where it is damaged, is not of the ``shape`` of one example, or (said at the end of the stream, so
    keep nothing before it has ended) where its content is not what CONTENT says of ``name``.
    """
    name = name or path.name.removesuffix(".gz")
    digest = hashlib.sha256()
    advice = "delete it, and it is fetched again"
    try:
        opened = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115
        with cast(BinaryIO, opened) as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08":
                raise UserError(f"{path}: not an IDX file of bytes; {advice}")
            dims = file.read(4 * start[3])
            digest.update(start + dims)
            count, *rest = np.frombuffer(dims, ">u4").tolist() if len(dims) == 4 * start[3] and dims else (0,)
            if shape is not None and tuple(rest) != shape:
                raise UserError(f"{path}: examples of shape {tuple(rest)}, expected {shape}; {advice}")
            size = int(np.prod(rest, dtype=np.int64))
            for first in range(0, count, rows):
                part = file.read(min(rows, count - first) * size)
                if len(part) < min(rows, count - first) * size:
                    raise UserError(f"{path}: truncated: ends before example {count:,}; {advice}")
                digest.update(part)
                yield np.frombuffer(part, np.uint8).reshape(-1, *rest)
            digest.update(file.read(1))  # anything after the last example is not the original either
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: truncated or damaged: {error}; {advice}") from error
    if digest.hexdigest() != CONTENT[name]:
        found = f"SHA-256 {digest.hexdigest()[:12]}…, expected {CONTENT[name][:12]}…"
        raise UserError(f"{path}: content is not Fashion-MNIST's ({found}); {advice}")


def _from_mirrors(names: list[str], scratch: Path) -> dict[str, Path]:
    """Downloads from the mirrors that torchvision knows. Raises OSError where none answers."""
    from torchvision.datasets import FashionMNIST

    found = {}
    for name in names:
        error: OSError = OSError("no mirror")
        for mirror in FashionMNIST.mirrors:
            try:
                with (
                    urllib.request.urlopen(f"{mirror}{name}.gz", timeout=TIMEOUT) as answer,
                    open(scratch / f"{name}.gz", "wb") as file,
                ):
                    shutil.copyfileobj(answer, file)
            except OSError as failure:  # URLError and timeouts among them
                error = failure
            else:
                found[name] = scratch / f"{name}.gz"
                break
        else:
            raise error
    return found


def _from_package(names: list[str], scratch: Path) -> dict[str, Path]:
    """Unpacks the Debian package without installing it. Raises OSError or SubprocessError where that fails."""
    folder = unpack([PACKAGE], scratch) / "usr" / "share" / "datasets" / "fashion-mnist"
    return {name: folder / f"{name}.gz" for name in names}


Source = FashionMnist
