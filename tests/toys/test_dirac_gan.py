"""The Dirac-GAN: data at 0, a generator that puts all at θ, a critic ψ x + b. What each game's updates do near 0.

Mescheder et al. 2018, "Which Training Methods for GANs do actually Converge?", arXiv:1801.04406, section 2: what
converges here need not elsewhere, but what does not converge here converges nowhere. One step of size h of each, in
turns, is linear near the equilibrium. With a = h f'(0), f' the slope of the loss, and a damping d = h γ of the critic,

    ψ ← (1 - d) ψ - a θ,    θ ← θ + a ψ,

whose eigenvalues have the product 1 - d: undamped, they lie on the unit circle and the game goes round for ever.
"""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genus.contract import Batch, build
from genus.data.spec import DataSpec
from genus.families.gan._adversarial import Adversarial

H = 0.1  # of both players


class Point(nn.Module):
    """A generator that gives θ, whatever its code."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, code: Tensor) -> Tensor:
        return self.theta.expand(len(code), 1, 1, 1)


def dirac(family: str, **params: Any) -> Adversarial:
    model = build(family, DataSpec((1, 1, 1), levels=0), params)
    assert isinstance(model, Adversarial)
    offset = model.critic[-1].bias is not None
    model.generator = nn.Sequential(Point())
    model.critic = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=offset)).double()
    return model


def stepped(model: Adversarial, state: Tensor) -> Tensor:
    """(ψ, θ, b) after one round of the family's own updates from (ψ, θ, b), by gradient descent."""
    linear, point = model.critic[-1], model.generator[0]
    assert isinstance(linear, nn.Linear) and isinstance(point, Point)
    with torch.no_grad():
        linear.weight.fill_(state[0])
        point.theta.fill_(state[1])
        if linear.bias is not None:
            linear.bias.fill_(state[2])
    batch = Batch(torch.zeros(8, 1, 1, 1, dtype=torch.float64))
    for group, terms in model.updates(batch, generator=torch.Generator().manual_seed(0)):
        moved = model.groups()[group]
        slopes = torch.autograd.grad(terms["loss"], moved)
        with torch.no_grad():
            for parameter, slope in zip(moved, slopes, strict=True):
                parameter -= H * slope
    offset = linear.bias[0] if linear.bias is not None else state[2]
    return torch.stack([linear.weight[0, 0], point.theta, offset]).detach()


def eigenvalues(model: Adversarial, offset: float) -> list[complex]:
    """Of the map (ψ, θ) to (ψ, θ) at the equilibrium, by central differences in float64: errors of about 1e-9."""
    rest, e = torch.tensor([0.0, 0.0, offset], dtype=torch.float64), 1e-5
    torch.testing.assert_close(stepped(model, rest), rest, rtol=0, atol=1e-12)  # it is an equilibrium
    columns = []
    for k in range(2):
        ahead, behind = rest.clone(), rest.clone()
        ahead[k] += e
        behind[k] -= e
        columns.append((stepped(model, ahead) - stepped(model, behind))[:2] / (2 * e))
    found = torch.linalg.eigvals(torch.stack(columns, 1)).tolist()
    return sorted(found, key=lambda value: value.imag)


def expected(a: float, d: float = 0.0, rounds: int = 1) -> list[complex]:
    """Of ψ ← (1 - d) ψ - a θ, ``rounds`` times, then θ ← θ + a ψ."""
    kept, moved = (1 - d) ** rounds, a * sum((1 - d) ** k for k in range(rounds))
    trace, determinant = kept + 1 - a * moved, kept  # ψ' = kept ψ - moved θ; θ' = θ + a ψ'
    root = cmath.sqrt(trace**2 / 4 - determinant)
    return sorted([trace / 2 - root, trace / 2 + root], key=lambda value: value.imag)


@pytest.mark.parametrize(
    ("family", "params", "offset", "a"),
    [
        ("gan/gan", {"game": "non-saturating"}, 0.0, H / 2),  # f(t) = log sigmoid(t): f'(0) = 1/2
        ("gan/gan", {"game": "minimax"}, 0.0, H / 2),  # the same slope at 0: they differ far from it
        ("gan/lsgan", {}, 0.5, H / 2),  # the critic's offset rests half-way between its targets 0 and 1
        ("gan/wgan", {"n_critic": 1, "clip": 10.0}, 0.0, H),
        ("gan/r3gan", {"gamma": 0.0}, 0.0, H / 2),  # pairing alone is no cure
    ],
)
def test_undamped_games_turn_on_the_unit_circle(family: str, params: dict[str, Any], offset: float, a: float) -> None:
    found = eigenvalues(dirac(family, **params), offset)
    for value, closed in zip(found, expected(a), strict=True):
        assert abs(value - closed) < 1e-7
        assert abs(abs(value) - 1) < 1e-7 and abs(value.imag) > 0.04


def test_more_critic_steps_do_not_damp_wgan() -> None:
    found = eigenvalues(dirac("gan/wgan", n_critic=2, clip=10.0), 0.0)  # of four examples each
    for value, closed in zip(found, expected(H, rounds=2), strict=True):
        assert abs(value - closed) < 1e-7 and abs(abs(value) - 1) < 1e-7


@pytest.mark.parametrize("gamma", [0.2, 1.0])
def test_r1_damps_at_the_rate_of_the_closed_form(gamma: float) -> None:
    model = dirac("gan/r1", r1=10 * gamma, r1_every=1)  # of vectors, γ is a tenth
    found = eigenvalues(model, 0.0)
    for value, closed in zip(found, expected(H / 2, H * gamma), strict=True):
        assert abs(value - closed) < 1e-7
    if gamma == 0.2:  # a turning approach: both shrink by the root of the product
        assert all(abs(abs(value) - math.sqrt(1 - H * gamma)) < 1e-7 for value in found)


def test_r1_and_r2_damp_twice() -> None:
    found = eigenvalues(dirac("gan/r3gan", gamma=2.0, every=1), 0.0)
    for value, closed in zip(found, expected(H / 2, 2 * H * 0.2), strict=True):
        assert abs(value - closed) < 1e-7 and abs(value) < 1 - 1e-2


def furthest(family: str, params: dict[str, Any], steps: int = 400, last: int = 150) -> float:
    """Largest |θ| in the last steps of a training that begins at θ = 1."""
    model, state, seen = dirac(family, **params), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), []
    for _ in range(steps):
        state = stepped(model, state)
        seen.append(abs(state[1].item()))
    return max(seen[-last:])


@pytest.mark.parametrize(
    ("family", "params", "low", "high"),
    [
        ("gan/gan", {"game": "minimax"}, 0.95, 1.0),
        ("gan/gan", {}, 0.3, 0.6),  # what is of second order draws it in, ever more slowly: as 1/√t
        ("gan/lsgan", {}, 0.2, 0.5),
        ("gan/wgan", {"n_critic": 1, "clip": 10.0}, 0.99, 1.01),
        ("gan/wgan_gp", {"n_critic": 1, "penalty": 1.0}, 0.5, 3.0),  # a slope of 1 is asked for where 0 would be right
        ("gan/dragan", {"penalty": 1.0}, 0.5, 5.0),
        ("gan/r1", {"r1": 10.0, "r1_every": 1}, 0.0, 1e-3),
        ("gan/r3gan", {"gamma": 5.0, "every": 1}, 0.0, 1e-3),
    ],
)
def test_what_is_left_of_a_start_at_1(family: str, params: dict[str, Any], low: float, high: float) -> None:
    assert low <= furthest(family, params) <= high
