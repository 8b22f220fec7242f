"""Stage evaluate: every figure of one model on the test split, which nothing before has chosen by."""

from __future__ import annotations

from pathlib import Path

from genus import config
from genus.files import read_json, sha256, write_json


def run(name: str) -> None:
    """Measures ``name`` and writes its metrics, its timing, and its record (both, and what the model is)."""
    params = config.load()
    chosen = params.model(name)

    from safetensors.torch import load_file

    from genus.data.loaders import open_dataset
    from genus.evaluation.evaluate import Task, evaluate, load_model
    from genus.evaluation.reference import open_reference
    from genus.training import pick_device, set_up

    device = pick_device(params.device)
    set_up(params.threads, params.seed)
    folder = Path("models") / name
    about = read_json(folder / "model.json")
    data = open_dataset(chosen.dataset)
    model = load_model(about, load_file(folder / "weights.safetensors")).to(device)
    reference = open_reference(data, Path("data/judge") / chosen.dataset)
    figures, timing = evaluate(Task(model, data, reference, chosen.evaluate, params.seed, device))
    timing = read_json(Path("reports/timing/train") / f"{name}.json") | timing
    write_json(Path("reports/metrics") / f"{name}.json", figures)
    write_json(Path("reports/timing") / f"{name}.json", timing)
    described = ("name", "family", "paper", "dataset", "parameters", "steps", "seed", "budget")
    record = {key: about[key] for key in described}
    record |= {"metrics": figures, "timing": timing, "sha256": sha256(folder / "weights.safetensors")}
    write_json(Path("reports/records") / chosen.collection / f"{name}.json", record)
