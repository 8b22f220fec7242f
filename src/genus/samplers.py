"""Samplers, free functions that know nothing of any network: walks along a score, and text symbol by symbol.

A ``score`` is a function of ``x`` [B, ...] that gives the gradient of a log density, of the same shape; with a second
argument it is the score of the data with Gaussian noise of that standard deviation added.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

Score = Callable[[Tensor], Tensor]
NoisyScore = Callable[[Tensor, float], Tensor]
Watch = Callable[[int, Tensor, Tensor, float], None]  # number of the move, x, its score, its noise level
Next = Callable[
    [Tensor], Tensor
]  # tokens [B, T] that follow those it was given before -> logits of the next one [B, V]


def _noise(x: Tensor, generator: Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def langevin(score: Score, x: Tensor, *, step: float, steps: int, generator: Generator) -> Tensor:
    """Unadjusted Langevin dynamics: ``steps`` times x + step · score(x) + √(2 · step) · z.  Same shape as ``x``.

    For N(0, v) the k-th iterate's variance is a^2k v_0 + (1 - a^2k) v / (1 - step / 2v) with a = 1 - step / v:
    it converges for step < 2v and ends wider than the target, by the factor 1 / (1 - step / 2v).
    """
    for _ in range(steps):
        x = x + step * score(x) + math.sqrt(2 * step) * _noise(x, generator)
    return x


def leftover(ratio: float, steps: int, rate: float) -> float:
    """Variance over sigma_i^2 after level i of plain annealed Langevin that came in with (ratio · sigma_i)^2.

    Song & Ermon 2020 (2006.09011), proposition 4, for data at one point; ``rate`` is step / sigma_i^2. Never below 1:
    the plain dynamics contracts towards 1 / (1 - rate / 2), from above.
    """
    stationary = 1 / (1 - rate / 2)
    return (1 - rate) ** (2 * steps) * (ratio**2 - stationary) + stationary


def step_rate(ratio: float, steps: int) -> float:
    """Song & Ermon 2020's technique 4: the rate step / sigma_i^2 whose ``leftover`` is closest to 1.

    ``ratio``: sigma_{i-1} / sigma_i > 1, the same all down the ladder, so one rate serves all levels.
    One step a level has the closed form 1 - 1 / ratio^2; more steps take a ternary search.
    """
    if steps == 1:
        return 1 - 1 / ratio**2
    low, high = 0.0, 1.0
    for _ in range(100):  # the leftover falls, then rises: one minimum in (0, 1)
        third = (high - low) / 3
        if leftover(ratio, steps, low + third) < leftover(ratio, steps, high - third):
            high -= third
        else:
            low += third
    return (low + high) / 2


def annealed_langevin(
    score: NoisyScore,
    x: Tensor,
    sigmas: list[float],
    *,
    rate: float,
    steps: int,
    generator: Generator,
    consistent: bool = True,
    denoise: bool = True,
    watch: Watch | None = None,
) -> Tensor:
    """Annealed Langevin dynamics (Song & Ermon 2019, 1907.05600, algorithm 1): same shape as ``x``.

    ``x``: noise of standard deviation sigmas[0] (the data's own spread is small beside it). ``sigmas`` falls; at each
    level i there are ``steps`` moves x + rate · sigma_i^2 · score(x, sigma_i) + noise, 0 < rate < 1.

    The noise of algorithm 1 has variance 2 · rate · sigma_i^2, which is right for many small steps. With few of them it
    leaves more noise in x than the next level's score expects, whatever the rate (see ``leftover``). ``consistent``
    adds instead what is missing, as Jolicoeur-Martineau et al. 2021 (2009.05475, section 4) do. On a direction in which
    the data is N(0, v), a move turns the variance v + sigma_i^2 into v + sigma_i^2 (1 - 2 rate + k rate^2) with
    k = sigma_i^2 / (v + sigma_i^2), and the noise must bring it to v + sigma^2 for the sigma of the next move. Theirs
    is k = 1, data at one point, which leaves every direction too narrow by several per cent. Ours is k = 1/2, right
    where v = sigma_i^2: wider directions hardly move at this level, narrower ones are put right by the levels to come.
    (While sigma_i^2 is far above v, x is wider than its level by rate / 2(1 - rate), and in step again by the end.)

    ``denoise``: end with the posterior mean x + sigma_L^2 · score(x, sigma_L) (Tweedie; Jolicoeur-Martineau et al.
    2021, section 3), which takes out the last level's noise.
    Raises ValueError for a rate too small to get down to the next level.
    """
    moves = [sigma for sigma in sigmas for _ in range(steps)]
    for move, (now, then) in enumerate(zip(moves, [*moves[1:], moves[-1]], strict=True)):
        missing = 2 * rate * now**2
        if consistent:
            missing += then**2 - (1 + rate**2 / 2) * now**2
        if missing < 0:
            raise ValueError(f"rate {rate:.3g} is too small for the step from sigma {now:.3g} to {then:.3g}")
        slope = score(x, now)
        if watch is not None:
            watch(move, x, slope, now)
        x = x + rate * now**2 * slope + math.sqrt(missing) * _noise(x, generator)
    return x + sigmas[-1] ** 2 * score(x, sigmas[-1]) if denoise else x


def karras_levels(high: float, low: float, steps: int, bend: float = 7.0) -> list[float]:
    """``steps`` noise levels falling from ``high`` to ``low``, close together where they are low.

    Karras et al. 2022 (2206.00364), equation 5: evenly spaced in sigma^(1 / bend), their rho. Raises ValueError for
    fewer than 2 steps.
    """
    if steps < 2:
        raise ValueError(f"steps are at least 2, for the highest and the lowest noise level: not {steps}")
    top, bottom = high ** (1 / bend), low ** (1 / bend)
    return [(top + i / (steps - 1) * (bottom - top)) ** bend for i in range(steps)]


def heun(
    score: NoisyScore,
    x: Tensor,
    sigmas: list[float],
    *,
    generator: Generator,
    churn: float = 0.0,
    churned: tuple[float, float] = (0.05, 50.0),
    inflate: float = 1.003,
    watch: Watch | None = None,
) -> Tensor:
    """The probability flow dx / dsigma = -sigma · score(x, sigma) down to no noise, by Heun's second-order steps.

    Karras et al. 2022 (2206.00364), algorithm 2; same shape as ``x``, which is noise of deviation sigmas[0] on
    the data. ``sigmas`` falls; after its last level an Euler step goes to 0: the score is asked 2 · len(sigmas) - 1
    times.

    ``churn`` (their S_churn): before a step from a level within ``churned`` the noise is raised by the factor
    1 + min(churn / len(sigmas), √2 - 1), with fresh noise of ``inflate`` times the deviation that is right: new noise
    puts right what earlier steps did wrong. 0 is the flow itself, which draws nothing.
    """
    for move, (now, then) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        if churn > 0 and churned[0] <= now <= churned[1]:
            raised = now * (1 + min(churn / len(sigmas), math.sqrt(2) - 1))
            x = x + inflate * math.sqrt(raised**2 - now**2) * _noise(x, generator)
            now = raised
        towards = score(x, now)
        if watch is not None:
            watch(move, x, towards, now)
        slope = -now * towards
        end = x + (then - now) * slope
        if then > 0:
            end = x + (then - now) * 0.5 * (slope - then * score(end, then))
        x = end
    return x


def documents(
    follow: Next,
    n: int,
    *,
    prompt: list[int],
    longest: int,
    generator: Generator,
    device: torch.device,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    length: int = 0,
) -> Tensor:
    """Ancestral sampling of text: int64 [n, T] documents that begin with the tokens ``prompt``, zeros after their end.

    ``follow`` is given what it has not seen yet of the documents, tokens [n, k], and gives logits [n, V] of the token
    that comes next; the first that it is given is a zero, the end of a document before. T is ``length``, or where that
    is 0 the ``longest`` that there may be, but no more than 1,000; a document that long is cut there. Each position is
    one draw for all documents.

    ``temperature``: logits are divided by it; 0 takes the likeliest. ``top_k``: only the k likeliest symbols; 0: all.
    ``top_p``: only the likeliest symbols that together have this probability (Holtzman et al. 2020, 1904.09751).
    Raises ValueError for values that make no sense, and a prompt that leaves no room.
    """
    room = length or min(longest, 1000)
    if not 0 < room <= longest:
        raise ValueError(f"length is a number of tokens up to {longest}, or 0: not {length}")
    if not temperature >= 0:  # nor NaN
        raise ValueError(f"temperature is at least 0: not {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k is at least 0: not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is above 0 and at most 1: not {top_p}")
    if len(prompt) >= room:
        raise ValueError(f"the prompt has {len(prompt)} symbols and leaves no room in a document of {room} tokens")
    x = torch.zeros(n, room + 1, dtype=torch.int64, device=device)  # the end that a document follows, and itself
    x[:, 1 : len(prompt) + 1] = torch.tensor(prompt, dtype=torch.int64, device=device)
    seen, going = 0, x[:, 0] == 0
    for place in range(len(prompt) + 1, room + 1):
        logits = follow(x[:, seen:place])
        x[:, place] = next_token(logits, temperature, top_k, top_p, generator) * going
        seen, going = place, going & (x[:, place] > 0)
        if not going.any():
            break
    return x[:, 1:]


def next_token(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: Generator) -> Tensor:
    """One token a row of logits [n, V], as ``documents`` says: int64 [n]."""
    if not temperature:
        return logits.argmax(-1)
    likely, order = logits.float().div(temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k:
        likely = likely[:, :top_k]
    if top_p < 1:
        before = likely / likely.sum(-1, keepdim=True)
        before = before @ torch.ones(likely.shape[1], likely.shape[1], device=likely.device).triu(1)  # cumsum
        likely = likely * (before < top_p)
    return order.gather(-1, torch.multinomial(likely, 1, generator=generator)).squeeze(-1)
