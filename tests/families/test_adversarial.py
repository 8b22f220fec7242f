"""The adversarial losses: each against its paper's formula in float64, its remedies, its order of steps, its labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genus.config import Train
from genus.contract import Batch, Conditional, Samples, build, family_class, family_names
from genus.data.spec import DataSpec
from genus.families.gan._adversarial import Adversarial, deal, slopes
from genus.families.gan.wgan import WGAN
from genus.training import train

ALL = [name for name in family_names() if issubclass(family_class(name), Adversarial)]
IMAGES = DataSpec((1, 8, 8), 17, tuple("abc"))


def tiny(family: str, spec: DataSpec = IMAGES, **params: Any) -> Adversarial:
    torch.manual_seed(0)
    model = build(family, spec, {"width": 8, "critic_width": 8, "latent": 8, **params})
    assert isinstance(model, Adversarial)
    return model


def batch(n: int = 8, spec: DataSpec = IMAGES, dtype: torch.dtype = torch.float64) -> Batch:
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(n, *spec.shape, generator=draws, dtype=dtype) * 2 - 1
    return Batch(x, torch.randint(3, (n,), generator=draws))


def linear(family: str, **params: Any) -> tuple[Adversarial, Tensor]:
    """A model whose critic is the linear function x·w in float64, and w."""
    model = tiny(family, **params).double()
    model.critic = nn.Sequential(nn.Flatten(), nn.Linear(IMAGES.dims, 1, bias=False)).double()
    weight = model.critic[-1].weight
    assert isinstance(weight, Tensor)
    return model, weight[0]


def losses(model: Adversarial, x: Batch) -> tuple[list[tuple[str, dict[str, float]]], list[Tensor]]:
    """What a round of updates asks for, without steps; and the fakes that the generator made, in turn."""
    fakes: list[Tensor] = []
    handle = model.generator.register_forward_hook(lambda _, __, made: fakes.append(made.detach().flatten(1)))
    seen = [
        (group, {name: value.item() for name, value in terms.items()})
        for group, terms in model.updates(x, generator=torch.Generator().manual_seed(1))
    ]
    handle.remove()
    return seen, fakes


def logits(weight: Tensor, x: Batch, fakes: list[Tensor]) -> tuple[Tensor, Tensor]:
    return (x.x.flatten(1) @ weight).detach(), (fakes[0] @ weight).detach()


@pytest.mark.parametrize("game", ["non-saturating", "minimax"])
def test_gan(game: str) -> None:
    model, weight = linear("gan/gan", game=game)
    seen, fakes = losses(model, batch())
    real, fake = (score.sigmoid() for score in logits(weight, batch(), fakes))
    value = real.log().mean() + (1 - fake).log().mean()  # equation 1
    wanted = (1 - fake).log().mean() if game == "minimax" else -fake.log().mean()
    assert [group for group, _ in seen] == ["critic", "generator"]
    assert seen[0][1]["loss"] == pytest.approx(-value.item(), rel=1e-9)
    assert seen[1][1]["loss"] == pytest.approx(wanted.item(), rel=1e-9)


def test_the_minimax_slope_vanishes_where_fakes_are_told_and_the_other_does_not() -> None:
    """Section 3: at D(G(z)) = s(-20) the slopes in the score are s(-20) and 1 - s(-20)."""
    found = {}
    for game in ("minimax", "non-saturating"):
        model, _ = linear("gan/gan", game=game)
        model.critic = nn.Sequential(nn.Flatten(), Shifted(-20.0))
        model.generator = nn.Sequential(Movable())
        *_, (_, terms) = model.updates(batch(), generator=torch.Generator())
        (slope,) = torch.autograd.grad(terms["loss"], list(model.generator.parameters()))
        found[game] = slope.sum().abs().item()
    assert found["minimax"] == pytest.approx(math.exp(-20) / (1 + math.exp(-20)), rel=1e-6)
    assert found["non-saturating"] == pytest.approx(1.0, rel=1e-6)


class Shifted(nn.Module):
    """The mean over an example's numbers, moved."""

    def __init__(self, by: float):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True) + self.by


class Movable(nn.Module):
    """Gives its parameter, whatever the code."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1, 8, 8, dtype=torch.float64))

    def forward(self, code: Tensor) -> Tensor:
        return self.value.expand(len(code), 1, 8, 8)


@pytest.mark.parametrize("targets", [(0.0, 1.0, 1.0), (-1.0, 1.0, 0.0)])
def test_lsgan(targets: tuple[float, float, float]) -> None:
    model, weight = linear("gan/lsgan", targets=targets)
    seen, fakes = losses(model, batch())
    (a, b, c), (real, fake) = targets, logits(weight, batch(), fakes)
    assert seen[0][1]["loss"] == pytest.approx(((real - b) ** 2 + (fake - a) ** 2).mean().item() / 2, rel=1e-9)
    assert seen[1][1]["loss"] == pytest.approx(((fake - c) ** 2).mean().item() / 2, rel=1e-9)


def test_wgan_takes_critic_steps_on_shares_of_the_batch_and_clips_after_each() -> None:
    model, weight = linear("gan/wgan", n_critic=3, clip=0.02)
    x = batch(12)
    order, largest = [], []
    start = weight.detach().clone()
    fakes: list[Tensor] = []
    handle = model.generator.register_forward_hook(lambda _, __, made: fakes.append(made.detach().flatten(1)))
    for group, terms in model.updates(x, generator=torch.Generator().manual_seed(1)):
        largest.append(weight.abs().max().item())
        order.append((group, terms["loss"].item()))
    handle.remove()
    assert [group for group, _ in order] == ["critic"] * 3 + ["generator"]
    assert largest[0] == start.abs().max() > 0.02 and set(largest[1:]) == {0.02}
    weights = [start, *[start.clamp(-0.02, 0.02)] * 3]
    for k in range(3):
        estimate = (x.x.flatten(1)[k::3] @ weights[k]).mean() - (fakes[0][k::3] @ weights[k]).mean()  # equation 3
        assert order[k][1] == pytest.approx(-estimate.item(), rel=1e-9)
    assert order[3][1] == pytest.approx(-(fakes[1] @ weights[3]).mean().item(), rel=1e-9) and len(fakes[1]) == 4


def test_wgan_keeps_the_critics_weights_within_c() -> None:
    for spec in (IMAGES, DataSpec((2, 1, 1), 17)):
        model = tiny("gan/wgan", spec, clip=0.01)
        assert isinstance(model, WGAN)
        for _ in model.updates(batch(8, spec, torch.float32), generator=torch.Generator().manual_seed(0)):
            pass
        sines = 2 if spec.flat else 0  # weight and phase of the features, free
        assert sum(p.abs().max() > 0.01 for p in model.groups()["critic"]) == sines


def test_the_critic_of_a_line_finds_the_wasserstein_distance() -> None:
    """Between points at 0 and at d the distance is d, and of slopes up to K a critic finds K d: here K = c."""
    model = build("gan/wgan", DataSpec((1, 1, 1), levels=0), {"n_critic": 1, "clip": 0.5})
    assert isinstance(model, WGAN)
    model.critic = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False)).double()
    model.generator = nn.Sequential(At(-0.8))
    x = Batch(torch.zeros(4, 1, 1, 1, dtype=torch.float64))
    for _ in range(60):
        for group, terms in model.updates(x, generator=torch.Generator()):
            if group == "critic":
                estimate = terms["wasserstein"].item()
                (slope,) = torch.autograd.grad(terms["loss"], model.critic[-1].weight)
                model.critic[-1].weight.data -= 0.1 * slope
    assert estimate == pytest.approx(0.5 * 0.8, rel=1e-9)


class At(nn.Module):
    def __init__(self, where: float):
        super().__init__()
        self.where = nn.Parameter(torch.tensor(where, dtype=torch.float64))

    def forward(self, code: Tensor) -> Tensor:
        return self.where.expand(len(code), 1, 1, 1)


def test_wgan_gp() -> None:
    model, weight = linear("gan/wgan_gp", n_critic=2, penalty=7.0)
    seen, fakes = losses(model, batch())
    assert [group for group, _ in seen] == ["critic", "critic", "generator"]
    norm = weight.detach().norm()  # a linear critic's slope is w, wherever it is taken
    for k in range(2):
        estimate = ((batch().x.flatten(1)[k::2] - fakes[0][k::2]) @ weight).mean()
        expected = 7 * (norm - 1) ** 2 - estimate  # equation 3
        assert seen[k][1]["loss"] == pytest.approx(expected.item(), rel=1e-9)
        assert seen[k][1]["slope"] == pytest.approx(norm.item(), rel=1e-9)


class Quadratic(nn.Module):
    """½ |x|²: its slope at x is x itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.square().sum(1, keepdim=True) / 2


def test_wgan_gp_takes_the_slope_between_real_and_fake() -> None:
    """With all reals at r and all fakes at f on one line the slope's norm is uniform between |r| and |f|."""
    model = tiny("gan/wgan_gp", n_critic=1).double()
    model.critic = nn.Sequential(nn.Flatten(), Quadratic())
    model.generator = nn.Sequential(Movable())  # at 0
    n = 4000
    x = Batch(torch.full((n, 1, 8, 8), 0.5, dtype=torch.float64))  # |r| = 4
    (_, terms), _ = model.updates(x, generator=torch.Generator().manual_seed(0))
    assert terms["slope"].item() == pytest.approx(2.0, abs=4 * 4 / math.sqrt(12 * n))  # four standard errors
    penalty = (terms["loss"] + terms["wasserstein"]).item() / 10
    assert penalty == pytest.approx((3**3 + 1) / 12, abs=0.15)  # E(U - 1)², U uniform on [0, 4]


def test_dragan() -> None:
    model, weight = linear("gan/dragan", penalty=3.0, slope=2.0)
    seen, fakes = losses(model, batch())
    real, fake = (score.sigmoid() for score in logits(weight, batch(), fakes))
    expected = 3 * (weight.detach().norm() - 2) ** 2 - real.log().mean() - (1 - fake).log().mean()
    assert seen[0][1]["loss"] == pytest.approx(expected.item(), rel=1e-9)
    assert seen[1][1]["loss"] == pytest.approx(-fake.log().mean().item(), rel=1e-9)


def test_dragan_takes_the_slope_around_the_data() -> None:
    """At x = ±a, of standard deviation a, the slope of ½|x|² is x + δ with E|x + δ|² = D a² (1 + spread²)."""
    model = tiny("gan/dragan", spread=0.5).double()
    model.critic = nn.Sequential(nn.Flatten(), Quadratic())
    signs = torch.where(torch.arange(4000) % 2 == 0, 0.6, -0.6).double()
    x = Batch(signs.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone())
    (_, terms), _ = model.updates(x, generator=torch.Generator().manual_seed(0))
    assert terms["slope"].item() == pytest.approx(0.6 * math.sqrt(64 * 1.25), rel=0.01)  # the norm hardly varies


@pytest.mark.parametrize("family", ["gan/wgan_gp", "gan/dragan"])
def test_penalties_are_lighter_for_vectors_unless_they_are_given(family: str) -> None:
    flat = DataSpec((2, 1, 1), 17)
    penalties = [tiny(family, spec, **params).penalty for spec in (IMAGES, flat) for params in ({}, {"penalty": 3.0})]
    assert penalties == [10.0, 3.0, 0.1, 3.0]


def test_r3gan() -> None:
    model, weight = linear("gan/r3gan", gamma=0.3, every=1)
    seen, fakes = losses(model, batch())
    real, fake = logits(weight, batch(), fakes)
    square = weight.detach().square().sum()
    expected = -(real - fake).sigmoid().log().mean() + 0.3 / 2 * 2 * square
    assert seen[0][1]["loss"] == pytest.approx(expected.item(), rel=1e-9)
    assert seen[0][1]["r1"] == seen[0][1]["r2"] == pytest.approx(square.item(), rel=1e-9)
    assert seen[1][1]["loss"] == pytest.approx(-(fake - real).sigmoid().log().mean().item(), rel=1e-9)


def test_an_untrained_residual_block_is_the_identity() -> None:
    from genus.families.gan.r3gan import Block

    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(Block(8, 1.0)(x), x)


def test_slopes_are_each_examples_own() -> None:
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(slopes(x.square().sum(1), x), 2 * x)


@pytest.mark.parametrize(
    ("family", "params"),
    [
        ("gan/wgan_gp", {}),
        ("gan/wgan_gp", {"norm": "none"}),
        ("gan/dragan", {"norm": "layer"}),
        ("gan/r3gan", {}),
    ],
)
@pytest.mark.parametrize("spec", [IMAGES, DataSpec((2, 1, 1), 17)], ids=["image", "vector"])
def test_critics_without_batch_norm_judge_each_example_by_itself(
    family: str, params: dict[str, Any], spec: DataSpec
) -> None:
    model = tiny(family, spec, **params).double()
    x = batch(6, spec).x
    torch.testing.assert_close(model.critic(x)[:2], model.critic(x[:2]), rtol=1e-9, atol=1e-12)


def test_batch_norm_is_refused_where_each_example_has_a_slope_of_its_own() -> None:
    with pytest.raises(ValueError, match="layer or none"):
        tiny("gan/wgan_gp", norm="batch")
    for family in ("gan/wgan", "gan/wgan_gp", "gan/dragan"):
        with pytest.raises(ValueError, match="batch, layer or none"):
            tiny(family, norm="instance")


def test_another_game_is_refused() -> None:
    with pytest.raises(ValueError, match="minimax or non-saturating"):
        tiny("gan/gan", game="zero-sum")


def test_minibatches_are_dealt_so_that_shares_of_a_batch_deal_alike() -> None:
    x, y = torch.arange(24), torch.arange(24) * 10
    whole = deal(3, x, None, y)
    assert [part[0].tolist() for part in whole] == [list(range(k, 24, 3)) for k in range(3)]
    assert all(part[1] is None and torch.equal(part[2], 10 * part[0]) for part in whole)
    shares = [deal(3, x[:12]), deal(3, x[12:])]  # of two processes
    assert all(torch.equal(whole[k][0], torch.cat([share[k][0] for share in shares])) for k in range(3))
    assert [len(part[0]) for part in deal(5, torch.arange(14))] == [5, 5, 4] and len(deal(5, torch.arange(1))) == 1


@pytest.mark.parametrize("family", ALL)
def test_asks_for_classes_only_where_it_is_to(family: str) -> None:
    model = tiny(family)
    assert isinstance(model, Samples) and not isinstance(model, Conditional)
    with pytest.raises(ValueError, match="no classes"):
        tiny(family, DataSpec((1, 8, 8), 17), conditional=True)
    asked = tiny(family, conditional=True)
    assert isinstance(asked, Conditional) and asked.labels == 3 and asked.latent == 11
    for group, terms in asked.updates(batch(8, dtype=torch.float32), generator=torch.Generator().manual_seed(0)):
        found = torch.autograd.grad(terms["loss"], asked.groups()[group], allow_unused=True)  # not all has grown
        for parameter, slope in zip(asked.groups()[group], found, strict=True):
            parameter.data -= 0.01 * (0 if slope is None else slope)
    names = {id(p) for group in asked.groups().values() for p in group}
    assert names == {id(p) for p in asked.parameters()} and asked.label_vectors is not None
    assert asked.label_vectors.weight.abs().sum() > 0, "the critic learns what the classes are"
    asked.eval()
    with torch.inference_mode():
        drawn = [
            asked.sample(6, generator=torch.Generator().manual_seed(3), cond=torch.full((6,), label))
            for label in range(3)
        ]
        code = torch.randn(6, 11, generator=torch.Generator().manual_seed(3))
        named = code[:, 8:].argmax(1)
        free = asked.sample(6, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(free, torch.stack([drawn[int(k)][i] for i, k in enumerate(named)]))  # as the code says


@pytest.mark.parametrize("family", ALL)
def test_losses_are_taken_in_full_precision_where_networks_are_not(family: str) -> None:
    x = batch(16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = list(tiny(family).updates(x, generator=torch.Generator().manual_seed(0)))
    exact = list(tiny(family).updates(x, generator=torch.Generator().manual_seed(0)))
    for (group, terms), (_, wanted) in zip(rounded, exact, strict=True):
        assert terms["loss"].dtype == torch.float32, group
        torch.testing.assert_close(terms["loss"], wanted["loss"], rtol=0.05, atol=0.05)


def test_learns_which_class_is_which() -> None:
    """Two classes of vectors, at -½ and ½: after 150 steps almost all that is asked for lies on its side."""
    spec = DataSpec((2, 1, 1), 17, ("low", "high"))
    random = np.random.default_rng(0)
    labels = random.integers(2, size=2000)
    stored = (random.integers(-1, 2, (2000, 2, 1, 1)) + np.where(labels, 12, 4)[:, None, None, None]).astype(np.uint8)
    model = tiny("gan/r1", spec, conditional=True, width=16, critic_width=16)
    config = Train(steps=150, batch_size=64, learning_rate=1e-2, betas=(0.5, 0.99))
    train(model, stored, labels, config, steps=150, seed=0, device=torch.device("cpu"))
    with torch.inference_mode():
        cond = torch.arange(400) % 2
        drawn = model.eval().sample(400, generator=torch.Generator().manual_seed(0), cond=cond)
    assert ((drawn.flatten(1).mean(1) > 0).long() == cond).float().mean() > 0.95
