"""Stage evaluate: every figure of one model on the test split, which nothing before has chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genus import config
from genus.files import read_json, read_tensors, replacing, sha256, write_json
from genus.stages.records import failure_recorded, record_of


def run(name: str) -> None:
    """Measures ``name`` and writes its metrics, its timing, its pictures, and its record: all that the report needs."""
    params = config.load()
    chosen = params.model(name)

    from genus.contract import CAPABILITIES, load_model
    from genus.data.loaders import open_dataset
    from genus.evaluation.evaluate import METRICS, Metric, Task, evaluate
    from genus.evaluation.reference import open_reference
    from genus.training import pick_device, set_up

    device = pick_device(params.device)
    set_up(params.threads, params.seed)
    folder = Path("models") / name
    about = read_json(folder / "model.json")
    data = open_dataset(chosen.dataset)
    judge = Path("data/judge") / chosen.dataset
    table: Sequence[Metric]
    reference: Any
    if data.spec.kind == "text":
        from genus.evaluation.text import evaluate as text
        from genus.evaluation.text import reference as judged

        table, show, reference = text.METRICS, _texts, judged.open_reference(data, judge)
    else:
        table, show, reference = METRICS, _pictures, open_reference(data, judge)
    model = load_model(about, read_tensors(folder / "weights.safetensors")).to(device)
    controls = read_json(Path("reports/controls") / chosen.dataset / "controls.json")["controls"]
    held_out = controls["held_out"]["metrics"]["memorisation"]
    task = Task(model, data, reference, chosen.evaluate, params.seed, device, held_out)
    with failure_recorded(name, chosen, "evaluate", FloatingPointError):
        figures, timing = evaluate(task, table)
    with replacing(Path("reports/pictures") / chosen.collection / name) as pictures:
        pictures.mkdir()
        shown = show(task, pictures)
    timing = read_json(Path("reports/timing/train") / f"{name}.json") | timing
    write_json(Path("reports/metrics") / f"{name}.json", figures)
    write_json(Path("reports/timing") / f"{name}.json", timing)
    described = ("name", "family", "paper", "dataset", "parameters", "steps", "seed", "budget")
    record = {key: about[key] for key in described}
    record |= {"metrics": figures, "timing": timing, "history": _history(folder / "history.csv")} | shown
    record |= {"can": [label for label, needs in CAPABILITIES.items() if isinstance(model, needs)]}
    record |= {"sha256": sha256(folder / "weights.safetensors")}
    write_json(record_of(name, chosen), record)


def _pictures(task: Any, folder: Path) -> dict[str, Any]:
    """Puts the pictures of what the model does into ``folder``."""
    from PIL import Image

    from genus.evaluation.gallery import gallery

    for picture, pixels in gallery(task).items():
        Image.fromarray(pixels).save(folder / f"{picture}.png", format="PNG")
    return {}


def _texts(task: Any, folder: Path) -> dict[str, Any]:
    """The record's part ``texts``, samples to be read; the same as a file in ``folder``."""
    from genus.evaluation.text.evaluate import shown

    found = shown(task)
    parts = [f"{part['label']}\n\n" + "".join(f"{text}\n\n" for text in part["texts"]) for part in found]
    (folder / "samples.txt").write_text("\n".join(parts), encoding="utf-8")
    return {"texts": found}


def _history(path: Path, most: int = 200) -> dict[str, list[float | None]]:
    """The training's history by column, at most so many rows: enough for a curve."""
    import pandas as pd

    table = pd.read_csv(path)
    thin = table.iloc[:: -(-len(table) // most)]
    return {str(name): [None if pd.isna(value) else float(value) for value in thin[name]] for name in thin}
