"""Which version is champion: decided by the gate, by hand, or taken back; and which model answers which need."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from genus import tracking
from genus.errors import UserError
from genus.registry import gate, pull
from genus.registry.entries import Entry, ask, reaching, unknown
from genus.registry.gate import Decision, NotTried, Trial
from genus.registry.versions import CHALLENGER, CHAMPION, against, decided, one_at_a_time, serves, set_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

NEEDS = ("best-density", "best-quality", "fastest", "most-stable")  # aliases of a data set's own registered model
BEFORE = "\n\n## Gate"  # where the gate's part of a version's description begins


def judge_all(client: MlflowClient, numbers: Mapping[str, str]) -> None:
    """Decides of each model's version, unless there is nothing to decide: {model: version}.

    The versions that only have to work are tried first, all at once; then the others, each against its champion.
    """
    waiting = {}
    for name, number in numbers.items():
        entry = _known(client, name)
        if not decided(entry, number, gate.data_hash(_dataset(entry, number))):
            waiting[name] = entry
    works = _tried({name: numbers[name] for name, entry in waiting.items() if CHAMPION not in entry.aliases})
    for name, entry in waiting.items():
        number = numbers[name]
        decision = judge(name, number, entry, works.get(name))
        apply(client, name, number, entry, decision)
        standing = "is champion" if decision.promoted else "is not champion"
        print(f"{name}: version {number} {standing}: {decision.reason}")


def _tried(numbers: Mapping[str, str]) -> dict[str, Trial]:
    """Whether versions work, of those whose packages are in order; none where a trial was lost: each gets its own."""
    packages: dict[str, Path] = {}
    for name, number in numbers.items():
        with contextlib.suppress(UserError):
            packages[name] = pull.open_package(f"{name}/{number}")
    with contextlib.suppress(NotTried):
        return dict(zip(packages, gate.trials(list(packages.values())), strict=True)) if packages else {}
    return {}


def judge(name: str, number: str, entry: Entry, works: Trial | None = None, *, force: str = "") -> Decision:
    """What the gate says of a version. ``works`` is a trial already made; ``force`` the reason not to compare it."""
    holder = entry.aliases.get(CHAMPION)
    try:
        ours = pull.open_package(f"{name}/{number}")
    except pull.Damaged as error:
        return gate.decide(Trial(fault=str(error)), None, holder)
    dataset = _dataset(entry, number)
    try:
        theirs, vacant = _champion(name, number, entry)
        if force or theirs is None:
            trial = works or gate.trials([ours])[0]
            return gate.forced(trial, holder, force) if force else gate.decide(trial, None, holder, vacant)
        if not gate.data_hash(dataset):
            return gate.without_data(gate.trials([ours])[0], dataset)
        challenger, champion = gate.trials([ours, theirs], dataset)
        return gate.decide(challenger, champion, holder)
    except (NotTried, UserError) as error:  # the champion may be a newer Genus's, or can't be fetched at the moment
        return gate.not_tried(str(error))


def _champion(name: str, number: str, entry: Entry) -> tuple[Path | None, str]:
    """The champion's package, or why there is none to beat."""
    holder = entry.aliases.get(CHAMPION)
    if holder is None:
        return None, gate.FIRST if number == "1" else "there is no champion"
    if holder not in entry.versions:
        return None, f"the champion, version {holder}, is gone"
    try:
        return pull.open_package(f"{name}/{holder}"), ""
    except pull.Damaged as error:
        return None, f"the champion is lost ({error})"


def apply(client: MlflowClient, name: str, number: str, entry: Entry, decision: Decision, reason: str = "") -> None:
    """Writes a decision down, tags and description first, the alias after them, and what it holds for last: where a
    process was killed in between, the next decides again.
    """
    holder, there = entry.aliases.get(CHAMPION), entry.versions[number].tags
    tags = decision.tags() | ({"genus.reason": reason} if reason else {})
    if decision.promoted and holder not in (None, number):
        tags["genus.replaces"] = str(holder)
    for key in there:
        if key.startswith("genus.gate.") and key not in tags:
            client.delete_model_version_tag(name, number, key)
    set_tags(client, name, number, tags, there)
    told = (client.get_model_version(name, number).description or "").partition(BEFORE)[0]
    client.update_model_version(name, number, f"{told}\n\n{decision.markdown()}")
    if decision.promoted:
        if "genus.rolled_back" in there:
            client.delete_model_version_tag(name, number, "genus.rolled_back")
        client.set_registered_model_alias(name, CHAMPION, number)
        if entry.aliases.get(CHALLENGER) == number:
            client.delete_registered_model_alias(name, CHALLENGER)
        _notify(name, number, holder, decision.reason)
    if decision.remembered:
        data = gate.data_hash(_dataset(entry, number))
        client.set_model_version_tag(name, number, "genus.decided_against", against(holder, data))


def _notify(name: str, number: str, holder: str | None, reason: str) -> None:
    from genus.notify import send

    text = f"{name}: version {number} is champion: {reason}"
    send("promotion", text, model=name, version=number, replaces=holder, reason=reason)


def promote(name: str, version: str = "", reason: str = "", *, force: bool = False) -> tuple[str, Decision]:
    """Puts the challenger, or ``version``, through the gate; its number and the decision.

    ``force`` asks only that it works. A decision that was taken against the same champion on the same data stands.
    Raises UserError for what can't be promoted, or not without a reason.
    """
    if force and not reason.strip():
        raise UserError("--force needs a reason: add --reason")
    with reaching(), one_at_a_time():
        client = tracking.client()
        entry = _model(client, name)
        number = version or entry.aliases.get(CHALLENGER, "")
        there = f"there is {', '.join(sorted(entry.versions, key=int)) or 'none'}"
        if not number:
            raise UserError(f"{name} has no challenger: name one with --version; {there}")
        if number not in entry.versions:
            raise UserError(f"{name} has no version {number}: {there}")
        if number == entry.aliases.get(CHAMPION):
            raise UserError(f"{name}: version {number} is champion already")
        why = entry.versions[number].tags.get("genus.rolled_back")
        if why and not (version and reason.strip()):
            raise UserError(f"{name}: version {number} was rolled back ({why}): give --version {number} and --reason")
        if not force and not why and decided(entry, number, gate.data_hash(_dataset(entry, number))):
            # Looking again and again would promote by chance in the end.
            tags = entry.versions[number].tags
            told = f"{tags['genus.decision']} (decided already, nothing has changed since)"
            return number, Decision(False, tags["genus.rule"], told)
        decision = judge(name, number, entry, force=reason if force else "")
        apply(client, name, number, entry, decision, reason)
        return number, decision


def rollback(name: str, reason: str) -> tuple[str, str]:
    """Gives the place of the champion back to the one before it; the numbers of both, the champion's first.

    Versions that are gone or were rolled back themselves are passed over. The one rolled back is never promoted again
    by itself. Raises UserError where there is no champion, none before it, or that one's package is damaged.
    """
    if not reason.strip():
        raise UserError("a rollback needs a reason: add --reason")
    with reaching(), one_at_a_time():
        client = tracking.client()
        entry = _model(client, name)
        holder = entry.aliases.get(CHAMPION)
        if holder is None:
            raise UserError(f"{name} has no champion to roll back")
        before = _before(entry, holder)
        if before is None:
            raise UserError(f"{name}: there is no champion before version {holder} to go back to")
        pull.open_package(f"{name}/{before}")
        # What is killed after the first of these is finished by doing it again.
        client.set_model_version_tag(name, before, "genus.restored", f"instead of version {holder}: {reason}")
        client.set_model_version_tag(name, holder, "genus.rolled_back", reason)
        client.set_registered_model_alias(name, CHAMPION, before)
        told = client.get_model_version(name, holder).description or ""
        client.update_model_version(name, holder, f"{told}\n\n**Rolled back** to version {before}: {reason}")
        return holder, before


def _before(entry: Entry, number: str) -> str | None:
    """The champion before this one, along the chain of who replaced whom."""
    seen = {number}
    while True:
        number = entry.versions[number].tags.get("genus.replaces", "") if number in entry.versions else ""
        if not number or number in seen:
            return None
        seen.add(number)
        if number in entry.versions and "genus.rolled_back" not in entry.versions[number].tags:
            return number


@dataclass(frozen=True)
class Past:
    """A line of a model's history."""

    number: str
    made: datetime.datetime
    aliases: tuple[str, ...]
    figure: str  # of the evaluator, on the test split
    replaces: str
    decision: str
    rolled_back: str


def history(name: str) -> list[Past]:
    """All versions of a model, the newest first. Raises UserError for an unknown name."""
    with reaching():
        client = tracking.client()
        entry = _known(client, name)
        found = []
        for version in client.search_model_versions(f"name = '{name}'"):
            number, tags = str(version.version), version.tags
            figure = ""
            if "genus.metric" in tags:
                kind = f" ({tags['genus.kind']})" if tags.get("genus.kind") else ""
                figure = f"{tags['genus.metric']}{kind} {float(tags['genus.value']):.4f}"
            found.append(
                Past(
                    number,
                    datetime.datetime.fromtimestamp(version.creation_timestamp / 1000),
                    tuple(sorted(alias for alias, holder in entry.aliases.items() if holder == number)),
                    figure or " ".join(filter(None, (tags.get("genus.model"), tags.get("genus.model_version")))),
                    tags.get("genus.replaces", ""),
                    tags.get("genus.decision", ""),
                    tags.get("genus.rolled_back", ""),
                )
            )
    return sorted(found, key=lambda past: -int(past.number))


def answer(client: MlflowClient, dataset: str, wanted: Mapping[str, str], numbers: Mapping[str, str]) -> None:
    """Points the aliases of the registered model ``dataset`` at the models that answer its needs: {alias: model}.

    Its versions are the models' own (``numbers``), with the same package: no file is copied. A need without an answer,
    or whose answer doesn't work or was rolled back, has no alias.
    """
    entry, known = ask(client, dataset) or Entry(), {}
    for alias, model in wanted.items():
        if model in numbers and serves(_known(client, model).versions[numbers[model]]):
            known[alias] = (model, numbers[model])
    if known and not entry.versions:
        with contextlib.suppress(*tracking.problems()):  # it may be there, empty
            client.create_registered_model(dataset, description=f"Models of {dataset}, by need: {', '.join(NEEDS)}.")
    there = {(v.tags.get("genus.model"), v.tags.get("genus.model_version")): n for n, v in entry.versions.items()}
    for pair in sorted(set(known.values()) - set(there)):
        there[pair] = _alike(client, dataset, *pair)
    for alias, pair in known.items():
        if entry.aliases.get(alias) != there[pair]:
            client.set_registered_model_alias(dataset, alias, there[pair])
    for alias in set(entry.aliases) - set(known):
        client.delete_registered_model_alias(dataset, alias)


def _alike(client: MlflowClient, dataset: str, model: str, number: str) -> str:
    """A version of ``dataset`` that is a model's version: same package, run and hashes."""
    version = client.get_model_version(model, number)
    kept = ("sha256", "manifest", "format", "knobs", "family", "dataset", "data_sha256", "metric", "value", "kind", "n")
    tags = {key: version.tags[key] for key in (f"genus.{name}" for name in kept) if key in version.tags}
    made = client.create_model_version(
        dataset,
        source=str(version.source),
        run_id=version.run_id,
        model_id=str(version.source).removeprefix("models:/"),
        tags=tags | {"genus.model": model, "genus.model_version": number},
        description=f"Version {number} of {model}.",
    )
    return str(made.version)


def _known(client: MlflowClient, name: str) -> Entry:
    """What the registry holds under ``name``. Raises UserError, naming the nearest, where it knows none."""
    entry = ask(client, name)
    if entry is None:
        raise unknown(name)
    return entry


def _model(client: MlflowClient, name: str) -> Entry:
    """The same of a model that has champions. Raises UserError for a data set, whose aliases are needs."""
    entry = _known(client, name)
    models = sorted({v.tags["genus.model"] for v in entry.versions.values() if "genus.model" in v.tags})
    if models:
        raise UserError(f"{name} is a data set, whose aliases follow the scorecard: name one of {', '.join(models)}")
    return entry


def _dataset(entry: Entry, number: str) -> str:
    return entry.versions[number].tags.get("genus.dataset", "")
