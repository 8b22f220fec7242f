"""Spline flow: splines against other implementations, log-determinants against autograd, sums to 1, known densities."""

import math

import pytest
import torch
from torch import Tensor

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.evaluation import two_d
from genus.families.flows._coupling import Base, Conditional, Convolutions, Layer, Mixing
from genus.families.flows.spline import LEAST, Bend, Spline, rational_quadratic
from tests.families.flow_checks import (
    CONTINUOUS,
    assert_bijective,
    assert_bijective_flow,
    assert_images_have_mass_one,
    assert_inverts_after_training,
    assert_plane_has_mass_one,
    assert_refuses_what_is_no_example,
    randomised,
    seeded,
)

TAIL = 3.0


# --- the splines


def drawn(bins: int, n: int = 2000, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Numbers inside and beyond the interval, and raw splines far from the identity."""
    x = 2 * torch.randn(n, dtype=torch.float64, generator=seeded(0))
    return x, spread * torch.randn(3 * bins - 1, n, dtype=torch.float64, generator=seeded(bins))


def by_hand(x: float, raw: list[float], tail: float) -> tuple[float, float]:
    """y and dy/dx by equations 4 and 5 of the paper, one number at a time, from knots and slopes laid out."""
    if abs(x) > tail:
        return x, 1.0
    bins = (len(raw) + 1) // 3

    def knots(part: list[float]) -> list[float]:
        total = sum(math.exp(value) for value in part)
        shares = [LEAST + (1 - bins * LEAST) * math.exp(value) / total for value in part]
        return [-tail + 2 * tail * sum(shares[:k]) for k in range(bins + 1)]

    across, up = knots(raw[:bins]), knots(raw[bins : 2 * bins])
    slopes = [1.0, *(LEAST + math.log1p(math.exp(value)) for value in raw[2 * bins :]), 1.0]
    k = max(k for k in range(bins) if across[k] <= x)
    s = (up[k + 1] - up[k]) / (across[k + 1] - across[k])
    xi = (x - across[k]) / (across[k + 1] - across[k])
    below = s + (slopes[k + 1] + slopes[k] - 2 * s) * xi * (1 - xi)
    y = up[k] + (up[k + 1] - up[k]) * (s * xi**2 + slopes[k] * xi * (1 - xi)) / below
    return y, s**2 * (slopes[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + slopes[k] * (1 - xi) ** 2) / below**2


@pytest.mark.parametrize("bins", [2, 3, 8, 32])
def test_spline_is_the_papers(bins: int) -> None:
    x, raw = drawn(bins, 300)
    y, log_slope = rational_quadratic(x, raw, TAIL)
    for each in range(len(x)):
        expected, slope = by_hand(float(x[each]), raw[:, each].tolist(), TAIL)
        assert abs(float(y[each]) - expected) <= 1e-10
        assert abs(float(log_slope[each]) - math.log(slope)) <= 1e-10


@pytest.mark.parametrize("library", ["nflows.transforms.splines.rational_quadratic", "normflows.utils.splines"])
@pytest.mark.parametrize("inverse", [False, True])
def test_spline_is_that_of_others(library: str, inverse: bool) -> None:
    theirs = pytest.importorskip(library).unconstrained_rational_quadratic_spline
    for bins in (2, 8, 32):
        x, raw = drawn(bins, spread=1.0)  # with 2 their inverse's slopes lose more digits than are compared here
        parts = raw.t().split([bins, bins, bins - 1], -1)
        expected = theirs(x, *parts, inverse=inverse, tails="linear", tail_bound=TAIL)
        for found, wanted in zip(rational_quadratic(x, raw, TAIL, inverse=inverse), expected, strict=True):
            assert (found - wanted).abs().max() <= 1e-10


@pytest.mark.parametrize("bins", [2, 8, 32])
def test_spline_inverts_and_knows_its_slope(bins: int) -> None:
    x, raw = drawn(bins)
    x.requires_grad_()
    y, log_slope = rational_quadratic(x, raw, TAIL)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (slope.log() - log_slope).abs().max() <= 1e-9
    back, back_log_slope = rational_quadratic(y, raw, TAIL, inverse=True)
    assert (back - x).abs().max() <= 1e-9
    assert (back_log_slope + log_slope).abs().max() <= 1e-8


def test_gradients_of_a_spline_are_right() -> None:
    x, raw = drawn(4, 12)
    assert torch.autograd.gradcheck(
        lambda x, raw: rational_quadratic(x, raw, TAIL), (x.requires_grad_(), raw.requires_grad_()), atol=1e-6
    )


def test_spline_rises_without_steps_over_the_whole_line() -> None:
    raw = drawn(8, 5)[1].unsqueeze(-1).expand(23, 5, 20_001)
    x = torch.linspace(-4, 4, 20_001, dtype=torch.float64).expand(5, -1)
    y, log_slope = rational_quadratic(x, raw, TAIL)
    rise = y.diff(dim=1)
    assert rise.min() > 0
    assert torch.equal(y[x.abs() > TAIL], x[x.abs() > TAIL])
    slope = log_slope.exp()
    bound = torch.maximum(slope[:, 1:], slope[:, :-1]) * 4e-4 * 1.2  # slopes are continuous too: no jump between them
    assert (rise <= bound).all()


def test_equal_bins_and_slopes_of_one_are_the_identity() -> None:
    x, _ = drawn(8)
    raw = (
        torch.tensor([0.0] * 16 + [math.log(math.expm1(1 - LEAST))] * 7, dtype=torch.float64)
        .unsqueeze(-1)
        .expand(23, len(x))
    )
    y, log_slope = rational_quadratic(x, raw, TAIL)
    assert (y - x).abs().max() <= 1e-12 and log_slope.abs().max() <= 1e-12


def test_extreme_splines_stay_finite_in_float32() -> None:
    """Raw numbers that saturate everything: bins of the least size, slopes of the least and of a hundred."""
    x = torch.linspace(-4, 4, 5001)
    for seed in range(5):
        raw = (100 * torch.randn(23, 5001, generator=seeded(seed))).requires_grad_()
        for inverse in (False, True):
            y, log_slope = rational_quadratic(x, raw, TAIL, inverse=inverse)
            assert y.isfinite().all() and log_slope.isfinite().all()
            assert y.abs().max() <= 4
        (slope,) = torch.autograd.grad(log_slope.sum() + y.sum(), raw)
        assert slope.isfinite().all()


# --- the layers


def layers() -> dict[str, Layer]:
    torch.manual_seed(0)
    nets = [Convolutions(3, 8, outputs, (3, 2), whole=True) for outputs in (3 * 11, 3 * 13)]
    return {
        "mixing": Mixing(torch.eye(6)[torch.randperm(6)]),
        "splines": Bend(nets[0], 4, TAIL),
        "affine splines": Bend(nets[1], 4, TAIL, 2.0),
        "flipped": Bend(Convolutions(3, 8, 3 * 13, (3, 2), whole=False), 4, TAIL, 2.0, flip=True),
        "base": Base(6, 3, 2),
    }


@pytest.mark.parametrize("name", layers())
def test_layer_log_det_and_inverse(name: str) -> None:
    layer = randomised(layers()[name])
    assert_bijective(layer, layer.inverse, torch.randn(1, 3, 2, 6, dtype=torch.float64, generator=seeded(1)))


def test_conditional_prior_log_det_and_inverse() -> None:
    torch.manual_seed(0)
    prior = randomised(Conditional(2, 3))
    x, kept = (torch.randn(1, 3, 2, c, dtype=torch.float64, generator=seeded(c)) for c in (3, 2))
    assert_bijective(lambda x: prior(x, kept), lambda z: prior.inverse(z, kept), x)


@pytest.mark.parametrize("name", ["splines", "affine splines", "flipped"])
def test_untrained_coupling_is_the_identity(name: str) -> None:
    x = torch.randn(5, 3, 2, 6, generator=seeded(1))
    y, log_det = layers()[name](x)
    assert (y - x).abs().max() < 1e-5 and log_det.abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4), (2, 1, 1), (5, 1, 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_whole_flow_log_det_and_inverse(shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    model = randomised(Spline(DataSpec(shape, 17), steps=(2, 2), hidden=(8, 8), affine=affine, dense=16), 0.1)
    assert_bijective_flow(model)


# --- the density


def test_probabilities_of_all_images_sum_to_one() -> None:
    torch.manual_seed(0)
    assert_images_have_mass_one(
        randomised(Spline(DataSpec((1, 2, 2), levels=2), steps=(2,), hidden=(8,)), 0.05), 10_000
    )


def test_density_of_the_plane_integrates_to_one() -> None:
    torch.manual_seed(0)
    assert_plane_has_mass_one(randomised(Spline(CONTINUOUS, fine=8, dense=16), 0.1), 8, 400)


def test_learns_a_known_density() -> None:
    """The one that flows find hardest, in a third of the usual steps."""
    figures = two_d.fit("flows/spline", {}, "checkerboard", seed=0, device=torch.device("cpu"), steps=200).figures
    assert figures["kl"]["value"] <= 0.08


def test_inverts_after_training() -> None:
    torch.manual_seed(0)
    assert_inverts_after_training(Spline(DataSpec((1, 8, 8)), steps=(2, 2), hidden=(16, 16)))


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((1, 28, 28), {"steps": (1, 1, 1), "hidden": (8, 8, 8)}, "halved 3 times"),
        ((1, 8, 8), {"steps": (1, 1), "hidden": (8,)}, "one number a scale"),
        ((2,), {}, "images"),
        ((1, 1, 1), {}, "two numbers"),
        ((1, 8, 8), {"onto_reals": "probit"}, "onto_reals"),
        ((1, 8, 8), {"bins": 1}, "bins must be at least 2"),
        ((1, 8, 8), {"fine": 1000}, "fine must be .* room for shares of 0.001"),
    ],
)
def test_what_cannot_work_is_named(shape: tuple[int, ...], options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Spline(DataSpec(shape), **options)


def test_refuses_what_is_no_image() -> None:
    assert_refuses_what_is_no_example(Spline(DataSpec((1, 8, 8)), steps=(1,), hidden=(8,)))


def test_weights_that_give_no_numbers_or_no_inverse_are_named() -> None:
    model = Spline(DataSpec((1, 8, 8)), steps=(1,), hidden=(8,))
    mixing, coupling = model.scales[0]
    with torch.no_grad():
        kept = mixing.log_diagonal[0].item()
        mixing.log_diagonal[0] = -1e4
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):
            model.sample(2, generator=seeded(9))
        mixing.log_diagonal[0] = kept
        coupling.network.last.bias[3] = math.inf
        for ask in (
            lambda: model.sample(2, generator=seeded(9)),
            lambda: model.log_prob(Batch(torch.zeros(2, 1, 8, 8)), generator=seeded(9)),
        ):
            with pytest.raises(torch.linalg.LinAlgError, match=r"parameter scales.0.1.network.last.bias holds NaN"):
                ask()
