"""Verdicts follow from intervals, in all four ways; a claim is data, and a wrong one is named in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from genus.errors import UserError
from genus.evaluation import claims, properties
from genus.evaluation.claims import Claim, Condition, describe, interval, judge, read

FAMILIES = {"a": "flows/one", "b": "vae/two", "c": "gan/three"}


def figure(value: float, half: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half} | more


def verdict(cells: dict[str, Any], families: dict[str, str] | None = None, **condition: Any) -> tuple[str, str]:
    """The verdict on one condition about flows, with these cells of the measure."""
    claim = Claim(id=1, claim="x", property="speed", families=["flows"], all=[Condition(measure="m", **condition)])
    (found,) = judge([claim], families or FAMILIES, {"m": cells})
    return found["verdict"], found["because"]


@pytest.mark.parametrize(
    ("value", "half", "at_most", "at_least"),
    [
        (1.0, 0.2, "supported", "contradicted"),  # all of the interval below 2
        (1.9, 0.2, "undecided", "undecided"),  # across it
        (3.0, 0.2, "contradicted", "supported"),
        (2.0, 0.0, "supported", "supported"),  # exactly there
    ],
)
def test_a_bound_is_judged_by_the_whole_interval(value: float, half: float, at_most: str, at_least: str) -> None:
    cells = {"a": figure(value, half)}
    assert verdict(cells, at_most=2)[0] == at_most
    assert verdict(cells, at_least=2.0)[0] == at_least


def test_exact_figures_decide_and_open_ones_do_not() -> None:
    assert verdict({"a": {"value": 1.0}}, at_most=2)[0] == "supported"  # a count
    assert verdict({"a": {"value": 1.0, "open": True}}, at_most=2)[0] == "undecided"  # a noisy figure of one run
    assert verdict({"a": {"value": 1.0, "low": None, "high": None}}, at_most=2)[0] == "undecided"
    half_open = {"a": {"value": 3.0, "low": 2.5, "high": None, "open": True}}
    assert verdict(half_open, at_most=2)[0] == "contradicted" and verdict(half_open, at_least=2)[0] == "supported"
    assert verdict(half_open, at_most=2.7)[0] == "undecided"


def test_an_open_end_survives_the_table() -> None:
    """The cell drops what is None; that the end is not known must not be lost with it."""
    record = {"probe": {"stability": {"spread": {"value": 0.1, "low": None, "high": None, "n": 1}}}}
    (row,) = [row for row in properties.table({"a": record}) if row["key"] == "stability.spread"]
    assert interval(row["cells"]["a"]) == (-float("inf"), float("inf"))
    (row,) = [row for row in properties.table({"a": {"parameters": 7}}) if row["key"] == "capacity.parameters"]
    assert interval(row["cells"]["a"]) == (7, 7)


@pytest.mark.parametrize(
    ("mine", "theirs", "less", "more"),
    [
        (figure(1, 0.5), [figure(2, 0.4), figure(3, 0.4)], "supported", "contradicted"),
        (figure(1, 0.5), [figure(2, 0.6), figure(3, 0.4)], "undecided", "contradicted"),  # one of them meets it
        (figure(4, 0.5), [figure(2, 0.6), figure(3, 0.4)], "contradicted", "supported"),
        (figure(2.5, 0.4), [figure(2, 0.05), figure(3, 0.05)], "contradicted", "contradicted"),  # between them
        (figure(2.5, 9.0), [figure(2, 0.05), figure(3, 0.05)], "undecided", "undecided"),
        (figure(1, 0.5), [None, {"value": None}], "waiting", "waiting"),
    ],
)
def test_rivals_must_all_be_beaten_for_sure(mine: Any, theirs: list[Any], less: str, more: str) -> None:
    cells = {"a": mine, "b": theirs[0], "c": theirs[1]}
    assert verdict(cells, less_than="others")[0] == less
    assert verdict(cells, more_than="others")[0] == more


def test_rivals_can_be_named() -> None:
    cells = {"a": figure(2, 0.1), "b": figure(1, 0.1), "c": figure(3, 0.1)}
    assert verdict(cells, more_than=["vae"])[0] == "supported"
    assert verdict(cells, more_than=["gan/three", "vae"])[0] == "contradicted"
    assert verdict(cells, more_than=["score"]) == ("waiting", "no figure of m to compare with")


def test_kinds_and_presence() -> None:
    cells = {"a": figure(1, 0.1, kind="elbo"), "b": None}
    assert verdict(cells, is_in=["elbo", "iwae"])[0] == "supported"
    assert verdict(cells, is_in=["exact"])[0] == "contradicted"
    assert verdict(cells, present=True)[0] == "supported" and verdict(cells, present=False)[0] == "contradicted"
    assert verdict({"a": None}, present=False)[0] == "supported"
    assert verdict({}, at_most=1) == ("waiting", "no figure of m for a")


def test_every_model_of_the_families_is_asked_and_the_worst_verdict_counts() -> None:
    families = {"a": "flows/one", "b": "flows/two", "c": "gan/three"}
    for value, expected in ((1.5, "supported"), (2.0, "undecided"), (3.0, "contradicted")):
        assert verdict({"a": figure(1, 0.1), "b": figure(value, 0.2)}, families, at_most=2)[0] == expected
    assert verdict({"a": figure(1, 0.1)}, families, at_most=2)[0] == "waiting"
    assert verdict({"a": figure(3, 0.1)}, families, at_most=2)[0] == "contradicted", "which needs no more figures"


def test_what_a_claim_waits_for_is_said() -> None:
    def judged(claim: Claim, families: dict[str, str], failed: dict[str, str]) -> str:
        (found,) = judge([claim], families, {"m": {"a": figure(1)}}, failed)
        assert found["verdict"] == "waiting"
        return found["because"]

    usual = Claim(id=1, claim="x", property="speed", families=["flows"], all=[Condition(measure="m", at_most=2)])
    assert judged(usual, {"c": "gan/three"}, {}) == "waits for a model of flows"
    assert judged(usual, {"c": "gan/three"}, {"a": "flows/one"}) == "waits for a, which failed"
    later = Claim(id=1, claim="x", property="speed", families=["flows"], waits_for="a distilled flow")
    assert judged(later, FAMILIES, {}) == "waits for a distilled flow"


def test_figures_in_words() -> None:
    assert describe({"value": 2}) == "2"
    assert describe(figure(2, 0.5)) == "2 (1.5 to 2.5)"
    assert describe({"value": 2, "open": True}) == "2 (interval unknown)"
    assert describe({"value": 2, "low": 1, "high": None, "open": True}) == "2 (at least 1)"
    assert describe({"value": 2, "low": None, "high": 3, "open": True}) == "2 (at most 3)"


GOOD = """
source: a book
claims:
- {id: 7, claim: a few, property: capacity, families: [flows], all: [{measure: capacity.parameters, at_most: 9}]}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "claims.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_adding_a_claim_needs_no_code(tmp_path: Path) -> None:
    """A claim that nobody has thought of, about a measure that is there, is judged as soon as it is written down."""
    more = "- {id: 8, claim: nor large, property: capacity, families: [flows/glow], source: me,"
    more += " all: [{measure: capacity.parameters, less_than: others}]}\n"
    found = read(written(tmp_path, GOOD + more))
    assert [claim.source for claim in found] == ["a book", "me"]
    rows = properties.table({"a": {"parameters": 8}, "b": {"parameters": 8}})
    families = {"a": "flows/glow", "b": "vae/vae"}
    verdicts = judge(found, families, {row["key"]: row["cells"] for row in rows})
    assert [one["verdict"] for one in verdicts] == ["supported", "undecided"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("capacity.parameters", "capacity.paramters", "claim 7: all.0.measure: capacity.paramters: did you mean"),
        ("at_most: 9", "at_most: 9, at_least: 3", "needs exactly one of at_most"),
        (", at_most: 9", "", "needs exactly one of at_most"),
        ("at_most: 9", "atmost: 9", "unknown key 'claims.0.all.0.atmost': did you mean 'at_most'?"),
        ("families: [flows]", "families: [flwos]", "claim 7: families: flwos: did you mean 'flows'?"),
        ("at_most: 9", "at_most: few", "claims.0.all.0.at_most: Input should be a valid number"),
        ("at_most: 9", "less_than: all", "claims.0.all.0.less_than"),
        ("property: capacity", "property: size", "claims.0.property"),
        (", all: [{measure: capacity.parameters, at_most: 9}]", "", "needs conditions under all"),
        ("claims:", "claims: [", "not YAML, line"),
        ("source: a book", "", "source: Field required"),
        (GOOD, "- a list", "right would be a mapping"),
        (GOOD, GOOD + GOOD.split("claims:\n")[1], "two claims have the id 7"),
        (GOOD, "{source: a book, claims: []}", "claims: List should have at least 1 item"),
    ],
)
def test_a_wrong_claim_is_one_line_that_names_file_and_key(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and said in message and "\n" not in message


def test_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "claims.yaml")


def test_the_ledger_is_complete_and_nothing_in_it_is_decided_by_an_empty_table() -> None:
    found = read(Path(__file__).parents[2] / "claims.yaml")
    assert [claim.id for claim in found] == list(range(1, 23))
    empty = {row.key: {} for row in properties.ROWS}
    families = {folder: f"{folder}/x" for claim in found for folder in claim.families}
    verdicts = {one["id"]: one["verdict"] for one in judge(found, families, empty)}
    assert verdicts.pop(11) == "supported", "what is claimed there is that there is no figure"
    assert set(verdicts.values()) == {claims.WAITING}
