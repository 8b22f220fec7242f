"""Rate and distortion of beta-VAEs on the shapes with known factors, and how disentangled their codes are, over beta.

python benchmarks/beta_curve.py [--betas 0.25 1 …] [--seeds 0 1 …] [--steps 1600]

Writes benchmarks/results/beta-curve.json, an entry a beta and seed, and draws docs/beta-curve.png of all that it holds:
what is there already is not trained again. Figures are of the validation split, but for the mutual information gap,
which is of 10,000 images of known factors. Needs `genus ingest factors`. One thread, about 15 s a training.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from genus.config import Evaluate, Train
from genus.contract import Batch, build, parameter_count
from genus.data.loaders import Dataset, open_dataset
from genus.evaluation.disentanglement import disentanglement
from genus.files import read_json, write_json
from genus.training import set_up, train

RESULTS, PICTURE = Path("benchmarks/results/beta-curve.json"), Path("docs/beta-curve.png")
BETAS, SEEDS, STEPS = (0.25, 1.0, 4.0, 10.0, 30.0), (0, 1, 2), 1600
PARAMS = {"latent": 10, "channels": 8, "hidden": 64, "mixtures": 1}
TRAIN: dict[str, Any] = {"batch_size": 32, "learning_rate": 2e-3, "clip": 300.0, "warmup": 0.1, "betas": (0.9, 0.99)}


def measured(data: Dataset, beta: float, seed: int, steps: int) -> dict[str, Any]:
    """Trains one model and gives its figures: rate and distortion in nats an image."""
    set_up(1, seed)
    cpu = torch.device("cpu")
    model: Any = build("vae/beta_vae", data.spec, PARAMS | {"beta": beta})
    started = time.process_time()
    config = Train(steps=steps, **TRAIN)
    model = train(model, data.split("train"), data.labels("train"), config, steps=steps, seed=seed, device=cpu).model
    seconds = time.process_time() - started
    x = data.spec.to_float(torch.from_numpy(np.array(data.split("validation"))))
    generator, batches = torch.Generator().manual_seed(seed), x.split(500)
    with torch.inference_mode():
        bound = torch.cat([model.log_prob(Batch(part), generator=generator) for part in batches]).double().mean().item()
        rate = torch.cat([model.rate(Batch(part), generator=generator) for part in batches]).double().mean().item()
    task = SimpleNamespace(model=model, data=data, effort=Evaluate(batch_size=500), seed=1000, device=cpu)
    figures, _ = disentanglement(task)
    entry = {"beta": beta, "seed": seed, "steps": steps, "parameters": parameter_count(model)}
    entry |= {"cpu_seconds": round(seconds, 1), "rate": rate, "distortion": -bound - rate, "bound": bound}
    return entry | figures


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of a few seeds, and half of its 95% interval by Student's t."""
    from scipy.stats import t

    n = len(values)
    spread = float(np.std(values, ddof=1)) / np.sqrt(n) if n > 1 else 0.0
    return float(np.mean(values)), float(t.ppf(0.975, n - 1) * spread) if n > 1 else 0.0


def draw(runs: list[dict[str, Any]]) -> None:
    """The picture: distortion against rate, the gap against beta; a point a training, a line through means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    betas = sorted({run["beta"] for run in runs})
    each = [[run for run in runs if run["beta"] == beta] for beta in betas]
    for axis, x, y in ((left, "rate", "distortion"), (right, "beta", "gap")):
        values = {key: [[_of(run, key) for run in group] for group in each] for key in (x, y)}
        axis.plot(np.concatenate(values[x]), np.concatenate(values[y]), ".", color="tab:blue", alpha=0.5)
        means = [np.array([interval(group)[0] for group in values[key]]) for key in (x, y)]
        axis.errorbar(*means, yerr=[interval(group)[1] for group in values[y]], fmt="o-", color="tab:blue", capsize=3)
    for beta, group in zip(betas, each, strict=True):
        place = (np.mean([run["rate"] for run in group]), np.mean([run["distortion"] for run in group]))
        left.annotate(f"β = {beta:g}", place, xytext=(6, 6), textcoords="offset points")
    left.set(xlabel="rate: KL, nats an image", ylabel="distortion: -log p(x|z), nats an image")
    right.set(xlabel="β", ylabel="mutual information gap", xscale="log", ylim=(0, None))
    right.set_xticks(betas, [f"{beta:g}" for beta in betas])
    right.minorticks_off()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def _of(run: dict[str, Any], key: str) -> float:
    return run["mutual_information_gap"]["value"] if key == "gap" else run[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--betas", type=float, nargs="*", default=BETAS)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    data = open_dataset("factors")
    kept = read_json(RESULTS) if RESULTS.exists() else {"params": PARAMS, "train": TRAIN, "runs": []}
    for seed in given.seeds:
        for beta in given.betas:
            if any((run["beta"], run["seed"], run["steps"]) == (beta, seed, given.steps) for run in kept["runs"]):
                continue
            entry = measured(data, beta, seed, given.steps)
            kept["runs"] = sorted([*kept["runs"], entry], key=lambda run: (run["steps"], run["beta"], run["seed"]))
            write_json(RESULTS, kept)
            gap = entry["mutual_information_gap"]["value"]
            told = f"rate {entry['rate']:.1f}, distortion {entry['distortion']:.1f} nats, gap {gap:.3f}"
            print(f"beta {beta:g}, seed {seed}: {told}, {entry['cpu_seconds']} s", flush=True)
    runs = [run for run in kept["runs"] if run["steps"] == given.steps]
    for beta in sorted({run["beta"] for run in runs}):
        mean, half = interval([_of(run, "gap") for run in runs if run["beta"] == beta])
        print(f"beta {beta:g}: mutual information gap {mean:.3f} ± {half:.3f}")
    draw(runs)


if __name__ == "__main__":
    main()
