"""Codebooks or finite scalar quantisation? VQ-VAE-2 with each, and a prior over its tokens.

python benchmarks/quantisers.py

Recipes are those of params.yaml. Of each: how much of the code is used, what is left of an image after it, and the
Fréchet distance of samples of a prior that was trained over its tokens, as shares of the Gaussian control's. "fsq 8x4"
has as many entries as the codebooks; "fsq 4x4x4", the family's default, twice as many. All figures are of the
validation split, seed 0. Writes benchmarks/results/quantisers.json, an entry at a time. Needs `genus judge
fashion-mnist`; one thread, four minutes each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genus import config
from genus.contract import build
from genus.data.loaders import Dataset, open_dataset
from genus.evaluation.codes import count, perplexity, root_mean_square
from genus.evaluation.judge import Judge, features
from genus.evaluation.metrics import Frechet, gaussian_control
from genus.evaluation.reference import open_reference
from genus.files import read_json, write_json
from genus.sampling import draw
from genus.training import set_up, train

RESULTS = Path("benchmarks/results/quantisers.json")
AUTOENCODER, PRIOR = "fashion-mnist-vqvae2", "fashion-mnist-code-prior"
QUANTISERS: dict[str, dict[str, Any]] = {
    "ema 32": {"quantiser": "ema"},
    "fsq 8x4": {"quantiser": "fsq", "levels": (8, 4)},
    "fsq 4x4x4": {"quantiser": "fsq", "levels": (4, 4, 4)},
}
SAMPLES = 4000
CPU = torch.device("cpu")


def measured(changes: dict[str, Any], params: config.Params, data: Dataset, judge: Judge) -> dict[str, Any]:
    """Trains an autoencoder and its prior, and gives their figures."""
    validation = np.asarray(data.split("validation"))
    frechet = Frechet(features(judge, validation))
    control = gaussian_control(data.split("train"), len(validation), levels=data.spec.levels, seed=params.seed)
    scale = frechet(features(judge, control))
    models: list[Any] = []
    seconds = []
    for name, given, parent in ((AUTOENCODER, changes, False), (PRIOR, {}, True)):
        chosen = params.model(name)
        set_up(1, params.seed)
        model = build(chosen.family, data.spec, chosen.params | given, models[0] if parent else None)
        started, steps = time.process_time(), chosen.train.steps
        options: dict[str, Any] = {"steps": steps, "seed": params.seed, "device": CPU}
        models.append(train(model, data.split("train"), data.labels("train"), chosen.train, **options).model.eval())
        seconds.append(round(time.process_time() - started, 1))
    autoencoder, prior = models
    counts, again = [np.zeros(autoencoder.entries, np.int64) for _ in autoencoder.grids], []
    with torch.inference_mode():
        for part in np.array_split(validation, 12):
            tokens = autoencoder.quantise(data.spec.to_float(torch.from_numpy(np.array(part))))
            counts = [seen + count(grid, autoencoder.entries) for seen, grid in zip(counts, tokens, strict=True)]
            again.append(data.spec.to_stored(autoencoder.dequantise(tokens)).numpy())
    decoded = np.concatenate(again)
    samples = draw(prior, SAMPLES, seed=params.seed, device=CPU, knobs=params.model(PRIOR).evaluate.knobs)
    return {
        "entries": autoencoder.entries,
        "used": [float((seen > 0).mean()) for seen in counts],
        "perplexity": [perplexity(seen) for seen in counts],
        "reconstruction_error": root_mean_square(decoded, validation),
        "reconstruction_share": frechet(features(judge, decoded)) / scale,
        "sample_share": frechet(features(judge, samples)) / scale,
        "samples": SAMPLES,
        "cpu_seconds": seconds,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    params = config.load()
    data = open_dataset(params.model(AUTOENCODER).dataset)
    judge = open_reference(data, Path("data/judge") / data.folder.name).judge
    for name, changes in QUANTISERS.items():
        kept = read_json(RESULTS) if RESULTS.exists() else {}
        kept[name] = measured(changes, params, data, judge)
        write_json(RESULTS, kept)
        print(name, kept[name], flush=True)


if __name__ == "__main__":
    main()
