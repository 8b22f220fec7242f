"""What `genus schedule` costs while it waits: memory of all its processes after a minute, and the look at raw data.

    python benchmarks/schedule_memory.py [SECONDS]

Asked: at most 400 MB. Exit status 1 where it is more.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from genus import config
from genus.data import origin
from genus.data.sources import open_source
from genus.files import write_json

ROOT = Path(__file__).parents[1]
LIMIT = 400  # MB


def idle(folder: Path, seconds: float) -> float:
    """Prints each process's memory after some looks at the raw data; returns their sum, MB.

    Of its PSS: pages that processes share are counted once.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PREFECT_HOME": str(folder / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    command = [str(Path(sys.executable).parent / "genus"), "schedule", "--poll", "5", "--port", str(port)]
    begun = time.monotonic()
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        while b"deployment run" not in (folder / "out").read_bytes():  # how Prefect says that it is serving
            if process.poll() is not None or time.monotonic() - begun > 120:
                raise SystemExit((folder / "out").read_text())
            time.sleep(0.1)
        print(f"serving after {time.monotonic() - begun:.1f} s")
        time.sleep(seconds)
        total = 0.0
        for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            memory = one.memory_full_info()
            total += memory.pss / 1e6
            words = " ".join(Path(word).name for word in one.cmdline()[:5])
            print(f"{memory.pss / 1e6:7.0f} MB  ({memory.rss / 1e6:.0f} resident)  {words}")
    finally:
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(60)
        print(f"ended {time.monotonic() - begun:.1f} s after Ctrl-C, exit status {process.returncode}")
    return total


def look(what: str, places: list[str]) -> None:
    """Prints the milliseconds of asking the file system, and of reading everything."""
    took = []
    for ask in (origin.stat, origin.content):
        ask(places)
        begun = time.perf_counter()
        ask(places)
        took.append(1e3 * (time.perf_counter() - begun))
    print(f"{what}: {took[0]:.2f} ms a look, {took[1]:.0f} ms where something has changed")


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    with tempfile.TemporaryDirectory(prefix="genus-") as scratch:
        folder = Path(scratch)
        (folder / "many").mkdir()
        for number in range(10_000):
            (folder / f"many/{number}.png").write_bytes(os.urandom(600))
        look("10,000 small files", [str(folder / "many")])
        os.chdir(ROOT)
        dataset = config.load().datasets["fashion-mnist"]
        places = origin.roots(open_source(dataset.source, dataset.options))
        if origin.stat(places):
            look("Fashion-MNIST's four files", places)
        project = folder / "project"
        project.mkdir()
        for name in ("params.yaml", "dvc.yaml"):
            shutil.copy(ROOT / name, project)
        for name in ("pipelines", "src"):
            shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        if places and Path(places[0]).exists():
            shutil.copytree(places[0], project / places[0])
            write_json(project / "data/origin/fashion-mnist.json", origin.content(places))  # as if it were ingested
        total = idle(project, seconds)
    print(f"idle: {total:.0f} MB in all, asked at most {LIMIT}")
    sys.exit(total > LIMIT)


if __name__ == "__main__":
    main()
