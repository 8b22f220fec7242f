"""Rate and active units of codes: against closed forms, for images and for text."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from genus.config import Evaluate
from genus.contract import Batch, Informs
from genus.data.spec import DataSpec
from genus.evaluation import latent
from genus.families.vae.beta_vae import BetaVAE
from genus.families.vae.sentence_vae import SentenceVAE
from genus.families.vae.vae import VAE

IMAGES = np.random.default_rng(0).integers(17, size=(700, 1, 4, 4), dtype=np.uint8)
VERSES = np.array(
    [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [2, 2, 1, 3, 0], [3, 0, 0, 0, 0], [1, 1, 0, 0, 0], [2, 4, 4, 0, 0]]
)


class Data(SimpleNamespace):
    def count(self, split: str) -> int:
        assert split == "test"
        return len(self.stored)

    def documents(self, split: str, rows: np.ndarray) -> np.ndarray:
        assert split == "test"
        return self.stored[rows].astype(np.uint8)


class Task(SimpleNamespace):
    effort, device = Evaluate(batch_size=100), torch.device("cpu")

    def test(self, n: int) -> Tensor:
        return self.data.spec.to_float(torch.from_numpy(self.data.stored[:n]))

    def generator(self, number: int) -> Generator:
        return torch.Generator().manual_seed(number)


def images(model: Any) -> Task:
    return Task(model=model, data=Data(spec=DataSpec((1, 4, 4), 17), stored=IMAGES))


def text(model: Any) -> Task:
    return Task(model=model, data=Data(spec=DataSpec((5,), 0, (), "abcd"), stored=VERSES))


class Known:
    """A code of four numbers: one still, one hardly moving, two that tell a pixel each. Says its rate by a pixel."""

    def encode(self, x: Tensor) -> Tensor:
        pixels = x.flatten(1)
        return torch.stack([torch.ones(len(x)), 0.05 * pixels[:, 0], pixels[:, 1], 3 * pixels[:, 2]], 1)

    def rate(self, batch: Batch, *, generator: Generator) -> Tensor:
        return 2 + batch.x[:, 0, 0, 0]


def test_active_units_are_those_that_move() -> None:
    figures, timing = latent.active_units(images(Known()))
    found = figures["active_units"]
    assert (found["value"], found["active"], found["latent"], found["n"]) == (0.5, 2, 4, 700) and timing == {}
    assert 0 < found["low"] < 0.5 < found["high"] < 1


def test_the_rate_is_a_mean_with_its_interval() -> None:
    found = latent.rate(images(Known()))[0]["rate"]
    values = 2 + IMAGES[:, 0, 0, 0].astype(float) / 8 - 1
    assert found["value"] == pytest.approx(values.mean(), abs=1e-6)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std(ddof=1) / math.sqrt(700), rel=1e-5)


def test_a_rate_that_is_no_number_is_named() -> None:
    class Broken(Known):
        def rate(self, batch: Batch, *, generator: Generator) -> Tensor:
            return torch.where(torch.arange(len(batch.x)) == 7, math.inf, 1.0)

    with pytest.raises(FloatingPointError, match="rate of test example 7 is not finite"):
        latent.rate(images(Broken()))


@pytest.mark.parametrize("family", [VAE, BetaVAE])
def test_image_models_inform(family: Any) -> None:
    torch.manual_seed(0)
    model = family(DataSpec((1, 4, 4), 17), latent=3, channels=4, hidden=8).eval()
    assert isinstance(model, Informs)
    assert latent.rate(images(model))[0]["rate"]["value"] > 0
    assert latent.active_units(images(model))[0]["active_units"]["latent"] == 3


def test_a_bent_posterior_s_rate_is_that_of_its_bound() -> None:
    """The rate's mean over draws is that of log p(x|z) less the bound: within 5 standard errors."""
    torch.manual_seed(0)
    model = VAE(DataSpec((1, 4, 4), 17), latent=2, channels=4, hidden=8, posterior="planar", flow_layers=2).double()
    x = DataSpec((1, 4, 4), 17).to_float(torch.from_numpy(IMAGES[:1])).double().expand(2_000, -1, -1, -1)
    with torch.no_grad():
        rate = model.rate(Batch(x), generator=torch.Generator().manual_seed(0))
        z, _ = model._code(x, torch.Generator().manual_seed(1))
        bound = model.log_prob(Batch(x), generator=torch.Generator().manual_seed(1))
        other = model.log_likelihood(x, z) - bound
    error = math.sqrt((rate.var().item() + other.var().item()) / len(x))
    assert abs(rate.mean().item() - other.mean().item()) < 5 * error


def test_text_is_measured_by_documents() -> None:
    torch.manual_seed(0)
    spec = DataSpec((5,), 0, (), "abcd")
    model = SentenceVAE(spec, latent=3, hidden=8, encoder=6, embedding=5, context=5).eval()
    assert isinstance(model, Informs)
    task = text(model)
    found = latent.rate(task)[0]["rate"]
    x = torch.from_numpy(VERSES)
    assert found["n"] == 6
    assert found["value"] == pytest.approx(model.rate(Batch(x), generator=task.generator(0)).mean().item(), abs=1e-6)
    assert latent.active_units(task)[0]["active_units"]["n"] == 6
