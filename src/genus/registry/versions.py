"""Versions and aliases: the registry is made to say what the files say."""

from __future__ import annotations

import contextlib
import fcntl
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genus import tracking
from genus.errors import UserError
from genus.files import read_json
from genus.registry.entries import Entry, Version, ask, look
from genus.registry.gate import METRICS
from genus.registry.package import FORMAT, save, seal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CHAMPION, CHALLENGER = "champion", "challenger"
# What a version is known by: the first that it has.
PRIMARY = ("bits_per_dim", "bits_per_char", "frechet_distance", "translated_accuracy")
Needs = Mapping[str, Mapping[str, str]]  # {data set: {alias: model}}: who answers which need


@dataclass(frozen=True)
class Figures:
    """The evaluator's figure of a version, on the test split: for people; the gate measures for itself."""

    metric: str
    value: float
    kind: str = ""  # of a likelihood
    n: int = 0

    @classmethod
    def of(cls, metrics: dict[str, Any]) -> Figures | None:
        """From reports/metrics/<model>.json; None for a model that has neither metric."""
        for name in PRIMARY:
            found = metrics.get(name) or {}
            if found.get("value") is not None:
                return cls(name, float(found["value"]), str(found.get("kind") or ""), int(found.get("n") or 0))
        return None

    def tags(self) -> dict[str, str]:
        return {
            "genus.metric": self.metric,
            "genus.value": repr(self.value),
            "genus.kind": self.kind,
            "genus.n": str(self.n),
        }


def alike(entry: Entry, content: str, knobs: dict[str, Any]) -> str | None:
    """The version with this content that is packaged with these knobs, as packages are now; the newest of several.

    Versions of an older Genus have no manifest and can't be verified: their content is packaged anew.
    """
    wanted = {"genus.sha256": content, "genus.knobs": _knobs(knobs), "genus.format": str(FORMAT)}
    found = [number for number, version in entry.versions.items() if wanted.items() <= version.tags.items()]
    return max(found, key=int, default=None)


def decided(entry: Entry, number: str, data: str) -> bool:
    """Whether nothing is to be decided of a version: it is champion, was rolled back, or lost to this champion."""
    holder, tags = entry.aliases.get(CHAMPION), entry.versions[number].tags
    return number == holder or "genus.rolled_back" in tags or tags.get("genus.decided_against") == against(holder, data)


def serves(version: Version) -> bool:
    """Whether a version may answer a need: it works, and nobody has rolled it back."""
    return version.tags.get("genus.works") == "yes" and "genus.rolled_back" not in version.tags


def against(holder: str | None, data: str) -> str:
    """What a decision holds for: the champion, the definition of the metrics and the data's hash."""
    return f"version {holder or 'none'}, metrics {METRICS}, data {data or 'none'}"


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Who changes the registry from this folder waits for others who do."""
    Path(".genus").mkdir(exist_ok=True)
    with open(".genus/register.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure(
    client: MlflowClient,
    folder: Path,
    run: Run,
    figures: Figures | None,
    knobs: dict[str, Any],
    facts: dict[str, Any],
) -> str:
    """The version of ``models/<model>/``, made if its content is new: then it is the challenger. Its number.

    ``knobs`` are the defaults of the family's sample() that the package gets, ``facts`` what its card tells.
    """
    about = read_json(folder / "model.json")
    name = about["name"]
    entry = ask(client, name)
    if entry is None:
        client.create_registered_model(name, description=f"{about['family']} on {about['dataset']}. {about['paper']}")
        entry = Entry()
    number = alike(entry, tracking.fingerprint(folder), knobs)
    if number is None:
        number = _create(client, folder, about, run, knobs, facts)
        entry.versions[number] = Version(name, number)
    tags = entry.versions[number].tags
    set_tags(client, name, number, figures.tags() if figures else {}, tags)
    newest = number == max(entry.versions, key=int)
    if newest and entry.aliases.get(CHAMPION) != number and "genus.decided_against" not in tags:
        client.set_registered_model_alias(name, CHALLENGER, number)
    return number


def set_tags(client: MlflowClient, name: str, number: str, tags: Mapping[str, str], there: Mapping[str, str]) -> None:
    """Sets the tags that are not ``there`` already."""
    for key, value in tags.items():
        if there.get(key) != value:
            client.set_model_version_tag(name, number, key, value)


def settled(files: Mapping[str, str], data: Mapping[str, str], needs: Needs) -> bool:
    """Whether the registry already says all that these files say. Quick.

    ``files``: {model: hash of the files behind it}; ``data``: {model: hash of the data that it would be judged on}.
    """
    there = _lasting([*files, *needs])
    numbers: dict[str, str] = {}
    for name, content in files.items():
        entry = there.get(name, Entry())
        same = [number for number, version in entry.versions.items() if version.tags.get("genus.files") == content]
        if not same or not decided(entry, max(same, key=int), data[name]):
            return False
        numbers[name] = max(same, key=int)
    for dataset, wanted in needs.items():
        entry = there.get(dataset, Entry())
        found = {}
        for alias, number in entry.aliases.items():
            tags = entry.versions[number].tags if number in entry.versions else {}
            found[alias] = (tags.get("genus.model"), tags.get("genus.model_version"))
        if found != {
            alias: (model, numbers[model])
            for alias, model in wanted.items()
            if model in numbers and serves(there[model].versions[numbers[model]])
        }:
            return False
    return True


def _create(
    client: MlflowClient, folder: Path, about: dict[str, Any], run: Run, knobs: dict[str, Any], facts: dict[str, Any]
) -> str:
    """Packages the model, ties the package to its run and makes a version of it; the version's number."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    name, run_id, experiment = about["name"], run.info.run_id, run.info.experiment_id
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "package"
        described = save(folder, path, knobs, facts)
        logged = client.create_logged_model(experiment, name, source_run_id=run_id, model_type=about["family"])
        described.run_id, described.model_id, described.model_uuid = run_id, logged.model_id, logged.model_id
        described.save(str(path / "MLmodel"))
        manifest = seal(path)
        client.log_model_artifacts(logged.model_id, str(path))
        client.log_text(run_id, (path / "README.md").read_text(encoding="utf-8"), "model_card.md")
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=about["steps"])])
    made = client.create_model_version(
        name,
        source=f"models:/{logged.model_id}",
        run_id=run_id,
        model_id=logged.model_id,
        tags={
            "genus.sha256": tracking.fingerprint(folder),
            "genus.manifest": manifest,
            "genus.format": str(FORMAT),
            "genus.knobs": _knobs(knobs),
            "genus.family": about["family"],
            "genus.dataset": about["dataset"],
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
    for name, entry in _lasting(models).items():
        try:
            content = tracking.fingerprint(Path(root) / name)
        except UserError:
            content = ""
        same = [number for number, version in entry.versions.items() if version.tags.get("genus.sha256") == content]
        version = max(same or entry.versions, key=int)
        table[name] = {"version": version, "aliases": sorted(a for a, v in entry.aliases.items() if v == version)}
    return table


def _lasting(names: Iterable[str]) -> dict[str, Entry]:
    """What the registry holds under these names that it knows, of versions whose run is there; nothing where it is
    silent.
    """
    there = {}
    with contextlib.suppress(UserError):
        for name, entry in look(names).items():
            versions = {number: version for number, version in entry.versions.items() if version.lasting}
            if versions:
                there[name] = Entry(versions, entry.aliases)
    return there
