"""The record of a model: what the report reads. One that could not be trained or measured has its failure there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from genus.config import Model
from genus.files import read_json, write_json


def record_of(name: str, model: Model) -> Path:
    """Where the record of a model stands."""
    return Path("reports/records") / model.collection / f"{name}.json"


def failure_of(name: str, model: Model) -> str:
    """Why a model could not be trained or measured, as its record says; empty where it could."""
    path = record_of(name, model)
    return read_json(path).get("failure", "") if path.exists() else ""


@contextlib.contextmanager
def failure_recorded(name: str, model: Model, stage: str, *kinds: type[Exception]) -> Iterator[None]:
    """Where the block raises one of ``kinds``, the record says so, and no longer what an earlier model has scored.

    A comparison that leaves out the models that diverged would be a lie.
    """
    try:
        yield
    except kinds as error:
        why = f"{stage}: {' '.join(str(error).split())}"
        write_json(
            record_of(name, model), {"name": name, "family": model.family, "dataset": model.dataset, "failure": why}
        )
        raise
