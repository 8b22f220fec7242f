"""Samplers against Gaussians, whose variance at every step has a closed form, and against scripted text."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from genus.samplers import (
    Next,
    annealed_langevin,
    documents,
    heun,
    karras_levels,
    langevin,
    leftover,
    next_token,
    step_rate,
)

N = 30_000  # draws; the variance of a Gaussian is then known to √(2/N) = 0.8%


def off(x: torch.Tensor, variance: float) -> float:
    """How far the mean square of zero-mean Gaussian draws is from ``variance``, in Monte Carlo standard deviations."""
    return abs(x.square().mean().item() / variance - 1) / math.sqrt(2 / x.numel())


def down(top: float, bottom: float, count: int) -> list[float]:
    return [top * (bottom / top) ** (i / (count - 1)) for i in range(count)]


@pytest.mark.parametrize("steps", [1, 3, 200])
def test_langevin_leaves_the_variance_of_the_closed_form(steps: int) -> None:
    target, start, step = 0.5, 4.0, 0.2
    generator = torch.Generator().manual_seed(0)
    x = math.sqrt(start) * torch.randn(N, generator=generator, dtype=torch.float64)
    x = langevin(lambda x: -x / target, x, step=step, steps=steps, generator=generator)
    kept = (1 - step / target) ** (2 * steps)
    expected = kept * start + (1 - kept) * target / (1 - step / (2 * target))
    assert off(x, expected) < 4


def test_the_closed_form_tends_to_the_target_with_the_step() -> None:
    generator = torch.Generator().manual_seed(1)
    x = langevin(lambda x: -x, torch.zeros(N, dtype=torch.float64), step=0.01, steps=400, generator=generator)
    assert off(x, 1.0) < 4 + 0.005 / math.sqrt(2 / N)  # 1 / (1 - 0.005): half a per cent too wide


@pytest.mark.parametrize("steps", [1, 5])
def test_step_rate_leaves_least(steps: int) -> None:
    best = step_rate(1.082, steps)
    rates = [i / 1000 for i in range(1, 1000)]
    assert min(rates, key=lambda rate: leftover(1.082, steps, rate)) == pytest.approx(best, abs=1e-3)
    assert leftover(1.082, steps, best) > 1  # the plain dynamics is always left with too much


def test_leftover_is_what_plain_annealed_langevin_leaves() -> None:
    rate, sigmas = 0.2, [1.0, 0.8]
    generator = torch.Generator().manual_seed(2)
    x = annealed_langevin(
        lambda x, sigma: -x / sigma**2,  # data at one point
        torch.randn(N, generator=generator, dtype=torch.float64),
        sigmas,
        rate=rate,
        steps=3,
        generator=generator,
        consistent=False,
        denoise=False,
    )
    first = math.sqrt(leftover(1.0, 3, rate))  # comes in with sigma_1 itself
    assert off(x, 0.8**2 * leftover(first * 1.0 / 0.8, 3, rate)) < 4


@pytest.mark.parametrize("count", [99, 50, 33])
@pytest.mark.parametrize("spread", [0.1, 0.7, 3.0, 9.0])
def test_consistent_noise_leaves_the_right_variance_at_every_level(count: int, spread: float) -> None:
    """On the way x may be wider than the level by rate / 2(1 - rate), as the docstring says; at the end it is right."""
    sigmas = down(42.0, 0.02, count)
    rate = step_rate(sigmas[0] / sigmas[1], 1)
    generator = torch.Generator().manual_seed(3)
    x = math.hypot(42.0, spread) * torch.randn(N, generator=generator, dtype=torch.float64)
    seen: list[float] = []

    def score(x: torch.Tensor, sigma: float) -> torch.Tensor:
        seen.append(x.square().mean().item() / (spread**2 + sigma**2))
        return -x / (spread**2 + sigma**2)

    x = annealed_langevin(score, x, sigmas, rate=rate, steps=1, generator=generator)
    assert max(seen) < 1 + rate / (2 * (1 - rate)) + 0.03 and min(seen) > 0.95
    assert x.var().item() == pytest.approx(spread**4 / (spread**2 + 0.02**2), rel=0.03 if count == 99 else 0.06)


def test_plain_annealed_langevin_with_few_steps_does_not() -> None:
    sigmas = down(42.0, 0.02, 99)
    generator = torch.Generator().manual_seed(4)
    x = 42 * torch.randn(N, generator=generator, dtype=torch.float64)
    rate = step_rate(sigmas[0] / sigmas[1], 1)

    def score(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return -x / (0.7**2 + sigma**2)

    x = annealed_langevin(score, x, sigmas, rate=rate, steps=1, generator=generator, consistent=False)
    assert x.var().item() > 2 * 0.7**2


def test_a_rate_that_cannot_follow_the_ladder_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        annealed_langevin(
            lambda x, sigma: -x, torch.zeros(1), [2.0, 1.0], rate=0.1, steps=1, generator=torch.Generator()
        )


def test_karras_levels_are_even_in_their_seventh_root() -> None:
    levels = karras_levels(80.0, 0.002, 18)
    assert len(levels) == 18 and levels[0] == pytest.approx(80) and levels[-1] == pytest.approx(0.002)
    gaps = [a ** (1 / 7) - b ** (1 / 7) for a, b in pairwise(levels)]
    assert max(gaps) - min(gaps) < 1e-12
    with pytest.raises(ValueError, match="steps are at least 2"):
        karras_levels(80.0, 0.002, 1)


def flowed(steps: int, spread: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What Heun makes of noise for N(0, spread²) data, what the flow makes of it, and how often the score was asked."""
    generator, calls = torch.Generator().manual_seed(5), []
    start = 20 * torch.randn(50, generator=generator, dtype=torch.float64)

    def score(x: torch.Tensor, sigma: float) -> torch.Tensor:
        calls.append(sigma)
        return -x / (spread**2 + sigma**2)

    before = generator.get_state()
    end = heun(score, start, karras_levels(20.0, 0.001, steps), generator=generator)
    assert torch.equal(before, generator.get_state()), "without churn nothing is drawn"
    return end, start * spread / math.hypot(spread, 20.0), len(calls)


def test_heun_is_of_second_order_along_the_flow_of_a_gaussian() -> None:
    """The flow carries x in proportion to √(v + sigma²): twice the steps leave a quarter of the error."""
    errors = {}
    for steps in (20, 40, 80):
        end, true, calls = flowed(steps)
        errors[steps] = ((end - true) / true).abs().max().item()
        assert calls == 2 * steps - 1
    assert errors[20] < 0.05 and errors[80] < 2e-3
    assert 3.5 < errors[20] / errors[40] < 4.8 and 3.8 < errors[40] / errors[80] < 4.4


def test_churn_leaves_the_variance_of_the_closed_form() -> None:
    """For Gaussian data every part of a step is linear, so that the variance after all of them is known."""
    var, sigmas, churn, churned, inflate = 0.25, karras_levels(20.0, 0.01, 12), 6.0, (0.05, 5.0), 1.01
    generator = torch.Generator().manual_seed(6)
    x = 20 * torch.randn(N, generator=generator, dtype=torch.float64)
    expected, last = 400.0, [*sigmas[1:], 0.0]
    for now, then in zip(sigmas, last, strict=True):
        if churned[0] <= now <= churned[1]:
            raised = now * (1 + min(churn / 12, math.sqrt(2) - 1))
            expected += inflate**2 * (raised**2 - now**2)
            now = raised
        slope = now / (var + now**2)
        euler = 1 + (then - now) * slope
        factor = euler if then == 0 else 1 + (then - now) / 2 * (slope + euler * then / (var + then**2))
        expected *= factor**2
    x = heun(
        lambda x, sigma: -x / (var + sigma**2),
        x,
        sigmas,
        generator=generator,
        churn=churn,
        churned=churned,
        inflate=inflate,
    )
    assert off(x, expected) < 4 and abs(expected / var - 1) > 0.02, "what is expected is not simply the data's"


def scripted(rows: list[list[int]], vocabulary: int = 4) -> tuple[Next, list[list[list[int]]]]:
    """Logits that are certain of scripted documents, and a record of what was given to follow."""
    given: list[list[list[int]]] = []

    def follow(tokens: torch.Tensor) -> torch.Tensor:
        given.append(tokens.tolist())
        place = sum(len(block[0]) for block in given)  # of the next token, 1 for the first
        return torch.stack([100.0 * F.one_hot(torch.tensor(row[place - 1]), vocabulary) for row in rows])

    return follow, given


def drawn(follow: Next, n: int, **kwargs: Any) -> torch.Tensor:
    known = {"prompt": [], "longest": 6, "generator": torch.Generator().manual_seed(0), "device": torch.device("cpu")}
    return documents(follow, n, **(known | kwargs))


def test_documents_stay_ended_and_their_prompt_is_given_once() -> None:
    follow, given = scripted([[2, 3, 0, 1, 1, 1], [2, 1, 1, 3, 0, 2]])
    assert drawn(follow, 2, prompt=[2]).tolist() == [[2, 3, 0, 0, 0, 0], [2, 1, 1, 3, 0, 0]]
    assert given[0] == [[0, 2], [0, 2]] and given[1:4] == [[[3], [1]], [[0], [1]], [[0], [3]]]
    assert len(given) == 4, "ends when all documents have"


def test_documents_are_cut_at_the_length() -> None:
    follow, _ = scripted([[1, 2, 3, 0]])
    assert drawn(follow, 1, length=3).tolist() == [[1, 2, 3]]
    assert drawn(lambda x: torch.zeros(2, 3), 2, longest=5000).shape == (2, 1000)


@pytest.mark.parametrize(
    ("knobs", "kept"),
    [
        ({}, [0.4, 0.1, 0.3, 0.2]),
        ({"top_k": 2}, [0.4, 0, 0.3, 0]),
        ({"top_k": 9}, [0.4, 0.1, 0.3, 0.2]),
        ({"top_p": 0.65}, [0.4, 0, 0.3, 0]),
        ({"top_p": 0.75}, [0.4, 0, 0.3, 0.2]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0.4, 0, 0.3, 0]),
        ({"temperature": 0.5}, [0.16, 0.01, 0.09, 0.04]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_next_tokens_are_drawn_from_what_the_knobs_leave(knobs: dict[str, Any], kept: list[float]) -> None:
    """Frequencies of 20,000 draws, each within 4.5 standard deviations of the probability."""
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().expand(20_000, -1)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | knobs
    found = next_token(logits, generator=torch.Generator().manual_seed(1), **settings)
    wanted = torch.tensor(kept) / sum(kept)
    deviation = (wanted * (1 - wanted) / 20_000).sqrt()
    assert ((found.bincount(minlength=4) / 20_000 - wanted).abs() <= 4.5 * deviation).all()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"length": 7}, "length is a number of tokens up to 6, or 0: not 7"),
        ({"length": -1}, "length is a number"),
        ({"temperature": -0.1}, "temperature is at least 0: not -0.1"),
        ({"temperature": float("nan")}, "temperature is at least 0"),
        ({"top_k": -1}, "top_k is at least 0"),
        ({"top_p": 0.0}, "top_p is above 0 and at most 1: not 0.0"),
        ({"top_p": 1.1}, "top_p is above 0"),
        ({"prompt": [1, 2, 3], "length": 3}, "the prompt has 3 symbols and leaves no room in a document of 3 tokens"),
    ],
    ids=str,
)
def test_wrong_knobs_are_named(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(lambda x: torch.zeros(1, 4), 1, **knobs)
