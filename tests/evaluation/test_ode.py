"""The probability-flow likelihood against densities in closed form: their denoisers are known, so is the answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from genus.contract import Family
from genus.data.spec import DataSpec
from genus.evaluation.ode import level_table, log_prob

CONTINUOUS = DataSpec((2, 1, 1), levels=0)
# Their mean is 0: the prior at sigma_max = 300 leaves the data's mean out.
CENTRES = torch.tensor([[0.9, 0.1], [-0.5, 0.6], [-0.4, -0.7]], dtype=torch.float64)
ONE = torch.zeros(1, 2, dtype=torch.float64)


class Mixture(Family):
    """Equal round Gaussians: E[clean | x] and the density at every noise level, in closed form."""

    def __init__(self, centres: Tensor, deviation: float, spec: DataSpec = CONTINUOUS, lowest: float = 0.02):
        super().__init__(spec)
        self.centres, self.deviation = centres, deviation
        self.sigmas = [300.0, 1.0, lowest]
        self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls = 0

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        total = self.deviation**2 + sigma[:, None] ** 2  # [B, 1]
        away = x.flatten(1)[:, None] - self.centres  # [B, K, 2]
        share = torch.softmax(-0.5 * away.square().sum(2) / total, 1)
        clean = self.centres + away * (self.deviation**2 / total)[:, None]
        return self.weight * (share[:, :, None] * clean).sum(1).view(x.shape)

    def density(self, x: Tensor, sigma: float) -> Tensor:
        """Log-density [B] of data with noise ``sigma``."""
        total = self.deviation**2 + sigma**2
        away = (x.flatten(1)[:, None] - self.centres).square().sum(2)
        return torch.logsumexp(-0.5 * away / total, 1) - math.log(2 * math.pi * total * len(self.centres))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(n: int) -> Tensor:
    return torch.randn(n, 2, 1, 1, generator=seeded(5), dtype=torch.float64) * 0.8


@pytest.mark.parametrize(("centres", "deviation"), [(ONE, 0.6), (CENTRES, 0.15)], ids=["gaussian", "mixture"])
def test_equals_the_closed_form(centres: Tensor, deviation: float) -> None:
    model, x = Mixture(centres, deviation), points(40)
    found = log_prob(model, x, generator=seeded(), trace="exact", rtol=1e-6, atol=1e-6)
    assert (found.nats - model.density(x, 0.02)).abs().max() < 1e-3
    assert (found.spread == 0).all() and found.kind == "ode"
    assert (found.start, found.end, found.probes) == (0.02, 300.0, 2)


def test_default_tolerance_is_off_by_little() -> None:
    model, x = Mixture(CENTRES, 0.15), points(200)
    found = log_prob(model, x, generator=seeded(), trace="exact")
    assert (found.nats - model.density(x, 0.02)).abs().mean() < 0.05  # of thin peaks, seen from afar
    assert found.nfe < 100


def test_starts_where_it_is_told() -> None:
    model, x = Mixture(CENTRES, 0.15), points(5)
    found = log_prob(model, x, generator=seeded(), trace="exact", rtol=1e-6, atol=1e-6, start=0.3)
    assert (found.nats - model.density(x, 0.3)).abs().max() < 1e-3 and found.start == 0.3


def test_hutchinson_is_unbiased_within_its_stated_error() -> None:
    """Sixty-four probes: the error over the stated standard error has mean 0 and size 1, over 60 points."""
    model, x = Mixture(CENTRES, 0.15), points(60)
    exact = log_prob(model, x, generator=seeded(), trace="exact", rtol=1e-5, atol=1e-5)
    found = log_prob(model, x, generator=seeded(1), trace="hutchinson", probes=64, rtol=1e-5, atol=1e-5)
    far = ((found.nats - exact.nats) / found.spread.clamp(min=1e-4)).numpy()
    assert found.spread.max() > 0.02, "a Jacobian that is diagonal everywhere would say nothing"
    assert np.abs(far).max() < 4.5 and abs(far.mean()) < 4 / math.sqrt(60) and 0.7 < far.std() < 1.4
    one = log_prob(model, x, generator=seeded(1), probes=1)
    assert one.spread.isnan().all() and one.probes == 1


def test_density_integrates_to_one() -> None:
    model = Mixture(CENTRES, 0.15)
    side = torch.linspace(-1.98, 1.98, 100, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)[:, :, None, None]
    found = log_prob(model, grid, generator=seeded(), trace="exact")
    assert found.nats.exp().sum().item() * 0.04**2 == pytest.approx(1, abs=1e-2)


def test_stored_levels_are_cells() -> None:
    """The mean over noise of exp(nats) is the density's mass in the cell, the mean of nats is below its log."""
    spec = DataSpec((2, 1, 1), levels=16)
    model, cell = Mixture(CENTRES * 0.6, 0.2, spec), 2 / 15
    stored = torch.cartesian_prod(torch.arange(16), torch.arange(16))[:, :, None, None]
    x = spec.to_float(stored).double()
    drawn = torch.stack([log_prob(model, x, generator=seeded(k), trace="exact").nats for k in range(8)])
    fine = (torch.arange(9, dtype=torch.float64) - 4) / 9 * cell
    inside = torch.cartesian_prod(fine, fine)[None, :, :, None, None] + x[:, None]
    mass = model.density(inside.flatten(0, 1), 0.02).exp().view(256, 81).mean(1) * cell**2
    found = drawn.exp().mean(0)
    assert found.sum().item() == pytest.approx(1, abs=0.01)
    assert (found - mass).abs().sum().item() < 0.1
    assert (mass * (mass.log() - drawn.mean(0))).sum().item() > 0, "the bound is below the log-probability"


def test_a_level_table_makes_another_bound_of_the_levels() -> None:
    """P(x) = ∫ p(z) P(x | D(z)) dz sums to 1 over the levels, and draws of exp(nats) are unbiased for it."""
    spec = DataSpec((2, 1, 1), levels=16)
    model = Mixture(CENTRES * 0.6, 0.2, spec, lowest=0.12)  # about a cell, or the draws would miss its edges
    x = spec.to_float(torch.cartesian_prod(torch.arange(16), torch.arange(16))[:, :, None, None]).double()
    table = level_table(model, x.repeat(20, 1, 1, 1), generator=seeded(1))
    assert table.shape == (16, 16) and (table.exp().sum(1) - 1).abs().max() < 1e-12
    drawn = torch.stack([log_prob(model, x, generator=seeded(k), trace="exact", table=table).nats for k in range(20)])
    assert drawn.exp().mean(0).sum().item() == pytest.approx(1, abs=0.03)


def test_what_it_costs_and_leaves() -> None:
    model, x = Mixture(CENTRES, 0.15), points(3)
    with torch.no_grad():
        found = log_prob(model, x, generator=seeded(3))
    assert found.nfe == model.calls
    assert model.weight.requires_grad and model.weight.grad is None
    assert found.nats.shape == (3,) and found.nats.dtype == torch.float64
    again = log_prob(model, x, generator=seeded(3))
    assert torch.equal(found.nats, again.nats)


def test_wrong_arguments_say_what_would_be_right() -> None:
    model, x = Mixture(CENTRES, 0.15), points(3)
    with pytest.raises(ValueError, match=r"right would be \[B, 2, 1, 1\]"):
        log_prob(model, x[:, :1], generator=seeded())
    with pytest.raises(ValueError, match="exact or hutchinson"):
        log_prob(model, x, generator=seeded(), trace="exakt")
    with pytest.raises(ValueError, match="probes must be at least 1"):
        log_prob(model, x, generator=seeded(), probes=0)
    with pytest.raises(ValueError, match="below the highest noise level"):
        log_prob(model, x, generator=seeded(), start=400.0)
    with pytest.raises(TypeError, match="does not denoise"):
        log_prob(Family(CONTINUOUS), x, generator=seeded())
    with pytest.raises(FloatingPointError, match="a slope that is not finite"):
        broken = Mixture(CENTRES, 0.15)
        broken.weight.data.fill_(math.nan)
        log_prob(broken, x, generator=seeded())
