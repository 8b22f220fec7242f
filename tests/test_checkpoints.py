"""A checkpoint that was damaged, is of another model or cannot be written: one line says so, the bytes are the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from genus.training import _digest
from tests.test_training import SPEC, Explodes, Interrupted, fit, weights

NAME = "c.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What a training leaves that was interrupted after step 60."""

    def interrupt(row: dict[str, float], speed: dict[str, float]) -> None:
        if row["step"] == 70:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(checkpoint=tmp_path / NAME, checkpoint_every=0, on_log=interrupt)
    return tmp_path / NAME


def flip(path: Path, place: float) -> None:
    """Inverts one bit at a share of the file's length: the header's, a weight's, the last."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def tampered(path: Path) -> None:
    """A weight is changed and the file is a good safetensors file."""
    tensors = load_file(path)
    tensors["model.left.weight"][0, 0] += 1e-6
    save_file(tensors, path)


def of_another_model(path: Path) -> None:
    """A good checkpoint, hash and all, whose weights have other shapes."""
    tensors = load_file(path)
    del tensors["sha256"]
    tensors["model.left.weight"] = torch.zeros(7, 16)
    save_file(tensors | {"sha256": _digest(tensors)}, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "header": lambda path: flip(path, 0.002),
    "names": lambda path: flip(path, 0.03),
    "middle": lambda path: flip(path, 0.5),
    "end": lambda path: flip(path, 1.0),
    "tampered": tampered,
    "another model's": of_another_model,
    "cut": truncate,
    "nothing": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 64),
    "text": lambda path: path.write_text("version https://example.org/large-file\n"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    return weights(fit())


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_checkpoint_is_named_put_aside_and_costs_time_only(
    damage: Callable[[Path], object], checkpoint: Path, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture
) -> None:
    damage(checkpoint)
    seen: list[float] = []
    again = fit(checkpoint=checkpoint, on_log=lambda row, speed: seen.append(row["step"]))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"genus: warning: {checkpoint}: ") and "starts from the beginning" in line
    assert ("another model" in line) == (damage is of_another_model)
    assert seen[0] == 10, "from the beginning"
    assert [path.name for path in checkpoint.parent.iterdir()] == ["c.damaged"]
    assert all(torch.equal(whole[name], weights(again)[name]) for name in whole)


def test_an_undamaged_checkpoint_says_nothing(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    seen: list[float] = []
    fit(checkpoint=checkpoint, on_log=lambda row, speed: seen.append(row["step"]))
    assert seen[0] == 70 and not capsys.readouterr().err


def test_a_checkpoint_of_other_groups_is_of_another_model(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    fit(model=Explodes(SPEC), steps=10, settings={"ema": 0.0}, checkpoint=checkpoint)
    assert "another model" in capsys.readouterr().err


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 kB, all of it taken but for a few."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes root")
    (folder / "filler").write_bytes(bytes(12 << 10))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_once_and_training_goes_on(
    full_disk: Path, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture
) -> None:
    """A checkpoint written before the disk was full stays, and is good."""
    path = full_disk / NAME
    ended = fit(checkpoint=path, checkpoint_every=0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"genus: warning: {path}: no checkpoint could be written") and "No space left" in line
    assert all(torch.equal(whole[name], weights(ended)[name]) for name in whole)
    assert [file.name for file in full_disk.iterdir()] == ["filler"], "no half checkpoint"

    (full_disk / "filler").unlink()  # room for one, but not for the next beside it

    def interrupt(row: dict[str, float], speed: dict[str, float]) -> None:
        if row["step"] == 20:
            (full_disk / "filler").write_bytes(bytes(4 << 10))
        if row["step"] == 70:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(checkpoint=path, checkpoint_every=0, on_log=interrupt)
    assert "No space left" in capsys.readouterr().err
    seen: list[float] = []
    resumed = fit(checkpoint=path, on_log=lambda row, speed: seen.append(row["step"]))
    assert seen[0] == 20 and not capsys.readouterr().err
    assert all(torch.equal(whole[name], weights(resumed)[name]) for name in whole)


def test_a_file_that_may_not_be_replaced_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    fit(checkpoint=tmp_path / "file" / NAME, checkpoint_every=0)
    (line,) = capsys.readouterr().err.splitlines()
    assert ("no checkpoint could be written" in line and "Not a directory" in line) or "File exists" in line


def test_a_finished_training_says_its_key_and_leaves_no_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Through the stage: a damaged file under its own key costs nothing, those of other keys are cleared away."""
    from genus import tracking
    from genus.files import read_json
    from genus.stages import ingest
    from genus.stages import train as stage
    from tests.registry.workspace import new_store

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(re.sub(r"^budget: .*$", "budget: 0.05", text, flags=re.M))
    ingest.run("digits")
    new_store(tmp_path)
    stage.run("digits-vae")
    folder, kept = tmp_path / "models/digits-vae", ("weights.safetensors", "model.json", "history.csv", "samples.png")
    first = {name: (folder / name).read_bytes() for name in kept}
    key = read_json(folder / "model.json")["key"]
    assert re.fullmatch("[0-9a-f]{16}", key)
    assert tracking.find_run(tracking.client(), "digits", f"tags.`genus.key` = '{key}'")

    checkpoints = stage.CHECKPOINTS / "digits-vae"
    checkpoints.mkdir(parents=True)
    for name in (key, "0123456789abcdef"):
        (checkpoints / f"{name}.safetensors").write_bytes(b"garbage")
    capsys.readouterr()
    stage.run("digits-vae")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and f"{key}.safetensors: damaged checkpoint" in warnings[0]
    assert {name: (folder / name).read_bytes() for name in kept} == first
    assert not checkpoints.exists()
