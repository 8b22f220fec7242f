"""What is measured of a translation, on translators whose figures are known in closed form."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from genus.config import Evaluate
from genus.contract import Family, Translates
from genus.data.loaders import Dataset
from genus.errors import UserError
from genus.evaluation import metrics
from genus.evaluation.evaluate import Task
from genus.evaluation.gallery import gallery
from genus.evaluation.judge import classes, features
from genus.evaluation.scorecard import draws, scorecard
from genus.evaluation.translation import overlap, strips, translation, ways
from tests.evaluation.conftest import Digits

KEYS = {"translated_accuracy", "cycle_error", "kept_silhouette"}


class Toy(Family):
    """Ones and sevens. Leaves every image as it is; or replaces each by the same ``real`` one of the target."""

    paper = "none 0"
    domains = (1, 7)

    def __init__(self, digits: Digits, real: bool = False, shift: float = 0.0):
        super().__init__(digits.data.spec)
        labels, self.shift = np.asarray(digits.data.labels("train")), shift
        stored = {label: digits.data.split("train")[np.flatnonzero(labels == label)[0]] for label in self.domains}
        self.shown = {k: self.spec.to_float(torch.from_numpy(np.array(v))) for k, v in stored.items()} if real else {}

    def translate(self, x: Tensor, to: int, *, generator: Generator) -> Tensor:
        return self.shown[to].expand_as(x) if self.shown else x + self.shift


def task(model: Family, digits: Digits) -> Task:
    return Task(model, digits.data, digits.reference, Evaluate(), 0, torch.device("cpu"))


def real_images(digits: Digits, label: int) -> np.ndarray:
    return np.array(digits.data.split("test")[np.asarray(digits.data.labels("test")) == label])


def taken(digits: Digits, images: np.ndarray) -> np.ndarray:
    return classes(digits.reference.judge, features(digits.reference.judge, images))


def test_what_is_left_as_it_is_arrives_by_mistake_alone(digits: Digits) -> None:
    model = Toy(digits)
    assert isinstance(model, Translates)
    found, timing = translation(task(model, digits))
    assert found.keys() == KEYS and timing["translate_ms"] > 0
    ones, sevens = real_images(digits, 1), real_images(digits, 7)
    n = len(ones) + len(sevens)
    lost = int((taken(digits, ones) == 7).sum() + (taken(digits, sevens) == 1).sum())
    right = int((taken(digits, ones) == 1).sum() + (taken(digits, sevens) == 7).sum())
    accuracy = found["translated_accuracy"]
    assert accuracy["value"] == accuracy["before"] == lost / n and accuracy["n"] == n
    assert accuracy["floor"] == right / n > 0.9
    assert (accuracy["low"], accuracy["high"]) == metrics.wilson(lost, n)
    assert list(accuracy["ways"]) == ["1 to 7", "7 to 1"]
    assert accuracy["ways"]["1 to 7"]["floor"] == (taken(digits, sevens) == 7).mean()
    assert found["cycle_error"]["value"] == 0 and found["kept_silhouette"]["value"] == 1
    json.dumps(found)  # plain numbers


def test_one_real_image_of_the_target_arrives_and_keeps_nothing(digits: Digits) -> None:
    """The figures that nobody is to be satisfied with apart: every translation is right, and the same."""
    model = Toy(digits, real=True)
    found, _ = translation(task(model, digits))
    accuracy, cycle, kept = (found[key] for key in ("translated_accuracy", "cycle_error", "kept_silhouette"))
    assert accuracy["value"] == 1.0 and accuracy["before"] < 0.1
    shown = {label: model.spec.to_stored(x).numpy() for label, x in model.shown.items()}
    for way, source, target in (("1 to 7", 1, 7), ("7 to 1", 7, 1)):
        real = real_images(digits, source)
        errors = np.abs(real.astype(float) - shown[source]).mean((1, 2, 3)) / 16
        value, low, high = metrics.mean_interval(errors)
        assert [cycle["ways"][way][end] for end in ("value", "low", "high")] == pytest.approx([value, low, high])
        ink, other = (real > 1.6).any(1), (shown[target] > 1.6).any(0)
        shares = (ink & other).sum((1, 2)) / (ink | other).sum((1, 2))
        assert kept["ways"][way]["value"] == pytest.approx(shares.mean()) and kept["ways"][way]["n"] == len(real)
    assert cycle["value"] > 0.1 and kept["value"] < 0.9


def test_overlap_by_hand() -> None:
    one = np.array([[[True, True], [False, False]], [[False, False], [False, False]]])
    other = np.array([[[True, False], [True, False]], [[False, False], [False, False]]])
    assert overlap(one, other).tolist() == [1 / 3, 1.0]


def test_the_way_back_starts_from_what_is_stored(digits: Digits) -> None:
    """A hundredth of a level, by which a network might hide what it has left out, does not survive."""
    forth, back = ways(Toy(digits, shift=1e-3), digits.data, "test", most=3, seed=0, device=torch.device("cpu"))
    assert len(forth.real) == len(back.real) == 3 and (forth.source, back.source) == (1, 7)
    assert np.array_equal(forth.real, forth.there) and np.array_equal(back.there, back.back)
    with pytest.raises(FloatingPointError, match="translation 0 of 3 to '7' is not finite"):
        ways(Toy(digits, shift=math.nan), digits.data, "test", most=3, seed=0, device=torch.device("cpu"))


def test_the_picture_is_both_directions_there_and_back(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy(digits, real=True)
    rows = strips(model, digits.data, "test", columns=4, seed=0, device=torch.device("cpu"))
    assert rows.shape == (24, *model.spec.shape)
    assert np.array_equal(rows[:4], real_images(digits, 1)[:4]) and np.array_equal(
        rows[12:16], real_images(digits, 7)[:4]
    )
    assert np.array_equal(rows[4], rows[20]), "there, and back from the other side, is the one seven"
    few = strips(model, digits.data, "test", columns=1000, seed=0, device=torch.device("cpu"))
    assert few.shape[0] == 6000 and not few[999].any()
    assert set(gallery(task(model, digits))) == {"translation"}
    monkeypatch.setattr(Dataset, "labels", lambda self, split: np.ones(self.count(split), np.int64))
    with pytest.raises(UserError, match="the test split has no image of class '7' to translate"):
        strips(model, digits.data, "test", columns=4, seed=0, device=torch.device("cpu"))
    assert translation(task(model, digits)) == ({}, {}) and not gallery(task(model, digits))


def test_a_model_that_draws_nothing_has_no_part_in_claims_and_advice() -> None:
    """Its figures stand in the table; a claim about samples is not left waiting for it."""
    from genus.evaluation import claims
    from tests.evaluation import card as example

    records = example.records()
    usual = example.card(records)
    name = f"{example.DATASET}-cyclegan"
    share = {"value": 0.9, "low": 0.88, "high": 0.92, "n": 200, "floor": 0.95, "before": 0.02}
    record = {"name": name, "family": "gan/cyclegan", "dataset": example.DATASET, "can": ["translates"]}
    record |= {"metrics": {"translated_accuracy": share}, "timing": {"train_images_per_s": 1e9}}
    assert not draws(record) and all(draws(other) for other in records.values())
    about, data = "a test", {example.DATASET: example.dataset()}
    both = scorecard(about, records | {name: record}, data, claims.read(example.ROOT / "claims.yaml"))
    assert both["verdicts"] == usual["verdicts"] and both["advice"] == usual["advice"]
    rows = {row["key"]: row["cells"][name] for row in both["properties"]}
    assert rows["capacity.translated_accuracy"]["value"] == 0.9 and rows["speed.train"]["value"] == 1e9


def test_a_trial_measures_what_the_gate_compares(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """On validation images, which are as many as there are of both classes."""
    from genus.evaluation import reference
    from genus.stages import trial

    monkeypatch.setattr(reference, "open_reference", lambda *_: digits.reference)
    runtime = SimpleNamespace(model=Toy(digits, real=True), domains=("1", "7"))
    found = trial._translated(runtime, digits.data)
    n = int(np.isin(digits.data.labels("validation"), (1, 7)).sum())
    assert found["translated"] == [1.0] * n and len(found["cycle"]) == n and found["sample_ms"] > 0
    assert found["domains"] == ["1", "7"] and min(found["cycle"]) > 0
