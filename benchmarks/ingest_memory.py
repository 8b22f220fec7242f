"""Peak memory of ingest at 5,000 and at 50,000 files of its own making. Prints both and their ratio.

python benchmarks/ingest_memory.py [FEW MANY]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
INGEST = """
import sys, time
from genus.config import Dataset
from genus.data.ingestion import ingest
options = {"path": sys.argv[1], "size": int(sys.argv[3])}
ingest("x", Dataset(source="image_folder", options=options), seed=0, root=sys.argv[2])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(peak, time.process_time())
"""


def peak(count: int, folder: Path) -> tuple[float, float]:
    """Makes ``count`` different pictures and ingests them: (peak resident set in MB, CPU seconds)."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 10}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path, compress_level=0)
    command = [sys.executable, "-c", INGEST, str(folder), str(folder / "out"), str(SIDE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kilobytes, seconds = done.stdout.split()[-2:]
    return int(kilobytes) / 1024, float(seconds)


def main() -> None:
    few, many = map(int, sys.argv[1:3] or (5_000, 50_000))
    figures = []
    for count in (few, many):
        with tempfile.TemporaryDirectory() as folder:
            figures.append(peak(count, Path(folder)))
        print(
            f"{count:,} files: peak resident set {figures[-1][0]:.1f} MB, {figures[-1][1]:.1f} CPU seconds", flush=True
        )
    print(f"ratio of the peaks {figures[1][0] / figures[0][0]:.3f}")


if __name__ == "__main__":
    main()
