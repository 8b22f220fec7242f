"""Stage judge: the classifier of a data set and what samples are measured against."""

from __future__ import annotations

from pathlib import Path

from genus import config


def run(name: str) -> None:
    """Trains the judge of data set ``name`` and writes data/judge/<name>/."""
    params = config.load()
    options = params.dataset(name).judge

    from genus.data.loaders import open_dataset
    from genus.evaluation.judge import train_judge
    from genus.evaluation.reference import make_reference
    from genus.training import pick_device, set_up

    set_up(params.threads, params.seed)
    data = open_dataset(name)
    judge = train_judge(
        data.spec,
        data.split("train"),
        data.labels("train"),
        device=pick_device(params.device),
        **options.model_dump(exclude={"backbone"}),
    )
    folder = Path("data/judge") / name
    reference = make_reference(judge, data, folder, seed=params.seed, config=options.backbone)
    print(f"judge of {name}: {reference.accuracy:.2%} of test, control {reference.views['judge'].control:.1f}")
