"""A model's figures: which capability brings which, and toy models whose figures are known in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from genus.config import Evaluate
from genus.contract import (
    Batch,
    Decodes,
    Family,
    Quantises,
    Samples,
    Translates,
    build,
    family_class,
    family_names,
)
from genus.data.loaders import Dataset
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.evaluation import evaluate as table
from genus.evaluation import ode
from genus.evaluation.evaluate import Task, evaluate
from genus.evaluation.gallery import gallery, spherical
from tests.evaluation.conftest import Digits
from tests.registry.workspace import small as described

EFFORT = {"samples": 60, "likelihoods": 40, "batch_size": 30, "weighed": 20, "weights": 8, "flowed": 4}


def task(model: Any, digits: Digits, **effort: Any) -> Task:
    settings = Evaluate.model_validate(EFFORT | effort)
    return Task(model, digits.data, digits.reference, settings, 0, torch.device("cpu"))


def small(family: str, digits: Digits) -> Family:
    torch.manual_seed(0)
    small = described(family)
    return build(family, digits.data.spec, small["params"], small["parent"]).eval()


@pytest.mark.parametrize("family", [name for name in family_names() if "image" in family_class(name).kinds])
def test_a_model_has_the_figures_of_its_capabilities_and_no_others(family: str, digits: Digits) -> None:
    model = small(family, digits)
    figures, timing = evaluate(task(model, digits))
    has = {method: hasattr(model, method) for method in ("log_prob", "log_weights", "denoise", "decode", "encode")}
    assert ("bits_per_dim" in figures) == has["log_prob"]
    assert ("iwae_bits_per_dim" in figures) == has["log_weights"]
    assert ("ode_bits_per_dim" in figures) == has["denoise"]
    assert ("latent_share" in figures) == isinstance(model, Decodes)
    samples, translates = isinstance(model, Samples), isinstance(model, Translates)
    assert ("kid" in figures) == ("sample_ms_1" in timing) == samples
    assert (figures["nfe"]["value"] >= 1) if samples else "nfe" not in figures
    assert ("translated_accuracy" in figures) == ("translate_ms" in timing) == translates and (samples or translates)
    assert not any("_ms" in name or "second" in name for name in figures), "timings stand apart"
    pictures = gallery(task(model, digits))
    assert ("interpolation" in pictures) == isinstance(model, Decodes) and ("trajectory" in pictures) == has["denoise"]
    assert ("reconstruction" in pictures) == has["encode"]
    assert ("codes_used" in figures) == isinstance(model, Quantises)
    assert ("samples" in pictures) == ("nearest" in pictures) == samples and ("translation" in pictures) == translates
    assert all(p.dtype == np.uint8 for p in pictures.values())


def test_same_model_same_figures(digits: Digits) -> None:
    first, again = (evaluate(task(small("vae/vae", digits), digits))[0] for _ in range(2))
    assert first == again


def test_importance_weighted_bound_only_tightens(digits: Digits) -> None:
    model = small("vae/vae", digits)
    whole = task(model, digits)
    figure = table.tighter_bound(whole)[0]["iwae_bits_per_dim"]
    bits = [point["value"] for point in figure["points"]]
    assert [point["k"] for point in figure["points"]] == [1, 2, 4, 8] and figure["kind"] == "iwae-8"
    assert bits == sorted(bits, reverse=True) and bits[0] > bits[-1]
    assert figure["gap"]["value"] == pytest.approx(bits[0] - bits[-1], rel=1e-9)
    with torch.inference_mode():  # the last is the bound of all weights, by hand
        weights = model.log_weights(Batch(whole.test(20)), 8, generator=whole.generator(13)).double()  # type: ignore[operator]
    by_hand = -(weights.logsumexp(0) - math.log(8)).mean().item() / (64 * math.log(2))
    assert bits[-1] == pytest.approx(by_hand, rel=1e-9)


class Toy(Family):
    """Independent N(0, v) numbers, rounded to levels: everything about it is known."""

    paper = "none 0"
    variance = 0.09
    sigmas = (5.0, 0.05)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1).to(x.dtype) ** 2
        return x * (self.variance / (self.variance + s))

    def continuous(self, n: int, generator: Generator) -> Tensor:
        return math.sqrt(self.variance) * torch.randn((n, *self.spec.shape), generator=generator)


def test_probability_flow_with_a_level_table_is_almost_tight() -> None:
    """The bound would be the true log-probability, were the levels' posterior known and not counted in cells."""
    spec = DataSpec((1, 4, 4), levels=65)
    model, generator = Toy(spec), torch.Generator().manual_seed(0)
    levels = spec.to_levels(model.continuous(4000, generator))
    edges = (torch.arange(66, dtype=torch.float64) - 0.5) * (2 / 64) - 1
    edges[0], edges[-1] = -math.inf, math.inf
    mass = torch.special.ndtr(edges / math.sqrt(model.variance)).diff()
    x = spec.to_float(levels.byte())
    known = ode.level_table(model, x[:3000], generator=generator)
    assert torch.allclose(known.exp().sum(1), torch.ones(65, dtype=torch.float64))
    test = x[3000:]
    options: dict[str, Any] = {"trace": "exact", "rtol": 1e-5, "atol": 1e-5}
    found = ode.log_prob(model, test, generator=generator, table=known, **options)
    true = mass.log()[levels[3000:]].flatten(1).sum(1)
    assert found.kind == "ode"
    # In nats a dimension: below the truth (a bound), but for four standard errors of its mean, and not by much.
    gap = (true - found.nats) / spec.dims
    assert -4 * gap.std() / math.sqrt(len(gap)) < gap.mean() < 0.03


class ByLabel(Family):
    """Draws real training images of the class that it is asked for, or of the wrong one."""

    paper = "none 0"
    labels = 10

    def __init__(self, data: Dataset, shift: int = 0):
        super().__init__(data.spec)
        self.images, self.known, self.shift = data.split("train"), data.labels("train"), shift
        self.register_buffer("anything", torch.zeros(1))

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None) -> Tensor:
        wanted = torch.randint(10, (n,), generator=generator) if cond is None else (cond + self.shift) % 10
        places = [np.flatnonzero(self.known == int(label)) for label in wanted]
        chosen = [int(torch.randint(len(place), (1,), generator=generator)) for place in places]
        rows = [self.images[place[index]] for place, index in zip(places, chosen, strict=True)]
        return self.spec.to_float(torch.from_numpy(np.stack(rows)))


def test_samples_asked_for_by_label(digits: Digits) -> None:
    """Real training images: the judge takes nearly all for what they are, and one can learn from them."""
    of_right, of_wrong = (table.asked_for(task(ByLabel(digits.data, by), digits, samples=600))[0] for by in (0, 1))
    assert of_right["asked_accuracy"]["value"] > 0.95 and of_wrong["asked_accuracy"]["value"] < 0.05
    right, wrong = of_right["generated_accuracy"], of_wrong["generated_accuracy"]
    assert right["value"] > 0.85 and right["low"] < right["value"] < right["high"] and wrong["value"] < 0.05
    assert right["floor"] == digits.reference.accuracy
    assert "generated_accuracy" in evaluate(task(ByLabel(digits.data), digits, samples=200))[0]


def test_a_sampler_that_copies_is_flagged(digits: Digits) -> None:
    from genus.evaluation.quality import copied

    best = copied(np.asarray(digits.data.split("validation")), digits.data, None)
    settings = Evaluate.model_validate(EFFORT | {"samples": 300})
    device = torch.device("cpu")
    copycat = Task(ByLabel(digits.data), digits.data, digits.reference, settings, 0, device, best)
    figure = evaluate(copycat)[0]["memorisation"]
    assert figure["flagged"] and figure["value"] == 1 and figure["floor"] == best["value"]


class Broken(ByLabel):
    """Draws what is no number."""

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None) -> Tensor:
        x = super().sample(n, generator=generator, cond=cond)
        x[-1, 0, 0, 0] = math.nan
        return x


def test_unusable_results_are_one_line(digits: Digits) -> None:
    with pytest.raises(FloatingPointError, match="sample 29 of 60 is not finite"):
        _ = task(Broken(digits.data), digits).draw(60, seed=0, batch_size=30)
    model = small("vae/vae", digits)
    with pytest.raises(UserError, match=r"evaluate.likelihoods: 400 is more than the 359 examples of the test split"):
        evaluate(task(model, digits, likelihoods=400))
    with pytest.raises(UserError, match=r"evaluate.curve: \{'temprature': 1.0\}: .*temprature"):
        table.knob_curve(task(model, digits, curve={"temprature": [1.0]}))
    with torch.no_grad():
        next(iter(model.parameters())).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="log_prob of test image 0 is not finite"):
        table.likelihood(task(model, digits))


def test_knobs_make_a_curve(digits: Digits) -> None:
    model = small("score/ncsn", digits)
    found, times = table.knob_curve(task(model, digits, curve={"thin": [8, 4]}, samples=400, batch_size=400))
    points = found["curve"]["points"]
    assert [point["knobs"] for point in points] == [{"thin": 8}, {"thin": 4}] and len(times["curve_sample_ms"]) == 2
    assert points[0]["calls"] < points[1]["calls"] < model.nfe  # type: ignore[operator]
    assert all(point["low"] <= point["high"] for point in points)


def test_the_inverse_of_a_flow_is_exact_and_of_a_liar_is_not(digits: Digits) -> None:
    model = small("flows/glow", digits)
    assert table.inverse(task(model, digits))[0]["inverse_error"]["value"] <= 1e-3
    original = model.encode
    model.encode = lambda x: original(x) + 1  # type: ignore[method-assign, assignment, operator]
    assert table.inverse(task(model, digits))[0]["inverse_error"]["value"] >= 1


def test_the_path_between_codes_stays_on_the_sphere() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(50, generator=generator), dim=0) for _ in range(2))
    path = spherical(a, b, torch.linspace(0, 1, 7))
    assert torch.allclose(path[0], a, atol=1e-6) and torch.allclose(path[-1], b, atol=1e-6)
    assert torch.allclose(path.norm(dim=1), torch.ones(7), atol=1e-5)
    angles = torch.acos((path[:-1] * path[1:]).sum(1).clamp(-1, 1))
    assert torch.allclose(angles, angles.mean().expand(6), atol=1e-3)  # even steps
