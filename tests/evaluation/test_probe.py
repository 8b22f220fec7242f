"""The probe's arithmetic against planted and closed-form answers, and a whole one, twice, on the digits."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from genus.config import Model, Probe, Train
from genus.contract import Batch, Family
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.evaluation import metrics, probe
from genus.evaluation.probe import Job, Noise, Operations, Outcome, Prober, gradients, most_spikes, shrink, spikes
from tests.evaluation.conftest import Digits

CPU = torch.device("cpu")


def done(quality: float | None = 1.0, *, job: dict[str, Any] | None = None, **more: Any) -> Outcome:
    return Outcome(Job(**(job or {})), quality=quality, untrained=more.pop("untrained", 10.0), **more)


def seeds(*qualities: float, **job: Any) -> list[Outcome]:
    return [done(quality, job={"seed": seed} | job) for seed, quality in enumerate(qualities)]


# Spikes


def noisy(n: int = 400, seed: int = 0) -> np.ndarray:
    """A falling loss with noise that falls with it."""
    steps = np.arange(n)
    return 4 * np.exp(-steps / 100) + (0.3 * np.exp(-steps / 150) + 0.02) * np.random.default_rng(seed).standard_normal(
        n
    )


def test_planted_spikes_are_counted_and_nothing_else() -> None:
    """No spike among 2,000 steps of Gaussian noise (5 robust σ: 3e-7 a step), and each planted one of 12 σ is found."""
    assert [spikes(noisy(seed=seed)) for seed in range(5)] == [0] * 5
    losses = noisy()
    for at in (60, 61, 150, 300, 390):
        losses[at] += 12 * (0.3 * math.exp(-at / 150) + 0.02)
    assert spikes(losses) == 5
    losses[200:] += 3.0  # another level is no spike
    assert spikes(losses) == 5


def test_spikes_of_flat_and_short_series() -> None:
    assert spikes(np.full(100, 3.0)) == 0 and spikes(np.arange(20.0)) == 0
    flat = np.full(100, 3.0)
    flat[50] = 3.1
    assert spikes(flat) == 1


def test_a_term_that_comes_every_few_steps_is_no_spike() -> None:
    random = np.random.default_rng(0)
    history = [
        {"critic_loss": 1 + 0.1 * random.standard_normal()} | ({"critic_r1": 5.0} if step % 8 == 0 else {})
        for step in range(320)
    ]
    for row in history:
        row["critic_loss"] += row.get("critic_r1", 0.0)
    assert spikes(np.array([row["critic_loss"] for row in history])) == 39, "taken as one series it would be"
    assert most_spikes(history) == 0
    history[101]["critic_loss"] += 3
    assert most_spikes(history) == 1


# Figures


def test_a_share_has_wilsons_interval() -> None:
    for hits, n in ((0, 13), (2, 9), (9, 9)):
        figure = probe._share([place < hits for place in range(n)])
        known = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert figure is not None
        # scipy has 1.95996 for 1.96.
        assert (figure["low"], figure["high"]) == pytest.approx((known.low, known.high), abs=1e-4)
        assert figure["value"] == hits / n and figure["n"] == n


def test_a_mean_has_the_t_interval_and_one_value_none() -> None:
    values = [1.0, 2.0, 4.0]
    figure = probe._mean(values)
    known = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert figure is not None and (figure["low"], figure["high"]) == pytest.approx(known)
    assert probe._mean([3.0, None]) == {"value": 3.0, "low": None, "high": None, "n": 1, "open": True}
    assert probe._mean([None]) is None
    bounded = probe._mean(values, least=0.0)
    assert bounded is not None and bounded["low"] == 0.0


def test_the_intervals_of_three_seeds_hold_the_truth_19_times_in_20() -> None:
    """Mean and spread over 800 trials of three log-normal seeds: 95% ± 2.3%, three standard errors."""
    random, sigma = np.random.default_rng(0), 0.3
    held = {"quality": 0, "spread": 0}
    truth = {"quality": 2.0, "spread": 2 * math.sinh(0.6745 * sigma)}
    for _ in range(800):
        found = seeds(*(2 * np.exp(sigma * random.standard_normal(3))))
        for name, figure in (("quality", probe._quality(found)), ("spread", probe._spread(found))):
            assert figure is not None
            held[name] += figure["low"] <= truth[name] <= figure["high"]
    assert all(abs(count / 800 - 0.95) < 0.023 for count in held.values()), held


def test_qualities_at_and_below_zero_have_logarithms() -> None:
    """KID is unbiased and may be negative: as good as can be told, not an error."""
    found = seeds(-0.01, 0.0, 0.02)
    figure = probe._quality(found)
    assert figure is not None and figure["value"] == pytest.approx(probe.FLOOR)
    assert figure["low"] == pytest.approx(figure["high"])


def test_a_ratio_of_groups_is_welchs() -> None:
    before, after = np.array([1.0, 1.3, 0.9]), np.array([2.0, 3.5, 2.4])
    figure = probe._ratio(seeds(*before), seeds(*after, batch=0.125))
    known = stats.ttest_ind(np.log(after), np.log(before), equal_var=False).confidence_interval()
    assert figure is not None
    assert np.log([figure["low"], figure["high"]]) == pytest.approx([known.low, known.high])
    assert figure["value"] == pytest.approx(float(np.exp(np.log(after).mean() - np.log(before).mean())))
    assert probe._ratio(seeds(1.0), []) is None
    single = probe._ratio(seeds(1.0), seeds(2.0))
    assert single is not None and (single["value"], single["open"], single["high"]) == (2.0, True, None)


def test_jobs_of_one_seed_are_compared_in_pairs() -> None:
    """Seeds that differ by a factor of four do not hide a cost of 10% that each of them shows."""
    figure = probe._paired(seeds(1.0, 4.0, 2.0), seeds(1.1, 4.4, 2.22, outliers=0.001))
    assert figure is not None and 1.05 < figure["low"] < figure["value"] < figure["high"] < 1.15


def test_a_failed_job_counts_as_having_learned_nothing() -> None:
    """Left out, a family whose small batches diverge would look cheap."""
    failed = [replace(found, quality=None, failed="nan") for found in seeds(1, 1, 1, batch=0.125)]
    figure = probe._ratio(seeds(1.0, 1.0, 1.0), failed)
    assert figure is not None and figure["value"] == pytest.approx(10.0)


def test_what_diverges() -> None:
    base = seeds(1.0, 1.1, 0.9)
    assert not any(probe.diverged(found, base) for found in base)
    assert probe.diverged(replace(base[0], failed="nan", quality=None), base)
    assert probe.diverged(done(10.5), base), "no better than before the first step"
    one = seeds(1.0, 1.1, 3.5)
    assert [probe.diverged(found, one) for found in one] == [False, False, True], "3.5 is 3.2 times the median"
    other = done(3.5, job={"width": 0.5})
    assert not probe.diverged(other, [*base, other]), "it has no peers to be lost from"
    assert not probe.diverged(done(None), base), "what does not sample may still train"


NOISE = Noise(0.05, 4)


def by_rate(**qualities: float | None) -> list[Outcome]:
    return [
        done(
            quality, job={"learning_rate": float(rate.strip("x").replace("_", "."))}, failed=None if quality else "nan"
        )
        for rate, quality in qualities.items()
    ]


def test_usable_learning_rates() -> None:
    """1 is best, 0.3 and 3 are within 1.5 of it, 0.1 and 10 far from it: a decade, and at most two."""
    found = by_rate(x0_1=5.0, x0_3=1.1, x1=1.0, x3=1.1, x10=None)
    figure = probe._usable(found, NOISE)
    assert figure is not None and figure["best"] == 1.0
    assert (figure["value"], figure["low"], figure["high"]) == pytest.approx((1.0, 1.0, 2.0))
    gap = probe._usable(by_rate(x0_1=1.0, x0_3=9.0, x1=1.0, x3=1.2, x10=9.0), Noise(0.0, 4))
    assert gap is not None and gap["value"] == pytest.approx(0.0), "beyond a gap nothing counts: 0.1 is first of equals"
    end = probe._usable(by_rate(x0_1=9.0, x0_3=9.0, x1=1.0, x3=1.0, x10=1.0), NOISE)
    assert end is not None and end["value"] == pytest.approx(1.0) and end["high"] is None and end["open"]
    unsure = probe._usable(by_rate(x0_1=5.0, x0_3=1.45, x1=1.0, x3=1.45, x10=5.0), NOISE)
    assert unsure is not None and unsure["low"] < unsure["value"], "1.45 is within the noise of 1.5"
    assert probe._usable(by_rate(x1=None, x3=None), NOISE) is None
    unknown = probe._usable(found, Noise(0.0, 0))
    assert unknown is not None and unknown["open"]


def test_slope_and_prediction_on_a_power_law() -> None:
    """quality = 3 · parameters^-0.25, without noise: a doubling gains 2^-0.25; the line is followed to 200,000."""
    found = [
        done(3 * count**-0.25, job={"width": width}, parameters=count, flops=float(count**2))
        for width, count in ((0.5, 40_000), (1.0, 110_000), (2.0, 350_000))
    ]
    slope = probe._slope(found, NOISE, "parameters")
    assert slope is not None and slope["value"] == pytest.approx(2**-0.25)
    assert slope["low"] < slope["value"] < slope["high"] and len(slope["points"]) == 3
    by_flops = probe._slope(found, NOISE, "flops")
    assert by_flops is not None and by_flops["value"] == pytest.approx(2**-0.125)
    at = probe._at(found, NOISE)
    assert at is not None and at["value"] == pytest.approx(3 * 200_000**-0.25) and at["low"] < at["value"] < at["high"]
    assert probe._at([replace(one, parameters=one.parameters // 100) for one in found], NOISE) is None, "too far away"
    assert probe._slope(found[:1], NOISE, "parameters") is None
    unknown = probe._slope(found, Noise(0.0, 0), "parameters")
    assert unknown is not None and unknown["open"]


def test_the_slopes_interval_is_that_of_a_regression() -> None:
    """Against scipy, whose residual deviation is given as the noise."""
    random = np.random.default_rng(1)
    counts = [10_000, 20_000, 40_000, 80_000, 160_000]
    qualities = [count**-0.3 * math.exp(0.1 * random.standard_normal()) for count in counts]
    found = [done(q, job={"width": float(c)}, parameters=c) for q, c in zip(qualities, counts, strict=True)]
    known = stats.linregress(np.log(counts), np.log(qualities))
    squares = float(((np.log(counts) - np.mean(np.log(counts))) ** 2).sum())
    figure = probe._slope(found, Noise(known.stderr * math.sqrt(squares), 3), "parameters")
    half = stats.t.ppf(0.975, 3) * known.stderr * math.log(2)
    assert figure is not None and math.log(figure["high"] / figure["value"]) == pytest.approx(half)


def test_resolution_compares_the_ends() -> None:
    found = [done(q, job={"size": size}) for size, q in ((0, 1.0), (8, 0.5), (20, 2.0))]
    figure = probe._resolution(found, 12, NOISE)
    assert figure is not None and figure["value"] == pytest.approx(4.0)
    assert [point["size"] for point in figure["points"]] == [8, 12, 20]
    half = stats.t.ppf(0.975, 4) * 0.05 * math.sqrt(2)
    assert math.log(figure["high"] / figure["value"]) == pytest.approx(half)


def varied(kls: list[float], errors: list[float], noise: float, count: int = 2) -> dict[str, Any] | None:
    """A trade of a base and three values for some seeds; the second is shifted, and its changes vary by ``noise``."""
    found = []
    for seed in range(count):
        for place, (kl, error) in enumerate(zip(kls, errors, strict=True)):
            own = noise * seed * (-1) ** place
            terms = {"kl": kl + 5 * seed, "reconstruction": error + 50 * seed + own}
            params = (("beta", float(place)),) if place else ()
            found.append(done(1.0, job={"seed": seed, "params": params}, terms=terms))
    return probe._trade("beta", found, [one for one in found if not one.job.params])


def test_trade_of_two_terms() -> None:
    clear = varied([10, 20, 5, 2], [100, 80, 120, 150], 0.5)
    assert clear is not None and (clear["value"], clear["low"], clear["high"]) == pytest.approx((-1, -1, -1))
    close = varied([10, 20, 5, 2], [100, 80, 120, 150], 10.0)
    assert close is not None and close["value"] == pytest.approx(-1) and close["high"] > -0.9, "within the noise"
    both = varied([10, 20, 5, 2], [100, 120, 80, 60], 0.5)
    assert both is not None and both["value"] == pytest.approx(1)
    single = varied([10, 20, 5, 2], [100, 80, 120, 150], 0.5, count=1)
    assert single is not None and single["open"], "one seed does not say what is chance"
    other = [done(1.0, terms={"loss": 1.0})] * 3
    assert probe._trade("beta", other, other) is None


def test_a_width_that_failed_says_nothing_of_capacity() -> None:
    found = [
        done(3 * count**-0.25, job={"width": width}, parameters=count)
        for width, count in ((0.5, 50_000), (1.0, 150_000))
    ]
    failed = done(None, job={"width": 2.0}, parameters=500_000, failed="nan")
    slope = probe._slope([*found, failed], NOISE, "parameters")
    assert slope is not None and slope["value"] == pytest.approx(2**-0.25)
    assert slope["points"][-1]["quality"] is None and slope["points"][-1]["failed"] == "nan"


# What is measured on models and data


class Linear(Family):
    """A mean of the images in one weight a pixel, with a known gradient: w - mean(x)."""

    def __init__(self) -> None:
        super().__init__(DataSpec((1, 2, 2)))
        self.weight = nn.Parameter(torch.zeros(1, 2, 2))

    def loss(self, batch: Batch, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"loss": 0.5 * ((batch.x - self.weight) ** 2).flatten(1).sum(1).mean()}


def test_gradients_are_those_of_the_loss_and_leave_the_model_alone() -> None:
    model, x = Linear(), torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    found = gradients(model, Batch(x))
    assert set(found) == {"model"} and torch.allclose(found["model"].float(), -x.mean(0).flatten(), atol=1e-6)
    assert model.weight.grad is None and model.weight.abs().sum() == 0


def test_operations_of_a_matrix_product() -> None:
    """[3, 5] times [5, 7]: 2 · 3 · 5 · 7, and twice that again for the two gradients."""
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    with Operations() as counted:
        product = a @ b
    assert counted.total == 2 * 3 * 5 * 7
    with Operations() as counted:
        product.sum().backward()
    assert counted.total == 2 * 2 * 3 * 5 * 7


def test_shrinking_averages() -> None:
    images = np.arange(2 * 16, dtype=np.uint8).reshape(2, 1, 4, 4) * 4
    assert np.array_equal(shrink(images, 4), images)
    assert shrink(images, 2)[0, 0, 0, 0] == round(float(images[0, 0, :2, :2].mean()))
    assert shrink(images, 2).shape == (2, 1, 2, 2)


def test_the_benchs_distance_is_the_kernel_distance(digits: Digits) -> None:
    bench = probe.Images(digits.data, digits.reference.judge, 8, seed=0, train_images=200)
    other = probe.features(digits.reference.judge, bench.train)
    assert bench.distance(other) == pytest.approx(metrics.mmd2(other, bench.seen), rel=1e-9)
    assert abs(bench.distance(other) / bench.control) < 0.2, "real images are near to real ones"
    noise = probe.features(digits.reference.judge, bench.noise(200, seed=0))
    assert bench.distance(noise) / bench.control > 1.5, "and noise is worse than the Gaussian"
    assert bench.expected.sum() == pytest.approx(1) and (bench.expected > 0.02).all()


TINY: dict[str, Any] = {
    "steps": 24,
    "seeds": 3,
    "learning_rates": [0.3, 1e9],
    "widths": [0.5],
    "sizes": [4, 6],
    "samples": 100,
    "vary": {"beta": [0.1, 20.0]},
}


def prober(digits: Digits, **more: Any) -> Prober:
    config = Model(
        family="vae/vae",
        dataset="digits",
        collection="smoke",
        params={"latent": 8, "channels": 8, "hidden": 32},
        train=Train(steps=1, batch_size=32, learning_rate=5e-3),
        probe=Probe(**(TINY | more)),
    )
    torch.manual_seed(123)  # of no influence
    made = Prober(config, digits.data, digits.reference.judge, seed=0, device=CPU)
    made.run()
    return made


def told(made: Prober) -> str:
    found = probe.summarise(made) | {
        "setting": probe.setting(made.probe, made),
        "curve": made.curve,
        "jobs": [asdict(outcome) for outcome in made.outcomes.values()],
    }
    return json.dumps(found, sort_keys=True, allow_nan=False)


def test_a_whole_probe_twice(digits: Digits) -> None:
    made = prober(digits)
    first = told(made)
    assert first == told(prober(digits)), "the same bytes"
    found, outcomes = json.loads(first), made.outcomes
    # 3 seeds, 2 rates, 1 width, 3 small batches, 3 with outliers, 2 sizes, 2 values of beta for 2 seeds.
    assert len(outcomes) == len(found["jobs"]) == found["setting"]["jobs"] == 18
    base = outcomes[Job(seed=0)]
    assert base.quality is not None and base.untrained is not None and base.quality < base.untrained
    assert base.bits is not None and base.pull is not None and base.flops > 0

    diverging = outcomes[Job(learning_rate=1e9)]
    assert diverging.failed and diverging.quality is None, "a failure is an outcome"
    refused = outcomes[Job(size=6)]
    assert refused.untried == "a 6x6 image: height and width must be multiples of 4" and not refused.failed

    assert found["stability"]["diverged"]["n"] == 11, "all but the rates, beta and what could not be tried"
    assert found["stability"]["outlier_bits"]["n"] == 3 and found["stability"]["small_batch_cost"]["n"] == 3
    assert [point["size"] for point in found["capacity"]["resolution_cost"]["points"]] == [4, 8]
    assert [point["width"] for point in found["capacity"]["slope"]["points"]] == [0.5, 1.0]
    assert found["density"]["kl_trade"]["value"] == pytest.approx(-1)
    assert [point["value"] for point in found["vary"]["beta"]] == [None, 0.1, 20.0]
    assert [point["step"] for point in found["curve"]] == [4, 8, 12, 16, 20, 24]
    assert len(made.curve_seconds) == 6 and made.curve_seconds == sorted(made.curve_seconds)
    assert found["curve"][-1]["quality"] == base.quality


def test_widths_keep_what_they_are_multiples_of(digits: Digits) -> None:
    config = Model(
        family="vae/vae", dataset="d", collection="c", params={"channels": 12}, train=Train(steps=1, batch_size=8)
    )
    made = Prober(config, digits.data, digits.reference.judge, seed=0, device=CPU)
    assert made.params(Job(width=0.5)) == {"channels": 8, "hidden": 160}  # 12 / 4 / 2 rounds up; 320 is the default
    assert made.params(Job(width=2.0)) == {"channels": 24, "hidden": 640}
    assert made.params(Job()) == {"channels": 12}


def test_a_size_that_the_family_cannot_have_at_all_is_the_users_error(digits: Digits) -> None:
    with pytest.raises(UserError, match=r"probe.size: vae/vae at 6 pixels: .*multiples of 4"):
        prober(digits, size=6)


def test_samples_that_are_no_numbers_are_a_failure(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored, NaN would be black: a picture like any other."""
    from genus.families.vae.vae import VAE

    usual = VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda self, code: usual(self, code) * math.nan)
    made = prober(digits, learning_rates=[], widths=[], sizes=[], outliers=0.0, batch=1.0, vary={}, seeds=2)
    assert {found.failed for found in made.outcomes.values()} == {"the samples are not finite"}
    figures = probe.summarise(made)
    assert figures["stability"]["diverged"]["value"] == 1.0 and figures["capacity"]["quality"] is None
