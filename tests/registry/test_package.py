"""Packages: what is packaged runs where Genus is not, without pickle, and draws by seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

from genus.contract import family_class, family_names
from genus.errors import UserError
from genus.registry import package
from genus.registry.package import ROOT, write_code
from tests.registry.workspace import FAMILY, SPEC, write_model

FAMILIES = [name for name in family_names() if hasattr(family_class(name), "sample")]

# Runs where `import genus` fails: isolated, and without what an editable install puts into the import system.
ELSEWHERE = """
import hashlib, json, sys
source = sys.argv[1]
sys.path = [path for path in sys.path if path.rstrip("/") != source]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
try:
    import genus
except ModuleNotFoundError:
    pass
else:
    raise SystemExit(f"genus can be imported here, from {genus.__file__}: the test would prove nothing")
import mlflow, pandas as pd
answer = {}
for folder in sys.argv[2:]:
    model = mlflow.pyfunc.load_model(folder, suppress_warnings=True)
    images = model.predict(pd.DataFrame({"seed": [5, 6]}))
    inner = model.unwrap_python_model().model
    file = sys.modules[type(inner).__module__].__file__
    answer[folder] = [list(images.shape), hashlib.sha256(images.tobytes()).hexdigest(), file]
print(json.dumps(answer))
"""


def load(folder: Path) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(folder), suppress_warnings=True)


def draw(model: mlflow.pyfunc.PyFuncModel, *seeds: int, **params: object) -> np.ndarray:
    return np.asarray(model.predict(pd.DataFrame({"seed": np.array(seeds, np.int64)}), params=params or None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models/<family>/ and its package of every family there is."""
    root = tmp_path_factory.mktemp("packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for family in FAMILIES:
            name = family.replace("/", "-")
            package(write_model(name, family), root / "packages" / name)
    return root


def test_every_family_runs_where_genus_is_not(folder: Path, tmp_path: Path) -> None:
    import hashlib

    packages = sorted(str(path) for path in (folder / "packages").iterdir())
    assert len(packages) == len(FAMILIES)
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(ROOT.parent), *packages],
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for path, (shape, content, file) in json.loads(done.stdout.splitlines()[-1]).items():
        assert Path(file).is_relative_to(path)  # its own code, from the package
        assert shape == [2, *SPEC.shape]
        here = draw(load(Path(path)), 5, 6)  # beside an installed Genus: the same
        assert hashlib.sha256(here.tobytes()).hexdigest() == content


def test_a_seed_is_a_sample_whatever_the_batch(folder: Path) -> None:
    model = load(folder / "packages" / FAMILY.replace("/", "-"))
    together = draw(model, 3, 1, 2, 1)
    assert together.dtype == np.uint8 and together.max() < SPEC.levels
    for index, seed in enumerate((3, 1, 2, 1)):
        np.testing.assert_array_equal(draw(model, seed)[0], together[index])
    assert (together[0] != together[1]).any()
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.manual_seed(99)
    torch.set_num_threads(2)
    np.testing.assert_array_equal(draw(model, 3)[0], together[0])
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    torch.random.set_rng_state(state)
    assert draw(model).shape == (0, *SPEC.shape)


def test_knobs_are_params_with_the_defaults_of_the_evaluation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    package(write_model(), tmp_path / "cool", knobs={"temperature": 0.5})
    cool, plain = load(tmp_path / "cool"), load(folder / "packages" / FAMILY.replace("/", "-"))
    np.testing.assert_array_equal(draw(cool, 1), draw(plain, 1, temperature=0.5))
    assert (draw(cool, 1) != draw(plain, 1)).any()
    with pytest.raises(mlflow.MlflowException, match="temperature"):
        draw(plain, 1, temperature="hot")
    with pytest.raises(mlflow.MlflowException, match="seed"):
        plain.predict(pd.DataFrame({"sead": [1]}))


def test_a_package_is_small_readable_and_knows_no_machine(folder: Path) -> None:
    for path in (folder / "packages").iterdir():
        files = [file for file in path.rglob("*") if file.is_file() and file.name != "weights.safetensors"]
        files = [file for file in files if file.parent.name != "__pycache__"]  # Python's, where one was loaded
        assert sum(file.stat().st_size for file in files) < 200_000
        assert {file.suffix for file in files} <= {"", ".py", ".json", ".yaml", ".txt"}  # nothing pickled
        for file in files:
            content = file.read_text(encoding="utf-8")
            assert str(folder) not in content and str(ROOT) not in content and "/tmp" not in content, file
        named = {line.split("==")[0] for line in (path / "requirements.txt").read_text().split()}
        assert named == {"torch", "numpy", "safetensors", "pandas", "mlflow"}


def test_code_is_named_by_its_content(tmp_path: Path) -> None:
    names = {family: write_code(family, tmp_path / family) for family in family_names()}
    assert len(set(names.values())) == len(names)
    for family, name in names.items():
        assert write_code(family, tmp_path / "again" / family) == name
        written = {str(path.relative_to(tmp_path / family / name)) for path in (tmp_path / family / name).rglob("*.py")}
        assert {"contract.py", "data/spec.py", f"families/{family}.py"} <= written
        others = {f"families/{other}.py" for other in family_names() if other != family}
        assert not written & (others | {"training.py", "tracking.py", "config.py", "cli.py"})


def test_weights_of_other_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    model = write_model()
    weights = load_file(model / "weights.safetensors")
    name = next(iter(weights))
    save_file({f"renamed.{name}": weights.pop(name), **weights}, model / "weights.safetensors")
    with pytest.raises(UserError, match=f"trained by another version of family '{FAMILY}'"):
        package(model, tmp_path / "package")
    assert not (tmp_path / "package").exists()
