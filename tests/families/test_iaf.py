"""IAF: MAF the other way round, log-determinants against autograd at random weights, a density of mass 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genus.config import Train
from genus.contract import Batch
from genus.data.sources import two_d
from genus.data.spec import DataSpec
from genus.families.flows import maf
from genus.families.flows.iaf import IAF, Affine
from genus.training import train

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor")  # a look at the range of x
CONTINUOUS, STORED = DataSpec((2, 1, 1), levels=0), DataSpec((2, 1, 1), levels=48)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(module: nn.Module, scale: float = 0.1) -> nn.Module:
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            parameter.add_(scale * torch.randn(parameter.shape, generator=seeded(k)))
    return module.double()


def log_det_by_autograd(function, x: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x).flatten(), x)
    return jacobian.reshape(x.numel(), x.numel()).slogdet().logabsdet


def test_layer_log_det_and_inverse() -> None:
    torch.manual_seed(0)
    layer = randomised(Affine(4, 16, 2.0), 0.3)
    z = torch.randn(1, 4, generator=seeded(1), dtype=torch.float64)
    y, log_det = layer(z)
    assert abs(log_det.item()) > 0.1, "the test says nothing of a layer that changes no volume"
    assert abs(log_det_by_autograd(lambda z: layer(z)[0], z) - log_det).item() <= 1e-9
    back, told = layer.inverse(y)
    assert (back - z).abs().max() <= 1e-9 and abs(told - log_det).item() <= 1e-9


class Mirrored(maf.Affine):
    """MAF's layer of the scale 1/s and the shift -m/s: it does with data what IAF's of s and m does with codes."""

    def _split(self, told: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = super()._split(told)
        return -shift * (-log_scale).exp(), -log_scale


def test_with_equal_weights_it_is_maf_the_other_way_round() -> None:
    """What is one pass for one is D passes for the other (Papamakarios et al. 2017, section 3.3)."""
    torch.manual_seed(0)
    ours, theirs = randomised(Affine(4, 16, 2.0), 0.3), Mirrored(4, 16, 2.0, 1.0).double()
    theirs.load_state_dict(ours.state_dict())
    z = torch.randn(10, 4, generator=seeded(1), dtype=torch.float64)
    for one, other in zip(ours(z), theirs(z), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
    assert torch.allclose(ours.inverse(z)[0], theirs.inverse(z), rtol=0, atol=1e-12)


def test_sampling_takes_one_pass_and_density_as_many_as_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("genus.nn.made.MADE._hidden", lambda self, x, middle: (calls.append(1), x)[1])
    model = IAF(DataSpec((7, 1, 1), levels=0), layers=3)
    with torch.no_grad():
        model.sample(2, generator=seeded())
        assert len(calls) == 3
        model.log_prob(Batch(torch.zeros(2, 7, 1, 1)), generator=seeded())
    assert len(calls) == 3 + 3 * 7


@torch.no_grad()
def test_density_integrates_to_one_at_random_weights() -> None:
    """Over [-12, 12]² by the midpoint rule."""
    torch.manual_seed(0)
    model = randomised(IAF(CONTINUOUS, layers=3, hidden=16), 0.1)
    side = (torch.arange(600, dtype=torch.float64) + 0.5) / 25 - 12
    x = torch.cartesian_prod(side, side)[:, :, None, None]
    assert model.log_prob(Batch(x), generator=seeded()).exp().sum().item() / 25**2 == pytest.approx(1, abs=1e-3)


def test_whole_flow_of_continuous_data() -> None:
    torch.manual_seed(0)
    model = randomised(IAF(DataSpec((5, 1, 1), levels=0), hidden=24), 0.1)
    x = torch.randn(1, 5, 1, 1, generator=seeded(3), dtype=torch.float64)
    code = model.encode(x)
    base = -0.5 * (code.square() + math.log(2 * math.pi)).sum()
    told = model.log_prob(Batch(x), generator=seeded())
    assert abs(base + log_det_by_autograd(model.encode, x) - told).item() <= 1e-9
    assert (model.decode(code) - x).abs().max() <= 1e-9


def test_learns_two_moons_and_inverts() -> None:
    """A hundred steps: most of what is to be learned. Float32 codes come back to their level, vectors within 1e-5."""
    points = two_d.draw("two_moons", 20_000, 48, 0)
    torch.manual_seed(0)
    config = Train(steps=100, batch_size=256, learning_rate=4e-3, clip=5.0)
    labels = np.zeros(len(points), np.int64)
    start = IAF(STORED, layers=6, hidden=32)
    model = train(start, points, labels, config, steps=100, seed=0, device=torch.device("cpu")).model
    assert isinstance(model, IAF)
    truth = two_d.truth("two_moons", 48)
    entropy = -(truth[truth > 0] * np.log(truth[truth > 0])).sum()
    with torch.inference_mode():
        x = STORED.to_float(torch.from_numpy(two_d.draw("two_moons", 2000, 48, 1)))
        nats = -model.log_prob(Batch(x), generator=seeded()).mean().item()
        assert torch.equal(STORED.to_levels(model.decode(model.encode(x))), STORED.to_levels(x))
        y = model.standardise(x, generator=None)[0]
        z = model.flow(x, None)[0]
        for layer in model.layers:
            z = layer(z)[0].flip(1)
    assert nats - entropy < 0.3 * (2 * math.log(48) - entropy)
    assert (z - y).abs().max() <= 1e-5


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(ValueError, match=r"IAF is for vectors, not for image data of shape \(1, 8, 8\)"):
        IAF(DataSpec((1, 8, 8), 17))
    with pytest.raises(ValueError, match="NaN"):
        IAF(CONTINUOUS).log_prob(Batch(torch.full((1, 2, 1, 1), math.nan)), generator=seeded())
    with pytest.raises(ValueError, match="from -3 to 2; levels"):
        IAF(STORED).log_prob(Batch(torch.tensor([-3.0, 2.0]).view(1, 2, 1, 1)), generator=seeded())
