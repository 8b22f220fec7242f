"""The table of properties finds its figures in a record, and the advice knows winners, runners-up and ties."""

from __future__ import annotations

from typing import Any

import pytest

from genus.evaluation.properties import NEEDS, ROWS, advice, table


def rows_of(records: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row["cells"] for row in table(records)}


def test_rows_are_of_the_five_properties_and_every_key_is_there_once() -> None:
    keys = [row.key for row in ROWS]
    assert len(set(keys)) == len(keys)
    assert {key.split(".")[0] for key in keys} == {"stability", "capacity", "density", "constraints", "speed"}
    assert {row.better for row in ROWS} == {"lower", "higher", ""}
    assert {key for need in NEEDS for key in (need.key, *need.then)} <= set(keys)


def test_a_record_without_anything_has_no_figure_anywhere() -> None:
    bare = {"failure": "it diverged"}
    probed = {"probe": {"stability": None, "curve": [], "two_d": {"rings": {"kl": None}}}, "timing": {}}
    for record in (bare, probed):
        assert all(cells["a"] is None for cells in rows_of({"a": record}).values())


def test_figures_are_found_where_the_stages_leave_them() -> None:
    distance = {"value": 20.0, "low": 18.0, "high": 22.0, "n": 100, "relative": 0.4, "kind": "judge"}
    gap = {"value": 0.02, "low": 0.01, "high": 0.03}
    record = {
        "parameters": 5,
        "metrics": {"frechet_distance": distance, "iwae_bits_per_dim": {"value": 3.0, "gap": gap}},
        "timing": {"sample_ms_64": 2.0, "probe_curve_seconds": [1.0, 2.0, 3.0]},
        "probe": {
            "constraints": {"trained_share": {"value": 0.5, "n": 4, "text": "not critic"}},
            "two_d": {"rings": {"kl": {"value": 0.1, "low": 0.0, "high": 0.2}}, "spiral": {"kl": {"value": 0.3}}},
            "curve": [{"quality": 4.0}, {"quality": 0.9}, {"quality": 0.2}],
        },
    }
    cells = {key: found["a"] for key, found in rows_of({"a": record}).items()}
    assert cells["capacity.parameters"] == {"value": 5}
    share = cells["capacity.frechet_distance"]
    assert (share["value"], share["low"], share["high"]) == pytest.approx((0.4, 0.36, 0.44))
    assert cells["density.gap"] == gap
    assert cells["density.two_d"]["value"] == 0.3 and cells["density.two_d"]["kind"] == "spiral"
    assert cells["constraints.trained_share"]["text"] == "not critic"
    reached = cells["speed.seconds_to_quality"]  # somewhere between the first and the second point
    assert (reached["low"], reached["value"], reached["high"]) == pytest.approx((0.9, 2.0, 2.2))
    assert cells["speed.sample_ms_64"]["low"] < 2.0 < cells["speed.sample_ms_64"]["high"]


def record(**figures: Any) -> dict[str, Any]:
    """A record with figures by row: ``stability_spread=(value, half)``; half None for an exact one."""
    made: dict[str, Any] = {"probe": {}, "metrics": {}, "timing": {}}
    for name, (value, half) in figures.items():
        section, _, key = name.partition("_")
        figure = {"value": value} | ({} if half is None else {"low": value - half, "high": value + half})
        if section in ("stability", "constraints"):
            made["probe"].setdefault(section, {})[key] = figure
        elif section == "timing":
            made["timing"][key] = value
        else:
            made["metrics"][key] = figure | {"relative": value}
    return made


def need(records: dict[str, Any], name: str, kind: str = "image") -> dict[str, Any]:
    rows = [row for row in table(records) if kind in row["kinds"]]
    (found,) = [entry for entry in advice(rows, kind) if entry["need"] == name]
    return found


def test_text_has_its_own_density_and_nothing_of_images() -> None:
    found = need({"a": record(metrics_bits_per_char=(1.9, 0.1))}, "best density", "text")
    assert (found["key"], found["figure"]) == ("density.bits_per_char", "1.9 bits/char")
    rows = {row["key"]: row["kinds"] for row in table({"a": record()})}
    shared = [key for key, kinds in rows.items() if "text" in kinds and "image" in kinds]
    assert "speed.memory" in shared and not {"density.bits_per_dim", "density.bits_per_char"} & set(shared)


def test_the_n_gram_gap_is_a_distance_from_real_text() -> None:
    figure = {"value": 2.0, "low": 1.9, "high": 2.1, "n": 9}
    rows = {}
    for name, floor in (("above", 1.5), ("below", 2.5), ("there", 1.95)):
        found = table({"a": {"metrics": {"ngram_bits": figure | {"floor": floor}}}})
        (rows[name],) = [row["cells"]["a"] for row in found if row["key"] == "capacity.ngram_gap"]
    ends = {name: tuple(round(row[end], 9) for end in ("value", "low", "high")) for name, row in rows.items()}
    assert ends == {"above": (0.5, 0.4, 0.6), "below": (0.5, 0.4, 0.6), "there": (0.05, 0.0, 0.15)}


def test_winner_and_runner_up_with_their_figures() -> None:
    found = need(
        {"a": record(metrics_bits_per_dim=(3.5, 0.1)), "b": record(metrics_bits_per_dim=(3.0, 0.1))}, "best density"
    )
    assert (found["model"], found["runner_up"], found["tied"]) == ("b", "a", [])
    assert (found["figure"], found["runner_up_figure"]) == ("3 bits/dim", "3.5 bits/dim")
    fast = need({"a": record(timing_train_images_per_s=(2000, None)), "b": record()}, "fastest training")
    assert (fast["model"], fast["figure"], fast["runner_up"], fast["runner_up_figure"]) == ("a", "2,000 1/s", None, "")


def test_intervals_that_meet_are_a_tie() -> None:
    figures = {"a": (0.30, 0.03), "b": (0.34, 0.02), "c": (0.50, 0.02)}
    found = need({name: record(metrics_frechet_distance=each) for name, each in figures.items()}, "best samples")
    assert (found["model"], found["runner_up"], found["tied"]) == ("a", "b", ["b"])


def test_an_unknown_interval_is_tied_with_everything() -> None:
    unknown = record()
    unknown["probe"] = {"stability": {"spread": {"value": 0.9, "low": None, "high": None, "n": 1}}}
    found = need({"a": record(stability_spread=(0.1, 0.01)), "b": unknown}, "most stable")
    assert (found["model"], found["tied"]) == ("a", ["b"])


def test_what_is_lost_is_not_stable() -> None:
    lost = record(stability_spread=(0.1, 0.01), stability_diverged=(0.2, 0.1))
    fine = record(stability_spread=(0.3, 0.01), stability_diverged=(0.0, None))
    found = need({"a": lost, "b": fine}, "most stable")
    assert (found["model"], found["runner_up"]) == ("b", None)


def test_equal_constraints_are_decided_by_what_must_be_trained() -> None:
    def one(free: float, networks: int, share: float) -> dict[str, Any]:
        return record(
            constraints_free_places=(free, None),
            constraints_networks=(networks, None),
            constraints_trained_share=(share, None),
        )

    records = {"game": one(1, 2, 1), "coder": one(1, 1, 0.5), "whole": one(1, 1, 1), "flow": one(0.2, 1, 1)}
    found = need(records, "fewest constraints")
    assert (found["model"], found["runner_up"], found["tied"]) == ("whole", "coder", [])
    twins = need({"x": one(1, 1, 1), "y": one(1, 1, 1)}, "fewest constraints")
    assert (twins["model"], twins["tied"]) == ("x", ["y"])


def test_nobody_has_it() -> None:
    found = need({"a": record()}, "best density")
    assert (found["model"], found["runner_up"], found["figure"], found["tied"]) == (None, None, "", [])
