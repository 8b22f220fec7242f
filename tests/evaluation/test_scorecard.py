"""The scorecard holds together when models fail or lack figures, and its trade-off marks what nothing beats."""

from __future__ import annotations

import json
from typing import Any

from genus.evaluation.claims import Claim, Condition
from genus.evaluation.scorecard import scorecard, tradeoff


def record(family: str, dataset: str = "d", **more: Any) -> dict[str, Any]:
    return {"name": family, "family": family, "dataset": dataset} | more


def measured(distance: float, ms: float, **metrics: Any) -> dict[str, Any]:
    figure = {"value": distance, "low": distance - 1, "high": distance + 1, "n": 500, "relative": distance / 100}
    return {"metrics": {"frechet_distance": figure} | metrics, "timing": {"sample_ms": ms}}


def test_a_failed_model_is_shown_and_the_rest_stands() -> None:
    claims = [
        Claim(
            id=1,
            claim="x",
            property="capacity",
            families=["flows"],
            all=[Condition(measure="capacity.parameters", at_most=9)],
        ),
        Claim(
            id=2,
            claim="y",
            property="capacity",
            families=["vae"],
            all=[Condition(measure="capacity.parameters", at_most=9)],
        ),
    ]
    records = {
        "f": record("flows/one", failure="the loss is nan"),
        "v": record("vae/two", parameters=3),
        "w": record("vae/two", "e"),
    }
    card = scorecard("about", records, {"d": {}, "e": {}}, claims)
    assert set(card) == {"about", "datasets", "models", "properties", "verdicts", "advice", "tradeoff"}
    assert card["models"]["f"]["failure"] == "the loss is nan"
    said = {(v["dataset"], v["id"]): (v["verdict"], v["because"]) for v in card["verdicts"]}
    assert said["d", 1] == ("waiting", "waits for f, which failed")
    assert said["d", 2][0] == "supported"
    assert said["e", 1] == ("waiting", "waits for a model of flows"), "data sets are judged by themselves"
    assert said["e", 2] == ("waiting", "no figure of capacity.parameters for w")
    (row,) = [row for row in card["properties"] if row["key"] == "capacity.parameters"]
    assert row["cells"] == {"f": None, "v": {"value": 3}, "w": None} and row["claims"] == [1, 2]
    assert {entry["dataset"] for entry in card["advice"]} == {"d", "e"}
    json.dumps(card, allow_nan=False)


def test_tradeoff_marks_what_is_neither_slower_nor_worse_than_another() -> None:
    records = {
        "good": record("a/a", **measured(10, 9.0, nfe={"value": 100})),
        "fast": record("b/b", **measured(50, 1.0)),
        "beaten": record("c/c", **measured(60, 2.0)),
        "elsewhere": record("c/c", "e", **measured(90, 99.0)),
        "failed": record("d/d", failure="no"),
    }
    points = {point["model"]: point for point in tradeoff(records)}
    assert {name for name, point in points.items() if point["pareto"]} == {"good", "fast", "elsewhere"}
    assert "failed" not in points and points["good"]["nfe"] == 100
    assert (points["good"]["quality"], points["good"]["low"], points["good"]["high"]) == (0.1, 0.09, 0.11)


def test_settings_of_a_knob_are_points_of_their_own() -> None:
    with_curve = measured(10, 9.0)
    with_curve["metrics"]["curve"] = {
        "points": [{"knobs": {"thin": 2}, "relative": 0.3, "calls": 50, "n": 9}, {"knobs": {"thin": 4}}]
    }
    with_curve["timing"]["curve_sample_ms"] = [4.0, 2.0]
    points = tradeoff({"m": record("a/a", **with_curve)})
    assert [(point["label"], point["sample_ms"], point["pareto"]) for point in points] == [
        ("thin 2", 4.0, True),
        ("", 9.0, True),
    ]


def test_claims_are_asked_of_the_data_that_they_speak_of() -> None:
    """One by a measure of text is none of images; of images one is asked though no model is there, and waits."""
    of_text = Condition(measure="density.bits_per_char", at_most=2.0)
    of_images = Condition(measure="density.bits_per_dim", at_most=2.0)
    about: dict[str, Any] = {"claim": "c", "property": "density", "source": "s"}
    asked = [
        Claim(id=1, families=["autoregressive/lstm"], all=[of_text], **about),
        Claim(id=2, families=["flows"], all=[of_images], **about),
    ]
    bits = {"metrics": {"bits_per_char": {"value": 1.5, "low": 1.4, "high": 1.6}}}
    records = {"verses": record("autoregressive/lstm", "words", **bits), "clothes": record("vae/vae", "pictures")}
    found = scorecard("both", records, {"words": {"kind": "text"}, "pictures": {"kind": "image"}}, asked)["verdicts"]
    said = [(verdict["dataset"], verdict["id"], verdict["verdict"]) for verdict in found]
    assert said == [("words", 1, "supported"), ("pictures", 2, "waiting")]
