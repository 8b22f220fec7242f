"""Planar and radial flows: log-determinants against autograd at random weights, exact inverses, a density of mass 1."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.flows._flow import BendingFlow
from genus.families.flows.planar import PlanarFlow
from genus.families.flows.radial import RadialFlow
from genus.nn import planar, radial
from tests.families.flow_checks import (
    CONTINUOUS,
    STORED,
    assert_bijective,
    assert_plane_has_mass_one,
    assert_refuses_what_is_no_example,
    seeded,
    trained_on_moons,
)

BENDS, FLOWS = (planar, radial), (PlanarFlow, RadialFlow)


def random_raw(bend: ModuleType, layers: int, dims: int) -> Tensor:
    return 2 * torch.randn(layers, bend.numbers(dims), generator=seeded(), dtype=torch.float64)


@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("dims", [1, 2, 5])
def test_log_det_and_inverse(bend: ModuleType, dims: int) -> None:
    changes = []
    for k, raw in enumerate(random_raw(bend, 20, dims)):
        z = torch.randn(1, dims, generator=seeded(k), dtype=torch.float64)
        assert_bijective(lambda z, raw=raw: bend.forward(z, raw), lambda y, raw=raw: bend.inverse(y, raw), z, least=-1)
        changes.append(abs(bend.forward(z, raw)[1].item()))
    assert max(changes) > 0.5, "the test says nothing of layers that change no volume"


@pytest.mark.parametrize("bend", BENDS)
def test_one_layer_for_each_example_is_that_layer(bend: ModuleType) -> None:
    raw, z = random_raw(bend, 6, 3), torch.randn(6, 3, generator=seeded(1), dtype=torch.float64)
    y, log_det = bend.forward(z, raw)
    for k in range(6):
        alone = bend.forward(z[k : k + 1], raw[k])
        assert torch.allclose(y[k], alone[0][0], rtol=0, atol=1e-12)
        assert torch.allclose(log_det[k], alone[1][0], rtol=0, atol=1e-12)
    assert (bend.inverse(y, raw) - z).abs().max() <= 1e-9


def test_planes_keep_the_paper_s_constraint_and_u_of_zero_is_the_identity() -> None:
    """w·û > -1 for any u, with the paper's m but for the shift; û differs from u along w alone."""
    raw = random_raw(planar, 50, 4)
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


def test_balls_are_the_paper_s_formula_within_its_constraint() -> None:
    """y = z + β h(α, r) (z - c) with β > -α (eq. 13, 14); a push of zero is the identity."""
    raw, z = random_raw(radial, 50, 4), torch.randn(50, 4, generator=seeded(2), dtype=torch.float64)
    centre, alpha = raw[:, :4], raw[:, 4].exp()
    beta = alpha * (torch.log1p((raw[:, 5] + math.log(math.e - 1)).exp()) - 1)
    assert (beta > -alpha).all() and (beta < 0).any() and (beta > 0).any()
    r = (z - centre).norm(dim=1)
    h, slope = 1 / (alpha + r), -1 / (alpha + r) ** 2
    y, log_det = radial.forward(z, raw)
    assert torch.allclose(y, z + (beta * h)[:, None] * (z - centre), rtol=0, atol=1e-9)
    expected = 3 * (1 + beta * h).log() + (1 + beta * h + beta * slope * r).log()
    assert torch.allclose(log_det, expected, rtol=0, atol=1e-9)
    raw[:, 5] = 0
    y, log_det = radial.forward(z, raw)
    assert (y - z).abs().max() <= 1e-12 and log_det.abs().max() <= 1e-12
    assert torch.equal(radial.inverse(centre, raw), centre), "the centre stays, and has no direction"


@pytest.mark.parametrize("kind", FLOWS)
def test_density_integrates_to_one_at_random_weights(kind: type[BendingFlow]) -> None:
    torch.manual_seed(0)
    model = kind(CONTINUOUS, layers=6).double()
    with torch.no_grad():
        model.slow.copy_(0.05 * random_raw(model.bend, 6, 2))
    assert_plane_has_mass_one(model)


@pytest.mark.parametrize("kind", FLOWS)
def test_learns_by_maximum_likelihood_and_inverts(kind: type[BendingFlow]) -> None:
    """Nearly half of what is to be learned. Float32 codes come back within 1e-5."""
    torch.manual_seed(0)
    model, x, left = trained_on_moons(kind(STORED, layers=8))
    assert left < 0.6
    with torch.inference_mode():
        y, log_det = model.standardise(x, generator=None)
        assert (model.generate(model.normalise(y, log_det)[0]) - y).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("kind", "place", "value", "says"),
    [
        (PlanarFlow, slice(4), [-5.0, -5.0, 5.0, 5.0], "w·û is -1 where it must be above -1"),
        (RadialFlow, 3, -20.0, "α is .*, β/α -1 where"),
    ],
)
def test_what_cannot_work_is_named(kind: type[BendingFlow], place: slice | int, value: object, says: str) -> None:
    with pytest.raises(ValueError, match=r"Flow is for vectors, not for image data of shape \(1, 8, 8\)"):
        kind(DataSpec((1, 8, 8), 17))
    assert_refuses_what_is_no_example(kind(STORED))
    model = kind(CONTINUOUS, layers=3)
    assert_refuses_what_is_no_example(model)
    with torch.no_grad():
        model.slow[1, place] = torch.tensor(value)  # softplus is 0 in floats
    for call in (
        lambda: model.log_prob(Batch(torch.zeros(1, 2, 1, 1)), generator=seeded()),
        lambda: model.decode(torch.zeros(1, 2)),
    ):
        with pytest.raises(ValueError, match=f"layer 2 is not invertible: {says}"):
            call()
    with torch.no_grad():
        model.slow[0] = math.nan
    with pytest.raises(ValueError, match="layer 1 is not invertible"):
        model.sample(1, generator=seeded())
