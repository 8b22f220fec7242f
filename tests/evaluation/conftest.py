"""The digits, ingested, with a judge of their own: made once a session."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from genus import config
from genus.data.ingestion import ingest
from genus.data.loaders import Dataset, open_dataset
from genus.evaluation.judge import train_judge
from genus.evaluation.reference import Reference, make_reference


class Digits(NamedTuple):
    data: Dataset
    reference: Reference
    folder: Path  # of the reference


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    root = tmp_path_factory.mktemp("digits")
    ingest("digits", config.Dataset(source="digits", validation=0.4), 0, root)  # enough held-out ones for controls
    data = open_dataset("digits", root / "processed")
    torch.manual_seed(0)
    images, labels = data.split("train"), data.labels("train")
    options = {"steps": 200, "batch_size": 64, "learning_rate": 4e-3}
    judge = train_judge(data.spec, images, labels, device=torch.device("cpu"), **options)  # type: ignore[arg-type]
    return Digits(data, make_reference(judge, data, root / "judge", seed=0), root / "judge")
