"""Trains and evaluates models at a larger budget, in a folder of their own, and keeps the figures.

python benchmarks/budget.py [--budget 10] [--results RESULTS.json] [MODEL ...]

Without names: every model of the collections tour, likelihood and text, one after the other, about a quarter of an hour
each. The data, their judges and their controls must be there: `genus run --all` makes them. A training that was
interrupted goes on from its checkpoint, and what is measured stands in the results before the next model begins.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import yaml

from genus import config
from genus.files import read_json, replacing, sha256, write_json

COLLECTIONS = ("tour", "likelihood", "text")
SHARED = ("data", "reports/controls", "reports/validation")  # which do not depend on the budget
KEPT = {  # of the metrics
    "bits_per_dim",
    "iwae_bits_per_dim",
    "ode_bits_per_dim",
    "bits_per_char",
    "word_perplexity",
    "frechet_distance",
    "kid",
    "coverage",
    "recall",
    "inverse_error",
}


def workspace(budget: float) -> Path:
    """A folder like the project's, with that budget, that shares what does not depend on it."""
    folder = Path(".genus/budget") / f"{budget:g}"
    for name in SHARED:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(Path(name).resolve())
    with replacing(folder / "params.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(yaml.safe_load(Path("params.yaml").read_text()) | {"budget": budget}))
    return folder


def measured(folder: Path, name: str) -> dict[str, object]:
    """Trains and evaluates one model there."""
    quiet = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{(folder / 'mlflow.db').resolve()}"}
    for stage in ("train", "evaluate"):
        subprocess.run([str(Path(sys.executable).with_name("genus")), stage, name], cwd=folder, env=quiet, check=True)
    about, timing = (
        read_json(folder / "models" / name / "model.json"),
        read_json(folder / f"reports/timing/{name}.json"),
    )
    figures = read_json(folder / f"reports/metrics/{name}.json")
    entry = {key: about[key] for key in ("parameters", "params", "steps", "seed")}
    entry |= {key: round(value, 3) for key, value in timing.items() if key in ("train_seconds", "sample_ms")}
    entry |= {key: round(value, 1) for key, value in timing.items() if key.startswith("train_") and "per_s" in key}
    entry |= {"machine": f"one of {os.cpu_count()} cores of {processor()}, no GPU"}
    entry |= {"weights_sha256": sha256(folder / f"models/{name}/weights.safetensors")}
    return entry | {"metrics": {key: value for key, value in figures.items() if key in KEPT}}


def processor() -> str:
    """What the machine's processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--budget", type=float, default=10)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    params = config.load()
    names = given.models or [name for part in COLLECTIONS for name in params.collection(part)]
    results = given.results or Path(f"benchmarks/results/budget-{given.budget:g}.json")
    folder = workspace(given.budget)
    for name in names:
        params.model(name)  # a misspelt one is said before hours of work
    for name in names:
        entry = measured(folder, name)
        kept = read_json(results) if results.exists() else {"budget": given.budget, "split": "test", "models": {}}
        kept["models"][name] = entry
        write_json(results, kept)
        figures = entry["metrics"]
        print(name, {key: round(value["value"], 4) for key, value in figures.items()}, flush=True)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
