"""NCSN: its ladder, its loss and its sampler, against data whose score is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genus.contract import Batch, build
from genus.data.spec import DataSpec
from genus.families.score.ncsn import NCSN, ladder_ratio


def tiny(**params: float) -> NCSN:
    torch.manual_seed(0)
    model = build("score/ncsn", DataSpec((1, 8, 8), 17), {"width": 8, **params})
    assert isinstance(model, NCSN)
    return model


class Exact(NCSN):
    """The network replaced by the posterior mean of N(0, sigma_data²) data, times ``factor``."""

    factor = 1.0

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma[:, None, None, None]
        return self.factor * x * self.sigma_data**2 / (self.sigma_data**2 + s**2)


def test_ladder_of_fashion_mnist() -> None:
    assert ladder_ratio(784) == pytest.approx(1.082, abs=5e-4)
    model = NCSN(DataSpec((1, 28, 28)), width=8)
    assert model.sigmas[0] == pytest.approx(42)  # 21 in [0, 1]
    assert model.sigmas[-1] == pytest.approx(0.02)
    assert len(model.sigmas) == 99 and model.nfe == 100
    ratios = [a / b for a, b in zip(model.sigmas, model.sigmas[1:], strict=False)]
    assert max(ratios) - min(ratios) < 1e-9 and ratios[0] <= ladder_ratio(784)


def test_ladder_ratio_is_half_an_overlap() -> None:
    """Technique 2 by Monte Carlo: half of level i - 1's norms are within three standard deviations of level i's."""
    dims, ratio = 784, ladder_ratio(784)
    norms = ratio * torch.randn(4000, dims, generator=torch.Generator().manual_seed(0)).norm(dim=1)
    inside = (norms - math.sqrt(dims)).abs() < 3 / math.sqrt(2) * ratio
    assert inside.float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_loss_is_least_for_the_true_score() -> None:
    """On N(0, sigma_data²) data the posterior mean has a weighted loss of 1 at every level, and nothing less."""
    model = Exact(DataSpec((1, 8, 8)), width=8)
    x = model.sigma_data * torch.randn(4096, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    losses = {}
    for factor in (0.9, 1.0, 1.1):
        model.factor = factor
        losses[factor] = model.loss(Batch(x), generator=torch.Generator().manual_seed(2))["loss"].item()
    # 262,144 numbers, each weight · error² with mean 1 and variance 2: a standard deviation of 0.003.
    assert losses[1.0] == pytest.approx(1.0, abs=0.012)
    assert losses[1.0] < min(losses[0.9], losses[1.1]) - 0.005


def test_score_is_tweedies() -> None:
    model = Exact(DataSpec((1, 8, 8)), width=8)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    expected = -x / (model.sigma_data**2 + sigma**2)[:, None, None, None]
    torch.testing.assert_close(model.score(x, sigma), expected, rtol=1e-4, atol=1e-5)


def test_a_network_that_says_nothing_starts_at_one() -> None:
    """The scaling makes the untrained loss 1 where the data's pixels have the variance sigma_data²."""
    model = tiny()
    x = model.sigma_data * torch.randn(1024, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    assert model.loss(Batch(x), generator=torch.Generator().manual_seed(4))["loss"].item() == pytest.approx(1, abs=0.03)


def test_samples_have_the_variance_of_the_data() -> None:
    model = Exact(DataSpec((1, 8, 8)), width=8, sigma_data=0.2)  # narrow: nothing is clipped at ±1
    x = model.sample(500, generator=torch.Generator().manual_seed(5))
    assert x.shape == (500, 1, 8, 8)
    assert x.std().item() == pytest.approx(0.2, rel=0.05)  # D = 64: 29 wide levels


def test_sizes_it_cannot_halve_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        NCSN(DataSpec((1, 10, 8)))


def test_gives_no_density() -> None:
    assert not hasattr(tiny(), "log_prob") and not hasattr(tiny(), "density")
