"""EDM: its scaling, its noise levels, its loss and its sampler, against data whose posterior mean is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genus.contract import Batch, Conditional, Denoises, Walks, build
from genus.data.spec import DataSpec
from genus.evaluation.constraints import evaluations
from genus.evaluation.ode import log_prob
from genus.families.score.edm import EDM

SPEC = DataSpec((1, 8, 8), 17, ("a", "b", "c"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(**params: Any) -> EDM:
    torch.manual_seed(0)
    model = build("score/edm", SPEC, {"width": 8, "hidden": 16, **params})
    assert isinstance(model, EDM)
    return model.eval()


class Exact(EDM):
    """The network replaced by the posterior mean of N(0, sigma_data²) data, times ``factor``."""

    factor = 1.0

    def denoise(self, x: Tensor, sigma: Tensor, told: Tensor | None = None) -> Tensor:
        s = sigma[:, None, None, None]
        return self.factor * x * self.sigma_data**2 / (self.sigma_data**2 + s**2)


def test_levels_and_evaluations_are_the_papers() -> None:
    model = EDM(DataSpec((1, 28, 28)), width=8, sigma_max=80.0, sigma_min=0.002)
    assert len(model.sigmas) == 18 and model.sigmas[0] == pytest.approx(80) and model.sigmas[-1] == pytest.approx(0.002)
    assert model.sigmas[1] == pytest.approx(57.586, abs=1e-3)  # (80^(1/7) + (0.002^(1/7) - 80^(1/7)) / 17)^7
    assert evaluations(tiny(), seed=0, knobs={}) == 35
    assert evaluations(tiny(), seed=0, knobs={"steps": 5, "churn": 3.0}) == 9


def test_noise_is_log_normal_and_uniform_for_vectors() -> None:
    sigma = tiny().noise_levels(40_000, seeded(1)).log()
    assert sigma.mean().item() == pytest.approx(-1.2, abs=0.03) and sigma.std().item() == pytest.approx(1.2, abs=0.03)
    assert sigma.min() >= math.log(0.0199) and sigma.max() <= math.log(1.5 * 8) + 1e-6
    vector = EDM(DataSpec((2, 1, 1), 101))
    sigma = vector.noise_levels(1000, seeded(1)).log()
    low, high = math.log(0.02 / 4), math.log(1.5 * math.sqrt(2))  # a quarter of a cell is below the 0.02 of images
    assert sigma.min() >= low and sigma.max() <= high
    assert sigma.mean().item() == pytest.approx((low + high) / 2, abs=0.01)


def test_a_network_that_says_nothing_starts_at_one_and_is_right_for_a_gaussian() -> None:
    """The last layer starts at zero: D is then the posterior mean of N(0, sigma_data²) data, whose loss is 1."""
    model = tiny()
    torch.nn.init.zeros_(model.network.leave.bias)  # type: ignore[union-attr, arg-type]
    x, sigma = torch.randn(3, 1, 8, 8, generator=seeded()), torch.tensor([0.01, 0.7, 12.0])
    expected = x * (0.49 / (0.49 + sigma**2))[:, None, None, None]
    torch.testing.assert_close(model.denoise(x, sigma), expected)
    x = 0.7 * torch.randn(2048, 1, 8, 8, generator=seeded(3))
    assert model.loss(Batch(x), generator=seeded(4))["loss"].item() == pytest.approx(1, abs=0.02)


def test_loss_is_least_for_the_posterior_mean() -> None:
    model = Exact(SPEC, width=8)
    x = 0.7 * torch.randn(2048, 1, 8, 8, generator=seeded(1))
    losses = {}
    for factor in (0.9, 1.0, 1.1):
        model.factor = factor
        losses[factor] = model.loss(Batch(x), generator=seeded(2))["loss"].item()
    assert losses[1.0] < min(losses[0.9], losses[1.1]) - 0.005


@pytest.mark.parametrize(("steps", "churn"), [(18, 0.0), (100, 20.0)])
def test_samples_have_the_variance_of_the_data(steps: int, churn: float) -> None:
    model = Exact(SPEC, width=8, sigma_data=0.2)  # narrow: nothing is clipped at ±1
    x = model.sample(500, generator=seeded(5), steps=steps, churn=churn)
    assert x.shape == (500, 1, 8, 8) and x.std().item() == pytest.approx(0.2, rel=0.03)


def test_its_flow_has_the_likelihood_of_a_gaussian() -> None:
    """Of continuous data: N(0, sigma_data² + sigma_min²), to the solver's error and the prior's v / sigma_max²."""
    spec = DataSpec((1, 4, 4), 0)
    model = Exact(spec, width=8, sigma_max=80.0).double()
    assert isinstance(model, Denoises) and isinstance(model, Walks)
    x = 0.7 * torch.randn(50, 1, 4, 4, generator=seeded(6), dtype=torch.float64)
    found = log_prob(model, x, generator=seeded(), trace="exact", rtol=1e-6, atol=1e-6)
    var = 0.7**2 + 0.02**2
    expected = -0.5 * (x.square().flatten(1).sum(1) / var + 16 * math.log(2 * math.pi * var))
    assert (found.nats - expected).abs().max() < 0.02


def test_a_trajectory_ends_in_the_samples() -> None:
    model = tiny()
    frames = model.trajectory(3, frames=7, generator=seeded(7))
    assert frames.shape == (7, 3, 1, 8, 8)
    assert torch.equal(frames[-1], model.sample(3, generator=seeded(7)))
    assert model.trajectory(2, frames=30, generator=seeded()).shape[0] == 30, "more frames than steps: some twice"


class Told(EDM):
    """Knows from the label where the data is: at -0.6, 0, 0.6, or without a label at their mean."""

    def denoise(self, x: Tensor, sigma: Tensor, told: Tensor | None = None) -> Tensor:
        where = torch.tensor([-0.6, 0.0, 0.6])
        mean = 0 if told is None else (told @ where)[:, None, None, None]
        return mean + 0 * x


def test_guidance_goes_beyond_the_label_from_what_is_likely_without() -> None:
    model = Told(SPEC, width=8, hidden=16, conditional=True)
    cond = torch.tensor([0, 1, 2])
    for guidance in (0.0, 1.0, 1.5):
        x = model.sample(3, generator=seeded(), cond=cond, guidance=guidance)
        expected = guidance * torch.tensor([-0.6, 0.0, 0.6])[:, None, None, None].expand_as(x)
        torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)
    drawn = model.sample(300, generator=seeded()).mean((1, 2, 3))
    assert [((drawn - where).abs() < 1e-4).float().mean().item() for where in (-0.6, 0.0, 0.6)] == pytest.approx(
        [1 / 3] * 3, abs=0.1
    ), "without labels they are drawn"


def test_labels_are_there_only_for_conditional_models() -> None:
    assert not isinstance(tiny(), Conditional)
    model = tiny(conditional=True)
    assert isinstance(model, Conditional) and model.labels == 3
    with pytest.raises(ValueError, match="trained without labels"):
        tiny().sample(2, generator=seeded(), cond=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="the data has no labels"):
        build("score/edm", DataSpec((1, 8, 8)), {"conditional": True})


def test_learns_what_the_label_says() -> None:
    """Three flat greys, one a label: what is drawn is nearest to the one that was asked for."""
    model = tiny(conditional=True).train()
    grey = torch.tensor([-0.8, 0.0, 0.8])
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = seeded(8)
    for _ in range(150):
        labels = torch.randint(3, (32,), generator=generator)
        x = grey[labels][:, None, None, None].expand(32, 1, 8, 8)
        loss = model.loss(Batch(x, labels), generator=generator)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    cond = torch.arange(3).repeat(4)
    with torch.inference_mode():
        drawn = model.eval().sample(12, generator=seeded(9), cond=cond, guidance=1.5).mean((1, 2, 3))
    assert torch.equal((drawn[:, None] - grey).abs().argmin(1), cond)


def test_sizes_it_cannot_halve_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        EDM(DataSpec((1, 10, 8)))
