"""Flipped bits, cut files and half-written records: found, named in one line, made again where it can be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from ruamel.yaml import YAML

import pipelines.run
from genus import config
from genus.data.loaders import open_dataset
from genus.errors import UserError
from genus.files import read_json, read_tensors, replacing, write_text
from pipelines import mend, plan
from pipelines.outcome import TIMED
from tests.conftest import ROOT
from tests.pipelines.conftest import ran, toy  # noqa: F401 (a fixture)

WEIGHTS = Path("models/digits-vae/weights.safetensors")


def repro(*arguments: str) -> str:
    done = subprocess.run(["dvc", "repro", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def content() -> dict[str, str]:
    """Path -> SHA-256 of every output that is no figure of time."""
    paths = (path for top in ("data", "models", "reports") for path in Path(top).rglob("*") if path.is_file())
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if not str(path).startswith(TIMED)
    }


def cached(path: Path) -> Path:
    """The object in DVC's cache of a file as it is now."""
    name = hashlib.md5(path.read_bytes()).hexdigest()
    return Path(".dvc/cache/files/md5", name[:2], name[2:])


def flip(path: Path) -> None:
    """One bit, as a bad disk does it: time, size and mode stay."""
    before = path.stat()
    path.chmod(0o644)
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(changed)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("links", ["copy", "hardlink"])
def test_flipped_bit_in_output_and_cache(toy: Path, links: str) -> None:  # noqa: F811
    subprocess.run(["dvc", "config", "cache.type", links], check=True)
    repro("train@digits-vae")
    before, stages = content(), ran(toy)
    object_ = cached(WEIGHTS)
    flip(object_)
    if links == "copy":  # else it is the same file
        flip(WEIGHTS)
    assert content() != before
    assert "didn't change" in repro("--single-item", "train@digits-vae")  # DVC alone sees nothing
    assert str(WEIGHTS) in mend.outputs(["train@digits-vae"])
    assert not object_.exists() and not WEIGHTS.exists()
    repro("train@digits-vae")
    assert content() == before and ran(toy)[len(stages) :] == ["train@digits-vae"]
    assert mend.outputs(["train@digits-vae", "ingest@digits"]) == []


def test_run_names_what_is_damaged_and_mends_it(toy: Path, prefect: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(pipelines.run, "_registered", lambda models, collections: {})
    text = (toy / "stage.py").read_text()
    (toy / "stage.py").write_text(text.replace('/weights", name)', '/weights", f"judge of {name}")'))  # of its own
    repro("evaluate@digits-vae")
    before, stages = content(), ran(toy)
    metrics, judge = Path("reports/metrics/digits-vae.json"), Path("data/judge/digits/weights")
    flip(cached(WEIGHTS))
    flip(WEIGHTS)  # lost: to be trained again
    flip(metrics)  # whole in the cache
    flip(cached(judge))
    shutil.rmtree(judge.parent)  # to be taken from the cache, which is no good
    Path(".dvc/tmp/rwlock").write_text("")  # what a kill leaves that comes while DVC writes it
    said = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    assert pipelines.run.run("smoke", models=["digits-vae"], console=said) == 0
    lines = said.export_text().splitlines()
    assert f"{WEIGHTS}: not what dvc.lock says: restored or made again" in lines
    assert f"{metrics}: not what dvc.lock says: restored or made again" in lines
    assert any(line.startswith(".dvc/tmp/rwlock: not readable; removed") for line in lines)
    assert content() == before
    stages = sorted(ran(toy)[len(stages) :])
    assert stages == ["evaluate@digits-vae", "judge@digits", "train@digits-vae"]  # evaluate: a training's time is new


def test_cut_lock_is_put_away_and_the_cache_has_all(toy: Path) -> None:  # noqa: F811
    repro("evaluate@digits-vae")
    lock, before, stages = Path("dvc.lock"), content(), ran(toy)
    text = lock.read_text()
    # Within a key: of what is cut elsewhere YAML makes a shorter file, and DVC looks the missing stages up by itself.
    lock.write_text(text[: text.index("md5:", len(text) // 2) + 2])
    said = list(mend.records())
    assert len(said) == 1 and said[0].startswith("dvc.lock: not readable; put away as .genus/dvc.lock.broken")
    repro("evaluate@digits-vae")
    assert content() == before and YAML(typ="safe").load(lock) == YAML(typ="safe").load(text)
    assert ran(toy)[len(stages) :] == ["ingest@digits"]  # whose outputs persist: those DVC does not look up
    assert list(mend.records()) == []


def test_a_deleted_folder_of_models_costs_no_run_its_parent_that_is_none(toy: Path) -> None:  # noqa: F811
    kept = (ROOT / mend.PARENTLESS).read_bytes()
    shutil.rmtree(toy / "models")
    assert list(mend.records()) == ["models/none: not there; made again, the models without a parent depend on it"]
    assert mend.PARENTLESS.read_bytes() == kept and list(mend.records()) == []
    assert "evaluate@digits-vae" in plan.make(config.load(), models=["digits-vae"]).stages


def test_cut_files_are_one_line_that_names_them(tmp_path: Path) -> None:
    array, weights, report = (tmp_path / name for name in ("train.npy", "weights.safetensors", "digits-vae.json"))
    np.save(array, np.zeros((50, 1, 8, 8), np.uint8))
    spec = {"shape": [1, 8, 8], "levels": 17, "classes": ["0"]}
    (tmp_path / "dataset.json").write_text(json.dumps({"spec": spec}))
    weights.write_bytes((100).to_bytes(8, "little") + b"{}")
    report.write_text('{"value": 1')
    data = open_dataset(tmp_path.name, tmp_path.parent)
    assert len(data.split("train")) == 50
    for size in (3000, 60, 0):
        os.truncate(array, size)
        with pytest.raises(UserError, match=r"train\.npy: unreadable array: "):
            data.split("train")
    with pytest.raises(UserError, match=r"weights\.safetensors: damaged: "):
        read_tensors(weights)
    with pytest.raises(UserError, match=r"no-such\.safetensors: no such file"):
        read_tensors(tmp_path / "no-such.safetensors")
    with pytest.raises(UserError, match=r"digits-vae\.json: not JSON: "):
        read_json(report)


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name, writer in (("a.json", dead.pid), ("a.json", os.getppid()), ("b.json", dead.pid)):
        (tmp_path / f".{name}.abcdefgh.{writer}").mkdir()
    write_text(tmp_path / "a.json", "{}")
    left = {f".a.json.abcdefgh.{os.getppid()}", f".b.json.abcdefgh.{dead.pid}"}  # a living one's, another file's
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *left}
    # Killed between the two renames of a folder: the old one comes back before the new one is made.
    (tmp_path / f".d.abcdefgh.{dead.pid}/old").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "d") as folder:
        folder.mkdir()
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "d", *left}
