"""Versions and aliases: the registry is made to say what the files say."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genus import tracking
from genus.errors import UserError
from genus.files import read_json
from genus.registry.package import save

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CHAMPION = "champion"
PRIMARY = ("bits_per_dim", "frechet_distance")  # the first that a model has decides; lower is better


@dataclass(frozen=True)
class Figures:
    """What a version is judged by. ``kind`` says what sort of likelihood it is; ``data`` is the data's hash.

    ``half`` is half of the figure's 95% interval, 0 where it has none.
    """

    metric: str
    value: float
    kind: str = ""
    n: int = 0
    data: str = ""
    half: float = 0.0

    @classmethod
    def of(cls, metrics: dict[str, Any], data: str) -> Figures | None:
        """From reports/metrics/<model>.json; None for a model that has neither metric."""
        for name in PRIMARY:
            found = metrics.get(name) or {}
            if found.get("value") is not None:
                value, kind, n = float(found["value"]), str(found.get("kind") or ""), int(found.get("n") or 0)
                low, high = found.get("low"), found.get("high")
                return cls(name, value, kind, n, data, 0.0 if low is None or high is None else (high - low) / 2)
        return None

    @classmethod
    def of_tags(cls, tags: dict[str, str]) -> Figures | None:
        """As a version's tags keep them."""
        if "genus.metric" not in tags:
            return None
        kind, n, data = (tags.get(f"genus.{name}", "") for name in ("kind", "n", "data_sha256"))
        half = float(tags.get("genus.half") or 0)
        return cls(tags["genus.metric"], float(tags["genus.value"]), kind, int(n or 0), data, half)

    def tags(self) -> dict[str, str]:
        return {
            "genus.metric": self.metric,
            "genus.value": repr(self.value),
            "genus.kind": self.kind,
            "genus.n": str(self.n),
            "genus.half": repr(self.half),
        }

    def __str__(self) -> str:
        return f"{self.metric}{f' ({self.kind})' if self.kind else ''} {self.value:.4f}"


def decide(challenger: Figures | None, champion: Figures | None, version: str | None) -> tuple[bool, str]:
    """Whether a challenger becomes champion, and why. ``version`` is the champion's, None where there is none.

    Figures of another metric, another kind of likelihood or other data can't be compared: then the newer stands,
    because only it speaks of the data and the metric as they are now. Of comparable ones the challenger's must be lower
    by more than chance: the 95% interval of the difference of two independent figures.
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
    chance = math.hypot(challenger.half, champion.half)
    told = f"version {version}: {champion.value:.4f}" + (f" by more than chance, {chance:.4f}" if chance else "")
    if champion.value - challenger.value > chance:
        return True, f"{challenger} beats {told}"
    return False, f"{challenger} does not beat {told}"


@dataclass
class Entry:
    """What the registry holds under one name: tags by version, and versions by alias."""

    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def of(self, content: str, knobs: dict[str, Any]) -> str | None:
        """The version with this content that is packaged with these knobs; the newest where there are several."""
        wanted = {"genus.sha256": content, "genus.knobs": _knobs(knobs)}
        found = [number for number, tags in self.versions.items() if wanted.items() <= tags.items()]
        return max(found, key=int, default=None)


def register(
    client: MlflowClient, folder: Path, run: Run, figures: Figures | None, knobs: dict[str, Any], files: str
) -> str:
    """The version of ``models/<model>/``, registered if its content is new, with its tags and aliases set; its number.

    ``knobs`` are the defaults of the family's sample() that the package gets, ``files`` the hash of all the files
    behind it, by which ``settled`` knows it again. Running it again changes nothing.
    """
    about = read_json(folder / "model.json")
    name = about["name"]
    entry = _ask(client, name)
    if entry is None:
        client.create_registered_model(name, description=f"{about['family']} on {about['dataset']}. {about['paper']}")
        entry = Entry()
    version = entry.of(tracking.fingerprint(folder), knobs) or _create(client, folder, about, run, knobs)
    tags = figures.tags() if figures else {}
    holder = entry.aliases.get(CHAMPION)
    if holder != version:
        champion = Figures.of_tags(entry.versions.get(holder or "", {}))
        better, tags["genus.decision"] = decide(figures, champion, holder)
        if better:
            if holder is not None:
                tags["genus.replaces"] = holder
            client.set_registered_model_alias(name, CHAMPION, version)
    tags["genus.files"] = files  # the last: where it stands, all the rest does
    for key, value in tags.items():
        if entry.versions.get(version, {}).get(key) != value:
            client.set_model_version_tag(name, version, key, value)
    return version


def settled(files: dict[str, str]) -> bool:
    """Whether the registry already says all that these files say: {model: hash of the files behind it}. Quick."""
    entries = _look(files)
    for name, content in files.items():
        entry = entries.get(name, Entry())
        if CHAMPION not in entry.aliases or content not in {t.get("genus.files") for t in entry.versions.values()}:
            return False
    return True


def _create(client: MlflowClient, folder: Path, about: dict[str, Any], run: Run, knobs: dict[str, Any]) -> str:
    """Packages the model, ties the package to its run and makes a version of it; the version's number."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    name, run_id, experiment = about["name"], run.info.run_id, run.info.experiment_id
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "package"
        described = save(folder, path, knobs)
        logged = client.create_logged_model(experiment, name, source_run_id=run_id, model_type=about["family"])
        described.run_id, described.model_id, described.model_uuid = run_id, logged.model_id, logged.model_id
        described.save(str(path / "MLmodel"))
        client.log_model_artifacts(logged.model_id, str(path))
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=about["steps"])])
    made = client.create_model_version(
        name,
        source=f"models:/{logged.model_id}",
        run_id=run_id,
        model_id=logged.model_id,
        tags={
            "genus.sha256": tracking.fingerprint(folder),
            "genus.knobs": _knobs(knobs),
            "genus.family": about["family"],
            "genus.data_sha256": about["data_sha256"],
        },
        description=f"{about['paper']}. {about['parameters']:,} parameters, {about['steps']:,} steps.",
    )
    return str(made.version)


def _knobs(knobs: dict[str, Any]) -> str:
    return json.dumps(knobs, sort_keys=True)


def status(models: Iterable[str], root: str | Path = "models") -> dict[str, dict[str, Any]]:
    """{model: {"version": "3", "aliases": ["champion"]}} of those that are registered: the version of the files
    under ``root``, or the newest where they have none. Empty where no store answers. Quick.
    """
    table: dict[str, dict[str, Any]] = {}
    for name, entry in _look(models).items():
        try:
            content = tracking.fingerprint(Path(root) / name)
        except UserError:
            content = ""
        same = [number for number, tags in entry.versions.items() if tags.get("genus.sha256") == content]
        version = max(same or entry.versions, key=int)
        table[name] = {"version": version, "aliases": sorted(a for a, v in entry.aliases.items() if v == version)}
    return table


def _look(models: Iterable[str]) -> dict[str, Entry]:
    """What the registry holds of these models, without importing MLflow (seconds) where its database is a local file.

    Only versions whose run is there. Where the tables are not as this MLflow has them, the client is asked.
    """
    models, address = list(models), tracking.uri()
    if address.startswith("sqlite:///"):
        database = Path(address.removeprefix("sqlite:///"))
        if not database.exists():
            return {}
        with contextlib.suppress(sqlite3.Error):
            return _read(database, models)
    try:
        client = tracking.client()
        answers = {name: _ask(client, name) for name in models}
    except tracking.problems():
        return {}
    return {name: entry for name, entry in answers.items() if entry is not None and entry.versions}


def _ask(client: MlflowClient, name: str) -> Entry | None:
    """What the registry holds under a name, None where it does not know it. Raises what MLflow raises."""
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    versions = client.search_model_versions(f"name = '{name}'")
    return Entry({str(v.version): dict(v.tags) for v in versions}, {a: str(v) for a, v in aliases.items()})


def _read(database: Path, models: list[str]) -> dict[str, Entry]:
    """The same from the database's tables. Raises sqlite3.Error where they are others."""
    found: dict[str, Entry] = {}
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=20)) as store:
        with_run = "FROM model_versions JOIN runs ON run_id = run_uuid WHERE lifecycle_stage = 'active'"
        for name, version in store.execute(f"SELECT model_versions.name, version {with_run}"):
            if name in models:
                found.setdefault(name, Entry()).versions[str(version)] = {}
        for name, version, key, value in store.execute("SELECT name, version, key, value FROM model_version_tags"):
            if name in found and str(version) in found[name].versions:
                found[name].versions[str(version)][key] = value
        for name, alias, version in store.execute("SELECT name, alias, version FROM registered_model_aliases"):
            if name in found:
                found[name].aliases[alias] = str(version)
    return {name: found[name] for name in models if name in found}
