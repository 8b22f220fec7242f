"""Packages: a trained model that loads where this repository is not.

An MLflow pyfunc made of readable parts: safetensors weights, model.json, a card, and the few files of Genus that this
family needs, found by following its imports. Nothing in it is pickled, and a manifest holds the hash of every file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import genus
from genus.errors import UserError
from genus.files import read_json, replacing, sha256, write_json
from genus.registry.card import card
from genus.registry.runtime import settable

if TYPE_CHECKING:
    from mlflow.models import Model, ModelSignature

    from genus.contract import Family

ROOT = Path(__file__).parents[1]  # the package genus
FORMAT = 1  # of packages: what this Genus writes, and the newest that it reads
MANIFEST = "artifacts/manifest.json"
LEFT_BY_MLFLOW = "registered_model_meta"
REQUIREMENTS = ("torch", "numpy", "safetensors", "pandas", "mlflow")


def package(
    folder: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    knobs: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Writes ``models/<model>/`` as a sealed MLflow model to the folder ``destination``, whole or not at all.

    ``knobs`` are the defaults of the family's sample() that the model was evaluated with; ``facts`` is what its card
    tells beside model.json, see ``card``.
    """
    with replacing(destination) as temporary:
        save(Path(folder), temporary, knobs or {}, facts)
        seal(temporary)


def save(folder: Path, destination: Path, knobs: dict[str, Any], facts: dict[str, Any] | None = None) -> Model:
    """Writes the package, all but its manifest, and returns its description, which is the file MLmodel.

    Whoever changes a file after that calls ``seal`` last. The files are those that ``mlflow.pyfunc.save_model`` writes,
    but for the machine's paths, which that one puts in, and for the seconds in which it compares the requirements with
    everything installed here.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    about = read_json(folder / "model.json")
    family = _fitting(folder, about)
    artifacts = destination / "artifacts"
    artifacts.mkdir(parents=True)
    for name in ("weights.safetensors", "model.json"):
        shutil.copy2(folder / name, artifacts)
    write_code(_families(about), artifacts / "code")
    here = Path(__file__)
    shutil.copy2(here.with_name("runtime.py"), artifacts / "code")
    shutil.copy2(here.with_name("served.py"), destination)
    taken = settable(family, knobs)
    write_json(artifacts / "knobs.json", taken)
    samples = hasattr(family, "sample")
    told = {"knobs": taken, "kind": getattr(family, "density", None), "samples": samples, **(facts or {})}
    (destination / "README.md").write_text(card(about, told), encoding="utf-8")

    model = Model(about["name"])
    model.signature = _signature(about, taken, samples)
    parts = {"weights": "weights.safetensors", "model": "model.json", "knobs": "knobs.json", "code": "code"}
    mlflow.pyfunc.add_to_model(
        model,
        loader_module="mlflow.pyfunc.loaders.code_model",
        model_code_path="served.py",
        artifacts={name: {"path": f"artifacts/{path}", "uri": f"artifacts/{path}"} for name, path in parts.items()},
        conda_env="conda.yaml",
        python_env="python_env.yaml",
        streamable=False,
    )
    model.save(str(destination / "MLmodel"))
    # Exact versions: the bytes of a sample depend on torch's kernels.
    requirements = [f"{name}=={_version(name)}" for name in REQUIREMENTS]
    python = platform.python_version()
    pip: list[Any] = [f"python={python}", "pip", {"pip": requirements}]
    conda = {"name": "genus", "channels": ["conda-forge"], "dependencies": pip}
    virtualenv = {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    (destination / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    for file, content in {"conda.yaml": conda, "python_env.yaml": virtualenv}.items():  # JSON is YAML too
        (destination / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return model


def seal(folder: Path) -> str:
    """Writes artifacts/manifest.json, the SHA-256 of every other file of a package; returns its own, hex.

    The last thing done to a package: its registry keeps the hash as the version's tag ``genus.manifest``.
    """
    files = {path: sha256(folder / path) for path in contents(folder)}
    write_json(folder / MANIFEST, {"format": FORMAT, "genus": genus.__version__, "files": files})
    return sha256(folder / MANIFEST)


def contents(folder: Path) -> list[str]:
    """Every file of a package but its manifest, and but what is left there where it is used: what Python compiled
    beside the sources, and MLflow's note of the version it loaded. ``runtime.load`` reads none of these.
    """
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    names = (path.as_posix() for path in found if "__pycache__" not in path.parts)
    return sorted(name for name in names if name not in (MANIFEST, LEFT_BY_MLFLOW))


def write_code(families: Sequence[str], destination: Path) -> str:
    """Writes the sources that ``families`` (flows/glow) need as one package; returns the package's name.

    The name is genus_<hash of the sources>, so that it never meets another version's code, nor an installed Genus.
    """
    needed = _closure([f"families/{family}.py" for family in families])
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in needed}
    sources["__init__.py"] = '"""The part of Genus that this model needs."""\n'
    content = hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()
    name = f"genus_{content[:12]}"
    for path, text in sources.items():
        target = destination / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(r"^(\s*(?:from|import)\s+)genus\b", rf"\1{name}", text, flags=re.M), encoding="utf-8")
    return name


def _families(about: Mapping[str, Any]) -> list[str]:
    """A model's family and those of the models that it learned from."""
    return [about["family"], *(_families(about["parent"]) if about.get("parent") else [])]


def _closure(first: Sequence[str]) -> set[str]:
    """Paths under genus/ that source files need: what they import, what that imports, and their packages."""
    found: set[str] = set()
    waiting = list(first)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        if path == "__init__.py":  # the package's front door leads everywhere
            continue
        waiting += [f"{parent}/__init__.py" if str(parent) != "." else "__init__.py" for parent in Path(path).parents]
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                if name.split(".")[0] == "genus":
                    relative = "/".join(name.split(".")[1:])
                    candidates = (f"{relative}.py", f"{relative}/__init__.py")
                    waiting += [candidate for candidate in candidates if (ROOT / candidate).is_file()]
    return found


def _fitting(folder: Path, about: dict[str, Any]) -> Family:
    """The family as it is now, built. Raises UserError where the stored weights are not of this version of it."""
    import torch
    from safetensors import safe_open

    from genus.contract import build
    from genus.data.spec import DataSpec

    with torch.random.fork_rng(devices=[]):
        family = build(about["family"], DataSpec.from_json(about["spec"]), about["params"], about.get("parent"))
    wanted = {name: list(tensor.shape) for name, tensor in family.state_dict().items()}
    with safe_open(folder / "weights.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    if wanted != stored:
        raise UserError(f"{folder}: trained by another version of family '{about['family']}'; train it again")
    return family


def _signature(about: dict[str, Any], knobs: dict[str, Any], samples: bool) -> ModelSignature:
    """Input: a seed a row, a label or a prompt where the model takes one. Params: the knobs, with their defaults.

    Of a model that translates and does not sample the input is what its output is, images.
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    columns: list[ColSpec | TensorSpec] = [ColSpec("long", "seed"), ColSpec("long", "label", required=False)]
    if "prompt" in knobs:
        columns.append(ColSpec("string", "prompt", required=False))
    params = [ParamSpec(name, _kind(value), value) for name, value in knobs.items()]
    if about["spec"].get("alphabet"):
        outputs = Schema([ColSpec("string")])
    else:
        dtype = np.dtype(np.uint8 if about["spec"]["levels"] else np.float32)
        outputs = Schema([TensorSpec(dtype, (-1, *about["spec"]["shape"]))])
    return ModelSignature(
        inputs=Schema(columns) if samples else outputs,
        outputs=outputs,
        params=ParamSchema(params) if params else None,  # type: ignore[arg-type]
    )


def _kind(value: bool | int | float | str) -> str:
    """MLflow's name of a value's type."""
    return {bool: "boolean", int: "long", float: "double", str: "string"}[type(value)]


def _version(name: str) -> str:
    """An installed version as the index names it, without the build's suffix (+cpu)."""
    return importlib.metadata.version(name).split("+")[0]
