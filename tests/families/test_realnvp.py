"""RealNVP: log-determinants against autograd at random weights, the paper's masks, exact inverses, sums to 1."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from genus.config import Train
from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.flows._coupling import Convolutions, Dense, squeeze, unsqueeze
from genus.families.flows.realnvp import Affine, Normalise, RealNVP, Reorder
from genus.training import train


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


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    convolutions = [Convolutions(4, 8, 8, (3, 2), whole=whole) for whole in (True, False)]
    return {
        "first half": Affine(convolutions[0], 2.0, flip=True),
        "second half": Affine(convolutions[1], 2.0),
        "normalise": Normalise(8),
        "reorder": Reorder((0, 3, 1, 2)),
    }


@pytest.mark.parametrize("name", layers())
def test_layer_log_det_and_inverse(name: str) -> None:
    layer = randomise(layers()[name])
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64, generator=seeded(1))
    y, log_det = layer(x)
    assert abs(log_det).item() > 0.1 or name == "reorder", "the test says nothing of a layer that changes no volume"
    assert abs(jacobian_log_det(lambda x: layer(x)[0], x) - log_det).item() <= 1e-9
    assert (layer.inverse(y) - x).abs().max() <= 1e-9


@pytest.mark.parametrize("dims", [2, 5])
@pytest.mark.parametrize("flip", [False, True])
def test_dense_coupling_log_det_and_inverse(dims: int, flip: bool) -> None:
    torch.manual_seed(0)
    kept, changed = dims - dims // 2, dims // 2
    kept, changed = (changed, kept) if flip else (kept, changed)
    layer = randomise(Affine(Dense(kept, 16, 2 * changed), 1.0, flip=flip))
    x = torch.randn(1, 1, 1, dims, dtype=torch.float64, generator=seeded(1))
    y, log_det = layer(x)
    assert abs(log_det).item() > 0.05
    assert abs(jacobian_log_det(lambda x: layer(x)[0], x) - log_det).item() <= 1e-9
    assert (layer.inverse(y) - x).abs().max() <= 1e-9


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4), (5, 1, 1)])
@pytest.mark.parametrize("onto_reals", ["gaussianise", "logit"])
def test_whole_flow_log_det_and_inverse(shape: tuple[int, ...], onto_reals: str) -> None:
    torch.manual_seed(0)
    model = randomise(RealNVP(DataSpec(shape, 17), couplings=(2, 2), hidden=(8, 8), onto_reals=onto_reals), 0.1)
    y = torch.randn(1, *shape, dtype=torch.float64, generator=seeded(2))
    log_det = model.flow(y)[1]

    def code(y: Tensor) -> Tensor:
        return torch.cat([z.flatten(1) for z in model.flow(y)[0]], 1)

    assert abs(log_det).item() > 0.05
    assert abs(jacobian_log_det(code, y) - log_det).item() <= 1e-9
    assert (model.unflow(code(y)) - y).abs().max() <= 1e-9


def test_first_couplings_have_the_papers_checkerboard() -> None:
    """Equation 9, b x + (1 - b)(x exp(s(b x)) + t(b x)), with b a checkerboard of the whole image."""
    torch.manual_seed(0)
    model = randomise(RealNVP(DataSpec((1, 8, 8), 17), couplings=(2, 1), hidden=(8, 8)))
    diagonals, _, first, _, second = list(model.scales[0])[:5]
    image = torch.randn(3, 8, 8, 1, dtype=torch.float64, generator=seeded(3))
    board = torch.arange(8)
    board = ((board[:, None] + board) % 2 == 0).double().view(1, 8, 8, 1)
    for coupling, b in ((first, board), (second, 1 - board)):
        told = diagonals(squeeze(b * image))[0]  # all that the network may see
        kept = told.chunk(2, -1)[1 if coupling.flip else 0]
        raw, shift = coupling.network(kept).chunk(2, -1)
        log_scale = 2 * torch.tanh(raw / 2)

        def placed(values: Tensor, flip: bool = coupling.flip) -> Tensor:
            both = [values, torch.zeros_like(values)] if flip else [torch.zeros_like(values), values]
            return unsqueeze(diagonals.inverse(torch.cat(both, -1)))

        expected = b * image + (1 - b) * (image * placed(log_scale).exp() + placed(shift))
        found = unsqueeze(diagonals.inverse(coupling(diagonals(squeeze(image))[0])[0]))
        assert (found - expected).abs().max() <= 1e-12
        assert ((found - image).abs() > 1e-6).double().mul(b).sum() == 0, "the other colour is as it was"


def test_channel_couplings_change_the_other_rows() -> None:
    torch.manual_seed(0)
    model = randomise(RealNVP(DataSpec((1, 4, 4), 17), couplings=(2,), hidden=(8,)))
    coupling = list(model.scales[0])[7]
    image = torch.randn(1, 4, 4, 1, dtype=torch.float64, generator=seeded(4))
    moved = (unsqueeze(coupling(squeeze(image))[0]) != image)[0, :, :, 0]
    assert moved[1::2].all() and not moved[::2].any()


def test_probabilities_of_all_images_sum_to_one() -> None:
    """2x2 pixels of 2 levels: the sum over all 16 images of E_u[exp log_prob] is the integral of the density."""
    spec = DataSpec((1, 2, 2), levels=2)
    torch.manual_seed(0)
    model = randomise(RealNVP(spec, couplings=(2,), hidden=(8,)), 0.1)
    images = torch.tensor(list(itertools.product([0, 1], repeat=4))).view(16, 1, 2, 2)
    with torch.no_grad():
        x = spec.to_float(images).double().repeat(20_000, 1, 1, 1)
        probability = model.log_prob(Batch(x), generator=seeded(3)).exp().view(-1, 16).sum(1)
    error = probability.std() / len(probability) ** 0.5
    assert error < 0.02
    assert abs(probability.mean() - 1) < 4 * error


def test_density_of_the_plane_integrates_to_one() -> None:
    torch.manual_seed(0)
    model = randomise(RealNVP(DataSpec((2, 1, 1), levels=0), couplings=(1, 1), hidden=(16, 16)), 0.1)
    side = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side).view(-1, 2, 1, 1)
    with torch.no_grad():
        mass = model.log_prob(Batch(grid), generator=seeded(0)).exp().sum() * (side[1] - side[0]) ** 2
    assert abs(mass.item() - 1) <= 1e-3


def test_inverts_after_training() -> None:
    """In float32, on reals and on levels."""
    spec = DataSpec((1, 8, 8))
    torch.manual_seed(0)
    ramp = torch.arange(8).view(1, 1, 8) * 30 + torch.randint(0, 40, (256, 1, 1, 1), generator=seeded(5))
    images = (ramp + torch.randint(0, 6, (256, 1, 8, 8), generator=seeded(6))).clamp(0, 255).byte().numpy()
    config = Train(steps=60, batch_size=32, learning_rate=4e-3, betas=(0.9, 0.99))
    model = RealNVP(spec, couplings=(2, 2), hidden=(16, 16))
    labels = torch.zeros(256).long().numpy()
    result = train(model, images, labels, config, steps=60, seed=0, device=torch.device("cpu"))
    assert result.history[-1]["bits_per_dim"] < result.history[0]["bits_per_dim"] - 1
    x = spec.to_float(torch.from_numpy(images))
    with torch.no_grad():
        y = model.dequantise(x, generator=seeded(7))[0]
        code = torch.cat([z.flatten(1) for z in model.flow(y)[0]], 1)
        assert (model.unflow(code) - y).abs().max() <= 1e-5
        assert torch.equal(spec.to_levels(model.decode(model.encode(x))), spec.to_levels(x))


def test_first_batch_is_normalised() -> None:
    spec = DataSpec((1, 8, 8), 17)
    torch.manual_seed(0)
    model = RealNVP(spec, couplings=(2, 2), hidden=(8, 8))
    batch = Batch(spec.to_float(torch.randint(17, (64, 1, 8, 8), generator=seeded(4)) ** 2 % 17))
    with torch.no_grad():
        model.initialise(batch, generator=seeded(5))
        latents, _ = model.flow(model.dequantise(batch.x, generator=seeded(5))[0])
    for z in latents:
        assert z.mean((0, 1, 2)).abs().max() < 1e-4
        assert (z.std((0, 1, 2)) - 1).abs().max() < 1e-4


def test_temperature_zero_is_one_image_and_one_is_many() -> None:
    torch.manual_seed(0)
    model = randomise(RealNVP(DataSpec((1, 8, 8), 17), couplings=(2, 2), hidden=(8, 8)), 0.05)
    with torch.no_grad():
        cold = model.sample(4, generator=seeded(8), temperature=0.0)
        warm = model.sample(4, generator=seeded(8))
    assert cold.std(0).max() == 0
    assert warm.std(0).max() > 0


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((1, 28, 28), {"couplings": (1, 1, 1), "hidden": (8, 8, 8)}, "halved 3 times"),
        ((1, 8, 8), {"couplings": (1, 1), "hidden": (8,)}, "one number a scale"),
        ((2,), {}, "images"),
        ((1, 1, 1), {}, "two numbers"),
        ((1, 8, 8), {"onto_reals": "probit"}, "onto_reals"),
    ],
)
def test_what_cannot_work_is_named(shape: tuple[int, ...], options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RealNVP(DataSpec(shape), **options)


@pytest.mark.parametrize(("value", "says"), [(math.nan, "NaN"), (1.5, "-1, 1")])
def test_refuses_what_is_no_image(value: float, says: str) -> None:
    model = RealNVP(DataSpec((1, 8, 8)), couplings=(1,), hidden=(8,))
    for ask in (lambda x: model.log_prob(Batch(x), generator=seeded(9)), model.encode):
        with pytest.raises(ValueError, match=says):
            ask(torch.full((1, 1, 8, 8), value))


@pytest.mark.parametrize(
    ("value", "says"), [(math.nan, "scales.0.1.log_scale holds NaN"), (1e4, "out of a float's range")]
)
def test_weights_that_give_no_numbers_are_named(value: float, says: str) -> None:
    model = RealNVP(DataSpec((1, 8, 8)), couplings=(1,), hidden=(8,))
    with torch.no_grad():
        model.scales[0][1].log_scale.fill_(value)
        with pytest.raises(torch.linalg.LinAlgError, match=says):
            model.log_prob(Batch(torch.zeros(2, 1, 8, 8)), generator=seeded(9))
        model.scales[0][1].log_scale.fill_(-value)
        with pytest.raises(torch.linalg.LinAlgError, match=says):
            model.sample(2, generator=seeded(9))
