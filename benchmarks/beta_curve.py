"""Rate and distortion of beta-VAEs on the shapes with known factors, and how disentangled their codes are, over beta.

python benchmarks/beta_curve.py [--betas 0.25 1 …] [--seeds 0 1 …] [--steps 1600] [--no-questions]

Writes benchmarks/results/beta-curve.json, an entry a beta and seed, and draws docs/beta-curve.png of all that it holds:
what is there already is not trained again. Figures are of the validation split, but for the mutual information gap,
which is of 10,000 images of known factors. Needs `genus ingest factors`. One thread, about 15 s a training of the curve
and 90 s one of the second question.

Then asks whether beta = 30 has a wider gap than beta = 1. Neither the curve's seeds nor those of an earlier question
have a say in an answer. What was fixed before any of a question's seeds was trained (``QUESTIONS``): the seeds, the
steps, the two betas, all else as in the curve; a paired t test of the gap, one-sided, over all of them. The same test
of DCI disentanglement is told beside it, and decides nothing. At 1,600 steps the answer was no: at beta = 30 two of the
six gaps are next to none. So it was asked once more, of trainings five times as long and with ten seeds: wider on each
of them (+0.245, p = 6e-9). As two questions have two chances, each is answered at 2.5%.
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
PAIR = (1.0, 30.0)
QUESTIONS = {1600: (10, 11, 12, 13, 14, 15), 8000: (20, 21, 22, 23, 24, 25, 26, 27, 28, 29)}  # seeds, by steps
LEVEL = 0.05 / len(QUESTIONS)
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


def paired(low: list[float], high: list[float]) -> dict[str, float]:
    """Whether ``high`` is above ``low``, seed by seed: mean difference, its one-sided bound, and Student's p."""
    from scipy import stats

    differences = np.subtract(high, low)
    test = stats.ttest_1samp(differences, 0.0, alternative="greater")
    bound = float(test.confidence_interval(1 - LEVEL).low)
    return {"difference": float(differences.mean()), "low": bound, "p_value": float(test.pvalue), "n": len(differences)}


def compared(runs: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """A question's answer: the paired tests over all its seeds."""
    found = {(run["beta"], run["seed"]): run for run in runs}
    told: dict[str, Any] = {"steps": steps, "betas": list(PAIR), "seeds": list(QUESTIONS[steps]), "level": LEVEL}
    for name in ("mutual_information_gap", "dci"):
        low, high = ([found[beta, seed][name]["value"] for seed in QUESTIONS[steps]] for beta in PAIR)
        told[name] = {"values": [low, high]} | paired(low, high)
    return told


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


def trained(kept: dict[str, Any], part: str, betas: list[float], seeds: list[int], steps: int) -> list[dict[str, Any]]:
    """The runs of a part of the results, with those that were missing."""
    data = open_dataset("factors")
    for seed in seeds:
        for beta in betas:
            if any((run["beta"], run["seed"], run["steps"]) == (beta, seed, steps) for run in kept.get(part, [])):
                continue
            entry = measured(data, beta, seed, steps)
            runs = [*kept.get(part, []), entry]
            kept[part] = sorted(runs, key=lambda run: (run["steps"], run["beta"], run["seed"]))
            write_json(RESULTS, kept)
            told = f"rate {entry['rate']:.1f}, distortion {entry['distortion']:.1f} nats, gap {_of(entry, 'gap'):.3f}"
            print(f"beta {beta:g}, seed {seed}: {told}, {entry['cpu_seconds']} s", flush=True)
    return [run for run in kept.get(part, []) if run["steps"] == steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--betas", type=float, nargs="*", default=BETAS)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--no-questions", action="store_true")
    given = parser.parse_args()
    kept = read_json(RESULTS) if RESULTS.exists() else {"params": PARAMS, "train": TRAIN, "runs": []}
    if given.seeds:
        runs = trained(kept, "runs", given.betas, given.seeds, given.steps)
        for beta in sorted({run["beta"] for run in runs}):
            mean, half = interval([_of(run, "gap") for run in runs if run["beta"] == beta])
            print(f"beta {beta:g}: mutual information gap {mean:.3f} ± {half:.3f}")
        draw(runs)
    if given.no_questions:
        return
    kept["answers"] = []
    for steps, seeds in QUESTIONS.items():
        answer = compared(trained(kept, "fresh", list(PAIR), list(seeds), steps), steps)
        kept["answers"].append(answer)
        write_json(RESULTS, kept)
        for name in ("mutual_information_gap", "dci"):
            told = answer[name]
            sure = f"above {told['low']:+.3f} at {1 - LEVEL:.1%}, p = {told['p_value']:.2g}, {told['n']} seeds"
            print(f"{steps} steps, beta {PAIR[1]:g} over {PAIR[0]:g}, {name}: {told['difference']:+.3f}, {sure}")


if __name__ == "__main__":
    main()
