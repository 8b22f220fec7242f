"""What a run has to do: which stages, in which order, and which of them have changed. DVC is asked for all of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from genus.config import NONE, Model, Params
from genus.errors import UserError, nearest

# Seconds a stage of each kind is expected to take until it has run here once: only the order depends on them.
EXPECTED = {
    "ingest": 20.0, "validate": 10.0, "judge": 100.0, "controls": 90.0, "train": 110.0, "evaluate": 90.0, "probe": 110.0
}  # fmt: skip
TRAINS_OR_SAMPLES = ("judge", "train", "evaluate", "probe")  # the stages that use a GPU where there is one
GATHERS = {"scorecard": "evaluate"}  # stages that go on without some of what they gather, and of what kind that is


@dataclass(frozen=True)
class Plan:
    """The stages of one run in an order that respects ``upstream``, and what is to be shown at the end."""

    upstream: dict[str, list[str]]  # stage -> stages of this run that must be done first
    changed: frozenset[str]  # stages that DVC says have changed; what stands downstream of them may change
    models: list[str]  # the models that this run is about
    collections: list[str]  # the collections whose registration this run is to reconcile

    @property
    def stages(self) -> list[str]:
        return list(self.upstream)

    def waiting(self, forced: Collection[str] = ()) -> list[str]:
        """The stages to hand to DVC: the changed and the forced ones and everything downstream of them."""
        found: list[str] = []
        for stage, needs in self.upstream.items():
            if stage in forced or stage in self.changed or set(found).intersection(needs):
                found.append(stage)
        return found

    def lost(self, failed: Collection[str]) -> list[str]:
        """The stages that cannot run where those in ``failed`` have failed: all downstream of them.

        But a stage that gathers the others' results goes on as long as there is one to gather.
        """
        gone = set(failed)
        for stage, needs in self.upstream.items():
            gathered = [need for need in needs if kind(need) == GATHERS.get(kind(stage))]
            if gone.intersection(needs) and gone.issuperset(gathered):
                gone.add(stage)
        return [stage for stage in self.upstream if stage in gone and stage not in failed]

    def urgency(self, seconds: dict[str, float]) -> dict[str, float]:
        """Expected seconds from a stage's start to the end of the run: the longest way goes first."""
        tail = dict.fromkeys(self.upstream, 0.0)
        for stage in reversed(self.upstream):
            tail[stage] += seconds.get(stage, EXPECTED.get(kind(stage), 5.0))
            for need in self.upstream[stage]:
                tail[need] = max(tail[need], tail[stage])
        return tail


def kind(stage: str) -> str:
    """``train@digits-glow`` is of kind ``train``."""
    return stage.partition("@")[0]


def model_names(params: Params, asked: Collection[str], datasets: Collection[str], collection: str) -> list[str]:
    """Full names of the models asked for: ``glow`` is short for ``<dataset>-glow`` where only one model can be meant.

    A short name is looked for in ``datasets`` where some are given, else in ``collection``, then everywhere.
    Raises UserError, with the nearest name, for what does not exist or could be several.
    """
    places = [[m for m in params.models if params.models[m].dataset in datasets]] if datasets else []
    places += [] if datasets else [params.collection(collection), list(params.models)]
    names = []
    for name in asked:
        if name in params.models:
            names.append(name)
            continue
        for place in places:
            meant = [m for m in place if m == f"{params.models[m].dataset}-{name}"]
            if len(meant) > 1:
                raise UserError(f"model '{name}' could be {' or '.join(sorted(meant))}: give the full name")
            if meant:
                names += meant
                break
        else:
            short = {m.removeprefix(f"{params.models[m].dataset}-") for m in params.models}
            raise UserError(f"unknown model '{name}': {nearest(name, {*params.models, *short})}")
    return list(dict.fromkeys(names))


def make(
    params: Params, *, collection: str = "tour", models: Collection[str] = (), datasets: Collection[str] = ()
) -> Plan:
    """The plan of ``genus run``: a whole collection up to its registration, or the models asked for.

    Raises UserError for names that do not exist and for a graph that DVC cannot read.
    """
    for dataset in datasets:
        params.dataset(dataset)
    if models or datasets:
        chosen = model_names(params, models, datasets, collection)
        chosen = chosen or [m for m in params.models if params.models[m].dataset in datasets]
        # A data set that no model learns yet is still brought as far as it goes.
        alone = [d for d in datasets if not any(params.models[m].dataset == d for m in chosen)]
        targets = [f"evaluate@{model}" for model in chosen] + [f"judge@{dataset}" for dataset in alone]
        collections: list[str] = []
    else:
        chosen = params.collection(collection)
        if not chosen:
            raise UserError(f"params.yaml: no model is in the collection '{collection}'")
        targets, collections = [f"register@{collection}"], [collection]
    upstream, changed = _ask_dvc(targets)
    return Plan(upstream, frozenset(changed), chosen, collections)


def _ask_dvc(targets: list[str]) -> tuple[dict[str, list[str]], Iterable[str]]:
    """The graph above ``targets`` in an order to run it in, and the stages in it that have changed."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    try:
        with Repo(".") as repo:
            graph = repo.index.graph
            needs = {stage.addressing: sorted(up.addressing for up in graph.successors(stage)) for stage in graph}
            for target in targets:
                if target not in needs:
                    raise UserError(f"dvc.yaml has no stage '{target}': {nearest(target, needs)}")
            _nothing_missing(stage for target in targets for stage in repo.stage.collect(target, with_deps=True))
            changed = repo.status(targets=targets, with_deps=True)
    except LockError as error:
        raise UserError("another DVC command is going on in this folder: try again when it is done") from error
    except DvcException as error:
        said = " ".join(str(error).split())
        absent = re.search(r"'stages\.(\w+@([\w.-]+))\..*Could not find 'item\.(\w+)'", said)
        if absent and absent[3] in Model.model_fields:
            line = (
                f"params.yaml: models.{absent[2]}.{absent[3]} is missing and {absent[1]} depends on it: write it down"
            )
            raise UserError(line + (f", {NONE} where there is none" if absent[3] == "parent" else "")) from error
        raise UserError(f"dvc.yaml: {said}") from error
    ordered: dict[str, list[str]] = {}

    def visit(stage: str) -> None:
        if stage not in ordered:
            for need in needs[stage]:
                visit(need)
            ordered[stage] = needs[stage]

    for target in targets:
        visit(target)
    return ordered, changed


def _nothing_missing(stages: Iterable[Any]) -> None:
    """Raises UserError for a key that a stage depends on and params.yaml does not have: DVC knows no default values."""
    for stage in stages:
        for params in stage.params:
            missing = set(params.params).difference(params.read_params())
            if missing:
                raise UserError(
                    f"{params.def_path}: {min(missing)} is missing and {stage.addressing} depends on it: "
                    "write it down, an empty section as {}"
                )
