"""Pulling: what is used is what was registered, byte for byte, or one line says what is wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import genus
from genus import tracking
from genus.cli import app
from genus.errors import UserError
from genus.registry import entries
from genus.registry.package import MANIFEST, contents, seal
from genus.registry.pull import Wanted, find, open_package, pull
from tests.registry.workspace import MODEL, SPEC, publish, workspace
from tests.servers import local_mlflow

__all__ = ["workspace"]  # a fixture: pytest finds it by its name

WEIGHTS = "artifacts/weights.safetensors"


def type_(*arguments: str) -> None:
    """As a person types it, in this process; a UserError comes out as it is."""
    app(list(arguments), standalone_mode=False)


def tags(**values: str) -> None:
    for key, value in values.items():
        tracking.client().set_model_version_tag(MODEL, "1", f"genus.{key}", value)


@pytest.mark.parametrize(
    ("reference", "wanted"),
    [
        ("digits-vae", Wanted("digits-vae", "champion")),
        ("digits-vae@challenger", Wanted("digits-vae", "challenger")),
        ("digits-vae/12", Wanted("digits-vae", "", "12")),
        ("digits-vae/007", Wanted("digits-vae", "", "7")),
        ("models:/digits@best-density", Wanted("digits", "best-density")),
        ("models:/digits-vae/3", Wanted("digits-vae", "", "3")),
    ],
)
def test_references(reference: str, wanted: Wanted) -> None:
    assert Wanted.parse(reference) == wanted


@pytest.mark.parametrize(
    "reference", ["", "@champion", "a/b", "a@", "a/", "a@b@c", "a/1/2", "a@b/1", "models:/", "a b"]
)
def test_what_names_no_model(reference: str) -> None:
    with pytest.raises(UserError, match="names no model: write name, name@alias or name/3"):
        Wanted.parse(reference)


def test_pulled_is_what_was_registered_even_after_use_in_place(workspace: Path) -> None:
    import mlflow

    publish(seed=0)
    publish(seed=1)
    tracking.client()
    plain = mlflow.pyfunc.load_model(f"models:/{MODEL}/1", suppress_warnings=True)  # leaves files where it loads
    place = open_package(f"{MODEL}/1")
    assert len([path for path in place.rglob("*") if path.is_file()]) > len(contents(place)) + 1
    folder = pull(f"{MODEL}/1", workspace / "deep" / "pulled")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*contents(place), MANIFEST}
    assert all((folder / path).read_bytes() == (place / path).read_bytes() for path in found)
    expected = plain.predict(pd.DataFrame({"seed": [1, 2]}))
    np.testing.assert_array_equal(genus.load(f"{MODEL}/1").sample([1, 2]), expected)
    assert (genus.load(MODEL).sample([1, 2]) != expected).any()  # the champion is version 2


def _flip(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def _append(path: str):
    def tamper(folder: Path) -> None:
        with open(folder / path, "a") as file:
            file.write("\n")

    return tamper


def _link(folder: Path) -> None:
    """The same content, but where somebody can change it after it has been verified."""
    (folder / WEIGHTS).rename("elsewhere")
    (folder / WEIGHTS).symlink_to(Path("elsewhere").absolute())


def _reseal(folder: Path) -> None:
    _flip(folder)
    seal(folder)


@pytest.mark.parametrize(
    ("tamper", "line"),
    [
        (_flip, f"{WEIGHTS} is not the one that was registered"),
        (_append("MLmodel"), "MLmodel is not the one"),
        (_append("artifacts/code/runtime.py"), "artifacts/code/runtime.py is not the one"),
        (_reseal, f"{MANIFEST} is not the one"),
        (lambda folder: (folder / "served.py").unlink(), "served.py is missing from its package"),
        (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST} is missing"),
        (lambda folder: (folder / "artifacts/code/torch.py").write_text(""), "artifacts/code/torch.py was not in its"),
        (lambda folder: (folder / "more").symlink_to(folder), "more was not in its package"),
        (_link, f"{WEIGHTS} is not the one"),
        (shutil.rmtree, "its package is gone"),
    ],
    ids=["byte", "MLmodel", "code", "manifest", "missing", "no-manifest", "extra", "link", "linked", "gone"],
)
def test_a_tampered_file_is_named_and_nothing_is_used(workspace: Path, tamper, line: str) -> None:
    publish()
    tamper(open_package(MODEL))
    for attempt in (lambda: pull(MODEL, "pulled"), lambda: open_package(MODEL), lambda: genus.load(MODEL)):
        with pytest.raises(UserError) as raised:
            attempt()
        assert str(raised.value).startswith(f"{MODEL}/1: ") and line in str(raised.value)
    assert not Path("pulled").exists()
    assert not list(workspace.glob(".pulled*"))


def test_a_cold_sample_imports_no_mlflow_and_runs_no_compiled_code(workspace: Path) -> None:
    """MLflow takes seconds of the six that a cold start may take; compiled files are not what was verified."""
    publish()
    for source in (open_package(MODEL) / "artifacts" / "code").rglob("*.py"):
        evil = compile("raise SystemExit('compiled code was run')", str(source), "exec")
        stat = source.stat()
        content = importlib._bootstrap_external._code_to_timestamp_pyc(evil, int(stat.st_mtime), stat.st_size)  # type: ignore[attr-defined]
        cache = Path(importlib.util.cache_from_source(str(source)))
        cache.parent.mkdir(exist_ok=True)
        cache.write_bytes(content)
    code = (
        "import sys; from genus.cli import app; app(sys.argv[1:], standalone_mode=False);"
        "print(sorted({'mlflow', 'pandas', 'prefect', 'dvc', 'sklearn', 'torchvision'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "sample", MODEL, "-n", "2", "--out", "x.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.stdout.split("\n")[:2] == ["x.png", "[]"], done.stderr


def test_what_is_not_there_is_named_with_what_is(workspace: Path) -> None:
    publish()
    publish(seed=1, alias="challenger")
    for reference, line in (
        ("digits-vea", r"no model 'digits-vea' in the registry .*: did you mean 'digits-vae'\?"),
        (f"{MODEL}@best", r"digits-vae has no alias 'best': there is challenger \(version 2\), champion \(version 1\)"),
        (f"{MODEL}/9", "digits-vae has no version 9: there is 1, 2"),
    ):
        with pytest.raises(UserError, match=line):
            pull(reference, "pulled")
    tracking.client().delete_model_version(MODEL, "1")
    with pytest.raises(UserError, match=r"no alias 'champion': there is challenger|no version 1: there is 2"):
        pull(MODEL, "pulled")
    shutil.rmtree("mlflow")
    with pytest.raises(UserError, match=r"mlflow.db: no registry is here: `genus run` makes one"):
        pull(MODEL, "pulled")
    assert not Path("mlflow").exists()  # asking makes none
    Path("mlflow").mkdir()
    Path("mlflow/mlflow.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match=r"mlflow.db: cannot be read: file is not a database"):
        pull(MODEL, "pulled")


def test_versions_of_other_genera(workspace: Path) -> None:
    publish()
    tags(format="2")
    with pytest.raises(UserError, match=r"made by a newer Genus \(format 2, this one reads 1\): upgrade"):
        pull(MODEL, "pulled")
    tags(format="1", manifest="")
    with pytest.raises(UserError, match="has no manifest to be verified by"):
        genus.load(MODEL)


def test_a_newer_manifest_is_said_to_be_newer_not_damaged(workspace: Path) -> None:
    import json

    from genus.files import sha256

    publish()
    manifest = open_package(MODEL) / MANIFEST
    manifest.write_text(json.dumps({"format": 3, "content": "in a way that nobody knows yet"}))
    tags(manifest=sha256(manifest))
    with pytest.raises(UserError, match=r"made by a newer Genus \(format 3, this one reads 1\)"):
        genus.load(MODEL)


def test_a_folder_is_replaced_only_where_it_is_a_package(workspace: Path) -> None:
    publish(seed=0)
    publish(seed=1)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    Path("file").write_text("")
    for place in ("mine", "file", "."):
        with pytest.raises(UserError, match="is there already and no package: choose another folder"):
            pull(MODEL, place)
    assert Path("mine/thesis.txt").read_text() == "years of work"
    Path("empty").mkdir()
    first = (pull(f"{MODEL}/1", "empty") / WEIGHTS).read_bytes()
    assert (pull(MODEL, "empty") / WEIGHTS).read_bytes() != first
    _flip(open_package(f"{MODEL}/1"))
    champion = (Path("empty") / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="is not the one"):
        pull(f"{MODEL}/1", "empty")
    assert (Path("empty") / WEIGHTS).read_bytes() == champion  # the old stays where the new is broken


@pytest.mark.parametrize("form", ["mlflow-artifacts:/{}", "file://{}", "{}"])
def test_however_the_store_says_where_artifacts_are(workspace: Path, form: str) -> None:
    publish()
    place = open_package(MODEL)
    assert place.is_relative_to(workspace / "mlflow/artifacts")
    where = form.format(place.relative_to(workspace / "mlflow/artifacts") if "mlflow" in form else place)
    with contextlib.closing(sqlite3.connect("mlflow/mlflow.db")) as store, store:
        for change in (
            "model_versions SET storage_location = NULL",
            f"logged_models SET artifact_location = '{where}'",
        ):
            store.execute(f"UPDATE {change}")
    assert open_package(MODEL) == place
    with contextlib.closing(sqlite3.connect("mlflow/mlflow.db")) as store, store:
        store.execute(f"UPDATE model_versions SET storage_location = '{where}'")
    assert open_package(MODEL) == place


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """A server that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_does_not_answer_is_one_line_and_soon(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "PATIENCE", 0.3)
    with silent() as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(UserError, match=f"{address}: the registry does not answer: .*timed out"):
            pull(MODEL, "pulled")
    with pytest.raises(UserError, match=f"{address}: the registry does not answer: .*refused"):
        genus.load(MODEL)


def test_from_a_server_into_a_cache(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with local_mlflow(tmp_path / "mlflow") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        publish()
        folder = open_package(MODEL)
        assert folder.parent == tmp_path / "cache/genus" and find(MODEL).tags["genus.manifest"] == folder.name
        expected = genus.load(MODEL).sample([4])
        _flip(folder)  # a damaged cache is fetched anew
        np.testing.assert_array_equal(genus.load(MODEL).sample([4]), expected)
        pulled = pull(MODEL, "pulled")
        assert contents(pulled) == contents(folder)
        (stored,) = (tmp_path / "mlflow/artifacts").rglob("weights.safetensors")
        _flip(
            stored.parents[1]
        )  # on the server: what is verified in the cache still serves, pulling says what is wrong
        np.testing.assert_array_equal(genus.load(MODEL).sample([4]), expected)
        shutil.rmtree(folder)
        with pytest.raises(UserError, match=f"{MODEL}/1: {WEIGHTS} is not the one that was registered"):
            genus.load(MODEL)
        assert not folder.exists()
        stored.unlink()
        with pytest.raises(UserError, match=f"{MODEL}/1: |cannot be used"):
            pull(MODEL, "again")
        with pytest.raises(UserError, match=r"no model 'digits-vea' .*: did you mean 'digits-vae'"):
            pull("digits-vea", "again")
    with pytest.raises(UserError, match=f"{address}: the registry does not answer"):
        genus.load(MODEL)


def test_genus_sample(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(knobs={"temperature": 0.5})
    type_("sample", MODEL, "-n", "5", "--seed", "3", "--out", "some/x.npy")
    drawn = np.load("some/x.npy")
    np.testing.assert_array_equal(drawn, genus.load(MODEL).sample(range(3, 8)))
    type_("sample", f"{MODEL}@champion", "-n", "4", "--out", "x.npy", "--set", "temperature=1")
    np.testing.assert_array_equal(np.load("x.npy"), genus.load(MODEL).sample(range(4), temperature=1.0))
    type_("sample", MODEL, "-n", "6", "--out", "x.png")
    with Image.open("x.png") as picture:
        assert picture.mode == "L" and picture.width == 3 * 8 * 7
    assert capsys.readouterr().out.split() == ["some/x.npy", "x.npy", "x.png"]
    for options, line in (
        (["--out", "x.jpg"], "--out x.jpg: ends in neither .png nor .npy"),
        (["--out", "y.npy", "--set", "temprature=1"], "no parameter 'temprature': did you mean 'temperature'?"),
        (["--out", "y.npy", "--set", "temperature=hot"], "parameter 'temperature' of digits-vae is a number"),
        (["--out", "y.npy", "--set", "temperature"], "--set temperature: write KEY=VALUE"),
        (["--out", "y.npy", "--label", "1"], "digits-vae takes no label"),
    ):
        with pytest.raises(UserError) as raised:
            type_("sample", MODEL, *options)
        assert line in str(raised.value)
    assert not Path("y.npy").exists()


def test_genus_score(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish()
    images = np.random.default_rng(0).integers(0, SPEC.levels, (230, *SPEC.shape), np.uint8)
    np.save("images.npy", images)
    type_("score", MODEL, "images.npy", "--out", "scores.parquet")
    table = pd.read_parquet("scores.parquet")
    assert list(table.columns) == ["index", "nats", "bits_per_dim", "kind"]
    assert list(table["index"]) == list(range(230)) and set(table["kind"]) == {"elbo"}
    model = genus.load(MODEL)
    np.testing.assert_array_equal(table["nats"], model.log_prob(images))
    np.testing.assert_allclose(table["bits_per_dim"], -table["nats"] / np.log(2) / 64)
    assert f"230 examples, on average {table['bits_per_dim'].mean():.4f} bits/dim (elbo)" in capsys.readouterr().out
    np.save("wide.npy", np.zeros((2, 1, 9, 9), np.uint8))
    np.save("float.npy", np.zeros((2, 1, 8, 8)))
    np.save("bright.npy", np.full((2, 1, 8, 8), 17, np.uint8))
    Path("text.npy").write_text("text")
    for data, line in (
        ("wide.npy", "digits-vae scores uint8 [N, 1, 8, 8], not uint8 [2, 1, 9, 9]"),
        ("float.npy", "digits-vae scores uint8 [N, 1, 8, 8], not float64"),
        ("bright.npy", "digits-vae knows levels 0 to 16: there is a 17"),
        ("text.npy", "text.npy: no .npy file"),
        ("absent.npy", "absent.npy: No such file"),
        ("digits:test", "data/processed/digits: no such data set"),
        ("digits:tset", "digits:tset: neither a .npy file nor DATASET:SPLIT"),
    ):
        with pytest.raises(UserError) as raised:
            type_("score", MODEL, data, "--out", "x.parquet")
        assert line in str(raised.value)
    with pytest.raises(UserError, match=r"does not end in \.parquet"):
        type_("score", MODEL, "images.npy", "--out", "x.csv")
    assert not Path("x.parquet").exists()
