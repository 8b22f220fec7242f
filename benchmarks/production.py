"""The digits' five models on PostgreSQL and S3: trained in one clone, pulled and registered by another. Prints seconds.

python benchmarks/production.py [RESULTS.json]

Two MLflow servers and a Prefect server on PostgreSQL, artifacts and the DVC remote on an S3 server, all on 127.0.0.1.
The second clone has the commit, an empty registry and nothing else; it must end with every model's champion, trained by
nobody there. Needs PostgreSQL's programs and moto; clones what is committed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.backends import servers  # noqa: E402 (found by the line above)

GIT = ("git", "-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost")


def call(folder: Path, environment: dict[str, str], *command: str) -> tuple[str, float]:
    """Runs a command with the folder's own code: what it printed, and its seconds. Raises where it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    started = time.monotonic()
    environment = os.environ | environment | {"PATH": path, "PYTHONPATH": str(folder / "src")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout, time.monotonic() - started


def registered(address: str) -> dict[str, bool]:
    """{model: whether its champion's run was made from files} of a registry."""
    from mlflow import MlflowClient

    client, found = MlflowClient(address, address), {}
    for model in client.search_registered_models():
        if "champion" in model.aliases:
            version = client.get_model_version_by_alias(model.name, "champion")
            found[model.name] = "genus.filled" in client.get_run(version.run_id).data.tags
    return found


def main() -> None:
    if servers.binaries() is None:
        raise SystemExit("PostgreSQL is not installed: apt-get install postgresql")
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        database, s3 = stack.enter_context(servers.postgres()), stack.enter_context(servers.s3())
        os.environ |= s3
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # somebody's own server
        here, there = folder / "here", folder / "there"
        call(folder, {}, "git", "clone", "-q", str(ROOT), "here")
        call(here, {}, "dvc", "remote", "add", "-d", "store", f"s3://{servers.BUCKET}/dvc")
        call(here, {}, "dvc", "remote", "modify", "store", "endpointurl", s3["AWS_ENDPOINT_URL"])

        settings = {
            "MLFLOW_TRACKING_URI": stack.enter_context(servers.mlflow(database("mlflow"), s3)),
            "PREFECT_API_URL": stack.enter_context(servers.prefect(database("prefect"))),
        }
        said, figures["train_s"] = call(here, settings, "genus", "run", "--collection", "smoke")
        print(said, flush=True)
        _, figures["push_s"] = call(here, {}, "dvc", "push", "--with-deps", "register@smoke")
        figures["objects"] = len(servers.keys("dvc/"))
        call(here, {}, "git", "add", ".dvc/config", "dvc.lock")
        call(here, {}, *GIT, "commit", "-q", "-m", "trained on this machine")

        call(folder, {}, "git", "clone", "-q", str(here), "there")
        settings["MLFLOW_TRACKING_URI"] = stack.enter_context(servers.mlflow(database("another"), s3))
        _, figures["pull_s"] = call(there, {}, "dvc", "pull", "--with-deps", "register@smoke")
        _, figures["register_s"] = call(there, settings, "genus", "register", "smoke")
        champions = registered(settings["MLFLOW_TRACKING_URI"])
        assert champions and all(champions.values()), champions
        figures["champions"] = len(champions)
        said, figures["nothing_to_do_s"] = call(there, settings, "genus", "run", "--collection", "smoke")
        assert "nothing has changed" in said, said
        assert not (there / ".genus/checkpoints").exists()
        print(said)
    print(" ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
