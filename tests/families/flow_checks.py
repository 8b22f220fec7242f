"""What the tests of flows share: random weights, log-determinants by autograd, masses, and short trainings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genus.config import Train
from genus.contract import Batch, Family
from genus.data.sources import two_d
from genus.data.spec import DataSpec
from genus.training import train

Module = TypeVar("Module", bound=nn.Module)
CONTINUOUS, STORED = DataSpec((2, 1, 1), levels=0), DataSpec((2, 1, 1), levels=48)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(module: Module, scale: float = 0.3) -> Module:
    """In float64, away from the identity that a flow starts at, where wrong Jacobians would pass."""
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            parameter.add_(scale * torch.randn(parameter.shape, generator=seeded(k)))
    return module.double()


def log_det_by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x).flatten(), x)
    return jacobian.reshape(x.numel(), x.numel()).slogdet().logabsdet


def assert_bijective(layer: Callable, inverse: Callable[[Tensor], Tensor], x: Tensor, least: float = 0.1) -> None:
    """``layer`` of one example: its log-determinant is autograd's, ``inverse`` undoes it, both to 1e-9."""
    y, log_det = layer(x)
    assert abs(log_det).item() > least, "the test says nothing of a layer that changes no volume"
    assert abs(log_det_by_autograd(lambda x: layer(x)[0], x) - log_det).item() <= 1e-9
    assert (inverse(y) - x).abs().max() <= 1e-9


def assert_bijective_flow(model: Any, least: float = 0.05) -> None:
    """``flow`` and ``unflow`` of a flow of scales, whose code comes in parts."""
    y = torch.randn(1, *model.spec.shape, dtype=torch.float64, generator=seeded(3))

    def coded(y: Tensor) -> tuple[Tensor, Tensor]:
        latents, log_det = model.flow(y)
        return torch.cat([z.flatten(1) for z in latents], 1), log_det

    assert_bijective(coded, model.unflow, y, least)


@torch.no_grad()
def assert_plane_has_mass_one(model: Any, reach: int = 12, cells: int = 600) -> None:
    """A density of two numbers at random weights, by the midpoint rule, whose error is far below the 1e-3 asked."""
    side = ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells * 2 - 1) * reach
    x = torch.cartesian_prod(side, side)[:, :, None, None]
    mass = model.log_prob(Batch(x), generator=seeded()).exp().sum().item() * (2 * reach / cells) ** 2
    assert mass == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def assert_images_have_mass_one(model: Any, draws: int) -> None:
    """2x2 pixels of 2 levels: the sum over all 16 images of E_u[exp log_prob] is the integral of the density.

    The density that log_prob speaks of is smooth, and midpoints are not what it draws.
    """
    images = torch.tensor(list(itertools.product([0, 1], repeat=4))).view(16, 1, 2, 2)
    x = model.spec.to_float(images).double().repeat(draws, 1, 1, 1)
    probability = model.log_prob(Batch(x), generator=seeded(3)).exp().view(-1, 16).sum(1)
    error = probability.std() / len(probability) ** 0.5
    assert error < 0.02
    assert abs(probability.mean() - 1) < 4 * error


def assert_inverts_after_training(model: Any) -> None:
    """Sixty steps on ramps of 8x8 pixels; then, in float32, reals come back to 1e-5 and levels exactly."""
    ramp = torch.arange(8).view(1, 1, 8) * 30 + torch.randint(0, 40, (256, 1, 1, 1), generator=seeded(5))
    images = (ramp + torch.randint(0, 6, (256, 1, 8, 8), generator=seeded(6))).clamp(0, 255).byte().numpy()
    config = Train(steps=60, batch_size=32, learning_rate=4e-3, betas=(0.9, 0.99))
    result = train(model, images, np.zeros(256, np.int64), config, steps=60, seed=0, device=torch.device("cpu"))
    assert result.history[-1]["bits_per_dim"] < result.history[0]["bits_per_dim"] - 1
    x = model.spec.to_float(torch.from_numpy(images))
    with torch.no_grad():
        y = model.dequantise(x, generator=seeded(7))[0]
        code = torch.cat([z.flatten(1) for z in model.flow(y)[0]], 1)
        assert (model.unflow(code) - y).abs().max() <= 1e-5
        assert torch.equal(model.spec.to_levels(model.decode(model.encode(x))), model.spec.to_levels(x))


def trained_on_moons(model: Family) -> tuple[Any, Tensor, float]:
    """A hundred steps on two moons: the model, new examples, and what is left of what there is to be learned.

    Float32 codes must come back to their levels.
    """
    points = two_d.draw("two_moons", 20_000, 48, 0)
    config = Train(steps=100, batch_size=256, learning_rate=4e-3, clip=5.0)
    labels = np.zeros(len(points), np.int64)
    found: Any = train(model, points, labels, config, steps=100, seed=0, device=torch.device("cpu")).model
    truth = two_d.truth("two_moons", 48)
    entropy = -(truth[truth > 0] * np.log(truth[truth > 0])).sum()
    with torch.inference_mode():
        x = STORED.to_float(torch.from_numpy(two_d.draw("two_moons", 2000, 48, 1)))
        nats = -found.log_prob(Batch(x), generator=seeded()).mean().item()
        assert torch.equal(STORED.to_levels(found.decode(found.encode(x))), STORED.to_levels(x))
    return found, x, (nats - entropy) / (2 * math.log(48) - entropy)


def assert_temperature_matters(model: Any) -> None:
    """At zero there is one image, at one there are many."""
    with torch.no_grad():
        cold = model.sample(4, generator=seeded(8), temperature=0.0)
        warm = model.sample(4, generator=seeded(8))
    assert (cold == cold[:1]).all()
    assert warm.std(0).max() > 0


def assert_refuses_what_is_no_example(model: Any) -> None:
    """NaN, and stored levels outside [-1, 1], by density and code alike."""
    asked = (lambda x: model.log_prob(Batch(x), generator=seeded(9)), model.encode)
    for value, says in ((math.nan, "NaN"), *([(1.5, "-1, 1")] if model.spec.levels else [])):
        for ask in asked:
            with pytest.raises(ValueError, match=says):
                ask(torch.full((1, *model.spec.shape), value))
