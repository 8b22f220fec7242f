"""Peak memory of ingesting a text of its own making and of training on it, at 10 and at 100 MB. Prints both.

python benchmarks/text_memory.py [FEW MANY]
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from pathlib import Path

INGEST = """
import sys, time
from genus.config import Dataset
from genus.data.ingestion import ingest
options = {"path": sys.argv[1], "documents": "line"}
ingest("x", Dataset(source="text", options=options), seed=0, root=sys.argv[2])
"""
TRAIN = """
import sys, time
from pathlib import Path
import numpy as np, torch
from torch import nn
from genus.config import Train
from genus.contract import Family
from genus.data.loaders import open_dataset
from genus.training import set_up, train

class Bigram(Family):
    context = 128

    def __init__(self, spec):
        super().__init__(spec)
        self.logits = nn.Embedding(spec.vocabulary, spec.vocabulary)

    def loss(self, batch, *, generator):
        logits = self.logits(batch.x[:, :-1])
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), batch.x[:, 1:].flatten())}

set_up(1, 0)
data = open_dataset("x", Path(sys.argv[2]) / "processed")
config = Train(steps=1000, batch_size=32)
train(Bigram(data.spec), data.split("train"), data.labels("train"), config, steps=1000, seed=0,
      device=torch.device("cpu"))
"""
PEAK = """
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1], time.process_time())
"""


def write(path: Path, megabytes: int) -> None:
    """Lines of 400 characters of made-up words."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(5000)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(megabytes * 2500):
            file.write(" ".join(generator.choices(words, k=70))[:399].ljust(399, ".") + "\n")


def peak(code: str, *arguments: Path) -> tuple[float, float]:
    """Runs code in a process of its own: (peak resident set in MB, CPU seconds)."""
    done = subprocess.run(
        [sys.executable, "-c", code + PEAK, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    kilobytes, seconds = done.stdout.split()[-2:]
    return int(kilobytes) / 1024, float(seconds)


def main() -> None:
    few, many = map(int, sys.argv[1:3] or (10, 100))
    figures: dict[str, list[float]] = {"ingest": [], "training": []}
    for megabytes in (few, many):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.txt"
            write(path, megabytes)
            for what, code in (("ingest", INGEST), ("training", TRAIN)):
                most, seconds = peak(code, path, Path(folder) / "out")
                figures[what].append(most)
                print(f"{megabytes:,} MB, {what}: peak {most:.1f} MB, {seconds:.1f} CPU seconds", flush=True)
    for what, (less, more) in figures.items():
        print(f"{what}: ratio of the peaks {more / less:.3f}")


if __name__ == "__main__":
    main()
