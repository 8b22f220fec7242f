"""Stage controls: what known coders and known sample sets score on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from genus import config
from genus.files import replacing, write_json

if TYPE_CHECKING:
    from genus.data.loaders import Dataset

TOLD = ("kid", "coverage", "ngram_bits", "distinct_2", "memorisation")  # of each set, on the terminal


def run(name: str) -> None:
    """Measures the controls and anchors of data set ``name`` and writes reports/controls/<name>/."""
    params = config.load()
    params.dataset(name)

    from genus.data.loaders import open_dataset
    from genus.training import set_up

    set_up(params.threads, params.seed)
    data = open_dataset(name)
    found = (_text if data.spec.kind == "text" else _images)(data, name, params.seed)
    for key, row in found.items():
        metrics = row["metrics"]
        told = (f"{metric} {metrics[metric]['value']:.3g}" for metric in TOLD if metric in metrics)
        print(f"{key}: {', '.join(told)}")


def _images(data: Dataset, name: str, seed: int) -> dict:
    """Scores as JSON, and pictures of every set and of real images."""
    from PIL import Image

    from genus.evaluation.controls import anchors, controls
    from genus.evaluation.reference import open_reference
    from genus.pictures import grid

    found, sets = controls(data, open_reference(data, Path("data/judge") / name), seed=seed)
    with replacing(Path("reports/controls") / name) as folder:
        folder.mkdir()
        write_json(folder / "controls.json", {"anchors": anchors(data), "controls": found})
        for file, images, columns in (
            ("real.png", data.split("test")[:64], None),
            *((f"{key}.png", images[:10], 10) for key, images in sets.items()),
        ):
            Image.fromarray(grid(images, levels=data.spec.levels, columns=columns)).save(folder / file, format="PNG")
    return found


def _text(data: Dataset, name: str, seed: int) -> dict:
    """Scores and the first documents of every set, as JSON."""
    from genus.evaluation.text.controls import anchors, controls
    from genus.evaluation.text.reference import open_reference

    reference = open_reference(data, Path("data/judge") / name)
    found, real = controls(data, reference, seed=seed)
    with replacing(Path("reports/controls") / name) as folder:
        folder.mkdir()
        known = {"anchors": anchors(data, reference), "controls": found, "texts": real}
        write_json(folder / "controls.json", known)
    return found
