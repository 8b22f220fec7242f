"""Glow: log-determinants against autograd at random weights, exact inverses, a density that sums to 1."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.flows.glow import Coupling, Glow, Mixing, Step, squeeze, unsqueeze


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Away from the identity that a flow starts at, where wrong Jacobians would pass."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.double()


def jacobian_log_det(function, x: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x).flatten(), x)
    return jacobian.reshape(x.numel(), x.numel()).slogdet().logabsdet


@pytest.mark.parametrize("kind", [Mixing, Coupling, Step], ids=lambda kind: kind.__name__)
def test_layer_log_det_and_inverse(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)  # before the layer is built: its own draws count too
    options = {Mixing: ((6,), {}), Coupling: ((6, 8, 2.0, (3, 2)), {"whole": True})}
    positional, named = options.get(kind, ((6, 8, 2.0, (3, 2)), {"last": True}))
    layer = randomise(kind(*positional, **named))
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64, generator=seeded(1))
    y, log_det = layer(x)
    assert abs(log_det).item() > 0.1, "the test says nothing of a layer that changes no volume"
    assert abs(jacobian_log_det(lambda x: layer(x)[0], x) - log_det).item() <= 1e-9
    assert (layer.inverse(y) - x).abs().max() <= 1e-9


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4)])
@pytest.mark.parametrize("onto_reals", ["gaussianise", "logit"])
def test_whole_flow_log_det_and_inverse(shape: tuple[int, ...], onto_reals: str) -> None:
    torch.manual_seed(0)
    model = randomise(Glow(DataSpec(shape, 17), steps=(2, 2), hidden=(8, 8), onto_reals=onto_reals), 0.1)
    y = torch.randn(1, *shape, dtype=torch.float64, generator=seeded(2))
    log_det = model.flow(y)[1]

    def code(y: Tensor) -> Tensor:
        return torch.cat([z.flatten(1) for z in model.flow(y)[0]], 1)

    assert abs(jacobian_log_det(code, y) - log_det).item() <= 1e-9
    assert (model.unflow(code(y)) - y).abs().max() <= 1e-9


def test_probabilities_of_all_images_sum_to_one() -> None:
    """2x2 pixels of 2 levels: the sum over all 16 images of E_u[exp log_prob] is the integral of the density.

    The density that log_prob speaks of is smooth, and midpoints are not what it draws: 40,000 draws an image.
    """
    spec = DataSpec((1, 2, 2), levels=2)
    torch.manual_seed(0)
    model = randomise(Glow(spec, steps=(2,), hidden=(8,)), 0.1)
    images = torch.tensor(list(itertools.product([0, 1], repeat=4))).view(16, 1, 2, 2)
    with torch.no_grad():
        x = spec.to_float(images).double().repeat(40_000, 1, 1, 1)
        probability = model.log_prob(Batch(x), generator=seeded(3)).exp().view(-1, 16).sum(1)
    error = probability.std() / len(probability) ** 0.5
    assert error < 0.02
    assert abs(probability.mean() - 1) < 4 * error


def test_scale_is_bounded() -> None:
    coupling = Coupling(4, 8, 1.5, (4, 4))
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.mul_(0).add_(50.0)
    log_scale, _ = coupling.log_scale_and_shift(torch.full((2, 4, 4, 2), 100.0))
    assert log_scale.abs().max() <= 1.5
    assert log_scale.max() > 1.49


def test_initialise_normalises_every_actnorm() -> None:
    spec = DataSpec((1, 8, 8), 17)
    torch.manual_seed(0)
    model = Glow(spec, steps=(3, 3), hidden=(8, 8))
    batch = Batch(spec.to_float(torch.randint(17, (64, 1, 8, 8), generator=seeded(4)) ** 2 % 17))
    with torch.no_grad():
        model.initialise(batch, generator=seeded(5))
        x = squeeze(model.dequantise(batch.x, generator=seeded(5))[0].permute(0, 2, 3, 1))
        for step in model.scales[0]:
            normed = (x + step.mixing.bias) * step.mixing.log_scale.exp()
            assert normed.mean((0, 1, 2)).abs().max() < 1e-4
            assert (normed.std((0, 1, 2)) - 1).abs().max() < 1e-4
            x, _ = step(x)


def test_codes_are_as_large_as_images_and_come_back() -> None:
    spec = DataSpec((3, 8, 8))
    torch.manual_seed(0)
    model = Glow(spec, steps=(2, 2), hidden=(8, 8))
    x = spec.to_float(torch.randint(256, (4, 3, 8, 8), generator=seeded(6)))
    with torch.no_grad():
        model.initialise(Batch(x), generator=seeded(7))
        code = model.encode(x)
        assert code.shape == (4, 192)
        assert torch.equal(spec.to_levels(model.decode(code)), spec.to_levels(x))


def test_squeeze_keeps_blocks_together() -> None:
    x = torch.arange(16.0).view(1, 4, 4, 1)
    assert squeeze(x)[0, 0, 0].tolist() == [0.0, 1.0, 4.0, 5.0]
    assert torch.equal(unsqueeze(squeeze(x)), x)


def test_temperature_zero_is_one_image_and_one_is_many() -> None:
    torch.manual_seed(0)
    model = randomise(Glow(DataSpec((1, 8, 8), 17), steps=(2, 2), hidden=(8, 8)), 0.05)
    with torch.no_grad():
        cold = model.sample(4, generator=seeded(8), temperature=0.0)
        warm = model.sample(4, generator=seeded(8))
    assert cold.std(0).max() == 0
    assert warm.std(0).max() > 0


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((1, 28, 28), {"steps": (1, 1, 1), "hidden": (8, 8, 8)}, "halved 3 times"),
        ((1, 8, 8), {"steps": (1, 1), "hidden": (8,)}, "one number a scale"),
        ((2,), {}, "images"),
        ((1, 8, 8), {"onto_reals": "probit"}, "onto_reals"),
    ],
)
def test_what_cannot_work_is_named(shape: tuple[int, ...], options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Glow(DataSpec(shape), **options)


def test_log_prob_refuses_nan() -> None:
    model = Glow(DataSpec((1, 8, 8)), steps=(1,), hidden=(8,))
    with pytest.raises(ValueError, match="NaN"):
        model.log_prob(Batch(torch.full((1, 1, 8, 8), float("nan"))), generator=seeded(9))
