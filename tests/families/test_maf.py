"""MAF: log-determinants against autograd at random weights, exact inverses, densities of mass 1, order by gradient."""

from __future__ import annotations

import math

import pytest
import torch

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.flows.maf import MAF, Affine, Mixture
from tests.families.flow_checks import (
    CONTINUOUS,
    STORED,
    assert_bijective,
    assert_plane_has_mass_one,
    assert_refuses_what_is_no_example,
    log_det_by_autograd,
    randomised,
    seeded,
    trained_on_moons,
)

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor")  # a look at the range of x


@pytest.mark.parametrize("pitch", [0.0, 1.0])
def test_layer_log_det_and_inverse(pitch: float) -> None:
    torch.manual_seed(0)
    layer = randomised(Affine(4, 16, 2.0, pitch))
    x = torch.randn(1, 4, generator=seeded(1), dtype=torch.float64)
    assert_bijective(layer, layer.inverse, x)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0][0], x[0])
    assert (jacobian.triu(1) == 0).all(), "number i is a function of the numbers up to i"


def test_mixture_as_a_layer_has_the_mixture_s_density() -> None:
    """log N(z) + log |det dz/du| is log_prob, as far out as 8 deviations; z comes back, and so does u."""
    torch.manual_seed(0)
    mixture = randomised(Mixture(3, 16, 5, 0.0), 0.1)
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
    mixture = randomised(Mixture(1, 4, 5, 0.0), 0.1)
    u = ((torch.arange(40_000, dtype=torch.float64) + 0.5) / 1000 - 20)[:, None]
    assert mixture.log_prob(u).exp().sum().item() / 1000 == pytest.approx(1, abs=1e-6)


def test_density_integrates_to_one_at_random_weights() -> None:
    torch.manual_seed(0)
    assert_plane_has_mass_one(randomised(MAF(CONTINUOUS, hidden=16, components=3), 0.05))


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
    """Most of what is to be learned. Float32 codes come back within 1e-5."""
    torch.manual_seed(0)
    model, x, left = trained_on_moons(MAF(STORED, hidden=32, components=8))
    assert left < 0.15
    with torch.inference_mode():
        y, log_det = model.standardise(x, generator=None)
        u, _ = model.normalise(y, log_det)
        code = model.mixture(u)
        assert (model.mixture.inverse(code) - u).abs().max() <= 1e-5
        assert (model.generate(code) - y).abs().max() <= 2e-5


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(ValueError, match="MAF is for images and vectors, not for text"):
        MAF(DataSpec((5,), levels=0, alphabet="ab"))
    with pytest.raises(ValueError, match="layers must be at least 0 and components 1, not 2 and 0"):
        MAF(CONTINUOUS, components=0)
    for spec in (CONTINUOUS, STORED):
        assert_refuses_what_is_no_example(MAF(spec))
