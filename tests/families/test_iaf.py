"""IAF: MAF the other way round, log-determinants against autograd at random weights, a density of mass 1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.flows import maf
from genus.families.flows.iaf import IAF, PITCH, Affine
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


def test_layer_log_det_and_inverse() -> None:
    torch.manual_seed(0)
    layer = randomised(Affine(4, 16, 2.0, PITCH))
    z = torch.randn(1, 4, generator=seeded(1), dtype=torch.float64)
    assert_bijective(layer, lambda y: layer.inverse(y)[0], z)
    y, log_det = layer(z)
    assert abs(layer.inverse(y)[1] - log_det).item() <= 1e-9


class Mirrored(maf.Affine):
    """MAF's layer of the scale 1/s and the shift -m/s: it does with data what IAF's of s and m does with codes."""

    def split(self, told: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = super().split(told)
        return -shift * (-log_scale).exp(), -log_scale


def test_with_equal_weights_it_is_maf_the_other_way_round() -> None:
    """What is one pass for one is D passes for the other (Papamakarios et al. 2017, section 3.3)."""
    torch.manual_seed(0)
    ours, theirs = randomised(Affine(4, 16, 2.0, PITCH)), Mirrored(4, 16, 2.0, 1.0).double()
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


def test_density_integrates_to_one_at_random_weights() -> None:
    torch.manual_seed(0)
    assert_plane_has_mass_one(randomised(IAF(CONTINUOUS, layers=3, hidden=16), 0.1))


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
    """Most of what is to be learned. Float32 codes come back within 1e-5."""
    torch.manual_seed(0)
    model, x, left = trained_on_moons(IAF(STORED, layers=6, hidden=32))
    assert left < 0.3
    with torch.inference_mode():
        y, log_det = model.standardise(x, generator=None)
        assert (model.generate(model.normalise(y, log_det)[0]) - y).abs().max() <= 1e-5


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(ValueError, match=r"IAF is for vectors, not for image data of shape \(1, 8, 8\)"):
        IAF(DataSpec((1, 8, 8), 17))
    for spec in (CONTINUOUS, STORED):
        assert_refuses_what_is_no_example(IAF(spec))
