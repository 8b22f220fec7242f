"""CycleGAN: its losses against the paper's formulas in float64, its pool of fakes, its domains, and a game it wins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genus.config import Train
from genus.contract import Batch, Samples, Translates
from genus.data.spec import DataSpec
from genus.families.gan.cyclegan import KEPT, CycleGAN
from genus.training import train

SPEC = DataSpec((1, 8, 8), 17, ("a", "b", "c"))


def tiny(**params: Any) -> CycleGAN:
    torch.manual_seed(0)
    return CycleGAN(SPEC, **{"width": 8, "critic_width": 8, "blocks": 1, "domains": ["a", "c"]} | params)


def batch(n: int = 12, dtype: torch.dtype = torch.float64) -> Batch:
    """Rows of the three classes in turn."""
    x = torch.rand(n, *SPEC.shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1
    return Batch(x, torch.arange(n) % 3)


class Affine(nn.Module):
    """A translator that is a x + b: all of the losses can be written down."""

    def __init__(self, scale: float, shift: float):
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (scale, shift))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift


class Mean(nn.Module):
    """A critic that says w times the mean of an image, [B, 1]."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.flatten(1).mean(1, keepdim=True)


def written(**params: Any) -> CycleGAN:
    model = tiny(**params)
    model.forth, model.back = Affine(0.5, 0.2), Affine(1.5, -0.1)  # type: ignore[assignment]
    model.critics = nn.ModuleList([Mean(2.0), Mean(-3.0)])
    return model


def test_losses_are_the_papers() -> None:
    """Equations 1 to 3 with least squares (section 4), and the identity loss of section 5.2; in numpy, not in torch."""
    model, given = written(cycle=7.0, identity=3.0, pool=0), batch()
    x, y = (given.x[given.cond == label].numpy() for label in (0, 2))
    fake_y, fake_x = 0.5 * x + 0.2, 1.5 * y - 0.1

    def mean(images: np.ndarray, weight: float) -> np.ndarray:
        return weight * images.reshape(len(images), -1).mean(1)

    adversarial = ((mean(fake_y, -3) - 1) ** 2).mean() + ((mean(fake_x, 2) - 1) ** 2).mean()
    cycle = np.abs(1.5 * fake_y - 0.1 - x).mean() + np.abs(0.5 * fake_x + 0.2 - y).mean()
    identity = np.abs(0.5 * y + 0.2 - y).mean() + np.abs(1.5 * x - 0.1 - x).mean()
    real = ((mean(x, 2) - 1) ** 2).mean() + ((mean(y, -3) - 1) ** 2).mean()
    fake = (mean(fake_x, 2) ** 2).mean() + (mean(fake_y, -3) ** 2).mean()
    wanted = {"adversarial": adversarial, "cycle": cycle, "identity": identity}
    wanted["loss"] = adversarial + 7 * cycle + 3 * identity

    (first, told), (second, critic) = model.updates(given, generator=torch.Generator().manual_seed(0))
    assert (first, second) == ("generator", "critic") and told.keys() == wanted.keys()
    for name, value in wanted.items():
        assert told[name].item() == pytest.approx(value, rel=1e-12), name
    assert critic["loss"].item() == pytest.approx((real + fake) / 2, rel=1e-12)


def test_each_group_is_taught_by_its_own_loss() -> None:
    """The critics' loss reaches no translator, and every parameter has one group."""
    model = tiny().double()
    groups = model.groups()
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    for group, terms in model.updates(batch(), generator=torch.Generator().manual_seed(0)):
        slopes = torch.autograd.grad(terms["loss"], groups[group], retain_graph=True)
        assert all(slope.abs().sum() > 0 for slope in slopes), group
        if group == "critic":
            others = torch.autograd.grad(terms["loss"], groups["generator"], allow_unused=True)
            assert all(slope is None for slope in others)


@pytest.mark.parametrize("missing", [0, 2])
def test_a_batch_without_a_domain_teaches_nothing(missing: int) -> None:
    """And fills no pool; the same steps are asked for as ever, which other processes may need."""
    model, given = tiny().double(), batch()
    assert given.cond is not None
    given = Batch(given.x, torch.where(given.cond == missing, 1, given.cond))
    asked = []
    for group, terms in model.updates(given, generator=torch.Generator().manual_seed(0)):
        terms["loss"].backward(inputs=model.groups()[group])
        asked.append(group)
    assert asked == ["generator", "critic"] and model.pooled.tolist() == [0, 0]
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    with pytest.raises(ValueError, match="the batch has no labels"):
        next(iter(model.updates(Batch(given.x), generator=torch.Generator())))


def test_the_pool_keeps_earlier_fakes_and_shows_them() -> None:
    """Until it is full all are kept and shown as they are; then half are swapped for one that is in it."""
    model = tiny(pool=4)
    first = torch.arange(4.0).view(4, 1, 1, 1).expand(4, *SPEC.shape)
    assert torch.equal(model._remember(1, first, torch.zeros(4, 2)), first)
    assert model.pooled.tolist() == [0, 4] and torch.equal(model.pool[1], first) and not model.pool[0].any()
    new = torch.full((2, *SPEC.shape), 9.0)
    shown = model._remember(1, new, torch.tensor([[0.7, 0.1], [0.2, 0.6]]))  # kept back; in place of 0.6 · 4
    assert shown[:, 0, 0, 0].tolist() == [9.0, 2.0] and model.pool[1, :, 0, 0, 0].tolist() == [0.0, 1.0, 9.0, 3.0]
    many = torch.arange(100.0, 2100.0).view(2000, 1, 1, 1).expand(2000, *SPEC.shape)
    draws = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    shown = model._remember(1, many, draws)
    old = (shown != many).flatten(1).any(1)
    assert abs(old.double().mean().item() - 0.5) < 4 * 0.5 / 2000**0.5, "half of them are earlier ones"
    assert len(shown[:, 0, 0, 0].unique()) == 2000, "none is shown twice"
    assert torch.equal(tiny(pool=0)._remember(0, new, torch.zeros(2, 2)), new)


def test_the_pool_is_resumed_with_the_weights() -> None:
    model, fresh = tiny(pool=6).double(), tiny(pool=6).double()
    for _ in model.updates(batch(), generator=torch.Generator().manual_seed(1)):
        pass
    assert model.pooled.tolist() == [4, 4]
    fresh.load_state_dict(model.state_dict())
    critics = []
    for each in (model, fresh):
        steps = dict(each.updates(batch(24), generator=torch.Generator().manual_seed(2)))
        critics.append(steps["critic"]["loss"].item())
    assert critics[0] == critics[1] and torch.equal(model.pool, fresh.pool)
    empty = dict(tiny(pool=6).double().updates(batch(24), generator=torch.Generator().manual_seed(2)))
    assert empty["critic"]["loss"].item() != critics[0], "what is in it is shown"


def test_translates_between_its_two_domains() -> None:
    model = tiny()
    assert isinstance(model, Translates) and not isinstance(model, Samples) and model.domains == (0, 2)
    with torch.inference_mode():
        there, back = (model.translate(batch().x.float(), to, generator=torch.Generator()) for to in (2, 0))
        assert torch.equal(there, model.forth(batch().x.float())) and torch.equal(back, model.back(batch().x.float()))
        # At the start an image is let through: what is added is small beside the contrast that is given away.
        assert (there - batch().x).abs().max() < 1 - KEPT + 0.02 and there.abs().max() < 1
    with pytest.raises(ValueError, match="translates to class 0 or 2, not 1"):
        model.translate(batch().x.float(), 1, generator=torch.Generator())


@pytest.mark.parametrize(
    ("spec", "domains", "line"),
    [
        (SPEC, ["a", "d"], "right would be two of a, b, c, not a, d"),
        (SPEC, ["a", "a"], "not a, a"),
        (SPEC, ["a"], "not a$"),
        (DataSpec((1, 8, 8), 17), [], "no two classes"),
        (DataSpec((1, 4, 4), 17, ("a", "b")), [], "multiples of 4 and at least 8"),
        (DataSpec((1, 10, 8), 17, ("a", "b")), [], "multiples of 4 and at least 8"),
    ],
)
def test_what_it_cannot_translate_is_named(spec: DataSpec, domains: list[str], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        CycleGAN(spec, domains=domains)
    assert CycleGAN(SPEC, width=8, critic_width=8).domains == (0, 1)


def test_learns_to_move_a_bar() -> None:
    """A bar on the left against a bar on the right, and at an unseen height: only the side is to change."""
    random = np.random.default_rng(0)
    stored, labels = np.zeros((600, 1, 8, 8), np.uint8), np.arange(600) % 2
    for image, label in zip(stored, labels, strict=True):
        top = random.integers(5)
        image[0, top : top + 4, 1 + 4 * label : 3 + 4 * label] = 16
    torch.manual_seed(0)
    model = CycleGAN(DataSpec((1, 8, 8), 17, ("left", "right")), width=16, critic_width=16, blocks=1)
    rates = {"generator": 4e-3, "critic": 2e-3}
    config = Train(steps=60, batch_size=16, learning_rate=rates, betas=(0.5, 0.99), ema=0.9)
    model = train(model, stored, labels, config, steps=60, seed=0, device=torch.device("cpu")).model
    x = model.spec.to_float(torch.from_numpy(stored[labels == 0][:40]))
    with torch.inference_mode():
        there = model.translate(x, 1, generator=torch.Generator())
        back = model.translate(there, 0, generator=torch.Generator())
    light = (there + 1).clamp(min=0)
    right = light[..., 4:].sum((1, 2, 3)) / light.sum((1, 2, 3))
    assert right.mean() > 0.8, "light has moved to the right"
    assert (back - x).abs().mean() / 2 < 0.1
    heights = torch.stack([_height(x + 1), _height(light)])
    assert torch.corrcoef(heights)[0, 1] > 0.7, "and kept its height"


def _height(light: Tensor) -> Tensor:
    """The mean row of the light in each image [N, 1, H, W]."""
    return (light.sum((1, 3)) * torch.arange(light.shape[2])).sum(1) / light.sum((1, 2, 3))
