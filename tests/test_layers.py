"""Who may import whom: DESIGN's layers, read from the imports themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "genus"
PIPELINES = Path(__file__).parents[1] / "pipelines"
ALWAYS = {"errors", "files", "progress", "config"}  # may be used by every layer but the families
# layer: what it may import of genus besides ALWAYS and itself
LAYERS = {
    "families": {"contract", "nn", "samplers", "data.spec"},
    "nn": {"data.spec"},
    "samplers": set(),
    "contract": {"families", "data.spec"},
    "data": set(),
    "parallel": set(),
    "training": {"contract", "data.spec", "parallel"},
    "sampling": {"contract", "training"},
    "pictures": set(),
    "evaluation": {"contract", "data", "pictures", "sampling", "training"},
    "artifacts": set(),
    "outbox": set(),
    "tracking": {"artifacts", "outbox"},
    "notify": set(),
    "registry": {"contract", "data", "notify", "tracking", "families"},
}
ONLY_IN = {
    "mlflow": {"tracking", "artifacts", "registry", "stages.trial"},  # a trial loads a package as its consumers do
    "great_expectations": {"data.validation"},
    "prefect": set(),  # nowhere under src: pipelines only
}
NEVER_IN_FAMILIES = {"mlflow", "prefect", "dvc", "great_expectations", "pathlib", "logging", "os"}
FILES = sorted(SOURCE.rglob("*.py"))


def module(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, wherever in the file; `from genus import x` gives genus.x."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {f"genus.{a.name}" for a in node.names} if node.module == "genus" else {node.module}
    return found


def within(name: str, layers: set[str]) -> bool:
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_stay_in_their_layer(path: Path) -> None:
    here = module(path)
    layer = here.split(".")[0]
    ours = {name.removeprefix("genus.") for name in imports(path) if name.startswith("genus.")}
    assert "pipelines" not in {name.split(".")[0] for name in imports(path)}
    if layer in LAYERS:
        allowed = LAYERS[layer] | (ALWAYS if layer != "families" else {"errors"})
        if layer != "families":
            allowed |= {layer}
        else:  # a private base in its own folder is the one thing families may share
            folder = ".".join(here.split(".")[:2])
            ours = {name for name in ours if not name.startswith(f"{folder}._")}
        assert not {name for name in ours if not within(name, allowed)}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_heavy_tools_stay_where_they_belong(path: Path) -> None:
    here, used = module(path), {name.split(".")[0] for name in imports(path)}
    for tool, places in ONLY_IN.items():
        assert tool not in used or within(here, places), f"{tool} is imported in {here}"
    if here.startswith("families."):
        assert not used & NEVER_IN_FAMILIES


def test_no_family_is_named_outside_the_families() -> None:
    """No `if family ==` anywhere: training and evaluation name no family."""
    names = {path.stem for path in (SOURCE / "families").rglob("*.py")} - {"__init__"}
    for path in [SOURCE / "training.py", SOURCE / "sampling.py", *(SOURCE / "evaluation").glob("*.py")]:
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not names & {value for value in strings if isinstance(value, str)}, path
