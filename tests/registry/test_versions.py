"""What a version is known by, and when there is nothing to decide of it."""

from __future__ import annotations

import pytest

from genus.registry import Figures
from genus.registry.champions import _before
from genus.registry.entries import Entry, Version
from genus.registry.versions import against, alike, decided


def entry(versions: dict[str, dict[str, str]], **aliases: str) -> Entry:
    """What the registry holds under a name, from tags by number."""
    return Entry({number: Version("m", number, tags) for number, tags in versions.items()}, aliases)


def test_density_is_the_figure_where_there_is_one_else_the_samples() -> None:
    samples = {"frechet_distance": {"value": 40, "n": 9}, "kid": {"value": 0.1}}
    assert Figures.of(samples) == Figures("frechet_distance", 40.0, "", 9)
    both = samples | {"bits_per_dim": {"value": 3.0, "low": 2.75, "high": 3.25, "kind": "exact", "n": 7}}
    assert Figures.of(both) == Figures("bits_per_dim", 3.0, "exact", 7)
    assert Figures.of({"kid": {"value": 0.1}}) is None


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, False),
        ({"genus.decided_against": against("1", "data")}, True),
        ({"genus.decided_against": against("1", "other")}, False),  # the data have changed
        ({"genus.decided_against": against("3", "data")}, False),  # the champion has
        ({"genus.decided_against": against("1", "data").replace("metrics ", "metrics 0")}, False),
        ({"genus.rolled_back": "ugly"}, True),
    ],
)
def test_a_decision_holds_for_its_champion_its_data_and_its_metrics(tags: dict[str, str], expected: bool) -> None:
    held = entry({"1": {}, "2": tags}, champion="1")
    assert decided(held, "2", "data") is expected
    assert decided(held, "1", "data")  # the champion itself


def test_versions_without_a_manifest_are_packaged_anew() -> None:
    tags = {"genus.sha256": "c", "genus.knobs": "{}"}
    assert alike(entry({"1": tags}), "c", {}) is None
    held = entry({"1": tags, "2": tags | {"genus.format": "1"}, "10": tags | {"genus.format": "1"}})
    assert alike(held, "c", {}) == "10" and alike(held, "c", {"k": 1}) is None and alike(held, "d", {}) is None


@pytest.mark.parametrize(
    ("versions", "before"),
    [
        ({"1": {}, "2": {}}, None),
        ({"1": {}, "2": {}, "3": {"genus.replaces": "2"}}, "2"),
        ({"1": {}, "3": {"genus.replaces": "2"}}, None),  # deleted, and with it who came before
        ({"1": {}, "2": {"genus.replaces": "1", "genus.rolled_back": "x"}, "3": {"genus.replaces": "2"}}, "1"),
        (
            {"2": {"genus.replaces": "3", "genus.rolled_back": "x"}, "3": {"genus.replaces": "2"}},
            None,
        ),  # round and round
    ],
)
def test_the_champion_before(versions: dict[str, dict[str, str]], before: str | None) -> None:
    assert _before(entry(versions), max(versions)) == before
