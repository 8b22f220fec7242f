"""A model that translates and draws nothing, from its package to the gate: images in, images out."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file

from genus.registry import gate, package, runtime
from genus.registry.gate import Trial
from genus.stages import trial
from tests.registry.workspace import SPEC, write_model

NAME = "digits-cyclegan"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("translator")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        model = write_model(NAME, "gan/cyclegan").resolve()
        weights = load_file(model / "weights.safetensors")
        for name in ("forth.leave.weight", "back.leave.weight"):  # untrained it leaves an image nearly as it is
            weights[name] = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(len(name)))
        save_file(weights, model / "weights.safetensors")
        package(model, root / "package")
    return root / "package"


def images(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(SPEC.levels, size=(n, *SPEC.shape), dtype=np.uint8)


def test_a_package_translates_wherever_it_is_loaded(folder: Path) -> None:
    model, here = mlflow.pyfunc.load_model(str(folder), suppress_warnings=True), runtime.load(folder)
    there = np.asarray(model.predict(images()))
    assert there.dtype == np.uint8 and there.shape == (3, *SPEC.shape) and there.max() < SPEC.levels
    np.testing.assert_array_equal(there, here.translate(images()))
    np.testing.assert_array_equal(there[1:2], here.translate(images()[1:2]))  # alone as with others
    assert here.domains == ("1", "7") and here.knobs == {"to": "7"} and here.labels == 0
    back = np.asarray(model.predict(images(), params={"to": "1"}))
    np.testing.assert_array_equal(back, here.translate(images(), to="1"))
    assert (back != there).any()
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert ".translate(images)" in text and ".sample(" not in text and "it can translate, not score" in text


def test_what_it_cannot_do_is_said(folder: Path) -> None:
    here = runtime.load(folder)
    for ask, line in (
        (lambda: here.sample([1]), f"{NAME} cannot sample: it can translate"),
        (lambda: here.log_prob(images()), "it can translate, not score"),
        (lambda: here.translate(images(), to="3"), "translates to '1' or '7', not to '3'"),
        (lambda: here.translate(images(), two="7"), "no parameter 'two'"),
        (lambda: here.translate(images()[:, 0]), "translates uint8"),
    ):
        with pytest.raises(ValueError, match=line):
            ask()
    model = mlflow.pyfunc.load_model(str(folder), suppress_warnings=True)
    with pytest.raises(MlflowException, match="not to '3'"):
        model.predict(images(), params={"to": "3"})


def test_a_trial_finds_that_it_works(folder: Path) -> None:
    assert trial.trial(folder)["fault"] == ""


def test_the_gate_compares_translations_image_by_image() -> None:
    """Of 100 images one more arrives by chance, ten more do not; but not at the price of what is lost on the way."""

    def shown(hits: int, cycle: float = 0.03, domains: tuple[str, ...] = ("1", "7")) -> Trial:
        taken = tuple(float(place < hits) for place in range(100))
        return Trial(domains=domains, translated=taken, cycle=(cycle, cycle + 0.001) * 50, sample_ms=1.0)

    champion = shown(70)
    better = gate.decide(shown(80), champion, "1")
    assert (better.promoted, better.rule) == (True, "better") and better.rows[0].name == "translated_accuracy"
    assert better.rows[0].ends is not None and better.rows[0].ends[0] > 0
    assert gate.decide(shown(71), champion, "1").rule == "not better"
    assert gate.decide(shown(60), champion, "1").rule == "not better"
    lost = gate.decide(shown(80, cycle=0.05), champion, "1")
    assert (lost.promoted, lost.rule) == (False, "guard") and "cycle_error" in lost.reason
    assert gate.decide(shown(80, domains=("3", "8")), champion, "1").rule == "not better"
