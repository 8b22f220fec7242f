"""PixelCNN's sampler against the naive loop: a pass over the whole image for every value. Prints seconds and ratios.

python benchmarks/pixelcnn_sampling.py [RESULTS.json]

28x28 images of 256 levels, the family's default size, one thread, seconds of that thread. Both draw the same numbers.
Sums are taken in another order, so that a draw that lies on the edge between two levels may, rarely, fall to the other
side, and what comes after it in that image differs; tests/families/test_pixelcnn.py asks for equality in float64.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from genus.data.spec import DataSpec
from genus.families.autoregressive.pixelcnn import PixelCNN
from genus.nn import logistic

SIZES = (16, 64)  # images at once
ASKED = 10.0  # times faster, at least


def naive(model: PixelCNN, n: int, *, generator: Generator) -> Tensor:
    """One forward pass of the whole image a value: [n, *shape]."""
    x = torch.zeros(n, model.values, model.rows, model.columns)
    for r, c, j in itertools.product(range(model.rows), range(model.columns), range(model.values)):
        parameters = model.conditionals(x).unflatten(2, (n, model.rows, model.columns))[j, None, :, :, r, c]
        x[:, j, r, c] = logistic.sample(parameters, model.spec.levels, generator=generator)[0]
    return F.pixel_shuffle(x, model.block)


def timed(draw: Callable[..., Tensor]) -> tuple[Tensor, float]:
    """What was drawn, and the processor's seconds."""
    started = time.process_time()
    drawn = draw(generator=Generator().manual_seed(0))
    return drawn, time.process_time() - started


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = PixelCNN(DataSpec((1, 28, 28))).eval()
    figures: dict[str, float] = {}
    for n in SIZES:
        model.sample(2, generator=Generator().manual_seed(0))  # first-call costs
        kept, seconds = timed(partial(model.sample, n))
        slow, slow_seconds = timed(partial(naive, model, n))
        same = (model.spec.to_stored(kept) == model.spec.to_stored(slow)).flatten(1).all(1).sum().item()
        ratio = slow_seconds / seconds
        figures |= {f"sample_{n}_s": seconds, f"naive_{n}_s": slow_seconds, f"ratio_{n}": ratio, f"same_{n}": same}
        print(f"{n} images: {seconds:.2f} s, naive {slow_seconds:.1f} s, {ratio:.0f} times; {same} of {n} the same")
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if min(figures[f"ratio_{n}"] for n in SIZES) < ASKED:
        raise SystemExit(f"asked: {ASKED:g} times the naive loop")


if __name__ == "__main__":
    main()
