"""Stage judge: what samples of a data set are measured against: a classifier of images, or an n-gram model of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from genus import config

if TYPE_CHECKING:
    from genus.data.loaders import Dataset


def run(name: str) -> None:
    """Makes the judge of data set ``name`` and writes data/judge/<name>/."""
    params = config.load()
    options = params.dataset(name).judge

    from genus.data.loaders import open_dataset
    from genus.training import set_up

    set_up(params.threads, params.seed)
    data = open_dataset(name)
    (_text if data.spec.kind == "text" else _images)(data, Path("data/judge") / name, options, params)


def _images(data: Dataset, folder: Path, options: config.Judge, params: config.Params) -> None:
    from genus.evaluation.judge import train_judge
    from genus.evaluation.reference import make_reference
    from genus.training import pick_device

    judge = train_judge(
        data.spec,
        data.split("train"),
        data.labels("train"),
        device=pick_device(params.device),
        **options.model_dump(include={"steps", "batch_size", "learning_rate"}),
    )
    reference = make_reference(judge, data, folder, seed=params.seed, config=options.backbone)
    print(f"judge of {folder.name}: {reference.accuracy:.2%} of test, control {reference.views['judge'].control:.1f}")


def _text(data: Dataset, folder: Path, options: config.Judge, params: config.Params) -> None:
    from genus.evaluation.text.reference import make_reference

    ngram = make_reference(data, folder).ngram
    print(f"judge of {folder.name}: an {ngram.order}-gram model")
