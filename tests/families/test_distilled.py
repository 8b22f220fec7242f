"""Consistency distillation: the jump, the teacher's step, and a student that learns to jump."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from genus.contract import Batch, Denoises, Family, Terms, build
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.evaluation.constraints import evaluations
from genus.families.score.distilled import Distilled
from genus.families.score.edm import EDM
from genus.families.score.ncsn import NCSN
from genus.samplers import karras_levels

SPEC = DataSpec((1, 8, 8), 17)
SPREAD = 0.3


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


class Gaussian(Family):
    """Denoises N(0, SPREAD²), but for a learnable factor at each of 18 levels, which is 1 at first."""

    paper = "none"

    def __init__(self, spec: DataSpec = SPEC):
        super().__init__(spec)
        self.sigmas = [10.0, 1.0, 0.02]
        self.weight = torch.nn.Parameter(torch.zeros(18))

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = (sigma[:, None] - torch.tensor(karras_levels(10.0, 0.02, 18))).abs().argmin(1)
        s = sigma[:, None, None, None]
        return x * SPREAD**2 / (SPREAD**2 + s**2) * self.weight[level].exp()[:, None, None, None]

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        return {"loss": self.weight.square().sum()}


def frozen(model: Family) -> Any:
    return model.requires_grad_(False).eval()


def student(parent: Family | None = None, **params: Any) -> Distilled:
    torch.manual_seed(0)
    parent = parent or EDM(SPEC, width=8, hidden=16)
    return Distilled(parent.spec, parent=frozen(parent), **params)


def test_starts_as_its_parents_euler_step() -> None:
    model = student()
    x = torch.randn(3, 1, 8, 8, generator=seeded())
    sigma, end = torch.tensor([[0.5, 2.0, 12.0], [0.0, 1.0, 9.0]])
    s, t = sigma[:, None, None, None], end[:, None, None, None]
    euler = x + (t - s) * (x - model.parent.denoise(x, sigma)) / s
    torch.testing.assert_close(model.jump(x, sigma, end), euler)
    torch.testing.assert_close(model.jump(x, sigma, sigma), x)


def test_the_parents_steps_are_those_of_its_own_sampler() -> None:
    """All of them one after the other make the sample that Heun's steps along the whole ladder make."""
    parent = EDM(SPEC, width=8, hidden=16)
    model = student(parent, levels=6)
    x = parent.sigma_max * torch.randn(4, 1, 8, 8, generator=seeded(1))
    for now, then in pairwise(torch.tensor(model.ladder)):
        x = model.follow(x, now.expand(4), then.expand(4))
    torch.testing.assert_close(x.clamp(-1, 1), parent.sample(4, generator=seeded(1), steps=6), atol=1e-4, rtol=1e-4)


def test_a_step_of_the_parent_is_on_the_flow_of_a_gaussian() -> None:
    """From level to level of the ladder, x goes in proportion to √(v + sigma²); Heun's error is of second order."""
    model = student(Gaussian(), levels=60)
    ladder = torch.tensor(model.ladder, dtype=torch.float64)
    x = torch.randn(60, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    true = x * ((SPREAD**2 + ladder[1:] ** 2) / (SPREAD**2 + ladder[:-1] ** 2)).sqrt()[:, None, None, None]
    error = ((model.follow(x, ladder[:-1], ladder[1:]) - true) / x).abs().flatten(1).amax(1)
    assert error[:-1].max() < 1e-3 and error[-1] < (0.02 / SPREAD) ** 2  # the last is Euler's


@pytest.mark.parametrize("steps", [1, 4])
def test_the_loss_is_zero_for_the_flow_itself(steps: int) -> None:
    class Flow(Distilled):
        def jump(self, x: Tensor, now: Tensor, end: Tensor) -> Tensor:
            scale = (SPREAD**2 + end**2) / (SPREAD**2 + now**2)
            return x * scale.sqrt()[:, None, None, None] * self.student.weight[0].exp()

    x = SPREAD * torch.randn(256, 1, 8, 8, generator=seeded(1))
    right = Flow(SPEC, parent=frozen(Gaussian()), levels=200, steps=steps)
    start = student(Gaussian(), levels=200, steps=steps)
    losses = [model.loss(Batch(x), generator=seeded(2))["loss"].item() for model in (right, start)]
    assert losses[0] < 0.02 * losses[1], losses


@pytest.mark.parametrize("steps", [1, 3])
def test_a_student_learns_to_jump_and_its_parent_stays(steps: int) -> None:
    """From pure noise to the data's spread, which nothing but jumps that follow the flow would leave."""
    model = student(Gaussian(), levels=18, steps=steps)
    x = SPREAD * torch.randn(32, 1, 8, 8, generator=seeded(3))
    optimiser = torch.optim.Adam(model.groups()["model"])
    generator = seeded(4)
    before = model.sample(200, generator=seeded(5)).std().item()
    for step in range(400):
        optimiser.param_groups[0]["lr"] = 0.03 * (1 - step / 400)
        loss = model.loss(Batch(x), generator=generator)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = model.sample(200, generator=seeded(5)).std().item()
    assert before < 0.6 * SPREAD and after == pytest.approx(SPREAD, rel=0.1)
    assert not model.parent.weight.any()


@pytest.mark.parametrize("kind", [EDM, NCSN])
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 1, 1)])
def test_only_the_student_learns_all_of_it(kind: type[Family], shape: tuple[int, ...]) -> None:
    spec = DataSpec(shape, 17)
    torch.manual_seed(0)
    model = student(kind(spec))
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    assert own and all(name.startswith("student.") for name in own)
    assert len(model.groups()["model"]) == len(own) == len(list(model.parent.parameters()))
    seen: set[str] = set()
    for step in range(3):
        x = torch.rand(8, *shape, generator=seeded(step)) * 2 - 1
        model.zero_grad()
        model.loss(Batch(x), generator=seeded(step))["loss"].backward()
        for name, p in model.named_parameters():
            if p.grad is not None and p.grad.abs().sum() > 0:
                seen.add(name)
                p.data -= 1e-2 * p.grad.sign()
    assert seen == own
    drawn = model.sample(4, generator=seeded())
    assert drawn.shape == (4, *shape) and drawn.isfinite().all() and drawn.abs().max() <= 1


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_in_so_many_evaluations(steps: int) -> None:
    model = student(steps=steps).eval()
    assert evaluations(model, seed=0, knobs={}) == steps
    assert not isinstance(model, Denoises), "a jump is no posterior mean"


def test_samples_go_from_end_to_end() -> None:
    seen: list[tuple[float, float]] = []

    class Watched(Distilled):
        def jump(self, x: Tensor, now: Tensor, end: Tensor) -> Tensor:
            seen.append((now[0].item(), end[0].item()))
            return x / 100

    model = Watched(SPEC, parent=frozen(Gaussian()), steps=3, levels=6)
    x = model.sample(300, generator=seeded())
    assert seen == [pytest.approx((model.ladder[k], model.ladder[k + 2])) for k in (0, 2, 4)]
    assert seen[0][0] == pytest.approx(10) and seen[-1][1] == 0
    assert x.std().item() == pytest.approx(10 / 100**3, rel=0.03)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="needs a parent that denoises: Family does not"):
        build("score/distilled", SPEC, {}, Family(SPEC))
    with pytest.raises(ValueError, match=r"examples \(1, 8, 8\), the data of \(1, 4, 4\)"):
        Distilled(DataSpec((1, 4, 4)), parent=Gaussian())
    for steps, levels in ((3, 8), (0, 8), (1, 1)):
        with pytest.raises(ValueError, match="cannot be cut"):
            student(steps=steps, levels=levels)


def test_a_small_batch_may_have_arrived_whole() -> None:
    """Batches of two of which, sooner or later, no example is still on its way."""
    torch.manual_seed(0)
    model = Distilled(SPEC, parent=frozen(EDM(SPEC, width=8)), steps=4, levels=8)
    for seed in range(12):
        x = torch.zeros(2, *SPEC.shape)
        assert model.loss(Batch(x), generator=seeded(seed))["loss"].isfinite()
