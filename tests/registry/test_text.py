"""A model of text, out of the registry: by program, as it is served, as one types it, and before the gate."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

import genus
from genus import tracking
from genus.cli import app
from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.registry import gate, runtime
from genus.registry.gate import Quality, Trial, decide
from genus.registry.package import package
from genus.registry.versions import ensure
from genus.stages import trial
from tests.registry.workspace import SPECS, workspace, write_model

__all__ = ["workspace"]  # a fixture: pytest finds it by its name

NAME, FAMILY = "verses-lstm", "autoregressive/lstm"
SPEC = SPECS["text"]
DOCUMENTS = ["abc", "a bad cab.", "", "face\nfeed", "hhhhhhhhhhhhhhhhhhhh"]


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of an untrained model."""
    root = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        package(write_model(NAME, FAMILY), root / "package", knobs={"temperature": 0.8})
    return root / "package"


def publish() -> None:
    client = tracking.client()
    run = client.create_run(tracking._experiment(client, "verses"), run_name=NAME)
    number = ensure(client, write_model(NAME, FAMILY), run, None, {}, {})
    client.set_registered_model_alias(NAME, "champion", number)


def type_(*arguments: str) -> None:
    app([*arguments], standalone_mode=False)


def test_a_seed_is_a_text_whatever_else_is_asked_for(packaged: Path) -> None:
    model = runtime.load(packaged)
    texts = model.sample([3, 1, 3])
    assert texts.dtype == object and all(isinstance(text, str) for text in texts)
    assert texts[0] == texts[2] != texts[1] and model.sample([1])[0] == texts[1]
    assert set("".join(texts)) <= set(SPEC.alphabet) and model.knobs["temperature"] == 0.8
    begun = model.sample([3, 1], prompt="a bad ")
    assert all(text.startswith("a bad ") for text in begun)
    each = model.sample([3, 1], prompt=["cab", "a bad "])
    assert each[0].startswith("cab") and each[1] == begun[1]
    assert model.sample([3], prompt="", temperature=0.8)[0] == texts[0]
    for options, line in (
        ({"prompt": "xyz"}, "'x' is not in the alphabet"),
        ({"prompt": ["a"]}, "1 prompts for 2 seeds: one each"),
        ({"prompt": [1, 2]}, "parameter 'prompt' of verses-lstm is text"),
        ({"temprature": 1.0}, "did you mean 'temperature'?"),
        ({"temperature": -1.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=re.escape(line)):
            model.sample([1, 2], **options)  # type: ignore[arg-type]


def test_scores_are_the_familys_whatever_else_is_scored(packaged: Path) -> None:
    model = runtime.load(packaged)
    nats = model.log_prob(DOCUMENTS)
    for text, found in zip(DOCUMENTS, nats, strict=True):
        x = torch.tensor([[*SPEC.tokens(text), 0]])
        with torch.no_grad():
            expected = model.model.log_prob(Batch(x), generator=torch.Generator()).item()
        assert found == pytest.approx(expected, abs=1e-4)
    bits = model.bits_per_char(nats, DOCUMENTS)
    assert bits[0] == pytest.approx(-nats[0] / np.log(2) / 4), "the end is a character"
    told: list[tuple[int, int]] = []
    model.log_prob(["a"] * 230, report=lambda done, total: told.append((done, total)))
    assert told == [(100, 230), (200, 230), (230, 230)]
    for documents, line in (
        (["abc", "xyz"], "document 1: 'x' is not in the alphabet"),
        (["abc", 5], "verses-lstm scores documents: number 1 is no text but 5"),
        ("abc", "a list of them: not one text"),
    ):
        with pytest.raises(ValueError, match=line):
            model.log_prob(documents)  # type: ignore[arg-type]
    model.spec = DataSpec(SPEC.shape, 0, (), SPEC.alphabet[:-1] + "\ufffd")
    assert model.tokens(["axb"]) == [[*SPEC.tokens("a"), len(SPEC.alphabet), *SPEC.tokens("b"), 0]]


def test_a_prompt_is_a_column_and_a_parameter(packaged: Path) -> None:
    model, alone = mlflow.pyfunc.load_model(str(packaged), suppress_warnings=True), runtime.load(packaged)
    inputs = json.loads(model.metadata.signature.to_dict()["inputs"])
    assert [column["name"] for column in inputs] == ["seed", "label", "prompt"]
    rows = pd.DataFrame({"seed": [3, 1, 2], "prompt": ["cab", None, ""]})
    expected = alone.sample([3, 1, 2], prompt=["cab", "fed", ""])
    assert list(model.predict(rows, params={"prompt": "fed"})) == list(expected)
    assert list(model.predict(pd.DataFrame({"seed": [3]}), params={"prompt": "cab"})) == [expected[0]]
    nulls = pd.DataFrame({"seed": [3]}).assign(prompt=None, label=None)
    assert list(model.predict(nulls)) == list(alone.sample([3]))
    for data, line in (
        ({"seed": [1], "promt": ["a"]}, "no column 'promt' is known: seed, label, prompt"),
        ({"seed": [1], "prompt": ["x"]}, "'x' is not in the alphabet"),
    ):
        with pytest.raises(mlflow.MlflowException, match=line):
            model.predict(pd.DataFrame(data))


def test_its_card_speaks_of_text(packaged: Path) -> None:
    told = (packaged / "README.md").read_text()
    assert "text of 11 different symbols, a document at a time" in told and "texts = model.predict" in told
    assert "image" not in told and "`prompt` (default '')" in told and "kind `exact`" in told


def test_genus_sample_prints_text(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish()
    expected = genus.load(NAME).sample(range(2, 5), prompt="a cab").tolist()
    options = ("sample", NAME, "-n", "3", "--seed", "2", "--prompt", "a cab")
    type_(*options)
    assert capsys.readouterr().out == "\n\n".join(expected) + "\n"
    type_(*options, "--out", "some/x.txt")
    type_(*options, "--out", "x.json")
    assert Path("some/x.txt").read_text() == "\n\n".join(expected) + "\n"
    assert json.loads(Path("x.json").read_text()) == expected
    for more, line in (
        (["--out", "x.png"], "--out x.png: verses-lstm writes text: .txt or .json"),
        (["--prompt", "xyz"], "'x' is not in the alphabet"),
        (["--set", "temperature=hot"], "parameter 'temperature' of verses-lstm is a number"),
    ):
        with pytest.raises(UserError, match=re.escape(line)):
            type_("sample", NAME, *more)


def test_genus_score_reads_documents(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish()
    documents = ["a bad cab.", "feed"]
    Path("x.txt").write_text("a bad cab.\n\nfeed\n")
    Path("x.jsonl").write_text('"a bad cab."\n{"text": "feed"}\n')
    pd.DataFrame({"text": documents}).to_parquet("x.parquet")
    model = genus.load(NAME)
    nats = model.log_prob(documents)
    for data in ("x.txt", "x.jsonl", "x.parquet"):
        type_("score", NAME, data, "--out", "y.parquet")
        table = pd.read_parquet("y.parquet")
        assert list(table.columns) == ["index", "nats", "characters", "bits_per_char", "kind"]
        np.testing.assert_array_equal(table["nats"], nats)
        assert list(table["characters"]) == [11, 5] and set(table["kind"]) == {"exact"}
    mean = -nats.sum() / np.log(2) / 16
    assert f"2 examples, on average {mean:.4f} bits/char (exact)" in capsys.readouterr().out
    np.save("x.npy", np.zeros((2, 3), np.uint8))
    Path("bad.jsonl").write_text('{"txt": 1}\n')
    Path("empty.txt").write_text("\n")
    Path("bad.parquet").write_text("no")
    for data, line in (
        ("x.npy", "x.npy: verses-lstm scores documents"),
        ("bad.jsonl", "bad.jsonl: right would be a JSON string, or an object with 'text', a line"),
        ("empty.txt", "empty.txt: no documents in it"),
        ("bad.parquet", "bad.parquet: no Parquet file with a column 'text'"),
        ("absent.txt", "absent.txt: no such file"),
    ):
        with pytest.raises(UserError, match=re.escape(line)):
            type_("score", NAME, data, "--out", "z.parquet")


# The gate


def scored(change: float = 0.0, **more: Any) -> Trial:
    random = np.random.default_rng(0)
    tokens = random.integers(5, 200, 300)
    bits = random.normal(2.0, 0.4, 300) + change
    found = {"copied": 0.0, "copied_half": 0.04, "distinct": 0.9, "distinct_half": 0.01} | more.pop("quality", {})
    return Trial(
        **({"kind": "exact", "bits": tuple(bits), "tokens": tuple(tokens.tolist()), "sample_ms": 9.0} | more),
        quality={100: Quality(**found)},
    )


def test_the_gate_weighs_documents_by_length_and_guards_variety_and_copying() -> None:
    better = decide(scored(-0.05), scored(), "1")
    assert better.promoted and "bits_per_char (exact)" in better.reason
    row, plain = better.rows[0], scored()
    assert row.champion == pytest.approx(np.average(plain.bits, weights=plain.tokens))
    assert row.challenger - row.champion == pytest.approx(-0.05)
    assert [r.name for r in better.rows] == ["bits_per_char (exact)", "distinct", "copied", "sample_ms"]
    assert not decide(scored(0.05), scored(), "1").promoted
    for quality, why in (({"distinct": 0.8}, "distinct 0.8 against 0.9"), ({"copied": 0.2}, "copied 0.2 against 0")):
        lost = decide(scored(-0.05, quality=quality), scored(), "1")
        assert lost.rule == "guard" and why in lost.reason
    # What is better in the short documents alone is not better.
    short = np.array(plain.tokens) < 20
    change = np.where(short, -0.2, 0.05)
    mixed = scored(bits=tuple(np.array(plain.bits) + change))
    assert not decide(mixed, plain, "1").promoted


def test_a_trial_of_text(packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trial, "SAMPLE_SECONDS", 0.0)  # as few as there may be
    folder = tmp_path / "data/processed/verses"
    (folder / "offsets").mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, n in (("train", 400), ("validation", 120), ("test", 50)):
        lengths = random.integers(5, 30, n)
        tokens = random.integers(1, SPEC.vocabulary, lengths.sum() + n).astype(np.uint8)
        ends = np.cumsum(lengths + 1)
        tokens[ends - 1] = 0
        np.save(folder / f"{split}.npy", tokens)
        np.save(folder / "offsets" / f"{split}.npy", np.concatenate([[0], ends]))
    (folder / "dataset.json").write_text(json.dumps({"spec": SPEC.to_json(), "sha256": "ab"}))
    found = Trial.of(json.loads(json.dumps(trial.trial(packaged, "verses"))))
    assert (found.fault, found.unfit, found.kind) == ("", "", "exact")
    assert len(found.bits) == len(found.tokens) == 120 and all(6 <= n <= 30 for n in found.tokens)
    figures = found.quality[100]
    assert figures.frechet is None and figures.distinct is not None and abs(figures.copied) < 0.1
    assert found.sample_ms is not None and not decide(found, found, "1").promoted
    spec = SPEC.to_json() | {"alphabet": "abc"}
    (folder / "dataset.json").write_text(json.dumps({"spec": spec, "sha256": "ab"}))
    assert trial.trial(packaged, "verses")["unfit"] == "it is a model of another alphabet than the data have"
    assert gate.METRICS == 1, "what images are measured by has not changed"
