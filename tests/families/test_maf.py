"""MAF: log-determinants against autograd at random weights, exact inverses, densities of mass 1, order by gradient."""

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
from genus.families.flows.maf import MAF, Affine, Mixture
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


@pytest.mark.parametrize("pitch", [0.0, 1.0])
def test_layer_log_det_and_inverse(pitch: float) -> None:
    torch.manual_seed(0)
    layer = randomised(Affine(4, 16, 2.0, pitch), 0.3)
    x = torch.randn(1, 4, generator=seeded(1), dtype=torch.float64)
    u, log_det = layer(x)
    assert abs(log_det.item()) > 0.1, "the test says nothing of a layer that changes no volume"
    assert abs(log_det_by_autograd(lambda x: layer(x)[0], x) - log_det).item() <= 1e-9
    assert (layer.inverse(u) - x).abs().max() <= 1e-9
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0][0], x[0])
    assert (jacobian.triu(1) == 0).all(), "number i is a function of the numbers up to i"


def test_mixture_as_a_layer_has_the_mixture_s_density() -> None:
    """log N(z) + log |det dz/du| is log_prob, as far out as 8 deviations; z comes back, and so does u."""
    torch.manual_seed(0)
    mixture = randomised(Mixture(3, 16, 5, 0.0))
    for k in range(8):
        u = (1 + k % 4) * torch.randn(1, 3, generator=seeded(k), dtype=torch.float64)
        z = mixture(u)
        expected = -0.5 * (z.square() + math.log(2 * math.pi)).sum() + log_det_by_autograd(mixture, u)
        assert abs(expected - mixture.log_prob(u)).item() <= 1e-9
        assert (mixture.inverse(z) - u).abs().max() <= 1e-9
    z = torch.tensor([[-8.0, 0.0, 8.0]], dtype=torch.float64)
    assert (mixture(mixture.inverse(z)) - z).abs().max() <= 1e-9


def test_mixture_s_conditionals_integrate_to_one() -> None:
    torch.manual_seed(0)
    mixture = randomised(Mixture(1, 4, 5, 0.0))
    u = ((torch.arange(40_000, dtype=torch.float64) + 0.5) / 1000 - 20)[:, None]
    assert mixture.log_prob(u).exp().sum().item() / 1000 == pytest.approx(1, abs=1e-6)


@torch.no_grad()
def test_density_integrates_to_one_at_random_weights() -> None:
    """Over [-12, 12]² by the midpoint rule."""
    torch.manual_seed(0)
    model = randomised(MAF(CONTINUOUS, hidden=16, components=3), 0.05)
    side = (torch.arange(600, dtype=torch.float64) + 0.5) / 25 - 12
    x = torch.cartesian_prod(side, side)[:, :, None, None]
    assert model.log_prob(Batch(x), generator=seeded()).exp().sum().item() / 25**2 == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", [(5, 1, 1), (1, 3, 4), (2, 2, 2)])
def test_whole_flow_of_continuous_data(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = randomised(MAF(DataSpec(shape, levels=0), hidden=24, components=4), 0.1)
    x = torch.randn(1, *shape, generator=seeded(3), dtype=torch.float64)
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
    start = MAF(STORED, hidden=32, components=8)
    model = train(start, points, labels, config, steps=100, seed=0, device=torch.device("cpu")).model
    assert isinstance(model, MAF)
    truth = two_d.truth("two_moons", 48)
    entropy = -(truth[truth > 0] * np.log(truth[truth > 0])).sum()
    with torch.inference_mode():
        x = STORED.to_float(torch.from_numpy(two_d.draw("two_moons", 2000, 48, 1)))
        nats = -model.log_prob(Batch(x), generator=seeded()).mean().item()
        assert torch.equal(STORED.to_levels(model.decode(model.encode(x))), STORED.to_levels(x))
        u = model.flow(x, None)[0]
        again = model.mixture.inverse(model.mixture(u))
        errors = [(again - u).abs().max()]
        y = model.standardise(x, generator=None)[0]
        for layer in reversed(model.layers):
            u = layer.inverse(u.flip(1))
        errors.append((u - y).abs().max())
    assert nats - entropy < 0.15 * (2 * math.log(48) - entropy)
    assert max(errors) <= 1e-5


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(ValueError, match="MAF is for images and vectors, not for text"):
        MAF(DataSpec((5,), levels=0, alphabet="ab"))
    with pytest.raises(ValueError, match="layers must be at least 0 and components 1, not 2 and 0"):
        MAF(CONTINUOUS, components=0)
    with pytest.raises(ValueError, match="NaN"):
        MAF(CONTINUOUS).log_prob(Batch(torch.full((1, 2, 1, 1), math.nan)), generator=seeded())
    with pytest.raises(ValueError, match="from -3 to 2; levels"):
        MAF(STORED).log_prob(Batch(torch.tensor([-3.0, 2.0]).view(1, 2, 1, 1)), generator=seeded())
