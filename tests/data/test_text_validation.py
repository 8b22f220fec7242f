"""Validation of text: each fault is caught by the expectation that is for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from genus.data.loaders import SPLITS, Dataset
from genus.data.validation import validate
from genus.data.validation.evaluate import evaluate
from genus.data.validation.text import TextChecks, symbol_drift
from genus.errors import UserError
from tests.data.test_text import make, sentences  # noqa: F401 (a fixture)
from tests.data.test_validation import failing

Make = Callable[..., Dataset]


def sound() -> dict[str, list[str]]:
    lines = sentences(800)
    return {"train": lines[:400], "validation": lines[400:600], "test": lines[600:]}


def refused(data: Dataset, tmp_path: Path, message: str, **checks: float) -> None:
    with pytest.raises(UserError, match=message) as raised:
        validate(data, checks, tmp_path / "reports")
    assert "index.html" in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "reports/validation/x.json").exists()


def all_failing(data: Dataset) -> str:
    record, _ = evaluate(data, TextChecks())
    failed = [[o["column"], o["about"], o["observed"]] for o in record["expectations"] if not o["success"]]
    return json.dumps(failed, ensure_ascii=False)


def test_sound_text_passes_and_the_record_is_the_same_every_time(make: Make, tmp_path: Path) -> None:  # noqa: F811
    data, records = make(sound()), []
    for root in ("one", "two"):
        assert failing(validate(data, {}, tmp_path / root)) == []
        records.append((tmp_path / root / "validation/x.json").read_bytes())
    assert records[0] == records[1]
    record = json.loads(records[0])
    assert [row["split"] for row in record["splits"]] == list(SPLITS) and len(record["expectations"]) == 25
    assert set(record["checks"]) == {"unknown", "control", "duplicates", "repeats", "drift", "rows"}
    page = (tmp_path / "one/data_docs/x/index.html").read_text()
    assert "drift of symbols" in page and "<script" not in page and "http" not in page


def test_unknown_symbols(make: Make, tmp_path: Path) -> None:  # noqa: F811
    texts = sound()
    texts["test"] = [text.replace("o", "ø") for text in texts["test"]]
    refused(make(texts), tmp_path, "symbols outside of the alphabet.*unknown", drift=1)


def test_an_alphabet_that_drifts(make: Make, tmp_path: Path) -> None:  # noqa: F811
    texts = sound()
    texts["test"] = [text.replace("o", "u").replace("e", "u") for text in texts["test"]]
    refused(make(texts), tmp_path, r"drift of symbols\): max_value 0.1; observed 0.1")


def test_lengths_that_drift(make: Make, tmp_path: Path) -> None:  # noqa: F811
    texts = sound()
    texts["validation"] = [text[: len(text) // 2] for text in texts["validation"]]
    refused(make(texts), tmp_path, r"drift of length\): max_value 0.1; observed 0.[23]")


def test_control_characters(make: Make, tmp_path: Path) -> None:  # noqa: F811
    texts = sound()
    for number in range(5):
        texts["train"][number] += "\x1b[0m"
    data = make(texts)
    refused(data, tmp_path, r"no control characters: .*\(control\)")
    assert failing(validate(data, {"control": 0.01}, tmp_path / "reports")) == []


def test_duplicates_across_splits(make: Make, tmp_path: Path) -> None:  # noqa: F811
    texts = sound()
    texts["test"][:10] = texts["train"][:10]
    data = make(texts)
    refused(data, tmp_path, r"\(shared\): max_value 0.01; observed 0.055;")
    assert failing(validate(data, {"duplicates": 0.06}, tmp_path / "reports")) == []


def test_repeats_and_few_rows_are_warnings(
    make: Make,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = sound()
    texts["train"][:60] = texts["train"][:1] * 60
    assert failing(validate(make(texts), {"rows": 300}, tmp_path / "reports")) == ["rows", "sha1"]
    assert "few documents are there twice" in capsys.readouterr().err


def test_documents_that_are_not_the_tables(make: Make, tmp_path: Path) -> None:  # noqa: F811
    data = make(sound())
    tokens = np.array(data.split("train"))
    tokens[1] = tokens[1] % 5 + 1
    np.save(data.folder / "train.npy", tokens)
    refused(data, tmp_path, r"\(agreeing\): min_value 1.0; observed 0.9975")


@pytest.mark.parametrize(
    ("array", "wrong", "message"),
    [
        ("test", lambda tokens: tokens[:-1], "tokens and dataset.json"),
        ("test", lambda tokens: tokens[:-1], "share of the documents that end"),
        ("test", lambda tokens: np.where(np.arange(len(tokens)) == 2, 0, tokens), r"ended.*0\.99"),
        ("test", lambda tokens: np.where(np.arange(len(tokens)) == 2, 99, tokens), r'"top", "largest token", 99'),
        ("test", lambda tokens: tokens.astype(np.float32), "type of the tokens.*float32"),
        ("offsets/test", lambda offsets: offsets[:-1], "documents and table.parquet"),
        ("offsets/test", lambda offsets: offsets[::-1].copy(), "share of the documents that end"),
        ("offsets/test", lambda offsets: offsets.astype(np.int32), "type of the offsets"),
    ],
)
def test_wrong_arrays(make: Make, array: str, wrong: Callable, message: str) -> None:  # noqa: F811
    data = make(sound())
    path = data.folder / f"{array}.npy"
    given = np.load(path)
    np.save(path, wrong(given).astype(given.dtype) if "where" in str(wrong.__code__.co_names) else wrong(given))
    assert re.search(message, all_failing(data))


def test_wrong_table(make: Make, tmp_path: Path) -> None:  # noqa: F811
    data = make(sound())
    path = data.folder / "table.parquet"
    table = pd.read_parquet(path)
    table.assign(length=table["length"] - 5).to_parquet(path)
    assert "tokens and table.parquet" in all_failing(data) and "the longest document" in all_failing(data)
    table.drop(columns="length").to_parquet(path)
    with pytest.raises(UserError, match=r"table\.parquet: unreadable table: .*ingest again"):
        validate(data, {}, tmp_path / "reports")


def test_a_check_of_images_is_none_of_text(make: Make, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match=r"datasets\.x\.checks: unknown key 'constant'"):
        validate(make(sound()), {"constant": 0.5}, tmp_path / "reports")


def test_symbols_drift_by_chance_is_none_and_of_strangers_all() -> None:
    """Documents of their own mood: symbols within one are alike, a test that takes them as independent would fail."""
    generator = np.random.default_rng(0)

    def documents(n: int, tilt: float = 0.0) -> np.ndarray:
        moods = generator.dirichlet(np.full(20, 0.5) + tilt * (np.arange(20) < 5), n)
        return np.stack([generator.multinomial(generator.integers(5, 200), mood) for mood in moods])

    alike = np.array([symbol_drift(documents(300), documents(150)) for _ in range(100)])
    assert (alike > 0).mean() <= 0.02 and alike.max() < 0.01
    assert symbol_drift(documents(3000), documents(3000, tilt=1.0)) == pytest.approx(0.25, abs=0.03)
    strangers = documents(500)
    assert symbol_drift(np.pad(strangers, ((0, 0), (0, 20))), np.pad(strangers, ((0, 0), (20, 0)))) > 0.9
    assert symbol_drift(np.zeros((1, 20)), strangers) == 0
