"""Real full disks and read-only folders: one line that names the file, no half outputs, and on when there is room."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genus import config
from genus.data.ingestion import ingest
from genus.errors import UserError
from genus.files import replacing, write_json
from genus.stages import register
from pipelines.children import Children, StageFailed
from tests.pipelines.conftest import toy  # noqa: F401 (a fixture)
from tests.registry.workspace import MODEL, workspace, write_figures, write_model, write_params  # noqa: F401

FULL = "No space left on device"
READ_ONLY = "Read-only file system"
DIGITS = config.Dataset(source="digits")
Mount = Callable[..., None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """``mount("-t", "tmpfs", "-o", "size=64k", "none", folder)``; undone at the end."""
    mounted: list[str] = []

    def call(*arguments: str | Path) -> None:
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
        if str(arguments[-1]) not in mounted:
            mounted.append(str(arguments[-1]))

    yield call
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)


def small(mount: Mount, folder: Path, size: str) -> None:
    """Makes ``folder`` a disk of that size."""
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "none", folder)


def fill(folder: Path) -> Path:
    """Takes all the room that a disk has left."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


def content(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "filler":
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def folders(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()}


# From the first byte to nearly enough: in the spool, in the arrays, in the table, in the description.
@pytest.mark.parametrize("room", [0, 16, 96, 192, 288, 352])
def test_full_disk_during_ingest(tmp_path: Path, mount: Mount, room: int) -> None:
    undisturbed, data = tmp_path / "undisturbed", tmp_path / "data"
    ingest("digits", DIGITS, 0, undisturbed)
    small(mount, data, "2m")
    ingest("digits", DIGITS, 1, data)  # what was there before: another split
    before, there = content(data), folders(data)
    filler = fill(data)
    os.truncate(filler, filler.stat().st_size - room * 1024)
    with pytest.raises(UserError) as caught:
        ingest("digits", DIGITS, 0, data)
    assert str(caught.value) == f"{data}/processed/digits: cannot be written: {FULL}"
    assert content(data) == before and folders(data) == there
    filler.unlink()
    ingest("digits", DIGITS, 0, data)
    assert content(data) == content(undisturbed) != before


WRITERS: dict[str, Callable[[Path], object]] = {  # each library has words of its own for a full disk
    "text": lambda path: path.write_text("x" * 200_000),
    "numpy": lambda path: np.save(path.open("wb"), np.zeros(50_000)),
    "safetensors": lambda path: save_file({"a": torch.zeros(50_000)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk_is_the_same_line_whichever_library_writes(tmp_path: Path, mount: Mount, writer: str) -> None:
    small(mount, tmp_path / "disk", "64k")
    path = tmp_path / "disk" / "weights"
    path.write_text("older")
    with pytest.raises(UserError) as caught, replacing(path) as temporary:
        WRITERS[writer](temporary)
    assert str(caught.value) == f"{path}: cannot be written: {FULL}"
    assert os.listdir(path.parent) == ["weights"] and path.read_text() == "older"


def test_full_disk_during_registration(workspace: Path, mount: Mount) -> None:  # noqa: F811
    from mlflow import MlflowClient

    write_params(MODEL)
    write_model()
    write_figures(bits_per_dim=2.0)
    artifacts = workspace / "mlflow/artifacts"
    small(mount, artifacts, "256k")  # a package needs more
    with pytest.raises(UserError) as caught:
        register.run("smoke")
    line = str(caught.value)
    assert FULL in line and str(workspace / "mlflow") in line and "`genus register` tries again" in line
    assert "\n" not in line and not Path("reports/registered/smoke.json").exists()
    client = MlflowClient(f"sqlite:///{workspace}/mlflow/mlflow.db")
    assert not client.search_model_versions(f"name = '{MODEL}'")  # half a package is no version
    mount("-o", "remount,size=64m", artifacts)
    register.run("smoke")
    version = client.get_model_version_by_alias(MODEL, "champion")
    assert str(version.version) == "1" and version.status == "READY"
    assert len(client.search_runs([client.get_experiment_by_name("digits").experiment_id])) == 1


@pytest.mark.parametrize("where", ["logs", ".dvc/cache"])
def test_full_disk_under_a_stage_of_a_run(toy: Path, mount: Mount, where: str) -> None:  # noqa: F811
    small(mount, toy / where, "64k")
    filler = fill(toy / where)
    with pytest.raises(StageFailed) as caught:
        Children().run("ingest@digits")
    assert FULL in caught.value.line and "\n" not in caught.value.line
    filler.unlink()
    assert Children().run("ingest@digits").stage == "ingest@digits"
    assert not Children().run("ingest@digits").ran  # it is whole: DVC has nothing to do
    assert Path("data/processed/digits/train.npy").read_text() == "digits"


def read_only(mount: Mount, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mount("--bind", folder, folder)
    mount("-o", "remount,ro,bind", folder)


def test_read_only_folder_is_one_line(tmp_path: Path, mount: Mount) -> None:
    (tmp_path / "reports").mkdir()
    write_json(tmp_path / "reports/a.json", 1)
    read_only(mount, tmp_path / "reports")
    for path in (tmp_path / "reports/a.json", tmp_path / "reports/metrics/b.json"):
        with pytest.raises(UserError) as caught:
            write_json(path, 2)
        assert str(caught.value) == f"{path}: cannot be written: {READ_ONLY}"
    read_only(mount, tmp_path / "data")
    with pytest.raises(UserError) as caught:
        ingest("digits", DIGITS, 0, tmp_path / "data")
    assert str(caught.value) == f"{tmp_path}/data/processed/digits: cannot be written: {READ_ONLY}"


@pytest.mark.parametrize("where", [".genus", "logs"])
def test_run_with_a_read_only_folder_is_one_line(toy: Path, mount: Mount, where: str) -> None:  # noqa: F811
    read_only(mount, toy / where)
    command = [Path(sys.executable).parent / "genus", "run", "--datasets", "digits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2) and READ_ONLY in said and "Traceback" not in said, said
    assert any(READ_ONLY in line and where in line for line in said.splitlines()), said
