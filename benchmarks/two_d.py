"""Fits flows to all six 2-D densities: a table of KL(truth || model) in nats, and one picture of them beside the truth.

python benchmarks/two_d.py [FAMILY …] writes docs/two-d.png: a row the truth, then a row a family; a column a density.
Settings are the probe's (genus.evaluation.two_d), seed 0, one thread: 5 to 10 seconds a fit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from genus.data.sources.two_d import SHAPES
from genus.evaluation import two_d

FAMILIES = ("flows/planar", "flows/radial", "flows/iaf", "flows/maf")
GAP = 8  # pixels of white between pictures


def sheet(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Pictures [H, W, 3] of one size in rows, with white between them."""
    white = ((0, GAP), (0, GAP), (0, 0))
    lines = [np.concatenate([np.pad(one, white, constant_values=255) for one in row], 1) for row in rows]
    return np.concatenate(lines)[:-GAP, :-GAP]


def main(families: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    shown: list[list[np.ndarray]] = [[] for _ in range(1 + len(families))]
    print("| family | " + " | ".join(SHAPES) + " |")
    found = {family: [] for family in families}
    for shape in SHAPES:
        for row, family in enumerate(families, 1):
            fit = two_d.fit(family, {}, shape, seed=0, device=torch.device("cpu"))
            if row == 1:
                shown[0].append(two_d.picture(fit.truth, fit.scale))
            shown[row].append(two_d.picture(fit.table, fit.scale))
            found[family].append(fit.figures["kl"]["value"])
    for family, values in found.items():
        print(f"| {family} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    Image.fromarray(sheet(shown)).save(Path("docs/two-d.png"), optimize=True)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or FAMILIES)
