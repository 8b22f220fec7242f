"""Packages: a trained model that loads where this repository is not.

An MLflow pyfunc made of readable parts: safetensors weights, model.json, and the few files of Genus that this family
needs, found by following its imports. Nothing in it is pickled.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import inspect
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genus.files import read_json, replacing

if TYPE_CHECKING:
    from mlflow.models import Model

ROOT = Path(__file__).parents[1]  # the package genus
REQUIREMENTS = ("torch", "numpy", "safetensors", "pandas", "mlflow")


def package(
    folder: str | os.PathLike[str], destination: str | os.PathLike[str], knobs: dict[str, Any] | None = None
) -> None:
    """Writes ``models/<model>/`` as an MLflow model to the folder ``destination``, whole or not at all.

    ``knobs`` are the defaults of the family's sample() that the model was evaluated with.
    """
    with replacing(destination) as temporary:
        save(Path(folder), temporary, knobs or {})


def save(folder: Path, destination: Path, knobs: dict[str, Any], mlflow_model: Model | None = None) -> None:
    """Writes the package; ``mlflow_model`` carries the ids where it belongs to a run."""
    import mlflow.pyfunc

    about = read_json(folder / "model.json")
    with tempfile.TemporaryDirectory() as scratch:
        code = Path(scratch) / "code"
        write_code(about["family"], code)
        mlflow.pyfunc.save_model(
            path=str(destination),
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={
                "weights": str(folder / "weights.safetensors"),
                "model": str(folder / "model.json"),
                "code": str(code),
            },
            signature=_signature(about, knobs),
            # Exact versions: the bytes of a sample depend on torch's kernels.
            pip_requirements=[f"{name}=={_version(name)}" for name in REQUIREMENTS],
            mlflow_model=mlflow_model,
        )


def write_code(family: str, destination: Path) -> str:
    """Writes the sources that ``family`` (flows/glow) needs as one package; returns the package's name.

    The name is genus_<hash of the sources>, so that it never meets another version's code, nor an installed Genus.
    """
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in _closure(f"families/{family}.py")}
    content = hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()
    name = f"genus_{content[:12]}"
    for path, text in sources.items():
        target = destination / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(r"^(\s*(?:from|import)\s+)genus\b", rf"\1{name}", text, flags=re.M), encoding="utf-8")
    return name


def _closure(first: str) -> set[str]:
    """Paths under genus/ that a source file needs: what it imports, what that imports, and their packages."""
    found: set[str] = set()
    waiting = [first]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        waiting += [f"{parent}/__init__.py" if str(parent) != "." else "__init__.py" for parent in Path(path).parents]
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                here = ".".join(["genus", *Path(path).parts[: -node.level]]) if node.level else ""
                module = ".".join(part for part in (here, node.module) if part)
                names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            for name in names:
                if name.split(".")[0] == "genus":
                    relative = "/".join(name.split(".")[1:])
                    candidates = (f"{relative}.py", f"{relative}/__init__.py")
                    waiting += [candidate for candidate in candidates if (ROOT / candidate).is_file()]
    return found


def _signature(about: dict[str, Any], knobs: dict[str, Any]) -> Any:
    """Input: a seed a row. Params: what the family's sample() takes by keyword, with its defaults."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    from genus.contract import family_class

    taken = inspect.signature(family_class(about["family"]).sample).parameters  # type: ignore[attr-defined]
    defaults = {name: p.default for name, p in taken.items() if name not in ("self", "n", "generator", "cond")}
    defaults = {name: knobs.get(name, default) for name, default in defaults.items()}
    usable = {name: value for name, value in defaults.items() if isinstance(value, bool | int | float | str)}
    params = [ParamSpec(name, _kind(value), value) for name, value in sorted(usable.items())]
    dtype = np.dtype(np.uint8 if about["spec"]["levels"] else np.float32)
    return ModelSignature(
        inputs=Schema([ColSpec("long", "seed")]),
        outputs=Schema([TensorSpec(dtype, (-1, *about["spec"]["shape"]))]),
        params=ParamSchema(params) if params else None,  # type: ignore[arg-type]
    )


def _kind(value: bool | int | float | str) -> str:
    """MLflow's name of a value's type."""
    return {bool: "boolean", int: "long", float: "double", str: "string"}[type(value)]


def _version(name: str) -> str:
    """An installed version as the index names it, without the build's suffix (+cpu)."""
    return importlib.metadata.version(name).split("+")[0]
