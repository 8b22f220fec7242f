"""Pulls a package, installs nothing but its requirements in a new environment, and samples there: the same bytes?

python benchmarks/fresh_venv.py [NAME@ALIAS]    of this folder's registry; without a name, of one made for this
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SEEDS = 16
SAMPLE = f"""
import hashlib, importlib.util, sys
assert importlib.util.find_spec("genus") is None, "genus is installed here: this would prove nothing"
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
images = model.predict(pandas.DataFrame({{"seed": range({SEEDS})}}))
print(images.dtype, images.shape, hashlib.sha256(images.tobytes()).hexdigest())
"""


@contextlib.contextmanager
def took(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - started:.1f} s", flush=True)


def make_registry(folder: Path) -> str:
    """A registry with one small model in it, in ``folder``, which becomes the working directory."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.registry.workspace import MODEL, new_store, publish

    os.chdir(folder)
    new_store(folder)
    publish(MODEL)
    return MODEL


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        name = sys.argv[1] if len(sys.argv) > 1 else make_registry(folder)
        import genus
        from genus.registry.pull import pull

        with took(f"pulled {name}"):
            package = pull(name, folder / "package")
        python = folder / "venv/bin/python"
        with took("new environment with requirements.txt"):
            subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
            install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]
            subprocess.run([*install, package / "requirements.txt"], check=True)
        with took(f"sampled {SEEDS} there, pickle forbidden"):
            there = subprocess.run(
                [python, "-I", "-c", SAMPLE, package],
                env=os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
        if there.returncode:
            sys.exit(there.stderr)
        images = genus.load(name).sample(range(SEEDS))
        here = f"{images.dtype} {images.shape} {hashlib.sha256(images.tobytes()).hexdigest()}"
        print(f"there {there.stdout.strip()}\nhere  {here}")
        if there.stdout.strip() != here:
            sys.exit("the bytes differ")


if __name__ == "__main__":
    main()
