"""Fits of known 2-D densities: the figure's arithmetic, every family on a tiny budget, and vectors' contract."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from genus.config import Dataset as DatasetSection
from genus.config import Evaluate
from genus.contract import (
    Batch,
    Decodes,
    Encodes,
    Family,
    Initialises,
    Samples,
    Scores,
    Walks,
    build,
    family_class,
    family_names,
)
from genus.data.ingestion import ingest
from genus.data.loaders import Dataset, open_dataset
from genus.data.sources import two_d as source
from genus.data.spec import DataSpec
from genus.evaluation import gallery, two_d
from genus.evaluation.ode import log_prob as ode_log_prob

CPU = torch.device("cpu")
STORED = DataSpec((2, 1, 1), levels=64)
CONTINUOUS = DataSpec((2, 1, 1), levels=0)


class Table(Family):
    """A model that is a table of log-probabilities; ``noise``: of every answer, by which it is a bound."""

    def __init__(self, log_q: np.ndarray, noise: float = 0.0):
        super().__init__(DataSpec((2, 1, 1), levels=len(log_q)))
        self.log_q, self.noise = torch.from_numpy(log_q), noise
        self.density = "elbo" if noise else "exact"

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        x, y = self.spec.to_levels(batch.x)[:, :, 0, 0].T
        noise = torch.randn(len(x), generator=generator, dtype=torch.float64) * self.noise
        return self.log_q[x, y] + noise - self.noise**2 / 2


class Sampler(Family):
    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None) -> Tensor:
        return torch.rand(n, 2, 1, 1, generator=generator) * 2 - 1


ALONE = [name for name in family_names() if "vector" in family_class(name).kinds and not family_class(name).inherits]


@pytest.fixture(params=ALONE)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


# --- the figure


@pytest.mark.parametrize("shape", source.SHAPES)
def test_the_truth_itself_is_at_no_distance(shape: str) -> None:
    truth = source.truth(shape, 32)
    with np.errstate(divide="ignore"):
        figures, table = two_d.measure(Table(np.log(truth)), truth, seed=0, device=CPU)
    assert figures["kl"]["value"] == pytest.approx(0, abs=1e-12) and figures["mass"] == pytest.approx(1, abs=1e-12)
    assert figures["kl"]["low"] == figures["kl"]["high"] == figures["kl"]["value"]
    assert figures["kind"] == figures["kl"]["kind"] == "exact" and figures["variation"] < 1e-12
    np.testing.assert_allclose(table, truth, atol=1e-15)


def test_knowing_nothing_costs_what_entropy_leaves() -> None:
    truth = source.truth("rings", 32)
    figures, _ = two_d.measure(Table(np.full((32, 32), -2 * math.log(32))), truth, seed=0, device=CPU)
    expected = 2 * math.log(32) + (truth * np.log(truth)).sum()
    assert figures["kl"]["value"] == pytest.approx(expected, abs=1e-12)
    assert figures["uniform"] == pytest.approx(expected, abs=1e-12)


def test_a_bound_has_an_interval_that_holds_its_gap() -> None:
    """log q + s e - s²/2: the bound is s²/2 too low, and exp of it is q on average. Of 40 seeds 95% should hold."""
    truth = source.truth("two_moons", 16)
    with np.errstate(divide="ignore"):
        model = Table(np.log(truth), noise=0.5)
    found = [two_d.measure(model, truth, seed=seed, device=CPU)[0] for seed in range(40)]
    held = sum(each["kl"]["low"] < 0.125 < each["kl"]["high"] for each in found)
    assert 33 <= held <= 40 and found[0]["kl"]["n"] == two_d.REPEATS
    assert found[0]["kl"]["high"] - found[0]["kl"]["low"] < 0.2
    assert np.mean([each["mass"] for each in found]) == pytest.approx(1, abs=0.02)


def test_a_model_that_rules_out_what_happens_has_a_figure() -> None:
    truth = np.full((4, 4), 1 / 16)
    with np.errstate(divide="ignore"):
        log_q = np.log(np.pad(np.full((4, 2), 1 / 8), ((0, 0), (0, 2))))
    figures, _ = two_d.measure(Table(log_q), truth, seed=0, device=CPU)
    assert 10 < figures["kl"]["value"] < 100


def test_samples_alone_give_a_picture_and_no_figure() -> None:
    truth = np.full((32, 32), 1 / 1024)
    figures, table = two_d.measure(Sampler(DataSpec((2, 1, 1), levels=32)), truth, seed=0, device=CPU)
    assert figures["kl"] is None and figures["mass"] is None and figures["kind"] == "none"
    assert figures["variation"] < 0.1 and 0.9 < table.sum() <= 1
    with pytest.raises(TypeError, match="neither scores, denoises nor samples"):
        two_d.measure(Family(DataSpec((2, 1, 1), levels=32)), truth, seed=0, device=CPU)


def test_pictures_stand_upright_and_share_a_scale() -> None:
    table = np.zeros((40, 40))
    table[30, 35] = 1.0  # far to the right, near the top
    shown = two_d.picture(table, 1.0)
    assert shown.shape == (160, 160, 3) and shown.dtype == np.uint8
    bright = np.argwhere(shown.astype(int).sum(2) > 300)
    assert (bright.min(0) == (16, 120)).all() and (bright.max(0) == (19, 123)).all()
    half = two_d.picture(table / 2, 1.0)
    assert np.abs(half[17, 121].astype(int) - shown[17, 121]).sum() > 0
    assert two_d.picture(np.zeros((300, 300))).shape == (300, 300, 3)


# --- an ingested data set whose density is known


class Task:
    """What the evaluator gives a metric."""

    def __init__(self, model: Family, data: Dataset):
        self.model, self.data, self.effort, self.device = model, data, Evaluate(), CPU

    def count(self, key: str) -> int:
        return min(getattr(self.effort, key), len(self.data.split("test")))

    def generator(self, number: int) -> Generator:
        return seeded(number)


def test_excess_is_what_a_model_lacks_on_the_test_split(tmp_path: Path) -> None:
    """0 for the truth itself, the noise's gap for a bound, and KL(truth || uniform) for one that knows nothing."""
    options = {"shape": "rings", "count": 20_000, "levels": 32, "test": 0.5}
    ingest("rings", DatasetSection(source="two_d", options=options), seed=0, root=tmp_path)
    data = open_dataset("rings", tmp_path / "processed")
    truth = source.truth("rings", 32)
    with np.errstate(divide="ignore"):
        log_q = np.log(truth)
    (exact,) = two_d.excess(Task(Table(log_q), data))[0].values()
    assert exact["value"] == pytest.approx(0, abs=1e-12) and exact["n"] == 10_000 and exact["kind"] == "exact"
    (bound,) = two_d.excess(Task(Table(log_q, noise=0.5), data))[0].values()
    assert bound["low"] < 0.125 < bound["high"] and bound["kind"] == "elbo"
    uniform = Table(np.full((32, 32), -2 * math.log(32)))
    (nothing,) = two_d.excess(Task(uniform, data))[0].values()
    assert nothing["low"] < two_d.measure(uniform, truth, seed=0, device=CPU)[0]["uniform"] < nothing["high"]
    assert nothing["high"] - nothing["low"] < 0.05
    with pytest.raises(FloatingPointError, match="log_prob of test example 0 is not finite"):
        two_d.excess(Task(Table(np.full((32, 32), math.nan)), data))


def test_other_data_has_no_excess(tmp_path: Path) -> None:
    ingest("digits", DatasetSection(source="digits"), seed=0, root=tmp_path)
    data = open_dataset("digits", tmp_path / "processed")
    assert two_d.excess(Task(Table(np.zeros((2, 2))), data)) == ({}, {})


# --- the score, where the density is known with any noise added


class Knows(Family):
    """Denoises to where the true score leads, times ``factor``."""

    def __init__(self, truth: np.ndarray, factor: float = 1.0):
        super().__init__(DataSpec((2, 1, 1), levels=len(truth)))
        self.truth, self.factor, self.sigmas = truth, factor, [2.0, 0.5, 0.01]

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        score = two_d.noised(self.truth, x, sigma[0].item())[1]
        return (x.double() + self.factor * sigma[0].item() ** 2 * score[:, :, None, None]).to(x.dtype)


@pytest.mark.parametrize("shape", ["eight_gaussians", "two_moons"])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0])
def test_the_noised_score_is_that_of_the_mixture(shape: str, sigma: float) -> None:
    """Cells of 256 a side against autograd on the closed form: what their width changes is below a hundredth."""
    levels = 256
    half = levels / (levels - 1)  # the square [-4, 4]² in the units of DataSpec
    centres, deviation = source._mixture(shape)  # type: ignore[misc]
    centre = torch.from_numpy(centres) * half / source.SIDE
    x = torch.randn(200, 2, generator=seeded(), dtype=torch.float64) * 0.2
    x += sigma * torch.randn(200, 2, generator=seeded(1), dtype=torch.float64)
    x += centre[torch.randint(len(centre), (200,), generator=seeded(2))]
    variance = (deviation * half / source.SIDE) ** 2 + sigma**2
    position = x.clone().requires_grad_()
    away = (position[:, None] - centre).square().sum(2)
    log_density = torch.logsumexp(-0.5 * away / variance, 1) - math.log(2 * math.pi * variance * len(centre))
    (expected,) = torch.autograd.grad(log_density.sum(), position)
    density, score = two_d.noised(source.truth(shape, levels), x[:, :, None, None], sigma)
    likely = log_density > log_density.max() - 8
    assert likely.sum() > 100
    assert (score - expected)[likely].norm() < 0.01 * expected[likely].norm()
    assert (density.log() - log_density)[likely].abs().max() < 0.05


def test_the_noised_score_is_the_gradient_of_its_own_density_which_integrates_to_one() -> None:
    table = np.random.default_rng(0).random((5, 5))
    table /= table.sum()
    x = (torch.randn(100, 2, 1, 1, generator=seeded(), dtype=torch.float64)).requires_grad_()
    density, score = two_d.noised(table, x, 0.3)
    (expected,) = torch.autograd.grad(density.log().sum(), x)
    torch.testing.assert_close(score, expected.flatten(1), rtol=1e-9, atol=1e-9)
    side = torch.linspace(-4, 4, 161, dtype=torch.float64)
    total = two_d.noised(table, torch.cartesian_prod(side, side)[:, :, None, None], 0.3)[0].sum() * 0.05**2
    assert total.item() == pytest.approx(1, abs=1e-9)
    far = torch.full((1, 2, 1, 1), 30.0)
    assert [part.abs().max().item() for part in two_d.noised(table, far, 0.3)] == [0, 0], "not NaN where nothing is"


@pytest.mark.parametrize(("factor", "error"), [(1.0, 0.0), (0.0, 1.0), (1.2, 0.04)])
def test_score_error_is_what_a_factor_makes_of_it(factor: float, error: float) -> None:
    truth = source.truth("rings", 32)
    stored = torch.from_numpy(source.draw("rings", 500, 32, 0)).long()
    found = two_d.score_error(Knows(truth, factor), truth, stored, generator=seeded())
    assert found["value"] == pytest.approx(error, abs=1e-4) and found["n"] == 500
    assert found["low"] <= found["value"] <= found["high"] <= found["value"] + 1e-4  # every example says the same
    sigmas = [each["sigma"] for each in found["levels"]]
    assert len(sigmas) == two_d.NOISES and sigmas[0] == pytest.approx(2 / 31) and sigmas[-1] == pytest.approx(2)


def test_score_errors_interval_holds_what_many_examples_say() -> None:
    """A score that is right on the right and nothing on the left: of 40 seeds 95% should hold the mean of them all."""

    class Half(Knows):
        def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 0, super().denoise(x, sigma), x)

    truth = source.truth("two_moons", 16)
    found = []
    for seed in range(40):
        stored = torch.from_numpy(source.draw("two_moons", 200, 16, seed)).long()
        found.append(two_d.score_error(Half(truth), truth, stored, generator=seeded(seed)))
    mean = np.mean([each["value"] for each in found])
    held = sum(each["low"] < mean < each["high"] for each in found)
    assert 34 <= held <= 40 and 0.3 < mean < 0.7


def test_score_error_of_an_ingested_data_set(tmp_path: Path) -> None:
    options = {"shape": "rings", "count": 4000, "levels": 32, "test": 0.5}
    ingest("rings", DatasetSection(source="two_d", options=options), seed=0, root=tmp_path)
    ingest("digits", DatasetSection(source="digits"), seed=0, root=tmp_path)
    rings, digits = (open_dataset(name, tmp_path / "processed") for name in ("rings", "digits"))
    model = Knows(source.truth("rings", 32), 0.5)
    (figure,) = two_d.score_excess(Task(model, rings))[0].values()
    assert figure["value"] == pytest.approx(0.25, abs=1e-3) and figure["n"] == two_d.SCORED
    assert two_d.score_excess(Task(model, digits)) == ({}, {})
    assert gallery.field(Task(model, digits)) is None  # type: ignore[arg-type]
    half = gallery.field(Task(model, rings))  # type: ignore[arg-type]
    right = gallery.field(Task(Knows(source.truth("rings", 32)), rings))  # type: ignore[arg-type]
    assert half is not None and right is not None and half.shape == right.shape == (960, 640, 3)
    changed = (half != right).any((0, 2))
    assert not changed[:320].any() and changed[320:].any(), "only the learnt half is another"


# --- every family


def test_fits_on_a_tiny_budget(family: str) -> None:
    found = two_d.fit(family, {}, "checkerboard", seed=0, device=CPU, steps=4, levels=16)
    assert found.table.shape == found.truth.shape == (16, 16) and found.table.dtype == np.float64
    assert (found.table >= 0).all() and set(found.seconds) == {"train", "density"}
    figures = found.figures
    assert figures["steps"] == 4 and figures["parameters"] > 0
    if figures["kl"] is None:
        assert figures["kind"] == "none"
        return
    assert figures["kl"]["low"] <= figures["kl"]["value"] <= figures["kl"]["high"]
    assert figures["kl"]["value"] > 0.05 and math.isfinite(figures["kl"]["value"])
    # (An importance-weighted estimate of an untrained posterior is far below, but for one draw in very many.)
    assert abs(figures["mass"] - 1) < 1e-6 if figures["kind"] == "exact" else 0 < figures["mass"] < 1.4
    again = two_d.fit(family, {}, "checkerboard", seed=0, device=CPU, steps=4, levels=16)
    assert again.figures == figures and np.array_equal(again.table, found.table)


def test_learns(family: str) -> None:
    """A fifth of the budget is enough to be nearer than knowing nothing."""
    torch.manual_seed(0)
    steps = two_d.settings(build(family, STORED, {})).steps // 5
    figures = two_d.fit(family, {}, "eight_gaussians", seed=0, device=CPU, steps=steps, levels=32).figures
    if figures["kl"] is None:
        assert figures["variation"] < 0.65  # knowing nothing: 0.75
    else:
        assert figures["kl"]["value"] < 0.6 * figures["uniform"]


# --- the contract for vectors


def vectors(n: int = 8, seed: int = 0) -> Batch:
    stored = torch.randint(0, 64, (n, 2, 1, 1), generator=seeded(seed), dtype=torch.uint8)
    return Batch(STORED.to_float(stored), torch.zeros(n, dtype=torch.int64))


def started(family: str, spec: DataSpec = STORED) -> Family:
    torch.manual_seed(0)
    model = build(family, spec, {})
    if isinstance(model, Initialises):
        with torch.no_grad():
            model.initialise(vectors(64), generator=seeded())
    return model


def test_every_parameter_gets_a_gradient(family: str) -> None:
    model = started(family)
    names, seen = {id(p): name for name, p in model.named_parameters()}, set()
    for step in range(4):  # a zero-initialised last layer hides the layers before it until it has moved
        for group, terms in model.updates(vectors(32, step), generator=seeded(step)):
            parameters = model.groups()[group]
            for parameter in parameters:
                parameter.grad = None
            terms["loss"].backward(inputs=parameters)
            for parameter in parameters:
                if parameter.grad is not None:
                    assert parameter.grad.isfinite().all()
                    seen |= {names[id(parameter)]} if parameter.grad.abs().sum() > 0 else set()
                    parameter.data -= 1e-2 * parameter.grad.sign()
    assert set(names.values()) == seen


def test_samples_are_in_range_and_follow_their_seed(family: str) -> None:
    model = started(family).eval()
    assert isinstance(model, Samples)
    with torch.inference_mode():
        first, again, other = (model.sample(50, generator=seeded(seed)) for seed in (7, 7, 8))
    assert first.shape == (50, 2, 1, 1) and first.abs().max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
    if isinstance(model, Walks):
        with torch.inference_mode():
            assert model.trajectory(3, frames=5, generator=seeded()).shape == (5, 3, 2, 1, 1)


def test_log_prob_is_that_of_stored_levels(family: str) -> None:
    model = started(family).eval()
    if not isinstance(model, Scores):
        pytest.skip("gives no density")
    with torch.inference_mode():
        nats = model.log_prob(vectors(6), generator=seeded())
    assert nats.shape == (6,) and nats.isfinite().all() and (nats < 0).all()


def test_denoisers_answer_between_and_below_their_levels(family: str) -> None:
    model = started(family).eval()
    if not hasattr(model, "denoise"):
        pytest.skip("does not denoise")
    found = ode_log_prob(model, vectors(6).x, generator=seeded(), trace="exact", start=0.5 * min(model.sigmas))
    assert found.nats.isfinite().all()


def test_flows_of_continuous_vectors(family: str) -> None:
    """At random weights in float64: log-determinants against autograd to 1e-9, inverses to 1e-10."""
    try:
        model = build(family, CONTINUOUS, {})
    except ValueError as refused:
        assert "continuous data" in str(refused)
        return
    if not (isinstance(model, Encodes) and isinstance(model, Decodes) and isinstance(model, Scores)):
        pytest.skip("has no code of the data's size")
    assert model.latent == 2
    model, noise = model.double().eval(), seeded(1)
    with torch.no_grad():
        for parameter in model.parameters():  # little: networks that turn quickly are soon no function of a double
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
    x = torch.randn(20, 2, 1, 1, generator=seeded(2), dtype=torch.float64)
    told = model.log_prob(Batch(x), generator=seeded())
    sizes = []
    for one, nats in zip(x.split(1), told, strict=True):
        code = model.encode(one)
        log_det = torch.autograd.functional.jacobian(model.encode, one).reshape(2, 2).slogdet().logabsdet
        base = -0.5 * (code.square().sum() + 2 * math.log(2 * math.pi))
        assert abs(float(nats - base - log_det)) <= 1e-9
        assert (model.decode(code) - one).abs().max() <= 1e-10
        sizes.append(abs(float(log_det)))
    assert max(sizes) > 0.1, "the test says nothing of a flow that changes no volume"
