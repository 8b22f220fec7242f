"""Where ``mlflow-artifacts:/…`` leads: to the folder beside a local database, else to the server, as MLflow has it.

So the rows of a local store name no folder of this machine: the store can be copied, and a server started on it serves
every file. MLflow finds this by its entry point (pyproject.toml); ``tracking.client`` says it besides, for a Genus
that is on the path without being installed.
"""

from __future__ import annotations

import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

SCHEME = "mlflow-artifacts"
SQLITE = "sqlite:///"


def beside(address: str) -> Path | None:
    """The folder of the artifacts of a SQLite store, None for the address of anything else."""
    return Path(address.removeprefix(SQLITE)).absolute().parent / "artifacts" if address.startswith(SQLITE) else None


def repository(
    artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
) -> ArtifactRepository:
    """MLflow's repository for one run's or model's files."""
    import mlflow
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    parts = urllib.parse.urlsplit(artifact_uri)
    # A model's files are asked for without an address; the registry's is the tracking store's unless it was set.
    folder = beside(tracking_uri or registry_uri or mlflow.get_registry_uri())
    if folder is None or parts.netloc:
        return MlflowArtifactsRepository(artifact_uri, tracking_uri, registry_uri)
    inside = (folder / urllib.parse.unquote(parts.path).lstrip("/")).resolve()
    if not inside.is_relative_to(folder.resolve()):
        raise mlflow.MlflowException(f"{artifact_uri}: leads out of {folder}")
    return LocalArtifactRepository(str(inside), tracking_uri, registry_uri)


def register() -> None:
    """Makes ``repository`` MLflow's for this process."""
    from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry

    _artifact_repository_registry.register(SCHEME, repository)
