"""Does the critic's loss say how good a WGAN is? Its rank correlation with the Fréchet distance over a training.

python benchmarks/wgan_loss.py [MODEL …] trains models of params.yaml, both WGANs of Fashion-MNIST where none is named,
and stops at 12 points of each training, from its first step on. Beside the Fréchet distance of samples to the
validation split stand two estimates of the Wasserstein distance: "online", that of training, where a critic has had a
step or two since the generator moved; and "near", that of a copy of the critic which is trained on for 100 steps
against the generator as it stands, and is then near its best, on examples that it has not seen. It is the second that
Arjovsky et al. 2017 (arXiv:1701.07875, sections 3 and 4.2) speak of, and show by eye. Both networks have the averaged
weights there, from which samples are drawn here as everywhere.

Writes benchmarks/results/wgan_loss.json, a model at a time, and draws docs/wgan-loss.png of all that it holds. Needs
`genus judge fashion-mnist`; one thread, two to four minutes a model.
"""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm, spearmanr
from torch import Tensor

from genus import config
from genus.contract import Batch, build
from genus.data.loaders import Dataset, open_dataset
from genus.evaluation.judge import features
from genus.evaluation.metrics import Frechet
from genus.evaluation.reference import open_reference
from genus.files import read_json, write_json
from genus.sampling import draw
from genus.training import Row, set_up, train

RESULTS, PICTURE = Path("benchmarks/results/wgan_loss.json"), Path("docs/wgan-loss.png")
MODELS = ("fashion-mnist-wgan", "fashion-mnist-wgan-gp")
POINTS = (1, 10, 25, 50, 75, 100, 150, 200, 300, 450, 700)  # steps, and the last one
SAMPLES, RANK = 1000, "rank_correlation"
ROUNDS, STEPS, BATCH = 2, 50, 32  # of the critic's copy: rounds of so many steps of so many examples
CPU = torch.device("cpu")


def near(model: Any, data: Dataset, rate: float, betas: tuple[float, float], seed: int) -> tuple[float, list[float]]:
    """The estimate of a critic near its best, on fresh examples, and that on train examples in each of its rounds.

    A round is algorithm 1 up to the generator's turn, with as many critic steps as the round has.
    """
    model = copy.deepcopy(model).train().requires_grad_(True)
    model.generator.eval()  # it stands still, as it is drawn from
    model.n_critic = STEPS
    critic = model.groups()["critic"]
    optimiser = torch.optim.Adam(critic, rate, betas)
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    split, seen = data.split("train"), []
    for _ in range(ROUNDS):
        rows = np.sort(random.choice(len(split), STEPS * BATCH, replace=False))
        stored = torch.from_numpy(np.array(split[rows]))[torch.randperm(len(rows), generator=generator)]
        with torch.enable_grad():
            estimates = []
            for group, terms in model.updates(Batch(data.spec.to_float(stored)), generator=generator):
                if group == "generator":
                    break
                optimiser.zero_grad()
                terms["loss"].backward(inputs=critic)
                optimiser.step()
                estimates.append(terms["wasserstein"].item())
        seen.append(float(np.mean(estimates[len(estimates) // 2 :])))
    fresh = data.spec.to_float(torch.from_numpy(np.array(data.split("validation")[:SAMPLES])))
    fakes = model.sample(len(fresh), generator=generator)
    with torch.no_grad():  # in batches as in training, where it has a batch norm

        def scores(x: Tensor) -> float:
            return torch.cat([model.score(part, None) for part in x.split(BATCH) if len(part) == BATCH]).mean().item()

        return scores(fresh) - scores(fakes), seen


def trained(name: str) -> dict[str, Any]:
    """The figures of a training. Online estimates are means over the steps since the point before."""
    params = config.load()
    chosen = params.model(name)
    data = open_dataset(chosen.dataset)
    judge = open_reference(data, Path("data/judge") / chosen.dataset).judge
    frechet = Frechet(features(judge, np.asarray(data.split("validation"))))
    set_up(1, params.seed)
    steps, rates, found = chosen.train.steps, chosen.train.learning_rate, []
    assert isinstance(rates, dict)

    def on_samples(model: Any, step: int) -> None:
        drawn = draw(model, SAMPLES, seed=params.seed, device=CPU, quiet=True)
        estimate, rounds = near(model, data, rates["critic"], chosen.train.betas, step)
        found.append({"step": step, "frechet": frechet(features(judge, drawn)), "near": estimate, "rounds": rounds})

    points = [*(point for point in POINTS if point < steps), steps]
    history = train(
        build(chosen.family, data.spec, chosen.params),
        data.split("train"),
        data.labels("train"),
        chosen.train,
        steps=steps,
        seed=params.seed,
        device=CPU,
        log_every=1,
        on_samples=on_samples,
        samples_at=frozenset(points),
    ).history

    def online(rows: list[Row]) -> float:
        return float(np.mean([row["critic_wasserstein"] for row in rows]))

    for before, entry in zip([0, *points], found, strict=False):
        entry["online"] = online(history[before : entry["step"]])
    correlations = {
        key: correlation([e[key] for e in found], [e["frechet"] for e in found]) for key in ("near", "online")
    }
    settings = {"steps": steps, "seed": params.seed, "samples": SAMPLES, "critic_steps": ROUNDS * STEPS}
    return {RANK: correlations, **settings, "points": found}


def correlation(estimates: list[float], frechet: list[float]) -> dict[str, float]:
    """Spearman's, with a 95% interval by Fisher's z (Bonett & Wright 2000). The points are those of one training, each
    depending on the one before: what the interval says is how well so many points show a trend."""
    rho = float(spearmanr(estimates, frechet).statistic)
    half = norm.ppf(0.975) * math.sqrt((1 + rho**2 / 2) / (len(estimates) - 3))
    low, high = (math.tanh(math.atanh(min(max(rho, -0.9999), 0.9999)) + sign * half) for sign in (-1, 1))
    return {"value": rho, "low": low, "high": high, "n": len(estimates)}


def picture(found: dict[str, Any]) -> None:
    """Both estimates against the Fréchet distance, a panel a model; a line follows the training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(5 * len(found), 4), layout="constrained", squeeze=False)
    for axis, (name, figures) in zip(axes[0], found.items(), strict=True):
        far = [entry["frechet"] for entry in figures["points"]]
        for key, said in (("near", "critic near its best"), ("online", "critic of the training")):
            rho = figures[RANK][key]
            label = f"{said}: {rho['value']:.2f} ({rho['low']:.2f} to {rho['high']:.2f})"
            axis.plot(far, [entry[key] for entry in figures["points"]], "o-", ms=4, lw=1, label=label)
        axis.annotate(
            "first step",
            (far[0], figures["points"][0]["near"]),
            xytext=(-4, -12),
            textcoords="offset points",
            ha="right",
        )
        axis.set(title=name, xlabel="Fréchet distance to the validation split", ylabel="E f(x) - E f(G(z))")
        axis.legend(title="rank correlation", fontsize="small", loc="upper left")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main(names: tuple[str, ...]) -> None:
    kept = read_json(RESULTS) if RESULTS.exists() else {}
    for name in names:
        kept[name] = trained(name)
        write_json(RESULTS, kept)
        told = (
            f"{key} {rho['value']:.2f} ({rho['low']:.2f} to {rho['high']:.2f})" for key, rho in kept[name][RANK].items()
        )
        print(f"{name}: rank correlation over {len(kept[name]['points'])} points: {', '.join(told)}", flush=True)
    picture(kept)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or MODELS)
