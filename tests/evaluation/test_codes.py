"""What is measured of a code of tokens, on codes whose figures are known in closed form."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from genus.config import Evaluate
from genus.contract import Family, build
from genus.evaluation.codes import codes, perplexity, root_mean_square
from genus.evaluation.evaluate import Task
from tests.evaluation.conftest import Digits


class Levels(Family):
    """Tokens are the pixels' levels, coarsened by ``step``, beside a grid of one token that is always 0."""

    paper = "none 0"

    def __init__(self, digits: Digits, step: int = 1, shift: float = 0.0):
        super().__init__(digits.data.spec)
        self.step, self.shift, self.entries = step, shift, 4 * self.spec.levels
        self.grids = [(1, 1), self.spec.shape[1:]]

    def quantise(self, x: Tensor) -> list[Tensor]:
        return [torch.zeros(len(x), 1, 1).long(), self.spec.to_levels(x)[:, 0] // self.step]

    def dequantise(self, tokens: list[Tensor]) -> Tensor:
        return self.spec.to_float(tokens[1].unsqueeze(1) * self.step) + self.shift


def task(model: Family, digits: Digits) -> Task:
    settings = Evaluate.model_validate({"samples": 60, "batch_size": 50})
    return Task(model, digits.data, digits.reference, settings, 0, torch.device("cpu"))


def test_a_code_that_loses_nothing(digits: Digits) -> None:
    found, timing = codes(task(Levels(digits), digits))
    test = digits.data.split("test")
    used = len(np.unique(test)) / 68
    assert found["codes_used"]["grids"] == {"1x1": 1 / 68, "8x8": used} and found["codes_used"]["value"] == 1 / 68
    assert found["code_perplexity"]["value"] == 1.0
    share = np.bincount(test.ravel()) / test.size
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert found["code_perplexity"]["grids"]["8x8"] == pytest.approx(math.exp(entropy), rel=1e-12)
    assert found["code_bits"]["value"] == pytest.approx(65 / 64 * math.log2(68), rel=1e-12)
    assert found["reconstruction_error"]["value"] == 0
    assert found["reconstruction_frechet"]["value"] < 1e-5 * found["reconstruction_frechet"]["control"]
    assert all(figure["n"] == len(test) for figure in found.values()) and timing["reconstruction_ms"] > 0
    json.dumps(found)  # plain numbers


def test_a_coarse_code_loses_what_it_rounds_away(digits: Digits) -> None:
    """Levels cut to multiples of 8: the error is the remainder's, and the judge sees it."""
    found = codes(task(Levels(digits, step=8), digits))[0]
    test = digits.data.split("test")
    squares = ((test % 8).astype(float) ** 2).reshape(len(test), -1).mean(1)
    error = found["reconstruction_error"]
    assert error["value"] == pytest.approx(math.sqrt(squares.mean()), rel=1e-12)
    half = 1.96 * squares.std(ddof=1) / math.sqrt(len(squares))
    ends = [math.sqrt(squares.mean() - half), math.sqrt(squares.mean() + half)]
    assert [error["low"], error["high"]] == pytest.approx(ends, rel=1e-12)
    frechet = found["reconstruction_frechet"]
    assert 0.01 < frechet["relative"] == frechet["value"] / frechet["control"]
    assert frechet["low"] <= frechet["value"] <= frechet["high"]


def test_a_model_of_tokens_has_them(digits: Digits) -> None:
    torch.manual_seed(0)
    model = build("vae/vqvae2", digits.data.spec, {"width": 8, "entries": 16}).eval()
    found, _ = codes(task(model, digits))
    assert set(found["codes_used"]["grids"]) == {"2x2", "4x4"}
    assert 0 < found["codes_used"]["value"] <= 1 <= found["code_perplexity"]["value"] <= 16
    assert found["code_bits"]["value"] == 20 * 4 / 64
    assert found == codes(task(model, digits))[0]


def test_what_is_not_finite_is_named(digits: Digits) -> None:
    with pytest.raises(FloatingPointError, match="test images 0 to 49 is not finite"):
        codes(task(Levels(digits, shift=math.nan), digits))


def test_perplexity_and_error_by_hand() -> None:
    assert perplexity(np.array([3, 0, 1])) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert perplexity(np.array([5, 5, 5, 5, 0])) == pytest.approx(4)
    a, b = np.array([[0, 250], [3, 3]], np.uint8), np.array([[10, 0], [3, 3]], np.uint8)  # bytes must not wrap
    assert root_mean_square(a, b)["value"] == pytest.approx(math.sqrt((100 + 250**2) / 4))
