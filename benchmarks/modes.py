"""How many of 25 modes each adversarial loss finds, at equal networks, steps, batch and learning rates.

python benchmarks/modes.py [FAMILY …] writes benchmarks/results/modes.json and docs/modes.png, and prints a table.

The grid of Dumoulin et al. 2017 (arXiv:1606.00704): 5 × 5 Gaussians, their distance 20 standard deviations. A sample
is high-quality within 3 standard deviations of the nearest mode (Srivastava et al. 2017, arXiv:1705.07761), and a mode
is found where at least a tenth of the samples that it should have are. One generator step a step for each; a critic
that takes several takes them from shares of the same batch. Seed 0, averaged weights, one thread.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from genus.config import Train
from genus.contract import build, parameter_count
from genus.data.spec import DataSpec
from genus.files import write_json
from genus.sampling import draw
from genus.training import NonFiniteLoss, set_up, train

FAMILIES = ("gan/gan", "gan/lsgan", "gan/wgan", "gan/wgan_gp", "gan/dragan", "gan/r1", "gan/r3gan")
SIZES = {"width": 24, "critic_width": 24}
OWN = {"gan/wgan": {"clip": 0.1}}  # 0.01 is three steps of the critic's rate
SPEC = DataSpec((2, 1, 1), levels=0)
DEVIATION = 0.02
CENTRES = np.stack(np.meshgrid(*[np.linspace(-0.8, 0.8, 5)] * 2), -1).reshape(25, 2)
SEEDS, EXAMPLES, SAMPLES = (0,), 100_000, 2500
RATES = {"generator": 1.5e-3, "critic": 3e-3}
CONFIG = Train(steps=2500, batch_size=128, learning_rate=RATES, betas=(0.5, 0.99), ema=0.99, final_lr=0.1)
MISSING = 0.1  # a mode is missing when it has less than this share of what it should have, as a class is elsewhere
SIDE, GAP = 160, 8  # pixels of a picture, and between pictures


def grid(n: int, seed: int) -> np.ndarray:
    """Draws of the mixture: float32 [n, 2, 1, 1]."""
    random = np.random.default_rng(seed)
    points = CENTRES[random.integers(25, size=n)] + DEVIATION * random.standard_normal((n, 2))
    return points.astype(np.float32)[:, :, None, None]


def judged(points: np.ndarray) -> tuple[int, float]:
    """Modes found and the share of high-quality samples among points [N, 2]."""
    far = np.linalg.norm(points[:, None] - CENTRES, axis=2)  # [N, 25]
    good = far.min(1) < 3 * DEVIATION
    hits = np.bincount(far.argmin(1)[good], minlength=25)
    return int((hits >= MISSING * len(points) / 25).sum()), float(good.mean())


def picture(points: np.ndarray) -> np.ndarray:
    """Points [N, 2] of [-1, 1]² as grey pixels [SIDE, SIDE], darker where there are more."""
    count, _, _ = np.histogram2d(points[:, 1], points[:, 0], SIDE, ((-1, 1), (-1, 1)))
    return (255 * np.exp(-1.5 * count[::-1])).astype(np.uint8)


def main(families: tuple[str, ...]) -> None:
    found, pictures = {}, [picture(grid(SAMPLES, 1)[:, :, 0, 0])]
    print("| loss | modes of 25 | high quality | parameters | CPU seconds |")
    for family in families:
        modes, quality, seconds = [], [], []
        for seed in SEEDS:
            set_up(1, seed)
            model, started = build(family, SPEC, SIZES | OWN.get(family, {})), time.process_time()
            examples, labels = grid(EXAMPLES, seed), np.zeros(EXAMPLES, np.int64)
            try:
                trained = train(
                    model, examples, labels, CONFIG, steps=CONFIG.steps, seed=seed, device=torch.device("cpu")
                ).model
                points = draw(trained, SAMPLES, seed=seed, device=torch.device("cpu"), batch_size=SAMPLES, quiet=True)
                points = points[:, :, 0, 0]
            except NonFiniteLoss as failure:
                print(f"{family}, seed {seed}: {failure}", file=sys.stderr)
                points = np.full((SAMPLES, 2), 2.0)
            seconds.append(time.process_time() - started)
            for figures, value in zip((modes, quality), judged(points), strict=True):
                figures.append(value)
            if seed == SEEDS[0]:
                pictures.append(picture(points))
        found[family] = {
            "modes": modes,
            "high_quality": [round(value, 4) for value in quality],
            "parameters": parameter_count(model),
            "seconds": round(float(np.mean(seconds)), 1),
        }
        said = f"{np.mean(modes):.1f} ({min(modes)} to {max(modes)}) | {np.mean(quality):.3f}"
        print(f"| {family} | {said} | {parameter_count(model):,} | {np.mean(seconds):.1f} |", flush=True)
    settings = CONFIG.model_dump(mode="json") | {"sizes": SIZES, "seeds": SEEDS, "samples": SAMPLES}
    write_json(Path("benchmarks/results/modes.json"), {"settings": settings, "losses": found})
    white = [np.pad(one, ((0, 0), (0, GAP)), constant_values=255) for one in pictures]
    Image.fromarray(np.concatenate(white, 1)[:, :-GAP]).save(Path("docs/modes.png"), optimize=True)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or FAMILIES)
