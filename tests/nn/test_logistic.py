"""The discretised mixture of logistics: it sums to 1, its tails keep their precision, its sampler draws from it."""

import math

import pytest
import torch

from genus.data.spec import DataSpec
from genus.nn import logistic


def _parameters(batch: int, mixtures: int, seed: int = 0, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3 * mixtures, generator=generator, **kwargs) * 2


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_the_levels_probabilities_sum_to_one(levels):
    spec = DataSpec((1, 1, 1), levels)
    parameters = _parameters(50, 5, dtype=torch.float64)
    x = spec.to_float(torch.arange(levels)).double()
    total = logistic.log_prob(parameters.unsqueeze(-1).expand(-1, -1, levels), x.expand(50, -1), levels).exp().sum(1)
    # Levels come from float32: neighbouring intervals meet to about 1e-7, times a density of up to e^7.
    assert (total - 1).abs().max() < 1e-5


def test_a_level_has_the_mass_of_its_interval():
    weight, mean, scale = 0.3, 0.2, 0.05
    parameters = torch.tensor(
        [[math.log(weight), math.log(1 - weight), mean, -0.4, math.log(scale), math.log(0.2)]], dtype=torch.float64
    )

    def cdf(x: float) -> float:
        return weight / (1 + math.exp(-(x - mean) / scale)) + (1 - weight) / (1 + math.exp(-(x + 0.4) / 0.2))

    half = 1 / 16
    for level in range(17):
        x = level / 8 - 1
        upper = 1.0 if level == 16 else cdf(x + half)
        lower = 0.0 if level == 0 else cdf(x - half)
        found = logistic.log_prob(parameters, torch.tensor([x], dtype=torch.float64), 17).item()
        assert found == pytest.approx(math.log(upper - lower), abs=1e-10)


def test_far_tails_keep_their_logarithm_in_float32():
    """A level 30 scales from the mean has mass e^-30, below what a difference of float32 cdfs can hold."""
    scale = 2 / 255
    parameters = torch.tensor([[0.0, 0.0, math.log(scale)]])
    x = torch.tensor([round(127.5 + 30) * 2 / 255 - 1])
    upper, lower = (x.double() + 1 / 255) / scale, (x.double() - 1 / 255) / scale
    exact = torch.log(torch.sigmoid(-lower) - torch.sigmoid(-upper))
    assert torch.allclose(logistic.log_prob(parameters, x, 256).double(), exact, atol=1e-4)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_the_gradient_is_the_derivative(value):
    parameters = _parameters(4, 3, seed=1, dtype=torch.float64).requires_grad_()
    x = DataSpec((1,), 17).to_float(DataSpec((1,), 17).to_levels(torch.full((4,), value))).double()
    assert torch.autograd.gradcheck(lambda p: logistic.log_prob(p, x, 17), parameters)


def test_extreme_parameters_stay_finite():
    parameters = torch.tensor([[0.0, 50.0, -50.0]], requires_grad=True)
    for value in (-1.0, 0.5, 1.0):
        found = logistic.log_prob(parameters, torch.tensor([value]), 256)
        (gradient,) = torch.autograd.grad(found.sum(), parameters)
        assert found.isfinite().all() and gradient.isfinite().all()


def test_samples_follow_log_prob():
    """Frequencies of 200,000 draws lie within 5 standard errors of the probabilities."""
    n, levels = 200_000, 17
    spec = DataSpec((1,), levels)
    parameters = _parameters(1, 3, seed=2)
    x = logistic.sample(parameters.expand(n, -1), levels, generator=torch.Generator().manual_seed(3))
    frequency = torch.bincount(spec.to_levels(x), minlength=levels) / n
    every = spec.to_float(torch.arange(levels))
    p = logistic.log_prob(parameters.unsqueeze(-1).expand(1, -1, levels), every.unsqueeze(0), levels)[0].exp()
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-6).all()
    assert torch.equal(spec.to_float(spec.to_levels(x)), logistic.nearest_level(x, levels))


def test_temperature_zero_is_the_likeliest_components_mean():
    parameters = torch.tensor([[0.0, 2.0, -0.5, 0.3, -1.0, -1.0]])
    x = logistic.sample(parameters, 256, generator=torch.Generator().manual_seed(0), temperature=0.0)
    assert x.item() == pytest.approx(0.3, abs=1 / 255)


@pytest.mark.parametrize("level", [0, 100, 255])
def test_a_component_however_wide_has_gradients(level: int) -> None:
    """Of pixels that are always black a component's scale grows without end; in float32, as models are trained."""
    parameters = torch.zeros(1, 6, 1)
    parameters[:, 4] = 200.0
    parameters.requires_grad_()
    nats = logistic.log_prob(parameters, torch.full((1, 1), 2 * level / 255 - 1), 256)
    nats.sum().backward()
    assert nats.isfinite().all() and parameters.grad.isfinite().all()
