"""A toy project: the graph of the real dvc.yaml, with stages that do nothing but write their outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from genus import forkserver
from genus.config import NONE
from pipelines.children import FORKS

# Stands in for `genus STAGE NAME`: the same files, after TOY_SECONDS; the stages in TOY_FAILS fail.
STAGE = """
import json, os, pathlib, sys, time
from ruamel.yaml import YAML

stage, name = sys.argv[1:]
params = YAML(typ="safe").load(open("params.yaml"))
with open("ran.txt", "a") as file:
    file.write(f"{stage}@{name}\\n")
time.sleep(float(os.environ.get("TOY_SECONDS", "0")))
if f"{stage}@{name}" == os.environ.get("TOY_PASSING") and open("ran.txt").read().count(f"{stage}@{name}") < 3:
    print("genus: error: nobody answers yet", file=sys.stderr)
    sys.exit(75)
if f"{stage}@{name}" in os.environ.get("TOY_FAILS", "").split(","):
    print(f"genus: error: {stage} of {name} is broken on purpose", file=sys.stderr)
    sys.exit(2)

def write(path, text):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

if stage == "ingest":
    write(f"data/processed/{name}/train.npy", name)
    write(f"data/origin/{name}.json", json.dumps({"files": 0, "sha256": ""}))
elif stage == "validate":
    write(f"reports/validation/{name}.json", "{}")
elif stage == "judge":
    write(f"data/judge/{name}/weights", name)
elif stage == "controls":
    write(f"reports/controls/{name}/controls.json", "{}")
elif stage == "probe":
    write(f"reports/probes/{params['models'][name]['collection']}/{name}/probe.json", "{}")
    write(f"reports/timing/probe/{name}.json", json.dumps({"probe_seconds": time.time()}))
elif stage == "train":
    for file in ("weights.safetensors", "history.csv", "samples.png"):
        write(f"models/{name}/{file}", f"{name} {params['models'][name]['train']['steps']}")
    write(f"models/{name}/model.json", json.dumps({"name": name, "family": "flows/glow", "paper": "A & B 2018"}))
    write(f"reports/timing/train/{name}.json", json.dumps({"train_seconds": time.time()}))
elif stage == "evaluate":
    bits = {"value": 3.14159, "kind": "dequantised", "n": 100}
    frechet = {"value": 52.4, "relative": 0.12, "floor": 0.5, "n": 10000}
    write(f"reports/metrics/{name}.json", json.dumps({"bits_per_dim": bits, "frechet_distance": frechet}))
    write(f"reports/timing/{name}.json", json.dumps({"sample_ms": time.time()}))
    write(f"reports/records/{params['models'][name]['collection']}/{name}.json", json.dumps(time.time()))
    write(f"reports/pictures/{params['models'][name]['collection']}/{name}/samples.png", name)
elif stage == "scorecard":
    of = params["collections"][name]
    text = "".join(path.read_text() for path in sorted(pathlib.Path(of["records"]).rglob("*.json")))
    card = {"about": f"toy {text}", "models": {"digits-vae": {}}}
    card["advice"] = [{"need": "best density", "model": "digits-vae", "figure": "3.1 bits/dim", "runner_up": None}]
    cells = {"digits-vae": {"value": 3.14159, "kind": "elbo"}}
    card["properties"] = [{"title": "bits/dim", "unit": "", "cells": cells}]
    card["verdicts"] = [{"id": 7, "claim": "a | b", "verdict": "supported", "because": "c"}]
    write(f"reports/{of['report']}.json", json.dumps(card))
    for kind in ("html", "csv"):
        write(f"reports/{of['report']}.{kind}", text)
elif stage == "register":
    write(f"reports/registered/{name}.json", "{}")
if os.environ.get("GENUS_WORK"):
    write(os.environ["GENUS_WORK"], json.dumps({"seconds": 0.01}))
"""

PARAMS = """
seed: 0
collections:
  tour:
    about: a
    records: reports/records/tour
    probes: reports/probes/tour
    pictures: reports/pictures/tour
    report: scorecard
  smoke:
    about: b
    records: reports/records/smoke
    probes: reports/probes/smoke
    pictures: reports/pictures/smoke
    report: scorecard-smoke
  all:
    about: c
    records: reports/records
    probes: reports/probes
    pictures: reports/pictures
    report: scorecard-all
datasets:
  fashion-mnist:
    {source: fashion_mnist, options: {}, validation: 0.1, max_broken: 0.01, checks: {}, judge: {steps: 5}}
  digits:
    {source: digits, options: {}, validation: 0.1, max_broken: 0.01, checks: {}, judge: {steps: 5}}
models:
  digits-glow:
    family: flows/glow
    dataset: digits
    collection: smoke
    parent: none
    params: {}
    train: {steps: 5, batch_size: 2}
    evaluate: {}
    probe: {}
  digits-vae:
    family: vae/vae
    dataset: digits
    collection: smoke
    parent: none
    params: {}
    train: {steps: 7, batch_size: 2}
    evaluate: {}
    probe: {}
  fashion-mnist-vae:
    family: vae/vae
    dataset: fashion-mnist
    collection: tour
    parent: none
    params: {}
    train: {steps: 5, batch_size: 2}
    evaluate: {}
    probe: {}
budget: 1
threads: 1
device: cpu
"""


@pytest.fixture
def toy(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy project, the working directory of the test.

    Its stages need no libraries, so nobody shall import them ahead for each run: ``forks`` is for the tests of that.
    """
    monkeypatch.setenv(forkserver.VARIABLE, NONE)
    (project / "stage.py").write_text(STAGE)
    (project / "params.yaml").write_text(PARAMS)
    graph = (project / "dvc.yaml").read_text().replace("cmd: genus", "cmd: python stage.py")
    (project / "dvc.yaml").write_text(graph)
    return project


@pytest.fixture
def forks(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The socket of the server that a run of the toy project starts, as those of real ones do."""
    monkeypatch.delenv(forkserver.VARIABLE)
    return toy / FORKS


def ran(toy: Path) -> list[str]:
    """The stages whose commands have run so far, in the order in which they began."""
    path = toy / "ran.txt"
    return path.read_text().split() if path.exists() else []


def processes_of(toy: Path) -> list[str]:
    """Command lines of the processes whose working directory is the toy project."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if Path(os.readlink(entry / "cwd")) == toy:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it ended meanwhile
                continue
    return found
