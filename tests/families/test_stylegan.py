"""StyleGAN: modulated convolutions against one convolution an example, mixing, truncation, noise, the game."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from genus.contract import Batch, build
from genus.data.spec import DataSpec
from genus.families.gan._equalised import Linear
from genus.families.gan.stylegan import FORGET, Styled, StyleGAN

SPEC = DataSpec((1, 16, 16), 17)


def tiny(spec: DataSpec = SPEC, **params: Any) -> StyleGAN:
    torch.manual_seed(0)
    model = build("gan/stylegan", spec, {"width": 4, "critic_width": 4, "latent": 6, **params})
    assert isinstance(model, StyleGAN)
    return model.double()


def batch(n: int = 8) -> Batch:
    draws = torch.Generator().manual_seed(0)
    return Batch(torch.rand(n, *SPEC.shape, generator=draws, dtype=torch.float64) * 2 - 1)


def seed(number: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def codes(n: int = 5, number: int = 2) -> Tensor:
    return torch.randn(n, 6, generator=seed(number), dtype=torch.float64)


@pytest.mark.parametrize("doubles", [False, True])
def test_a_modulated_convolution_is_one_of_each_examples_own(doubles: bool) -> None:
    """Equations 1 and 3: w' = s w, w'' = w' / √(Σ w'²), the sum over what reaches a pixel."""
    torch.manual_seed(0)
    layer = Styled(6, 3, 5, doubles=doubles).double()
    with torch.no_grad():
        layer.strength.fill_(0.7)
        layer.bias.normal_()
    x, style = torch.randn(4, 3, 6, 6).double(), torch.randn(4, 6).double()
    side = 12 if doubles else 6
    noise = torch.randn(4, 1, side, side).double()
    for k, scales in enumerate(layer.scales(style)):
        if doubles:
            weight = layer.weight * scales[:, None, None, None]
            weight = weight / (weight.square().sum((0, 2, 3)) / 4).sqrt()[None, :, None, None]
            plain = functional.conv_transpose2d(x[k : k + 1], weight, None, 2, 1)
        else:
            weight = layer.weight * scales[None, :, None, None]
            weight = weight / weight.square().sum((1, 2, 3)).sqrt()[:, None, None, None]
            plain = functional.conv2d(x[k : k + 1], weight, None, 1, 1)
        plain = math.sqrt(2) * plain + 0.7 * noise[k] + layer.bias[:, None, None]
        expected = functional.leaky_relu(plain, 0.2)
        torch.testing.assert_close(layer(x, style, noise)[k : k + 1], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("doubles", [False, True])
def test_features_keep_variance_one_whatever_the_style(doubles: bool) -> None:
    torch.manual_seed(0)
    layer = Styled(6, 64, 64, doubles=doubles)
    x, noise = torch.randn(8, 64, 12, 12), torch.zeros(1)
    for size in (0.1, 10.0):
        made = layer(x, size * torch.randn(8, 6), noise)[..., 2:-2, 2:-2]  # the border sees zeros
        assert made.square().mean().item() == pytest.approx(1.04, rel=0.1)  # 2 · (1 + 0.2²) / 2


def test_styles_are_of_codes_on_the_sphere() -> None:
    mapping, _ = tiny().parts
    torch.testing.assert_close(mapping(codes()), mapping(3 * codes()))
    assert sum(isinstance(layer, Linear) for layer in tiny(layers=5).parts[0]) == 5


def test_layers_below_a_place_of_each_images_own_take_one_code_and_the_others_another() -> None:
    model = tiny(mixing=1.0)
    mapping, synthesis = model.parts
    styles, noise = model._styles(batch(64), seed())
    assert len(styles) == len(synthesis.layers) == 3 and [len(grain) for grain in noise] == [64] * 3
    draws = seed()
    one, other = (mapping(torch.randn(64, 6, generator=draws, dtype=torch.float64)) for _ in range(2))
    taken = torch.stack([(style == other).all(1) for style in styles])
    assert torch.equal(taken | torch.stack([(style == one).all(1) for style in styles]), torch.ones_like(taken))
    assert not taken[0].any() and taken[2].all() and 16 < taken[1].sum() < 48  # half of 64, four standard deviations

    several = torch.stack(tiny(mixing=0.5)._styles(batch(64), seed())[0])
    assert 16 < (several[0] == several[2]).all(1).sum() < 48
    alone = tiny(mixing=0.0)._styles(batch(), seed())[0]
    assert all(torch.equal(style, alone[0]) for style in alone)


def test_the_mean_style_follows_the_styles_of_training() -> None:
    model = tiny()
    mapping, _ = model.parts
    list(model.updates(batch(), generator=seed()))
    first = mapping(torch.randn(8, 6, generator=seed(), dtype=torch.float64)).mean(0)
    torch.testing.assert_close(model.mean_style, FORGET * first.detach())
    list(model.updates(batch(), generator=seed()))
    torch.testing.assert_close(model.mean_style, (1 - (1 - FORGET) ** 2) * first.detach())
    fresh = tiny()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.mean_style, model.mean_style) and int(fresh.critic_steps) == 2


def test_truncation_goes_from_the_mean_style_to_the_codes_own() -> None:
    model = tiny().eval()
    model.mean_style.normal_(generator=seed(5))
    mapping, synthesis = model.parts
    with torch.inference_mode():
        usual, told, mean, half = (
            model.sample(4, generator=seed(), **knobs)
            for knobs in ({}, {"truncation": 1.0}, {"truncation": 0.0}, {"truncation": 0.5})
        )
        style = mapping(torch.randn(4, 6, generator=seed(), dtype=torch.float64))
        between = (style + model.mean_style) / 2
        expected = synthesis([between] * 3, synthesis.fixed())
    assert torch.equal(usual, told) and not torch.equal(usual[0], usual[1])
    torch.testing.assert_close(mean, mean[:1].expand_as(mean))  # untrained, it has no use for noise
    torch.testing.assert_close(half, expected)


def test_noise_is_fresh_in_samples_and_fixed_in_what_a_code_decodes_to() -> None:
    model = tiny().eval()
    _, synthesis = model.parts
    with torch.inference_mode():
        silent = model.decode(codes())
        for layer in synthesis.layers:
            layer.strength.fill_(0.5)  # type: ignore[operator, union-attr]
        decoded = model.decode(codes())
        assert torch.equal(decoded, model.decode(codes())) and not torch.equal(decoded, silent)
        model.mean_style.zero_()
        drawn = model.sample(3, generator=seed(), truncation=0.0)  # one style: what differs is noise
    assert not torch.equal(drawn[0], drawn[1])
    assert [tuple(grain.shape) for grain in synthesis.noise(codes(), seed())] == [(5, 1, s, s) for s in (4, 8, 16)]


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().flatten(1))
        return x.flatten(1)


def test_the_game() -> None:
    model, flat = tiny(r1=0.3, r1_every=2), Flat()
    last = nn.Linear(256, 1, bias=False).double()
    model.critic, weight = nn.Sequential(flat, last), last.weight[0].detach()
    for penalised in (True, False, True):
        flat.seen.clear()
        (first, critic), (second, generator) = model.updates(batch(), generator=seed())
        real, fake, again = flat.seen
        assert (first, second) == ("critic", "generator") and torch.equal(fake, again)
        value = (real @ weight).sigmoid().log().mean() + (1 - (fake @ weight).sigmoid()).log().mean()
        penalty = 0.3 / 2 * 2 * weight.square().sum() * penalised  # of a linear critic, whose slope is w
        assert critic["loss"].item() == pytest.approx((penalty - value).item(), rel=1e-9)
        assert generator["loss"].item() == pytest.approx(-(fake @ weight).sigmoid().log().mean().item(), rel=1e-9)
        assert ("r1" in critic) == penalised


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 8), (1, 6, 6)])
def test_every_size_is_reached_from_a_coarse_one(shape: tuple[int, ...]) -> None:
    model = tiny(DataSpec(shape)).eval()
    sides = model.parts[1].sides
    assert sides[-1] == shape[1:] and min(sides[0]) < 8
    assert all((2 * a, 2 * b) == after for (a, b), after in pairwise(sides))
    with torch.inference_mode():
        assert model.sample(2, generator=seed()).shape == (2, *shape)
