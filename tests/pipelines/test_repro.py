"""DVC with a lock of which a stage writes its own lines: the same bytes as DVC's own, and DVC's own where in doubt."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
from dvc import dvcfile
from dvc.utils.serialize import dumps_yaml, loads_yaml, modify_yaml

from pipelines import repro
from pipelines.children import Children

LONG = "train@fashion-mnist-image-transformer"
HASHED = {"path": "a", "hash": "md5", "md5": "7169b8118c5d3590d93b5279022a2d9f", "size": 9144}
LOCK = {
    "schema": "2.0",
    "stages": {
        "ingest@a": {"cmd": "genus ingest a", "deps": [HASHED, HASHED | {"nfiles": 2}]},
        LONG: {"cmd": "x", "params": {"params.yaml": {"models.a.family": "flows/" + "long_" * 14, "seed": 0}}},
        "lines": {"cmd": "one\n\n  two\nthree\n", "outs": []},
        "listed": {"cmd": ["a b", "c: d", "'"], "params": {"params.yaml": {"models.a.params": {}}}},
    },
}
LONGER = "x" * 70 + " " + "y" * 70
VALUES = {"a": [0.1, 1e-05, 3, True, None, "yes", "1", "a: b", LONGER, {}, []], "b": {"c": {"d": "é"}}}


def set_stage(data: Any, name: str, said: Any) -> None:
    """What DVC does with the value that ``modify_yaml`` gives it."""
    data["stages"] = data.get("stages", {})
    assert (data["stages"].get(name, {}) != said) == (LOCK["stages"].get(name, {}) != said)  # type: ignore[attr-defined]
    data["stages"].update({name: said})


@pytest.mark.parametrize("name", ["ingest@a", LONG, "lines", "listed", "train@new"])
@pytest.mark.parametrize("more", [{}, {"params": {"params.yaml": VALUES}}])
def test_a_lock_has_the_bytes_that_dvc_would_have_written(tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    said = copy.deepcopy(LOCK["stages"].get(name, {"cmd": "new"}) | more)  # type: ignore[attr-defined]
    found = []
    for modify in (modify_yaml, repro.modified):
        path = tmp_path / f"{len(found)}.lock"
        path.write_text(dumps_yaml(copy.deepcopy(LOCK)))
        with modify(str(path)) as data:
            set_stage(data, name, copy.deepcopy(said))
        found.append(path.read_bytes())
    assert found[0] == found[1] and loads_yaml(found[1])["stages"][name] == said


def test_the_lock_of_this_repository_is_read_as_dvc_writes_it() -> None:
    path = Path(__file__).parents[2] / "dvc.lock"
    known = repro.stages(str(path))
    assert known is not None and repro.HEAD + "".join(known.values()) == path.read_text(encoding="utf-8")
    name = next(name for name in known if name.startswith("evaluate@"))
    assert known.get(name)["cmd"] == f"genus evaluate {name.partition('@')[2]}" and known.get("nobody", 1) == 1


WHOLE = dumps_yaml(copy.deepcopy(LOCK))


@pytest.mark.parametrize(
    "text",
    [
        "# a comment\n" + WHOLE,
        WHOLE + "  # a comment\n",
        WHOLE + "datasets: []\n",
        WHOLE.replace("  lines:", "  'lines':"),
        WHOLE.replace("    outs", "   outs"),
        WHOLE[:-1],
        WHOLE.replace("'2.0'", "'3.0'"),
        "",
    ],
)
def test_a_lock_that_dvc_has_not_written_like_that_is_left_to_dvc(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dvc.lock"
    assert repro.stages(str(path)) is None  # not there yet
    path.write_text(text)
    assert repro.stages(str(path)) is None


def test_stages_of_a_run_leave_the_lock_of_dvc_alone(toy: Path) -> None:
    lock, said = toy / "dvc.lock", []
    for stage in ("ingest@digits", "validate@digits"):
        assert Children().run(stage).ran
        said.append(lock.read_bytes())
    assert not Children().run("ingest@digits").ran and lock.read_bytes() == said[1]
    assert not list(toy.glob(".dvc.lock*"))  # what it was written to before
    for stage, before in zip(("ingest@digits", "validate@digits"), said, strict=True):
        lock.unlink() if stage == "ingest@digits" else None
        subprocess.run(["dvc", "repro", "--single-item", "--force", stage], cwd=toy, check=True, capture_output=True)
        assert lock.read_bytes() == before


def test_dvc_is_as_it_was_measured_to_be() -> None:
    """What ``repro`` stands in for: without these it would do nothing, and each stage take seconds again."""
    assert dvcfile.modify_yaml is modify_yaml and "_load_yaml" in dir(dvcfile.Lockfile)
