"""Validation: each fault is caught by the expectation that is for it, and severity decides what happens then."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from genus.config import Dataset as Config
from genus.data.ingestion import ingest
from genus.data.loaders import SPLITS, Dataset, open_dataset
from genus.data.sources import About, Example
from genus.data.spec import DataSpec
from genus.data.validation import validate
from genus.data.validation.tables import drift
from genus.errors import UserError
from genus.files import sha256

Images = dict[str, list[tuple[np.ndarray, int]]]


class Given:
    """A source that gives what it is told to."""

    def __init__(self, images: Images):
        self.images = images

    def about(self) -> About:
        return About(DataSpec((1, 6, 6), 256, ("a", "b")), "none", "made up", sum(map(len, self.images.values())))

    def examples(self):  # type: ignore[no-untyped-def]
        for split, images in self.images.items():
            for image, label in images:
                yield Example(split, image, label, split)


def sound() -> Images:
    generator = np.random.default_rng(0)
    rows = {"train": 400, "validation": 200, "test": 200}
    return {
        split: [(generator.integers(0, 256, (1, 6, 6), np.uint8), number % 2) for number in range(count)]
        for split, count in rows.items()
    }


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Images], Dataset]:
    """Ingests given images as data set ``x``."""

    def make(images: Images) -> Dataset:
        monkeypatch.setattr("genus.data.ingestion.open_source", lambda *_: Given(images))
        ingest("x", Config(source="given"), seed=0, root=tmp_path)
        return open_dataset("x", tmp_path / "processed")

    return make


def failing(record: dict[str, Any]) -> list[str]:
    return [outcome["column"] for outcome in record["expectations"] if not outcome["success"]]


def refused(data: Dataset, tmp_path: Path, message: str, **checks: float) -> None:
    """Validation stops with one line that has the message and names the page, and leaves no record."""
    record = tmp_path / "reports/validation/x.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("the record of a better day")
    with pytest.raises(UserError, match=message) as raised:
        validate(data, checks, tmp_path / "reports")
    page = tmp_path / "reports/data_docs/x/index.html"
    assert str(page) in str(raised.value) and "\n" not in str(raised.value)
    assert "Failed" in page.read_text() and not record.exists()


def test_sound_data_passes_and_the_record_is_the_same_every_time(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = made(sound())
    records = []
    for root in ("one", "two"):
        assert failing(validate(data, {}, tmp_path / root)) == []
        records.append((tmp_path / root / "validation/x.json").read_bytes())
    assert records[0] == records[1]
    record = json.loads(records[0])
    assert record["sha256"] == data.description["sha256"] and [row["split"] for row in record["splits"]] == list(SPLITS)
    assert {"expectation", "severity", "success", "observed", "expected"} <= set(record["expectations"][0])
    text = records[0].decode()
    assert str(tmp_path) not in text and "run_id" not in text and "time" not in text


def test_the_page_needs_no_network(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    validate(made(sound()), {}, tmp_path / "reports")
    page = (tmp_path / "reports/data_docs/x/index.html").read_text()
    assert "Evaluated Expectations" in page and "drift of mean" in page
    assert "<script" not in page and "<link" not in page and "src=" not in page and "http" not in page


def test_duplicates_across_splits(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    images = sound()
    images["test"][:10] = images["train"][:10]
    data = made(images)
    refused(data, tmp_path, r"expect_column_max_to_be_between\(shared\): max_value 0.001; observed 0.05;")
    assert failing(validate(data, {"duplicates": 0.05, "repeats": 0.05}, tmp_path / "reports")) == []


def test_drift_between_splits(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    images = sound()
    images["test"] = [(image // 2, label) for image, label in images["test"]]
    refused(made(images), tmp_path, r"drift of entropy\): max_value 0.1; observed 0.358671 \(and 2 more\)")


def test_constant_images(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    images = sound()
    images["train"][3] = (np.full((1, 6, 6), 9, np.uint8), 1)
    data = made(images)
    refused(data, tmp_path, r"no constant images: .*\(std\): .*unexpected_count': 1")
    assert failing(validate(data, {"constant": 0.01}, tmp_path / "reports")) == []


def test_a_class_that_is_missing(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    images = {split: [(image, 0) for image, _ in some] for split, some in sound().items()}
    refused(made(images), tmp_path, r"every class, and no other: .*\(label\)")


def test_a_class_that_nobody_named(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    images = sound()
    images["train"][0] = (images["train"][0][0], 7)
    refused(made(images), tmp_path, r"every class, and no other: .*\(label\)")


def test_imbalance_is_a_warning_and_goes_on(made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    images = sound()
    images["train"] = [(image, int(number % 10 == 0)) for number, (image, _) in enumerate(images["train"])]
    record = validate(made(images), {}, tmp_path / "reports")
    assert failing(record) == ["balance"] and (tmp_path / "reports/validation/x.json").exists()
    warning = capsys.readouterr().err
    assert "warning: data set 'x': rarest class over the mean class" in warning and "observed 0.2" in warning
    assert "index.html" in warning


def test_arrays_that_are_not_the_tables(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = made(sound())
    images = np.array(data.split("train"))
    images[5] += 1
    np.save(data.folder / "train.npy", images)
    refused(data, tmp_path, r"\(agreeing\): min_value 1.0; observed 0.9975")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda images: images[:-1], r"\(rows = "),
        (lambda images: images.astype(np.float32), r"type of the images: .*float32"),
        (lambda images: images[:, :, :5], r"shape of an example: .*1×5×6"),
    ],
)
def test_wrong_rows_type_and_shape(made, tmp_path: Path, wrong, message: str) -> None:  # type: ignore[no-untyped-def]
    data = made(sound())
    np.save(data.folder / "test.npy", wrong(np.array(data.split("test"))))
    with pytest.raises(UserError) as raised:
        validate(data, {}, tmp_path / "reports")
    record = json.dumps(_failed(data, tmp_path), ensure_ascii=False)
    assert "and" in str(raised.value)  # the hash disagrees as well
    assert re.search(message.replace(r"\(", "").replace(": .*", ".*"), record)


def _failed(data: Dataset, tmp_path: Path) -> list[list[Any]]:
    from genus.data.validation.evaluate import evaluate
    from genus.data.validation.suite import Checks

    record, _ = evaluate(data, Checks())
    return [[o["column"], o["about"], o["observed"]] for o in record["expectations"] if not o["success"]]


def test_a_column_that_is_missing(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = made(sound())
    path = data.folder / "table.parquet"
    pd.read_parquet(path).drop(columns="max").to_parquet(path)
    refused(data, tmp_path, "columns of the table|brightest level")


def test_a_table_that_is_torn(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = made(sound())
    path = data.folder / "table.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"table\.parquet: unreadable table: .*ingest again"):
        validate(data, {}, tmp_path / "reports")


def test_misspelt_check(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"datasets\.x\.checks: unknown key 'balanse': did you mean 'balance'"):
        validate(made(sound()), {"balanse": 0.5}, tmp_path / "reports")


def test_drift_is_nothing_by_chance_and_all_for_strangers() -> None:
    generator = np.random.default_rng(0)
    alike = [drift(generator.normal(size=300), generator.normal(size=200)) for _ in range(200)]
    assert np.mean(np.array(alike) > 0) <= 0.02  # once in a thousand, and the bound is not exact
    assert drift(np.zeros(10_000), np.ones(10_000)) == pytest.approx(1, abs=0.03)
    shifted = drift(generator.normal(size=20_000), generator.normal(0.5, size=20_000))
    assert shifted == pytest.approx(0.1974 - 0.0195, abs=0.02)  # 2 Phi(1/4) - 1, less chance


def test_validation_leaves_the_data_alone(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = made(sound())
    before = {path: sha256(path) for path in data.folder.rglob("*.*")}
    shutil.rmtree(tmp_path / "reports", ignore_errors=True)
    validate(data, {}, tmp_path / "reports")
    assert {path: sha256(path) for path in data.folder.rglob("*.*")} == before
