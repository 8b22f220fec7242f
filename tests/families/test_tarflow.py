"""TarFlow: log-determinants against autograd at random weights, exact inverses, a density that sums to 1."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.flows.tarflow import MAX_LOG_SCALE, TarFlow, bend, unbend
from tests.families.flow_checks import (
    assert_bijective,
    assert_refuses_what_is_no_example,
    assert_temperature_matters,
    randomised,
    seeded,
)


def tiny(spec: DataSpec, scale: float = 0.1, **params) -> TarFlow:
    """A tiny flow in float64 with random weights: where it starts, near the identity, wrong Jacobians would pass.

    An autoregressive inverse multiplies errors from value to value: the wilder the weights, the fewer the values.
    """
    small = {"mixtures": (3, 2), "layers": 1, "channels": 8, "heads": 2, "above": 1, "head": 16}
    torch.manual_seed(0)
    return randomised(TarFlow(spec, **(small | params)).eval(), scale)


def images(spec: DataSpec, n: int) -> Tensor:
    return spec.to_float(torch.randint(spec.levels, (n, *spec.shape), generator=seeded(1))).double()


@pytest.mark.parametrize("mixtures", [1, 4])
def test_the_map_of_a_value_has_its_slope_and_its_inverse(mixtures: int) -> None:
    """Also far out in the tails, where a distribution function is 0 or 1 to the last digit."""
    parameters = 2 * torch.randn(3, 3 * mixtures, 40, dtype=torch.float64, generator=seeded(2))
    x = torch.linspace(-60, 60, 40, dtype=torch.float64).expand(3, 40).clone().requires_grad_()
    z, log_slope = bend(parameters, x)
    (slope,) = torch.autograd.grad(z.sum(), x)
    assert (slope.log() - log_slope).abs().max() < 1e-9
    assert (unbend(parameters, z) - x).abs().max() < 1e-9


def test_one_component_is_the_papers_affine_map() -> None:
    parameters = torch.randn(2, 3, 5, dtype=torch.float64, generator=seeded(3))
    x = torch.randn(2, 5, dtype=torch.float64, generator=seeded(4))
    mean, log_scale = parameters[:, 1], MAX_LOG_SCALE * torch.tanh(parameters[:, 2] / MAX_LOG_SCALE)
    z, log_slope = bend(parameters, x)
    assert (z - (x - mean) * torch.exp(-log_scale)).abs().max() < 1e-12
    assert (log_slope + log_scale).abs().max() < 1e-12


def test_a_mixture_of_components_gives_standard_logistic_values() -> None:
    """A draw of the mixture becomes a standard logistic one: its distribution function does so by definition."""
    parameters = torch.randn(1, 9, 1, dtype=torch.float64, generator=seeded(5)).expand(1, 9, 20_000)
    logits, means, log_scales = (parameters[0, i : i + 3, 0] for i in (0, 3, 6))
    chosen = torch.multinomial(logits.softmax(0), 20_000, replacement=True, generator=seeded(6))
    uniform = torch.rand(20_000, dtype=torch.float64, generator=seeded(7))
    scales = torch.exp(MAX_LOG_SCALE * torch.tanh(log_scales / MAX_LOG_SCALE))
    z, _ = bend(parameters, (means[chosen] + scales[chosen] * uniform.logit())[None])
    levels = z[0].sigmoid().sort().values
    distance = (levels - torch.arange(20_000) / 20_000).abs().max().item()
    assert distance < 1.95 / 20_000**0.5  # Kolmogorov and Smirnov's, at 0.1%


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 4, 4), (5, 1, 1)], ids=str)
@pytest.mark.parametrize("levels", [17, 0])
@pytest.mark.parametrize("mixtures", [(1, 1, 1), (3, 1)], ids=str)
def test_whole_flow_log_det_and_inverse(shape: tuple[int, ...], levels: int, mixtures: tuple[int, ...]) -> None:
    model = tiny(DataSpec(shape, levels), mixtures=mixtures)
    y = torch.randn(1, *shape, dtype=torch.float64, generator=seeded(8))
    assert_bijective(model.flow, model.unflow, y)


@pytest.mark.parametrize("index", [0, 1])
def test_a_value_of_a_flow_depends_on_exactly_the_earlier_ones(index: int) -> None:
    """The Jacobian of the maps, by what is seen of each value, is strictly lower triangular, and full below that."""
    model = tiny(DataSpec((1, 6, 6), 17), above=2)
    see, flow = model._stack()[index]
    influence = torch.zeros(36, 36, dtype=torch.float64)
    for y in torch.randn(4, 1, 1, 6, 6, dtype=torch.float64, generator=seeded(9)):
        seen = see(F.pixel_unshuffle(y, 2)).requires_grad_()
        found = flow.network(seen)  # [D, 3K, P]
        mixed = (found * torch.linspace(0.5, 1.5, found.shape[1], dtype=found.dtype).view(1, -1, 1)).sum(1)
        for place, value in enumerate(mixed.T.flatten()):
            (gradient,) = torch.autograd.grad(value, seen, retain_graph=True)
            influence[place] += gradient[0].unflatten(0, (-1, 4)).abs().sum(0).permute(1, 2, 0).flatten()
    earlier = torch.ones_like(influence).tril(-1).bool()
    assert (influence[~earlier] == 0).all() and (influence[earlier] > 0).all()


def test_flows_take_turns_in_direction() -> None:
    """The second flow begins where the first one ends: in the last pixel."""
    model = tiny(DataSpec((1, 6, 6), 17))
    (first_sees, first), (second_sees, second) = model._stack()
    y = torch.randn(1, 1, 6, 6, dtype=torch.float64, generator=seeded(10))
    turned = first(y, first_sees)[0].flip(2, 3)
    assert torch.equal(model.flow(y)[0], second(turned, second_sees)[0].flip(2, 3))


def test_in_single_precision_the_inverse_is_exact_to_a_hundred_thousandth() -> None:
    spec = DataSpec((1, 8, 8))
    model = tiny(spec, 0.03).float()
    y = torch.randn(8, 1, 8, 8, generator=seeded(11))
    with torch.no_grad():
        assert (model.unflow(model.flow(y)[0]) - y).abs().max() <= 1e-5


def test_the_density_integrates_to_one_and_log_prob_bounds_its_share_of_each_image() -> None:
    """Two pixels of two levels: by quadrature over the plane, whose quadrants are the images, and by E_u[exp]."""
    spec = DataSpec((1, 1, 2), levels=2)
    model = tiny(spec, 0.05, block=1)
    side = (torch.arange(320, dtype=torch.float64) - 159.5) / 8  # the levels meet at 0, between two of these
    y = torch.cartesian_prod(side, side).view(-1, 1, 1, 2)
    x = spec.to_float(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])).double().view(4, 1, 1, 2)
    with torch.no_grad():
        z, log_det = model.flow(y)
        density = (log_det + (F.logsigmoid(z) + F.logsigmoid(-z)).flatten(1).sum(1)).exp() / 64
        drawn = model.log_prob(Batch(x.repeat(5_000, 1, 1, 1)), generator=seeded(12)).exp().view(-1, 4)
    assert abs(density.sum() - 1) < 1e-3
    shares = density.view(2, 160, 2, 160).sum((1, 3)).flatten()
    assert ((drawn.mean(0) - shares).abs() < 5 * drawn.std(0) / 5_000**0.5).all()


def test_codes_are_as_large_as_images_standard_normal_and_come_back() -> None:
    spec = DataSpec((3, 8, 8))
    model = tiny(spec, 0.03)
    x = images(spec, 4)
    with torch.no_grad():
        model.initialise(Batch(x), generator=seeded(13))
        code = model.encode(x)
        assert code.shape == (4, 192)
        assert torch.equal(spec.to_levels(model.decode(code)), spec.to_levels(x))


def test_the_base_is_a_standard_normal_code() -> None:
    """log_prob's standard logistic z and the code of ``decode`` are one distribution: equal densities, by autograd."""
    code = torch.linspace(-6, 6, 25, dtype=torch.float64).requires_grad_()
    z = torch.special.log_ndtr(code) - torch.special.log_ndtr(-code)
    (slope,) = torch.autograd.grad(z.sum(), code)
    logistic = F.logsigmoid(z) + F.logsigmoid(-z) + slope.log()
    assert (logistic - torch.distributions.Normal(0, 1).log_prob(code)).abs().max() < 1e-9


def test_temperature_zero_is_one_image_and_one_is_many() -> None:
    assert_temperature_matters(tiny(DataSpec((1, 8, 8), 17)))


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        (DataSpec((1, 7, 8)), {}, "7x8 image cannot be cut into 2x2 blocks"),
        (DataSpec((9,), 0, alphabet="ab"), {}, "TarFlow is for images and vectors, not for text"),
        (DataSpec((1, 8, 8)), {"mixtures": ()}, "one number from 1 up for each flow"),
        (DataSpec((1, 8, 8)), {"channels": 30, "heads": 4}, "30 is none of 4"),
    ],
)
def test_what_cannot_work_is_named(spec: DataSpec, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TarFlow(spec, **options)


def test_refuses_what_is_no_image() -> None:
    assert_refuses_what_is_no_example(tiny(DataSpec((1, 8, 8))))
