"""Does the critic's loss say how good a WGAN is? Its rank correlation with the Fréchet distance over a training.

python benchmarks/wgan_loss.py [MODEL …] trains models of params.yaml, both WGANs of Fashion-MNIST where none is named,
sets the critic's estimate of the Wasserstein distance beside the Fréchet distance of samples to the validation split at
12 points of the training, and writes benchmarks/results/wgan_loss.json. Arjovsky et al. 2017 (arXiv:1701.07875, section
4.2) show it by eye; the averaged weights are what is drawn from, here as everywhere. Needs `genus judge fashion-mnist`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from genus import config
from genus.contract import Family, build
from genus.data.loaders import open_dataset
from genus.evaluation.judge import features
from genus.evaluation.metrics import Frechet
from genus.evaluation.reference import open_reference
from genus.files import write_json
from genus.sampling import draw
from genus.training import Row, set_up, train

MODELS = ("fashion-mnist-wgan", "fashion-mnist-wgan_gp")
POINTS, SAMPLES = 12, 2000
CPU = torch.device("cpu")


def trained(name: str) -> tuple[dict[str, Any], Family]:
    """The figures of a training, and the model. Estimates are means over the steps since the point before."""
    params = config.load()
    chosen = params.model(name)
    data = open_dataset(chosen.dataset)
    judge = open_reference(data, Path("data/judge") / chosen.dataset).judge
    frechet = Frechet(features(judge, np.asarray(data.split("validation"))))
    set_up(1, params.seed)
    steps, points = chosen.train.steps, []
    every = steps // POINTS

    def on_samples(model: Family, step: int) -> None:
        drawn = draw(model, SAMPLES, seed=params.seed, device=CPU, quiet=True)
        points.append((step, frechet(features(judge, drawn))))

    result = train(
        build(chosen.family, data.spec, chosen.params),
        data.split("train"),
        data.labels("train"),
        chosen.train,
        steps=steps,
        seed=params.seed,
        device=CPU,
        log_every=1,
        on_samples=on_samples,
        samples_at=frozenset(range(every, steps + 1, every)),
    )

    def estimate(rows: list[Row]) -> float:
        return float(np.mean([row["critic_wasserstein"] for row in rows]))

    table = [
        {"step": step, "wasserstein": round(estimate(result.history[step - every : step]), 4), "frechet": round(far, 3)}
        for step, far in points
    ]
    found = spearmanr([row["wasserstein"] for row in table], [row["frechet"] for row in table])
    figures = {"rank_correlation": round(float(found.statistic), 3), "p_value": float(found.pvalue), "points": table}
    return figures | {"steps": steps, "seed": params.seed, "samples": SAMPLES}, result.model


def main(names: tuple[str, ...]) -> None:
    found = {name: trained(name)[0] for name in names}
    for name, figures in found.items():
        print(f"{name}: rank correlation {figures['rank_correlation']} over {len(figures['points'])} points")
    write_json(Path("benchmarks/results/wgan_loss.json"), found)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or MODELS)
