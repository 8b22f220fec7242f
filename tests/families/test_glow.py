"""Glow: log-determinants against autograd at random weights, exact inverses, a density that sums to 1."""

import pytest
import torch

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.flows._coupling import Affine, Convolutions, Mixing, squeeze, unsqueeze
from genus.families.flows.glow import Glow
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


def test_mixing_starts_as_the_rotation_and_knows_its_log_det_and_inverse() -> None:
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    mixing = Mixing(rotation)
    assert (mixing.matrix() - rotation).abs().max() <= 1e-6
    assert_bijective(
        randomised(mixing), mixing.inverse, torch.randn(1, 3, 2, 6, dtype=torch.float64, generator=seeded(1))
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4), (5, 1, 1)])
@pytest.mark.parametrize("onto_reals", ["gaussianise", "logit"])
def test_whole_flow_log_det_and_inverse(shape: tuple[int, ...], onto_reals: str) -> None:
    torch.manual_seed(0)
    model = Glow(DataSpec(shape, 17), steps=(2, 2), hidden=(8, 8), onto_reals=onto_reals)
    assert_bijective_flow(randomised(model, 0.1))


def test_probabilities_of_all_images_sum_to_one() -> None:
    torch.manual_seed(0)
    assert_images_have_mass_one(randomised(Glow(DataSpec((1, 2, 2), levels=2), steps=(2,), hidden=(8,)), 0.1), 40_000)


def test_density_of_the_plane_integrates_to_one() -> None:
    torch.manual_seed(0)
    assert_plane_has_mass_one(randomised(Glow(CONTINUOUS, steps=(2,), hidden=(16,)), 0.1), 8, 400)


def test_scale_is_bounded() -> None:
    coupling = Affine(Convolutions(2, 8, 4, (4, 4), whole=False), 1.5)
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.fill_(50.0)
        _, log_scale = coupling.bend(torch.zeros(2, 4, 4, 2), coupling.network(torch.full((2, 4, 4, 2), 100.0)))
    assert 1.49 < log_scale.abs().max() <= 1.5


def test_initialise_normalises_every_actnorm() -> None:
    spec = DataSpec((1, 8, 8), 17)
    torch.manual_seed(0)
    model = Glow(spec, steps=(3, 3), hidden=(8, 8))
    batch = Batch(spec.to_float(torch.randint(17, (64, 1, 8, 8), generator=seeded(4)) ** 2 % 17))
    with torch.no_grad():
        model.initialise(batch, generator=seeded(5))
        x = squeeze(model.dequantise(batch.x, generator=seeded(5))[0].permute(0, 2, 3, 1))
        for layer in model.scales[0]:
            if isinstance(layer, Mixing):
                normed = (x + layer.bias) * layer.log_scale.exp()
                assert normed.mean((0, 1, 2)).abs().max() < 1e-4
                assert (normed.std((0, 1, 2)) - 1).abs().max() < 1e-4
            x, _ = layer(x)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_step_without_any_warm_up_is_no_leap(seed: int) -> None:
    """Of Adam at 0.004: with hidden layers scaled to unit variance, 6.2 bits/dim become more than a billion."""
    spec = DataSpec((1, 12, 12))
    ramp = torch.arange(12).view(1, 1, 12) * 15 + torch.randint(60, (64, 1, 12, 1), generator=seeded(5))
    x = spec.to_float((ramp + torch.randint(9, (64, 1, 12, 12), generator=seeded(6))).clamp(0, 255))
    torch.manual_seed(seed)
    model = Glow(spec, steps=(6, 10), hidden=(32, 64))
    model.initialise(Batch(x[:32]), generator=seeded())
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0)
    terms = model.loss(Batch(x[:32]), generator=seeded(1))
    terms["loss"].backward()
    optimiser.step()
    with torch.no_grad():
        after = model.loss(Batch(x[32:]), generator=seeded(2))["bits_per_dim"]
    assert after < terms["bits_per_dim"] + 1


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


def test_inverts_after_training() -> None:
    torch.manual_seed(0)
    assert_inverts_after_training(Glow(DataSpec((1, 8, 8)), steps=(2, 2), hidden=(16, 16)))


def test_squeeze_keeps_blocks_together() -> None:
    x = torch.arange(16.0).view(1, 4, 4, 1)
    assert squeeze(x)[0, 0, 0].tolist() == [0.0, 1.0, 4.0, 5.0]
    assert torch.equal(unsqueeze(squeeze(x)), x)


def test_temperature_zero_is_one_image_and_one_is_many() -> None:
    torch.manual_seed(0)
    assert_temperature_matters(randomised(Glow(DataSpec((1, 8, 8), 17), steps=(2, 2), hidden=(8, 8)), 0.05))


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


def test_refuses_what_is_no_image() -> None:
    assert_refuses_what_is_no_example(Glow(DataSpec((1, 8, 8)), steps=(1,), hidden=(8,)))
