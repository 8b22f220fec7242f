"""Dequantisation against autograd and closed forms, float64."""

import math

import pytest
import torch

from genus.data.spec import DataSpec
from genus.nn.dequantisation import Dequantise, Gaussianise, Logit


def fitted(levels: int) -> Gaussianise:
    """A histogram with half of the data at level 0, as Fashion-MNIST has."""
    module = Gaussianise(levels)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(levels, (4000,), generator=generator)
    module.fit(torch.where(torch.rand(4000, generator=generator) < 0.5, 0, drawn))
    return module


MAPS = {"logit": lambda: Logit(1e-6), "wide logit": lambda: Logit(0.05), "gaussianise": lambda: fitted(256)}


@pytest.mark.parametrize("name", MAPS)
def test_slope_is_autograds_and_inverse_inverts(name: str) -> None:
    module = MAPS[name]()
    v = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y, log_slope = module(v)
    (slope,) = torch.autograd.grad(y.sum(), v)
    assert torch.allclose(log_slope, slope.log(), atol=1e-9, rtol=0)
    assert torch.allclose(module.inverse(y), v, atol=1e-9, rtol=0)


def test_dequantise_log_det_is_that_of_autograds_jacobian() -> None:
    spec = DataSpec((1, 2, 3), levels=17)
    module = Dequantise(spec, fitted(17))
    x = spec.to_float(torch.randint(17, (1, 1, 2, 3), generator=torch.Generator().manual_seed(2))).double()
    _, log_det = module(x, generator=torch.Generator().manual_seed(3))
    # The same noise by hand; v is what the Jacobian is taken by, -log L a dimension turns cells into levels.
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    v = (spec.to_levels(x) + noise) / 17
    jacobian = torch.autograd.functional.jacobian(lambda v: module.onto_reals(v)[0].flatten(), v).view(6, 6)
    assert abs(jacobian.slogdet().logabsdet - 6 * math.log(17) - log_det.item()) < 1e-9


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(4)], ids=["middle", "noise"])
def test_every_level_comes_back(levels: int, generator: torch.Generator | None) -> None:
    spec = DataSpec((1, 1, levels), levels)
    x = spec.to_float(torch.arange(levels)).view(1, 1, 1, -1)
    for onto_reals in (Logit(), fitted(levels)):
        module = Dequantise(spec, onto_reals)
        y, _ = module(x, generator=generator)
        assert torch.equal(spec.to_levels(module.inverse(y)), spec.to_levels(x))


def test_uniform_model_takes_log2_levels_bits_a_dimension() -> None:
    """A density that is uniform on v, pushed through any map, is 1 / L a level: log2 L bits."""
    spec = DataSpec((1, 4, 4), levels=256)
    x = spec.to_float(torch.randint(256, (8, 1, 4, 4), generator=torch.Generator().manual_seed(5))).double()
    for onto_reals in (Logit(0.05), fitted(256)):
        module = Dequantise(spec, onto_reals)
        y, log_det = module(x, generator=torch.Generator().manual_seed(6))
        _, log_slope = onto_reals(onto_reals.inverse(y))  # the density of y is 1 / slope
        bits = -(log_det - log_slope.flatten(1).sum(1)) / (16 * math.log(2))
        assert torch.allclose(bits, torch.full_like(bits, 8.0), atol=1e-6)


def test_a_standard_normal_takes_the_histograms_entropy() -> None:
    """What Gaussianise promises: before any layer, bits/dim is the cross-entropy with the level histogram."""
    spec = DataSpec((1, 5, 5), levels=17)
    module = Dequantise(spec, fitted(17))
    levels = torch.randint(17, (3, 1, 5, 5), generator=torch.Generator().manual_seed(7))
    y, log_det = module(spec.to_float(levels).double(), generator=torch.Generator().manual_seed(8))
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(y).flatten(1).sum(1)
    expected = module.onto_reals.mass.log()[levels].flatten(1).sum(1)
    assert torch.allclose(normal + log_det, expected, atol=1e-9, rtol=0)


def test_unseen_levels_stay_possible() -> None:
    module = Gaussianise(256)
    module.fit(torch.zeros(100, dtype=torch.int64))
    assert module.mass.min() > 0
    assert abs(module.mass.sum() - 1) < 1e-12
    assert module.mass[0] == pytest.approx(101 / 356)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.full((1, 1, 2, 2), math.nan), "NaN"),
        (torch.full((1, 1, 2, 2), 255.0), "255"),
        (torch.zeros(1, 1, 2, 3), "shape"),
    ],
)
def test_wrong_input_is_named(x: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Dequantise(DataSpec((1, 2, 2)), Logit()).check(x)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
def test_alpha_outside_its_range_is_named(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        Logit(alpha)
