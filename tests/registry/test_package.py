"""Packages: what is packaged runs where Genus is not, without pickle, and draws by seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

from genus.contract import Batch, family_class, family_names
from genus.errors import UserError
from genus.registry import package, runtime
from genus.registry.card import card
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
import mlflow, numpy as np, pandas as pd
answer = {}
for folder in sys.argv[2:]:
    model = mlflow.pyfunc.load_model(folder, suppress_warnings=True)
    drawn = np.asarray(model.predict(pd.DataFrame({"seed": [5, 6]})))
    content = repr(drawn.tolist()).encode() if drawn.dtype == object else drawn.tobytes()
    inner = model.unwrap_python_model().runtime.model
    file = sys.modules[type(inner).__module__].__file__
    answer[folder] = [list(drawn.shape), hashlib.sha256(content).hexdigest(), file]
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
        here, spec = draw(load(Path(path)), 5, 6), runtime.load(path).spec  # beside an installed Genus: the same
        assert shape == ([2] if spec.alphabet else [2, *spec.shape])
        same = repr(here.tolist()).encode() if spec.alphabet else here.tobytes()
        assert hashlib.sha256(same).hexdigest() == content


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


def test_what_mlflow_would_drop_in_silence_is_refused(folder: Path) -> None:
    vae, gan = (load(folder / "packages" / name) for name in ("vae-vae", "gan-gan"))
    for model, data, params, line in (
        (vae, {"seed": [1]}, {"temprature": 1.0}, "'temprature': did you mean 'temperature'?"),
        (gan, {"seed": [1]}, {"temperature": 1.0}, "no parameter 'temperature': it takes truncation"),
        (vae, {"seed": [1]}, {"temperature": "hot"}, "'temperature' of vae-vae is a number, as 0.0: not 'hot'"),
        (vae, {"seed": [1]}, {"temperature": True}, "is a number"),
        (vae, {"seed": [1]}, {"temperature": float("nan")}, "is a finite number"),
        (vae, {"seed": [1], "lable": [2]}, None, "no column 'lable' is known: seed, label"),
        (vae, {"seed": [1], "label": [2]}, None, "vae-vae takes no label: it was trained without"),
        (vae, {"sead": [1]}, None, "sead"),
    ):
        for form in (pd.DataFrame(data), data):
            with pytest.raises(mlflow.MlflowException) as raised:
                model.predict(form, params=params)
            assert line in str(raised.value) and raised.value.get_http_status_code() == 400
    # Spark sends an optional column that it was not given as nulls.
    nulls = pd.DataFrame({"seed": pd.Series([1])}, columns=["seed", "label"])
    np.testing.assert_array_equal(vae.predict(nulls), draw(vae, 1))


def test_models_of_others_are_left_alone(folder: Path, tmp_path: Path) -> None:
    load(folder / "packages" / "vae-vae")
    other = tmp_path / "other.py"
    other.write_text(
        "from mlflow.models import set_model\n"
        "from mlflow.pyfunc import PythonModel\n"
        "import pandas as pd\n"
        "class Other(PythonModel):\n"
        "    def predict(self, context, model_input: pd.DataFrame, params=None):\n"
        "        return list(model_input['x'])\n"
        "set_model(Other())\n"
    )
    mlflow.pyfunc.save_model(tmp_path / "other", python_model=str(other), pip_requirements=[])
    assert list(load(tmp_path / "other").predict(pd.DataFrame({"x": [1], "y": [2]}), params={"z": 3})) == [1]


class Labelled(torch.nn.Module):
    """Draws its label as a level."""

    labels = 3

    def sample(
        self, n: int, *, generator: torch.Generator, cond: torch.Tensor | None = None, **knobs: float
    ) -> torch.Tensor:
        assert cond is not None and cond.dtype == torch.int64 and cond.shape == (n,)
        return (cond * 2 / (SPEC.levels - 1) - 1).view(n, 1, 1, 1).expand(n, *SPEC.shape)


def test_labels(folder: Path) -> None:
    model = load(folder / "packages" / "gan-gan")
    model.unwrap_python_model().runtime.model = Labelled()
    images = model.predict(pd.DataFrame({"seed": [5, 6], "label": [2, 0]}))
    assert images[0].max() == images[0].min() == 2 and images[1].max() == 0
    for labels, line in (
        ({}, "gan-gan needs a label for each sample: 0 to 2"),
        ({"label": [3]}, "gan-gan has no label 3: 0 to 2"),
        ({"label": [-1]}, "gan-gan has no label -1"),
    ):
        with pytest.raises(mlflow.MlflowException, match=line):
            model.predict(pd.DataFrame({"seed": [5], **labels}))
    alone = model.unwrap_python_model().runtime
    for seeds, labels, line in (
        ([5], [1, 1], "2 labels for 1 seeds"),
        ([5], [0.5], "a label is a whole number"),
        ([0.5], [1], "a seed is a"),
    ):
        with pytest.raises(ValueError, match=line):
            alone.sample(seeds, labels)


class Watchful(torch.nn.Module):
    """Notes how many threads torch has after a moment of drawing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def sample(
        self, n: int, *, generator: torch.Generator, cond: torch.Tensor | None = None, **knobs: float
    ) -> torch.Tensor:
        time.sleep(0.02)
        self.seen.append(torch.get_num_threads())
        return torch.zeros(n, *SPEC.shape)


def test_requests_at_once_each_draw_on_one_thread(folder: Path) -> None:
    """Sums, and so bytes, depend on how many threads share them."""
    model, threads = runtime.load(folder / "packages" / "gan-gan"), torch.get_num_threads()
    model.model = Watchful()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: model.sample([seed, seed]), range(8)))
        assert set(model.model.seen) == {1} and len(model.model.seen) == 16
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_scores_are_the_familys_log_probabilities(folder: Path) -> None:
    random = np.random.default_rng(0)
    for path in (folder / "packages").iterdir():
        model = runtime.load(path)
        if model.text:
            continue  # see test_text.py
        images = random.integers(0, model.spec.levels, (130, *model.spec.shape), np.uint8)
        if model.kind == "none":
            with pytest.raises(ValueError, match="has no likelihood: it can sample, not score"):
                model.log_prob(images)
            continue
        few = images[:3] if model.kind == "ode" else images
        told: list[tuple[int, int]] = []
        nats = model.log_prob(few, 7, lambda done, total, told=told: told.append((done, total)))
        assert told == ([(3, 3)] if len(few) == 3 else [(100, 130), (130, 130)])
        np.testing.assert_array_equal(nats, model.log_prob(few, 7))
        first = Batch(model.spec.to_float(torch.from_numpy(few[:100])))
        with torch.no_grad():
            expected = model.model.log_prob(first, generator=torch.Generator().manual_seed(7))
        np.testing.assert_allclose(nats[:100], expected, rtol=1e-5)
        np.testing.assert_allclose(model.bits_per_dim(nats), -nats / (model.spec.dims * np.log(2)))


def test_a_manifest_holds_every_file(folder: Path) -> None:
    from genus.files import sha256
    from genus.registry.package import MANIFEST, seal

    for path in (folder / "packages").iterdir():
        manifest = json.loads((path / MANIFEST).read_text())
        assert manifest["format"] == 1
        found = {file for file in path.rglob("*") if file.is_file() and file.parent.name != "__pycache__"}
        named = {path / name for name in manifest["files"]}
        assert named == found - {path / MANIFEST}
        assert {sha256(file) for file in named} == set(manifest["files"].values())
        assert seal(path) == sha256(path / MANIFEST)  # again: the same


def test_the_card_tells_what_was_measured() -> None:
    about = json.loads(write_about())
    plain = card(about, {})
    for told in (
        "# digits-vae",
        "[arXiv:1312.6114](https://arxiv.org/abs/1312.6114)",
        "Not measured",
        "see the data's",
    ):
        assert told in plain
    assert about["data_sha256"] in plain and "five properties" not in plain
    full = card(
        about,
        {
            "knobs": {"temperature": 0.5},
            "metrics": {
                "bits_per_dim": {"value": 3.25, "low": 3.125, "high": 3.375, "kind": "elbo", "n": 359},
                "memorisation": {"value": 0.25, "flagged": True, "n": 100},
                "text": {"value": "none"},
            },
            "timing": {"train_seconds": 9.0},
            "properties": [
                {"property": "speed", "title": "a | b", "unit": "ms", "cells": {"digits-vae": {"value": 1.5, "n": 1}}},
                {"property": "speed", "title": "of another", "unit": "ms", "cells": {"digits-gan": {"value": 1}}},
            ],
            "data": {"licence": "CC BY 4.0", "source": "UCI", "counts": {"train": 1294}},
        },
    )
    for told in (
        "| bits per dim | 3.25 | 3.125 to 3.375 | elbo | 359 |  |",
        "| speed | a \\| b | 1.5 ms |  | 1 |",
        "the evidence lower bound",
        "0.25 (flagged)",
        "Data: CC BY 4.0.",
        "train 1,294",
        '"params": {"temperature": 0.5}',
        "| train seconds | 9 s |",
    ):
        assert told in full, told
    assert "of another" not in full and "| text" not in full


def write_about() -> str:
    """model.json of a VAE, without training one."""
    spec = SPEC.to_json()
    about = {"name": "digits-vae", "family": "vae/vae", "dataset": "digits", "spec": spec, "data_sha256": "ab" * 32}
    return json.dumps(about | {"paper": "Kingma & Welling 2013, arXiv:1312.6114", "steps": 30, "seed": 0})


def test_a_package_is_small_readable_and_knows_no_machine(folder: Path) -> None:
    for path in (folder / "packages").iterdir():
        files = [file for file in path.rglob("*") if file.is_file() and file.name != "weights.safetensors"]
        files = [file for file in files if file.parent.name != "__pycache__"]  # Python's, where one was loaded
        assert sum(file.stat().st_size for file in files) < 200_000
        assert {file.suffix for file in files} <= {"", ".py", ".json", ".yaml", ".txt", ".md"}  # nothing pickled
        for file in files:
            content = file.read_text(encoding="utf-8")
            assert str(folder) not in content and str(ROOT) not in content and "/tmp" not in content, file
        named = {line.split("==")[0] for line in (path / "requirements.txt").read_text().split()}
        assert named == {"torch", "numpy", "safetensors", "pandas", "mlflow"}


def test_code_is_named_by_its_content(tmp_path: Path) -> None:
    names = {family: write_code([family], tmp_path / family) for family in family_names()}
    assert len(set(names.values())) == len(names)
    for family, name in names.items():
        assert write_code([family], tmp_path / "again" / family) == name
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
