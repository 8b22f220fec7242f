"""R1: the penalty against a closed form, the order of the updates, the lazy schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genus.contract import Batch, build
from genus.data.spec import DataSpec
from genus.families.gan.r1 import R1, gradient_penalty


def tiny(**params: float) -> R1:
    torch.manual_seed(0)
    model = build("gan/r1", DataSpec((1, 8, 8), 17), {"width": 8, "critic_width": 8, "latent": 8, **params})
    assert isinstance(model, R1)
    return model


def batch(n: int = 8) -> Batch:
    return Batch(torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def test_penalty_of_a_linear_critic_is_its_squared_norm() -> None:
    critic = nn.Linear(12, 1).double()
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(critic(x), x)
    assert penalty.item() == pytest.approx(critic.weight.square().sum().item(), rel=1e-12)
    (slope,) = torch.autograd.grad(penalty, critic.weight)  # d|w|²/dw: the penalty can be differentiated again
    torch.testing.assert_close(slope, 2 * critic.weight.detach())


def test_penalty_of_a_quadratic_critic_depends_on_x() -> None:
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(x.square().sum(1), x)  # gradient 2x
    assert penalty.item() == pytest.approx(4 * x.square().sum(1).mean().item(), rel=1e-12)


def test_updates_alternate_and_move_only_their_group() -> None:
    model = tiny()
    groups = model.groups()
    order = []
    for group, terms in model.updates(batch(), generator=torch.Generator().manual_seed(1)):
        order.append(group)
        before = {name: [p.detach().clone() for p in parameters] for name, parameters in groups.items()}
        slopes = torch.autograd.grad(terms["loss"], groups[group])
        with torch.no_grad():
            for parameter, slope in zip(groups[group], slopes, strict=True):
                parameter -= 0.01 * slope
        moved = {
            name: any(not torch.equal(p, q) for p, q in zip(parameters, before[name], strict=True))
            for name, parameters in groups.items()
        }
        assert moved == {name: name == group for name in groups}
    assert order == ["critic", "generator"]


def test_losses_are_the_papers() -> None:
    """Critic: -log D(x) - log(1 - D(G(z))); generator, non-saturating: -log D(G(z)), with D the sigmoid."""
    model = tiny(r1=0.0)
    updates = iter(model.updates(batch(), generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        fake = model.generator(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))
        real_score, fake_score = model.critic(batch().x), model.critic(fake)
    expected = -(real_score.sigmoid().log().mean() + (1 - fake_score.sigmoid()).log().mean())
    torch.testing.assert_close(next(updates)[1]["loss"].detach(), expected)
    torch.testing.assert_close(next(updates)[1]["loss"].detach(), -fake_score.sigmoid().log().mean())


def test_r1_comes_every_few_steps_that_many_times_as_strong() -> None:
    model = tiny(r1=2.0, r1_every=3)
    seen = []
    for _ in range(7):
        updates = iter(model.updates(batch(), generator=torch.Generator().manual_seed(3)))
        critic = next(updates)[1]
        seen.append("r1" in critic)
        if "r1" in critic:  # batch statistics alone normalise while training, so the same call gives the same scores
            steps = model.critic_steps.clone()
            model.r1 = 0.0
            plain = next(iter(model.updates(batch(), generator=torch.Generator().manual_seed(3))))[1]
            model.r1 = 2.0
            assert torch.equal(steps, model.critic_steps)
            expected = plain["loss"] + 2.0 / 2 * 3 * critic["r1"]
            torch.testing.assert_close(critic["loss"], expected)
        list(updates)
    assert seen == [True, False, False, True, False, False, True]


def test_the_r1_cycle_goes_on_where_it_was_saved() -> None:
    model, other = tiny(r1_every=3), tiny(r1_every=3)
    list(model.updates(batch(), generator=torch.Generator().manual_seed(4)))
    other.load_state_dict(model.state_dict())
    assert "r1" not in next(iter(other.updates(batch(), generator=torch.Generator().manual_seed(4))))[1]


def test_sizes_it_cannot_halve_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        R1(DataSpec((1, 10, 8)))
