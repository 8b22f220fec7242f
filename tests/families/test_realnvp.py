"""RealNVP: log-determinants against autograd at random weights, the paper's masks, exact inverses, sums to 1."""

import math

import pytest
import torch
from torch import Tensor

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.flows._coupling import Affine, Convolutions, Dense, Layer, squeeze, unsqueeze
from genus.families.flows.realnvp import Normalise, RealNVP, Reorder
from tests.families.flow_checks import (
    CONTINUOUS,
    assert_bijective,
    assert_bijective_flow,
    assert_images_have_mass_one,
    assert_inverts_after_training,
    assert_plane_has_mass_one,
    assert_refuses_what_is_no_example,
    assert_temperature_matters,
    randomised,
    seeded,
)


def layers() -> dict[str, Layer]:
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
    layer = randomised(layers()[name])
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64, generator=seeded(1))
    assert_bijective(layer, layer.inverse, x, least=-1 if name == "reorder" else 0.1)


@pytest.mark.parametrize("dims", [2, 5])
@pytest.mark.parametrize("flip", [False, True])
def test_dense_coupling_log_det_and_inverse(dims: int, flip: bool) -> None:
    torch.manual_seed(0)
    kept, changed = dims - dims // 2, dims // 2
    kept, changed = (changed, kept) if flip else (kept, changed)
    layer = randomised(Affine(Dense(kept, 16, 2 * changed), 1.0, flip=flip))
    assert_bijective(layer, layer.inverse, torch.randn(1, 1, 1, dims, dtype=torch.float64, generator=seeded(1)), 0.05)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4), (5, 1, 1)])
@pytest.mark.parametrize("onto_reals", ["gaussianise", "logit"])
def test_whole_flow_log_det_and_inverse(shape: tuple[int, ...], onto_reals: str) -> None:
    torch.manual_seed(0)
    model = randomised(RealNVP(DataSpec(shape, 17), couplings=(2, 2), hidden=(8, 8), onto_reals=onto_reals), 0.1)
    assert_bijective_flow(model)


def test_first_couplings_have_the_papers_checkerboard() -> None:
    """Equation 9, b x + (1 - b)(x exp(s(b x)) + t(b x)), with b a checkerboard of the whole image."""
    torch.manual_seed(0)
    model = randomised(RealNVP(DataSpec((1, 8, 8), 17), couplings=(2, 1), hidden=(8, 8)))
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
    model = randomised(RealNVP(DataSpec((1, 4, 4), 17), couplings=(2,), hidden=(8,)))
    coupling = list(model.scales[0])[7]
    image = torch.randn(1, 4, 4, 1, dtype=torch.float64, generator=seeded(4))
    moved = (unsqueeze(coupling(squeeze(image))[0]) != image)[0, :, :, 0]
    assert moved[1::2].all() and not moved[::2].any()


def test_probabilities_of_all_images_sum_to_one() -> None:
    torch.manual_seed(0)
    model = RealNVP(DataSpec((1, 2, 2), levels=2), couplings=(2,), hidden=(8,))
    assert_images_have_mass_one(randomised(model, 0.1), 20_000)


def test_density_of_the_plane_integrates_to_one() -> None:
    torch.manual_seed(0)
    model = RealNVP(CONTINUOUS, couplings=(1, 1), hidden=(16, 16))
    assert_plane_has_mass_one(randomised(model, 0.1), 8, 400)


def test_inverts_after_training() -> None:
    torch.manual_seed(0)
    assert_inverts_after_training(RealNVP(DataSpec((1, 8, 8)), couplings=(2, 2), hidden=(16, 16)))


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
    assert_temperature_matters(randomised(RealNVP(DataSpec((1, 8, 8), 17), couplings=(2, 2), hidden=(8, 8)), 0.05))


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


def test_refuses_what_is_no_image() -> None:
    assert_refuses_what_is_no_example(RealNVP(DataSpec((1, 8, 8)), couplings=(1,), hidden=(8,)))


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
