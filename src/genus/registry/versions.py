"""Versions and aliases: the registry is made to say what the files say."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genus import tracking
from genus.errors import UserError
from genus.files import read_json
from genus.registry.package import save

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
PRIMARY = ("bits_per_dim", "frechet_distance")  # the first that a model has decides; lower is better


@dataclass(frozen=True)
class Figures:
    """What a version is judged by. ``kind`` says what sort of likelihood it is; ``data`` is the data's hash."""

    metric: str
    value: float
    kind: str = ""
    n: int = 0
    data: str = ""

    @classmethod
    def of(cls, metrics: dict[str, Any], data: str) -> Figures | None:
        """From reports/metrics/<model>.json; None for a model that has neither metric."""
        for name in PRIMARY:
            found = metrics.get(name) or {}
            if found.get("value") is not None:
                return cls(name, float(found["value"]), str(found.get("kind") or ""), int(found.get("n") or 0), data)
        return None

    @classmethod
    def of_tags(cls, tags: dict[str, str]) -> Figures | None:
        """As a version's tags keep them."""
        if "genus.metric" not in tags:
            return None
        kind, n, data = (tags.get(f"genus.{name}", "") for name in ("kind", "n", "data_sha256"))
        return cls(tags["genus.metric"], float(tags["genus.value"]), kind, int(n or 0), data)

    def tags(self) -> dict[str, str]:
        return {
            "genus.metric": self.metric,
            "genus.value": repr(self.value),
            "genus.kind": self.kind,
            "genus.n": str(self.n),
        }

    def __str__(self) -> str:
        return f"{self.metric}{f' ({self.kind})' if self.kind else ''} {self.value:.4f}"


def decide(challenger: Figures | None, champion: Figures | None, version: str | None) -> tuple[bool, str]:
    """Whether a challenger becomes champion, and why. ``version`` is the champion's, None where there is none.

    Figures of another metric, another kind of likelihood or other data can't be compared: then the newer stands,
    because only it speaks of the data and the metric as they are now.
    """
    if version is None:
        return True, f"first champion: {challenger}" if challenger else "first champion, without a figure"
    if challenger is None:
        return False, f"version {version} stays: no figure to beat it with"
    if champion is None:
        return True, f"{challenger}; version {version} has no figure"
    if (challenger.metric, challenger.kind) != (champion.metric, champion.kind):
        return True, f"{challenger}; not comparable with version {version}: {champion}"
    if challenger.data != champion.data:
        return True, f"{challenger}; version {version} was measured on other data"
    if challenger.value < champion.value:
        return True, f"{challenger} beats version {version}: {champion.value:.4f}"
    return False, f"{challenger} does not beat version {version}: {champion.value:.4f}"


def register(client: MlflowClient, folder: Path, run: Run, figures: Figures | None, knobs: dict[str, Any]) -> str:
    """The version of ``models/<model>/``, registered if its content is new, with its tags and aliases set; its number.

    ``knobs`` are the defaults of the family's sample() that the package gets. Running it again changes nothing.
    """
    from mlflow.exceptions import MlflowException

    about = read_json(folder / "model.json")
    name, content = about["name"], tracking.fingerprint(folder)
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name, description=f"{about['family']} on {about['dataset']}. {about['paper']}")
        aliases = {}
    versions = {version.version: version for version in client.search_model_versions(f"name = '{name}'")}
    known = [version for version in versions.values() if version.tags.get("genus.sha256") == content]
    version = known[0] if known else _create(client, folder, about, content, run, knobs)
    tags = figures.tags() if figures else {}
    holder = str(aliases[CHAMPION]) if CHAMPION in aliases else None
    if holder != str(version.version):
        champion = next((Figures.of_tags(v.tags) for v in versions.values() if str(v.version) == holder), None)
        better, why = decide(figures, champion, holder)
        tags["genus.decision"] = why
        if better:
            if holder is not None:
                tags["genus.replaces"] = holder
            client.set_registered_model_alias(name, CHAMPION, version.version)
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, version.version, key, value)
    return str(version.version)


def _create(
    client: MlflowClient, folder: Path, about: dict[str, Any], content: str, run: Run, knobs: dict[str, Any]
) -> ModelVersion:
    """Packages the model, ties the package to its run and makes a version of it."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    name, run_id = about["name"], run.info.run_id
    logged = client.create_logged_model(
        run.info.experiment_id, name=name, source_run_id=run_id, model_type=about["family"]
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "package"
        location = logged.artifact_location
        mlflow_model = Model(location, run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id)
        save(folder, path, knobs, mlflow_model)
        client.log_model_artifacts(logged.model_id, str(path))
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=about["steps"])])
    return client.create_model_version(
        name,
        source=f"models:/{logged.model_id}",
        run_id=run_id,
        model_id=logged.model_id,
        tags={"genus.sha256": content, "genus.family": about["family"], "genus.data_sha256": about["data_sha256"]},
        description=f"{about['paper']}. {about['parameters']:,} parameters, {about['steps']:,} steps.",
    )


def status(models: Iterable[str], root: str | Path = "models") -> dict[str, dict[str, Any]]:
    """{model: {"version": "3", "aliases": ["champion"]}} of those that are registered: the version of the files
    under ``root``, or the newest where there are none. Empty where there is no store or none that answers.
    """
    address = tracking.uri()
    if address.startswith("sqlite:///") and not Path(address.removeprefix("sqlite:///")).exists():
        return {}
    client = tracking.client()
    table: dict[str, dict[str, Any]] = {}
    for name in models:
        try:
            versions = client.search_model_versions(f"name = '{name}'")
            aliases = client.get_registered_model(name).aliases if versions else {}
        except tracking.problems():
            return table
        if versions:
            newest = max(versions, key=lambda version: int(version.version))
            try:
                content = tracking.fingerprint(Path(root) / name)
            except UserError:
                content = ""
            same = [version for version in versions if version.tags.get("genus.sha256") == content]
            shown = str((same or [newest])[0].version)
            pointing = sorted(alias for alias, version in aliases.items() if str(version) == shown)
            table[name] = {"version": shown, "aliases": pointing}
    return table
