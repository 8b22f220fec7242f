"""Who becomes champion, case by case."""

from __future__ import annotations

import pytest

from genus.registry import Figures, decide

OLD = Figures("bits_per_dim", 3.5, "elbo", 100, "data")
NOISY = Figures("bits_per_dim", 3.5, "elbo", 100, "data", 0.04)
UNKNOWN = Figures("frechet_distance", 3.5, "", 100, "data")


@pytest.mark.parametrize(
    ("challenger", "champion", "version", "better", "why"),
    [
        (OLD, None, None, True, "first champion: bits_per_dim (elbo) 3.5000"),
        (None, None, None, True, "first champion, without a figure"),
        (Figures("bits_per_dim", 3.4999, "elbo", 100, "data"), OLD, "1", True, "beats version 1: 3.5000"),
        (OLD, OLD, "1", False, "does not beat version 1: 3.5000"),
        (Figures("bits_per_dim", 3.46, "elbo", 100, "data", 0.03), NOISY, "1", False, "by more than chance, 0.0500"),
        (Figures("bits_per_dim", 3.44, "elbo", 100, "data", 0.03), NOISY, "1", True, "beats version 1: 3.5000 by more"),
        (Figures("bits_per_dim", 3.6, "elbo", 100, "data"), OLD, "7", False, "does not beat version 7"),
        (Figures("bits_per_dim", 3.6, "exact", 100, "data"), OLD, "1", True, "not comparable with version 1"),
        (UNKNOWN, OLD, "1", True, "not comparable with version 1"),
        (Figures("bits_per_dim", 3.6, "elbo", 100, "new"), OLD, "1", True, "measured on other data"),
        (OLD, None, "1", True, "version 1 has no figure"),
        (None, OLD, "1", False, "version 1 stays"),
    ],
)
def test_decision(
    challenger: Figures | None, champion: Figures | None, version: str | None, better: bool, why: str
) -> None:
    decided, reason = decide(challenger, champion, version)
    assert decided is better
    assert why in reason


def test_density_decides_where_there_is_one_else_the_samples() -> None:
    samples = {"frechet_distance": {"value": 40, "n": 9}, "kid": {"value": 0.1}}
    assert Figures.of(samples, "d") == Figures("frechet_distance", 40.0, "", 9, "d")
    both = samples | {"bits_per_dim": {"value": 3.0, "low": 2.75, "high": 3.25, "kind": "exact", "n": 7}}
    assert Figures.of(both, "d") == Figures("bits_per_dim", 3.0, "exact", 7, "d", 0.25)
    assert Figures.of({"kid": {"value": 0.1}}, "d") is None


def test_figures_survive_the_tags_exactly() -> None:
    figures = Figures("bits_per_dim", 0.1 + 0.2, "elbo", 100, "data", 0.1 * 3)
    assert Figures.of_tags(figures.tags() | {"genus.data_sha256": "data"}) == figures
    assert Figures.of_tags({}) is None
