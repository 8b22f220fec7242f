"""MeanFlow: its identity and its averages on Gaussian data, whose flow is known, and what it learns in a few steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genus.contract import Batch, Denoises, Walks, build
from genus.data.spec import DataSpec
from genus.evaluation.constraints import evaluations
from genus.evaluation.ode import log_prob
from genus.families.score.meanflow import MeanFlow

SPEC = DataSpec((1, 8, 8), 17)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(spec: DataSpec = SPEC, **params: Any) -> MeanFlow:
    torch.manual_seed(0)
    model = build("score/meanflow", spec, {"width": 8, "hidden": 16, **params})
    assert isinstance(model, MeanFlow)
    return model.eval()


def silent(**params: Any) -> MeanFlow:
    """One whose network says nothing: exact for N(0, sigma_data²)."""
    model = tiny(**params).double()
    torch.nn.init.zeros_(model.network.leave.bias)  # type: ignore[union-attr, arg-type]
    return model


def stirred(spec: DataSpec = SPEC) -> MeanFlow:
    """One whose network says something everywhere."""
    model, noise = tiny(spec).double(), seeded(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
    return model


def points(spec: DataSpec = SPEC, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.randn(n, *spec.shape, generator=seeded(2), dtype=torch.float64)
    r, t = torch.rand(2, n, generator=seeded(3), dtype=torch.float64).sort(0).values
    return z, r, t


def width(t: Tensor) -> Tensor:
    """Standard deviation at time t of the path from N(0, 0.7²) to N(0, 1)."""
    return (t**2 + (1 - t) ** 2 * 0.49).sqrt()[:, None, None, None]


def test_a_silent_network_is_the_average_velocity_of_gaussian_data() -> None:
    """The flow carries z in proportion to the width, so (t - r) u is what it moves; for r = t, the derivative."""
    model, (z, r, t) = silent(), points()
    moved = (t - r)[:, None, None, None] * model.velocity(z, r, t)
    torch.testing.assert_close(moved, z * (1 - width(r) / width(t)), rtol=1e-10, atol=1e-12)
    slope = (width(t + 1e-6) - width(t - 1e-6)) / 2e-6
    torch.testing.assert_close(model.velocity(z, t, t), z * slope / width(t), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_number_of_steps_is_exact_where_the_average_is(steps: int) -> None:
    model = silent(sigma_data=0.2).float()
    x = model.sample(400, generator=seeded(4), steps=steps)
    noise = torch.randn(400, *SPEC.shape, generator=seeded(4))
    torch.testing.assert_close(x, (0.2 * noise).clamp(-1, 1), atol=1e-5, rtol=0)
    assert evaluations(tiny(), seed=0, knobs={"steps": steps}) == steps


@pytest.mark.parametrize("spec", [SPEC, DataSpec((2, 1, 1), 17)], ids=["image", "vector"])
def test_acceleration_is_the_derivative_along_the_flow(spec: DataSpec) -> None:
    model, (z, r, t) = stirred(spec), points(spec)
    with torch.no_grad():
        v, step = model.velocity(z, t, t), 1e-5
        after, before = (model.velocity(z + h * v, r, t + h) for h in (step, -step))
    found = model.acceleration(z, r, t)
    assert (found - (after - before) / (2 * step)).abs().max() < 1e-6 * found.abs().max()
    assert found.abs().max() > 0.1


def test_acceleration_has_full_precision_under_autocast() -> None:
    model, (z, r, t) = stirred().float(), (part.float() for part in points())
    with torch.autocast("cpu", torch.bfloat16):
        found = model.acceleration(z, r, t)
        assert model.loss(Batch(z), generator=seeded())["loss"].isfinite()
    torch.testing.assert_close(found, model.acceleration(z, r, t))


def test_the_identity_holds_for_gaussian_data() -> None:
    """Equation 6: u = v - (t - r) du/dt."""
    model, (z, r, t) = silent(), points()
    expected = model.velocity(z, t, t) - (t - r)[:, None, None, None] * model.acceleration(z, r, t)
    torch.testing.assert_close(model.velocity(z, r, t), expected, rtol=1e-9, atol=1e-11)


def redrawn(model: MeanFlow, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, r, t and v as the loss draws them from the same seed."""
    draws = seeded(seed)
    r, t = (time.double() for time in model.times(len(x), draws))
    v = torch.randn(x.shape, generator=draws) - x
    return x + t[:, None, None, None] * v, r, t, v


def test_the_loss_and_its_gradient_are_the_papers() -> None:
    """Without weight, against autograd's own Jacobian-vector product; no gradient comes through the target."""
    model, x = stirred(), torch.rand(6, *SPEC.shape, generator=seeded(5), dtype=torch.float64) * 2 - 1
    model.apart, model.power = 0.5, 0.0
    terms = model.loss(Batch(x), generator=seeded(6))
    z, r, t, v = redrawn(model, x, 6)
    assert 0 < (r < t).sum() < 6
    bias = model.network.leave.bias
    direction = (model.velocity(z, t, t).detach(), torch.zeros_like(r), torch.ones_like(t))
    change = torch.autograd.functional.jvp(model.velocity, (z, r, t), direction)[1]
    expected = (model.velocity(z, r, t) - (v - (t - r)[:, None, None, None] * change).detach()).square().mean()
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms["squared"].item() == pytest.approx(expected.item(), rel=1e-6)
    slopes = [torch.autograd.grad(loss, bias)[0] for loss in (terms["loss"], expected)]  # type: ignore[arg-type]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=1e-9)


def test_the_weight_makes_every_example_count_the_same() -> None:
    model, x = stirred(), torch.rand(6, *SPEC.shape, generator=seeded(5), dtype=torch.float64) * 2 - 1
    assert model.power == 1 and model.loss(Batch(x), generator=seeded(6))["loss"].item() == pytest.approx(1, abs=0.01)
    assert tiny(DataSpec((2, 1, 1), 17)).power == 0


def test_its_flow_has_the_likelihood_of_a_gaussian() -> None:
    """Of continuous data N(0, 0.49) with the lowest noise on top, to what the prior at sigma = 24 leaves out."""
    spec = DataSpec((1, 4, 4), 0)
    torch.manual_seed(0)
    model = MeanFlow(spec, width=8, hidden=16).double().eval()
    torch.nn.init.zeros_(model.network.leave.bias)  # type: ignore[union-attr, arg-type]
    model.sigmas = [24.0, 0.02]
    assert isinstance(model, Denoises)
    x = 0.7 * torch.randn(10, 1, 4, 4, generator=seeded(6), dtype=torch.float64)
    found = log_prob(model, x, generator=seeded(), trace="exact", rtol=1e-5, atol=1e-5)
    var = 0.49 + 0.02**2
    expected = -0.5 * (x.square().flatten(1).sum(1) / var + 16 * math.log(2 * math.pi * var))
    assert (found.nats - expected).abs().max() < 16 * 0.49 / 24**2


def test_without_times_apart_it_is_flow_matching() -> None:
    """On N(0, 0.7²) a silent network's error is that of the best: the variance of v given z, 0.49 / width² a number."""
    model = silent(apart=0.0).float()
    x = 0.7 * torch.randn(4096, *SPEC.shape, generator=seeded(8))
    found = model.loss(Batch(x), generator=seeded(9))["squared"].item()
    t = redrawn(model, x, 9)[2]
    assert found == pytest.approx((0.49 / width(t) ** 2).mean().item(), rel=0.01)


def test_learns_to_sample_in_few_steps() -> None:
    """Points about (0.3, -0.4), with a spread of 0.1 where a silent network has 0.7."""
    spec, centre = DataSpec((2, 1, 1), 0), torch.tensor([0.3, -0.4])[:, None, None]
    model = tiny(spec, hidden=128, apart=0.5).train()
    optimiser = torch.optim.Adam(model.parameters())
    generator = seeded(10)
    for step in range(200):
        optimiser.param_groups[0]["lr"] = 4e-3 * (1 - step / 200)
        x = centre + 0.1 * torch.randn(128, *spec.shape, generator=generator)
        loss = model.loss(Batch(x), generator=generator)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for steps, spread in ((1, 0.5), (2, 0.2)):
        with torch.inference_mode():
            drawn = model.eval().sample(1000, generator=seeded(11), steps=steps)
        assert (drawn.mean(0) - centre).abs().max() < 0.1 and 0.05 < drawn.std(0).max() < spread


def test_a_trajectory_is_the_same_noise_in_more_and_more_steps() -> None:
    model = tiny()
    assert isinstance(model, Walks)
    frames = model.trajectory(3, frames=4, generator=seeded(12))
    for steps in (1, 4):
        assert torch.equal(frames[steps - 1], model.sample(3, generator=seeded(12), steps=steps))


def test_sizes_it_cannot_halve_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        MeanFlow(DataSpec((1, 10, 8)))
