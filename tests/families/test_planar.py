"""Planar flow: log-determinants against autograd at random weights, inverses solved exactly, a density of mass 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from genus.config import Train
from genus.contract import Batch
from genus.data.sources import two_d
from genus.data.spec import DataSpec
from genus.families.flows.planar import SPEED, PlanarFlow
from genus.nn import planar
from genus.training import train

CONTINUOUS, STORED = DataSpec((2, 1, 1), levels=0), DataSpec((2, 1, 1), levels=48)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_raw(layers: int, dims: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(layers, planar.numbers(dims), generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_log_det_and_inverse(dims: int) -> None:
    changes = []
    for k, raw in enumerate(random_raw(20, dims)):
        z = torch.randn(1, dims, generator=seeded(k), dtype=torch.float64)
        y, log_det = planar.forward(z, raw)
        jacobian = torch.autograd.functional.jacobian(lambda z, raw=raw: planar.forward(z, raw)[0], z)
        by_autograd = jacobian.reshape(dims, dims).slogdet()
        assert by_autograd.sign == 1 and abs(by_autograd.logabsdet - log_det).item() <= 1e-9
        assert (planar.inverse(y, raw) - z).abs().max() <= 1e-9
        changes.append(abs(log_det.item()))
    assert max(changes) > 0.5, "the test says nothing of layers that change no volume"


def test_one_layer_for_each_example_is_that_layer() -> None:
    raw, z = random_raw(6, 3), torch.randn(6, 3, generator=seeded(1), dtype=torch.float64)
    y, log_det = planar.forward(z, raw)
    for k in range(6):
        alone = planar.forward(z[k : k + 1], raw[k])
        assert torch.allclose(y[k], alone[0][0], rtol=0, atol=1e-12)
        assert torch.allclose(log_det[k], alone[1][0], rtol=0, atol=1e-12)
    assert (planar.inverse(y, raw) - z).abs().max() <= 1e-9


def test_the_paper_s_constraint_holds_and_u_of_zero_is_the_identity() -> None:
    """w·û > -1 for any u, with the paper's m but for the shift; û differs from u along w alone."""
    raw = random_raw(50, 4)
    u, w, _, slope = planar._constrained(raw)
    along = (u * w).sum(-1)
    assert (along > -1).all() and torch.allclose(1 + along, slope, rtol=0, atol=1e-9)
    shifted = (raw[:, :4] * raw[:, 4:8]).sum(-1) + math.log(math.e - 1)
    assert torch.allclose(along, -1 + shifted.exp().log1p(), rtol=0, atol=1e-9)
    moved = u - raw[:, :4]
    assert torch.allclose(moved, (moved * w).sum(-1, keepdim=True) / w.square().sum(-1, keepdim=True) * w, atol=1e-9)
    raw[:, :4] = 0
    z = torch.randn(50, 4, generator=seeded(2), dtype=torch.float64)
    y, log_det = planar.forward(z, raw)
    assert (y - z).abs().max() <= 1e-12 and log_det.abs().max() <= 1e-12


@torch.no_grad()
def test_density_integrates_to_one_at_random_weights() -> None:
    """Over [-12, 12]² by the midpoint rule, whose error is far below the 1e-3 that is asked."""
    torch.manual_seed(0)
    model = PlanarFlow(CONTINUOUS, layers=6).double()
    model.slow.copy_(0.05 * random_raw(6, 2))
    side = (torch.arange(600, dtype=torch.float64) + 0.5) / 25 - 12
    x = torch.cartesian_prod(side, side)[:, :, None, None]
    assert model.log_prob(Batch(x), generator=seeded()).exp().sum().item() / 25**2 == pytest.approx(1, abs=1e-3)


def test_learns_by_maximum_likelihood_and_inverts() -> None:
    """A hundred steps on two moons: nearly half of what is to be learned. Float32 codes come back within 1e-5."""
    points = two_d.draw("two_moons", 20_000, 48, 0)
    torch.manual_seed(0)
    config = Train(steps=100, batch_size=256, learning_rate=4e-3, clip=5.0)
    labels = np.zeros(len(points), np.int64)
    model = train(
        PlanarFlow(STORED, layers=8), points, labels, config, steps=100, seed=0, device=torch.device("cpu")
    ).model
    assert isinstance(model, PlanarFlow)
    truth = two_d.truth("two_moons", 48)
    entropy = -(truth[truth > 0] * np.log(truth[truth > 0])).sum()
    with torch.inference_mode():
        x = STORED.to_float(torch.from_numpy(two_d.draw("two_moons", 4000, 48, 1)))
        nats = -model.log_prob(Batch(x), generator=seeded()).mean().item()
        y = model.standardise(x, generator=None)[0]
        again = y
        for raw in SPEED * model.slow:
            again = planar.forward(again, raw)[0]
        for raw in reversed(SPEED * model.slow):
            again = planar.inverse(again, raw)
        assert torch.equal(STORED.to_levels(model.decode(model.encode(x))), STORED.to_levels(x))
    assert nats - entropy < 0.6 * (2 * math.log(48) - entropy)
    assert (again - y).abs().max() <= 1e-5


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(ValueError, match=r"a planar flow is for vectors, not for image data of shape \(1, 8, 8\)"):
        PlanarFlow(DataSpec((1, 8, 8), 17))
    model = PlanarFlow(CONTINUOUS, layers=3)
    with pytest.raises(ValueError, match="NaN"):
        model.log_prob(Batch(torch.full((1, 2, 1, 1), math.nan)), generator=seeded())
    with pytest.raises(ValueError, match="from -3 to 2; levels"):
        PlanarFlow(STORED).log_prob(Batch(torch.tensor([-3.0, 2.0]).view(1, 2, 1, 1)), generator=seeded())
    with torch.no_grad():
        model.slow[1, :4] = torch.tensor([-5.0, -5.0, 5.0, 5.0])  # softplus is 0 in floats
    for call in (
        lambda: model.log_prob(Batch(torch.zeros(1, 2, 1, 1)), generator=seeded()),
        lambda: model.decode(torch.zeros(1, 2)),
    ):
        with pytest.raises(ValueError, match="planar layer 2 is not invertible: w·û is -1 where it must be above -1"):
            call()
    with torch.no_grad():
        model.slow[0] = math.nan
    with pytest.raises(ValueError, match="planar layer 1 is not invertible"):
        model.sample(1, generator=seeded())
