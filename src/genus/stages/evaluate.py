"""Stage evaluate: every figure of one model on the test split, which nothing before has chosen by."""

from __future__ import annotations

from pathlib import Path

from genus import config
from genus.files import read_json, read_tensors, replacing, sha256, write_json
from genus.stages.records import failure_recorded, record_of


def run(name: str) -> None:
    """Measures ``name`` and writes its metrics, its timing, its pictures, and its record: all that the report needs."""
    params = config.load()
    chosen = params.model(name)

    from PIL import Image

    from genus.data.loaders import open_dataset
    from genus.evaluation.evaluate import Task, evaluate, load_model
    from genus.evaluation.gallery import gallery
    from genus.evaluation.reference import open_reference
    from genus.training import pick_device, set_up

    device = pick_device(params.device)
    set_up(params.threads, params.seed)
    folder = Path("models") / name
    about = read_json(folder / "model.json")
    data = open_dataset(chosen.dataset)
    model = load_model(about, read_tensors(folder / "weights.safetensors")).to(device)
    reference = open_reference(data, Path("data/judge") / chosen.dataset)
    controls = read_json(Path("reports/controls") / chosen.dataset / "controls.json")["controls"]
    held_out = controls["held_out"]["metrics"]["memorisation"]
    task = Task(model, data, reference, chosen.evaluate, params.seed, device, held_out)
    with failure_recorded(name, chosen, "evaluate", FloatingPointError):
        figures, timing = evaluate(task)
    with replacing(Path("reports/pictures") / chosen.collection / name) as pictures:
        pictures.mkdir()
        for picture, pixels in gallery(task).items():
            Image.fromarray(pixels).save(pictures / f"{picture}.png", format="PNG")
    timing = read_json(Path("reports/timing/train") / f"{name}.json") | timing
    write_json(Path("reports/metrics") / f"{name}.json", figures)
    write_json(Path("reports/timing") / f"{name}.json", timing)
    described = ("name", "family", "paper", "dataset", "parameters", "steps", "seed", "budget")
    record = {key: about[key] for key in described}
    record |= {"metrics": figures, "timing": timing, "history": _history(folder / "history.csv")}
    record |= {"sha256": sha256(folder / "weights.safetensors")}
    write_json(record_of(name, chosen), record)


def _history(path: Path, most: int = 200) -> dict[str, list[float | None]]:
    """The training's history by column, at most so many rows: enough for a curve."""
    import pandas as pd

    table = pd.read_csv(path)
    thin = table.iloc[:: -(-len(table) // most)]
    return {str(name): [None if pd.isna(value) else float(value) for value in thin[name]] for name in thin}
