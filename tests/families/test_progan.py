"""ProGAN: when and how it grows, its layers against closed forms, the game at each resolution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from genus.config import Train
from genus.contract import Batch, build
from genus.data.spec import DataSpec
from genus.families.gan.progan import Double, ProGAN, double, halve
from genus.training import train

SPEC = DataSpec((1, 16, 16), 17)


def tiny(spec: DataSpec = SPEC, steps: int = 0, **params: Any) -> ProGAN:
    torch.manual_seed(0)
    model = build("gan/progan", spec, {"width": 4, "critic_width": 4, "latent": 6, "grow": 2, **params})
    assert isinstance(model, ProGAN)
    model.critic_steps.fill_(steps)
    return model.double()


def batch(n: int = 8, spec: DataSpec = SPEC) -> Batch:
    draws = torch.Generator().manual_seed(0)
    return Batch(torch.rand(n, *spec.shape, generator=draws, dtype=torch.float64) * 2 - 1)


def seed(number: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_each_resolution_is_learnt_then_the_next_one_faded_in() -> None:
    model, seen = tiny(), []
    for _ in range(10):
        seen.append(model.shares(now=True))
        list(model.updates(batch(), generator=seed()))
    low, first, middle, second, full = [1.0], [0.5, 0.5], [0.0, 1.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]
    assert seen == [low, low, first, middle, middle, middle, second, full, full, full]
    assert tiny().shares() == [1.0, 0.0, 0.0] and tiny(grow=0).shares() == full


@pytest.mark.parametrize(
    ("shape", "doublings", "low"),
    [
        ((1, 28, 28), 2, (7, 7)),
        ((1, 8, 8), 1, (4, 4)),
        ((1, 12, 12), 1, (6, 6)),
        ((3, 32, 32), 3, (4, 4)),
        ((1, 20, 12), 1, (10, 6)),
        ((1, 7, 7), 0, (7, 7)),
    ],
)
def test_images_are_halved_while_they_can_be(shape: tuple[int, ...], doublings: int, low: tuple[int, int]) -> None:
    spec = DataSpec(shape)
    model = tiny(spec)
    assert model.doublings == doublings
    sizes = []
    for k in range(doublings + 1):
        model.critic_steps.fill_(4 * k)
        with torch.no_grad():
            sizes.append(tuple(model.generator[0](torch.randn(2, 6).double(), model.shares(now=True)).shape))
    assert sizes == [(2, shape[0], low[0] << k, low[1] << k) for k in range(doublings + 1)]


def test_an_image_that_is_faded_in_is_a_mixture_of_both_heads() -> None:
    growing, code = tiny().generator[0], torch.randn(3, 6, dtype=torch.float64)
    low = growing.blocks[0](code)
    coarse, fine = growing.heads[0](low), growing.heads[1](growing.blocks[1](low))
    for share in (0.0, 0.3, 1.0):
        expected = ((1 - share) * double(coarse) + share * fine).tanh()
        torch.testing.assert_close(growing(code, [1 - share, share]), expected)


def test_the_critic_begins_a_resolution_with_what_it_knows_and_ends_without_it() -> None:
    """At share 0 it gives what it gave of the halved image; at 1 the tail of the coarser image is out of use."""
    shrinking, x = tiny().critic[0], batch().x
    torch.testing.assert_close(shrinking(x, [0.0, 1.0, 0.0]), shrinking(halve(x), [0.0, 1.0]))
    before = shrinking(x, [0.0, 0.0, 1.0])
    with torch.no_grad():
        shrinking.tails[1][0].weight.fill_(math.nan)
    assert torch.equal(shrinking(x, [0.0, 0.0, 1.0]), before)


class Flat(nn.Module):
    """Features that are the pixels; remembers the images that it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, shares: list[float]) -> Tensor:
        self.seen.append(x.detach())
        return x.flatten(1)


def linear(steps: int, side: int, **params: Any) -> tuple[ProGAN, Flat, Tensor]:
    """A model with so many steps behind it, whose critic is the linear function x·w of that resolution."""
    model, flat = tiny(steps=steps, **params), Flat()
    last = nn.Linear(side**2, 1, bias=False).double()
    model.critic = nn.Sequential(flat, last)
    return model, flat, last.weight[0].detach()


@pytest.mark.parametrize(("steps", "side"), [(0, 4), (2, 8), (4, 8), (6, 16), (8, 16)])
def test_the_game_is_played_at_the_resolution_of_now(steps: int, side: int) -> None:
    model, flat, weight = linear(steps, side, r1=0.3, r1_every=2)
    (first, critic), (second, generator) = model.updates(batch(), generator=seed())
    real, fake, again = flat.seen
    assert (first, second) == ("critic", "generator") and torch.equal(fake, again)
    expected = batch().x
    while expected.shape[-1] > side:
        expected = functional.avg_pool2d(expected, 2)
    if steps in (2, 6):  # the first of two steps that fade: half of what is new is seen
        blurred = functional.avg_pool2d(expected, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected = (expected + blurred) / 2
    torch.testing.assert_close(real, expected)
    real_score, fake_score = real.flatten(1) @ weight, fake.flatten(1) @ weight
    value = real_score.sigmoid().log().mean() + (1 - fake_score.sigmoid()).log().mean()
    penalty = 0.3 / 2 * 2 * weight.square().sum()  # of a linear critic, whose slope is w; twice as strong
    assert critic["loss"].item() == pytest.approx((penalty - value).item(), rel=1e-9)
    assert generator["loss"].item() == pytest.approx(-fake_score.sigmoid().log().mean().item(), rel=1e-9)


def test_the_penalty_comes_every_few_steps() -> None:
    model = tiny(r1_every=3)
    found = ["r1" in dict(model.updates(batch(), generator=seed()))["critic"] for _ in range(5)]
    assert found == [True, False, False, True, False]
    assert "r1" not in dict(tiny(r1=0.0).updates(batch(), generator=seed()))["critic"]


def test_what_has_not_grown_is_not_trained_and_all_is_in_the_end() -> None:
    model, seen = tiny(), []
    for _ in range(8):
        now = set()
        for group, terms in model.updates(batch(), generator=seed()):
            parameters = model.groups()[group]
            found = torch.autograd.grad(terms["loss"], parameters, allow_unused=True)
            now |= {id(p) for p, slope in zip(parameters, found, strict=True) if slope is not None and slope.any()}
        seen.append({name for name, p in model.named_parameters() if id(p) in now})
    assert not any(name.startswith(("generator.0.blocks.1", "critic.0.blocks.1")) for name in seen[0])
    assert any(name.startswith("generator.0.blocks.2") for name in seen[7])
    assert "generator.0.heads.0.weight" in seen[0] and "generator.0.heads.0.weight" not in seen[3]
    assert set().union(*seen) == {name for name, _ in model.named_parameters()}


def test_samples_are_of_full_size_from_the_start() -> None:
    model = tiny().eval()
    with torch.inference_mode():
        early = model.sample(2, generator=seed())
        model.critic_steps.fill_(100)
        late = model.sample(2, generator=seed())
    assert early.shape == late.shape == (2, *SPEC.shape)
    repeated = early[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(early, repeated), "a coarse image's pixels"
    assert not torch.equal(late[:, :, ::2], late[:, :, 1::2])


def test_codes_on_a_sphere_are_not_truncated() -> None:
    model = tiny(grow=0).eval()
    with torch.inference_mode():
        code = torch.randn(3, 6, generator=seed(), dtype=torch.float64)
        torch.testing.assert_close(model.decode(0.5 * code), model.decode(code))
        assert torch.equal(model.sample(3, generator=seed(), truncation=1.0), model.decode(code))
    with pytest.raises(ValueError, match="on a sphere"):
        model.sample(3, generator=seed(), truncation=0.5)


def test_growing_goes_on_where_a_training_was_interrupted(tmp_path: Any) -> None:
    stored = np.random.default_rng(0).integers(17, size=(32, 1, 16, 16)).astype(np.uint8)
    config = Train(steps=9, batch_size=8, learning_rate=1e-2, ema=0.9)
    options: dict[str, Any] = {"steps": 9, "seed": 0, "device": torch.device("cpu"), "log_every": 1}
    labels = np.zeros(32, np.int64)
    whole = train(tiny().float(), stored, labels, config, **options).model
    path = tmp_path / "checkpoint.safetensors"

    def stop(row: dict[str, float], _: Any) -> None:
        if row["step"] == 7:  # while the full resolution is faded in; the last checkpoint is that of step 6
            raise KeyboardInterrupt

    often: dict[str, Any] = {"checkpoint": path, "checkpoint_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train(tiny().float(), stored, labels, config, **options, **often, on_log=stop)
    again = train(tiny(steps=5).float(), stored, labels, config, **options, **often).model
    assert isinstance(again, ProGAN) and int(again.critic_steps) == 9
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_doubling_starts_with_he_s_variance_and_weights_of_variance_one() -> None:
    torch.manual_seed(0)
    layer = Double(64, 64)
    made = layer(torch.randn(16, 64, 12, 12))[..., 2:-2, 2:-2]  # the border sees zeros
    assert made.var().item() == pytest.approx(2.0, rel=0.1)  # √2 makes up for the leaky ReLU
    assert layer.weight.std().item() == pytest.approx(1.0, rel=0.05)
