"""A project folder with trained models in it, as the stages leave them, and a tracking store that costs no time."""

from __future__ import annotations

import copy
import csv
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from genus import tracking
from genus.contract import build, family_class
from genus.data.spec import DataSpec

SPEC = DataSpec((1, 8, 8), 17, tuple("0123456789"))
SPECS = {"image": SPEC, "vector": DataSpec((2, 1, 1), 17), "text": DataSpec((40,), 0, (), "\n abcdefgh.")}
FAMILY = "vae/vae"
MODEL = "digits-vae"


@functools.cache
def _empty_store() -> Path:
    """MLflow takes seconds to make a store: one a test session, copied."""
    folder = Path(tempfile.mkdtemp())
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        tracking.prepare()
    return folder / "mlflow/mlflow.db"


def new_store(folder: Path) -> None:
    """Puts an empty tracking store into a project folder, in place of what is there."""
    shutil.rmtree(folder / "mlflow", ignore_errors=True)
    (folder / "mlflow").mkdir()
    shutil.copy(_empty_store(), folder / "mlflow/mlflow.db")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty project folder with an empty tracking store, the working directory of the test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    new_store(tmp_path)
    yield tmp_path


@functools.cache
def _small(family: str) -> dict[str, Any]:
    from genus.config import load

    params = load(Path(__file__).parents[2] / "params.yaml")
    names = (name for name in params.collection("smoke") if params.models[name].family == family)
    found = params.described(next(names, "none"))
    return found or {"family": family, "params": {}, "parent": None}


def small(family: str) -> dict[str, Any]:
    """A family, its parameters and what it learns from, as the smoke models of params.yaml have them."""
    return copy.deepcopy(_small(family))


def small_params(family: str) -> dict[str, Any]:
    """A family's parameters as the smoke models have them."""
    return small(family)["params"]


def write_model(name: str = MODEL, family: str = FAMILY, seed: int = 0, data: str = "ab" * 32) -> Path:
    """models/<name>/ as the training leaves it, with weights drawn from ``seed``."""
    params, spec = small_params(family), SPECS[family_class(family).kinds[0]]
    torch.manual_seed(seed)
    model = build(family, spec, params, small(family)["parent"])
    folder = Path("models") / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "weights.safetensors")
    about = {
        "name": name,
        "family": family,
        "dataset": "digits",
        "spec": spec.to_json(),
        "params": params,
        "paper": model.paper,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": 30,
        "seed": seed,
        "budget": 1,
        "train": {"steps": 30, "batch_size": 8},
        "data_sha256": data,
        "parent": small(family)["parent"],
    }
    (folder / "model.json").write_text(json.dumps(about))
    with open(folder / "history.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "learning_rate", "loss", "rare"])  # `rare` is a term that only some steps have
        rows.writerows([step, 0.001, 10 / step, step if step == 20 else ""] for step in (10, 20, 30))
    Image.fromarray(np.full((16, 16), seed, np.uint8)).save(folder / "samples.png")
    return folder


def write_figures(name: str = MODEL, **metrics: float) -> None:
    """The evaluator's files of a model: its metrics by name, and a timing."""
    full = {
        key: {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 100} for key, value in metrics.items()
    }
    if "bits_per_dim" in full:
        full["bits_per_dim"]["kind"] = "elbo"
    for folder, content in (("metrics", full), ("timing", {"sample_ms": 1.5, "train_seconds": 9.0})):
        path = Path("reports") / folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def write_params(*names: str, family: str = FAMILY, knobs: dict[str, Any] | None = None) -> None:
    """params.yaml with these models in the collection `smoke`."""
    model = {
        "family": family,
        "dataset": "digits",
        "collection": "smoke",
        "train": {"steps": 30, "batch_size": 8},
        "evaluate": {"knobs": knobs or {}},
    }
    folders = {name: f"reports/{name}" for name in ("records", "probes", "pictures")}
    collection = {"about": "tests", "report": "scorecard", **folders}
    content = {
        "collections": {"smoke": collection},
        "datasets": {"digits": {"source": "digits"}},
        "models": dict.fromkeys(names, model),
    }
    Path("params.yaml").write_text(json.dumps(content))  # JSON is YAML too


def publish(name: str = MODEL, seed: int = 0, alias: str = "champion", knobs: dict[str, Any] | None = None) -> str:
    """A version of models/<name>/ in the registry that ``tracking.uri()`` names, with no gate before it; its number."""
    from genus.registry.versions import ensure

    client = tracking.client()
    run = client.create_run(tracking._experiment(client, "digits"), run_name=name)
    number = ensure(client, write_model(name, seed=seed), run, None, knobs or {}, {})
    client.set_registered_model_alias(name, alias, number)
    return number


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Trials that cost no time: what is put into the list is found, of one package or two; an empty one works."""
    from genus.registry import gate

    found: list[Any] = []

    def trials(packages: Any, dataset: str = "") -> list[Any]:
        if dataset and not found:
            pytest.fail("a trial that nothing asked for")
        return [found[i] if found else gate.Trial() for i in range(len(packages))]

    monkeypatch.setattr(gate, "trials", trials)
    return found
