"""Does every model train on this GPU in bf16 as it does on the CPU in float32? `make gpu-check` answers.

The two devices draw different noise from equal seeds, so curves agree in the mean and not to the bit: the loss's mean
over the second half of the steps must lie within TOLERANCE of the CPU's, relative to the larger of the two curves'
magnitude and of the way the loss has come since the first step.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from genus import config
from genus.contract import build
from genus.data.loaders import Dataset, open_dataset
from genus.errors import UserError
from genus.training import Result, set_up, train

STEPS = 200
TOLERANCE = 0.15


@dataclass(frozen=True)
class Comparison:
    """One model on two devices."""

    difference: float  # of the late mean losses, relative
    images_per_s: float
    peak_memory_mb: float

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE


def run(collection: str = "tour") -> None:
    """Compares every model of the collection and prints a line each. Exit status 1 where one does not agree."""
    if not torch.cuda.is_available():
        print("gpu-check: there is no CUDA device here; nothing was checked")
        return
    params = config.load()
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {STEPS} steps, tolerance {TOLERANCE:.0%}")
    apart = []
    for name in params.collection(collection):
        section = params.models[name]
        result = compare(
            _data(section.dataset), section, device, seed=params.seed, parent=params.described(section.parent)
        )
        verdict = "agrees" if result.agrees else "APART"
        print(
            f"{name:32} {verdict}  loss {result.difference:6.1%} from the CPU's  "
            f"{result.images_per_s:8.0f} images/s  {result.peak_memory_mb:7.0f} MiB",
            flush=True,
        )
        if not result.agrees:
            apart.append(name)
    if apart:
        print(f"gpu-check: {', '.join(apart)} trains differently on this GPU", file=sys.stderr)
        raise SystemExit(1)


def compare(
    data: Dataset,
    section: config.Model,
    device: torch.device,
    *,
    seed: int,
    steps: int = STEPS,
    parent: dict[str, Any] | None = None,
) -> Comparison:
    """Trains the model on the CPU in float32 and on ``device`` as the pipeline would (cuda: bf16 autocast).

    One that learns from another learns here from its ``parent`` untrained.
    """

    def fit(where: torch.device) -> Result:
        set_up(torch.get_num_threads(), seed)
        model = build(section.family, data.spec, section.params, parent)
        labels = data.labels("train")
        return train(model, data.split("train"), labels, section.train, steps=steps, seed=seed, device=where)

    there, here = fit(device), fit(torch.device("cpu"))
    return Comparison(difference(there, here), there.timing["train_images_per_s"], there.timing["peak_memory_mb"])


def difference(one: Result, other: Result) -> float:
    """How far apart two trainings' losses are, the largest over the groups: 0 is equal, 1 as far as the loss moved."""
    worst = 0.0
    for name in (key for key in other.history[0] if key == "loss" or key.endswith("_loss")):
        a, b = ([row[name] for row in result.history] for result in (one, other))
        half = len(b) // 2
        late_a, late_b = sum(a[half:]) / len(a[half:]), sum(b[half:]) / len(b[half:])
        scale = max(abs(late_b), abs(b[0] - late_b))
        worst = max(worst, abs(late_a - late_b) / scale)
    return worst


def _data(name: str) -> Dataset:
    try:
        return open_dataset(name)
    except UserError:
        from genus.stages import ingest

        ingest.run(name)
        return open_dataset(name)
