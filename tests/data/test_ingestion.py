"""Ingest: the same bytes every time, memory that does not follow the data, and nothing lost when it fails."""

from __future__ import annotations

import csv
import errno
import hashlib
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import entropy

from genus.config import Dataset
from genus.data.ingestion import ingest, statistics
from genus.data.loaders import SPLITS, open_dataset
from genus.errors import UserError
from genus.files import sha256

DIGITS = Dataset(source="digits")


def pictures(folder: Path, count: int, *, side: int = 8, classes: int = 2) -> Path:
    """Random RGB pictures, ``count`` in all, in one folder a class."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % classes}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    return folder


def of_folder(path: Path, **changes: object) -> Dataset:
    options = {"path": str(path), "size": 8, **changes.pop("options", {})}  # type: ignore[dict-item]
    return Dataset(source="image_folder", options=options, **changes)  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_digits_are_scikit_learns_split_three_ways(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    description = ingest("digits", DIGITS, seed=0, root=tmp_path)
    data = open_dataset("digits", tmp_path / "processed")
    assert data.spec.shape == (1, 8, 8) and data.spec.levels == 17 and len(data.spec.classes) == 10
    assert description["counts"] == {"train": 1294, "validation": 144, "test": 359}
    given = load_digits()
    stored = {(image.tobytes(), int(label)) for split in SPLITS for image, label in _pairs(data, split)}
    assert stored == {
        (image.astype(np.uint8).tobytes(), int(label)) for image, label in zip(given.images, given.target, strict=True)
    }
    assert sum(len(data.split(split)) for split in SPLITS) == 1797
    for split in SPLITS:  # every class has its share of every split
        counts = np.bincount(data.labels(split), minlength=10)
        overall = np.bincount(given.target, minlength=10) / 1797
        assert np.abs(counts - overall * counts.sum()).max() <= 1.5


def _pairs(data, split):  # type: ignore[no-untyped-def]
    return zip(data.split(split), data.labels(split), strict=True)


def test_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    ingest("digits", DIGITS, seed=0, root=tmp_path)
    data = open_dataset("digits", tmp_path / "processed")
    assert isinstance(data.split("train"), np.memmap)
    assert data.split("train").dtype == np.uint8 and data.labels("train").dtype == np.int64
    assert not data.split("train").flags.writeable


def test_table_has_one_row_an_example_in_the_order_of_the_arrays(tmp_path: Path) -> None:
    ingest("digits", DIGITS, seed=0, root=tmp_path)
    data = open_dataset("digits", tmp_path / "processed")
    table = pd.read_parquet(tmp_path / "processed/digits/table.parquet")
    assert list(table.columns) == ["split", "label", "mean", "std", "min", "max", "entropy", "sha1"]
    assert list(table["split"]) == [split for split in SPLITS for _ in range(len(data.split(split)))]
    images = np.concatenate([data.split(split) for split in SPLITS])
    assert list(table["label"]) == np.concatenate([data.labels(split) for split in SPLITS]).tolist()
    assert list(table["sha1"]) == [hashlib.sha1(image.tobytes()).hexdigest() for image in images]


def test_statistics_against_numpy_and_scipy() -> None:
    images = np.random.default_rng(0).integers(0, 50, (20, 3, 5, 4), np.uint8)
    images[0] = 7
    found = statistics(images, 256)
    flat = images.reshape(20, -1)
    np.testing.assert_allclose(found["mean"], flat.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found["std"], flat.std(1), atol=1e-9)
    np.testing.assert_array_equal(found["min"], flat.min(1))
    np.testing.assert_array_equal(found["max"], flat.max(1))
    np.testing.assert_allclose(found["entropy"], [entropy(np.bincount(row), base=2) for row in flat], atol=6e-7)
    np.testing.assert_array_equal(found["entropy"], found["entropy"].round(6))  # the same on every processor
    assert found["std"][0] == 0 and found["entropy"][0] == 0


def test_a_level_too_high_is_an_error() -> None:
    with pytest.raises(ValueError, match="level 17 where the data set has 17"):
        statistics(np.full((1, 2, 2), 17, np.uint8), 17)


def test_two_ingests_give_the_same_bytes_and_another_seed_another_validation_split(tmp_path: Path) -> None:
    for root, seed in (("a", 0), ("b", 0), ("c", 1)):
        ingest("digits", DIGITS, seed=seed, root=tmp_path / root)
    a, b, c = (content(tmp_path / root / "processed/digits") for root in "abc")
    assert a == b and len(a) == 8
    assert a["validation.npy"] != c["validation.npy"] and a["test.npy"] == c["test.npy"]


def test_description_holds_no_path_or_time(tmp_path: Path) -> None:
    ingest("x", of_folder(pictures(tmp_path / "pictures", 30)), seed=0, root=tmp_path / "a")
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "deeper" / "pictures")
    ingest("x", of_folder(tmp_path / "deeper" / "pictures"), seed=0, root=tmp_path / "b")
    assert content(tmp_path / "a/processed/x") == content(tmp_path / "b/processed/x")


def test_broken_ones_are_put_aside_with_their_reasons(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 40)
    (folder / "class0/torn.png").write_bytes((folder / "class0/000000.png").read_bytes()[:60])
    (folder / "class1/text.jpg").write_text("no picture")
    description = ingest("x", of_folder(folder, max_broken=0.1), seed=0, root=tmp_path)
    assert description["quarantined"] == 2 and sum(description["counts"].values()) == 40
    with open(tmp_path / "quarantine/x/reasons.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["origin"] for row in rows] == ["class0/torn.png", "class1/text.jpg"]
    assert "damaged" in rows[0]["reason"] and "not a picture" in rows[1]["reason"]
    for row in rows:
        assert (tmp_path / "quarantine/x" / row["file"]).read_bytes() == (folder / row["origin"]).read_bytes()
    (folder / "class0/torn.png").unlink()
    (folder / "class1/text.jpg").unlink()
    ingest("x", of_folder(folder), seed=0, root=tmp_path)
    assert not (tmp_path / "quarantine/x").exists()


def test_too_many_broken_ones_fail_and_keep_the_old_output(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 40)
    ingest("x", of_folder(folder), seed=0, root=tmp_path)
    before = content(tmp_path / "processed/x")
    (folder / "class0/torn.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"1 of 41 examples are broken \(2.4%, max_broken is 1.0%\).*torn.png.*csv"):
        ingest("x", of_folder(folder), seed=0, root=tmp_path)
    assert content(tmp_path / "processed/x") == before
    assert [path.name for path in (tmp_path / "processed").iterdir()] == ["x"]  # no half output beside it
    assert (tmp_path / "quarantine/x/reasons.csv").exists()


def test_an_image_of_absurd_dimensions_is_refused_before_decoding(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 3)
    data = (folder / "class0/000000.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + data[24:29]  # would decode to 10 GB
    (folder / "class0/bomb.png").write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    with pytest.raises(UserError, match=r"bomb.png: 60,000×60,000 pixels, more than 64,000,000 in all"):
        ingest("x", of_folder(folder), seed=0, root=tmp_path)


def test_too_few_examples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few: none is left for the validation split"):
        ingest("x", of_folder(pictures(tmp_path / "pictures", 3)), seed=0, root=tmp_path)


def test_no_write_permission(tmp_path: Path) -> None:
    (tmp_path / "processed").write_text("a file where the folder should be")  # holds for root as well
    with pytest.raises(UserError, match=r"processed/digits: cannot be written"):
        ingest("digits", DIGITS, seed=0, root=tmp_path)


@pytest.mark.parametrize("call", ["os.replace", "numpy.save", "genus.data.ingestion.open"])
def test_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    ingest("digits", DIGITS, seed=0, root=tmp_path)
    before = content(tmp_path / "processed/digits")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(call, full, raising=False)
    with pytest.raises(UserError, match=r"processed/digits: cannot be written: No space left on device"):
        ingest("digits", DIGITS, seed=1, root=tmp_path)
    monkeypatch.undo()
    assert content(tmp_path / "processed/digits") == before
    assert [path.name for path in (tmp_path / "processed").iterdir()] == ["digits"]


PEAK = """
import sys
from genus.config import Dataset
from genus.data.ingestion import ingest
ingest("x", Dataset(source="image_folder", options={"path": sys.argv[1], "size": 16}), seed=0, root=sys.argv[2])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_does_not_follow_the_number_of_images(tmp_path: Path) -> None:
    """1,000 and 8,000 files here; benchmarks/ingest_memory.py does 5,000 and 50,000."""
    peaks = []
    for count in (1000, 8000):
        folder = tmp_path / str(count)
        (folder / "a").mkdir(parents=True)
        picture = folder / "a" / "0.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(picture)
        for number in range(1, count):
            (folder / "a" / f"{number}.png").hardlink_to(picture)
        command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / f"out{count}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.2 * peaks[0], peaks
