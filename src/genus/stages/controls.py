"""Stage controls: what known coders and known sample sets score on a data set."""

from __future__ import annotations

from pathlib import Path

from genus import config
from genus.files import replacing, write_json


def run(name: str) -> None:
    """Measures the controls and anchors of data set ``name`` and writes reports/controls/<name>/."""
    params = config.load()
    params.dataset(name)

    from PIL import Image

    from genus.data.loaders import open_dataset
    from genus.evaluation.controls import anchors, controls
    from genus.evaluation.reference import open_reference
    from genus.pictures import grid
    from genus.training import set_up

    set_up(params.threads, params.seed)
    data = open_dataset(name)
    found, sets = controls(data, open_reference(data, Path("data/judge") / name), seed=params.seed)
    with replacing(Path("reports/controls") / name) as folder:
        folder.mkdir()
        write_json(folder / "controls.json", {"anchors": anchors(data), "controls": found})
        for file, images, columns in (
            ("real.png", data.split("test")[:64], None),
            *((f"{key}.png", images[:10], 10) for key, images in sets.items()),
        ):
            Image.fromarray(grid(images, levels=data.spec.levels, columns=columns)).save(folder / file, format="PNG")
    for key, row in found.items():
        told = (f"{name} {row['metrics'][name]['value']:.3g}" for name in ("kid", "coverage", "memorisation"))
        print(f"{key}: {', '.join(told)}")
