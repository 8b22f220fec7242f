"""What textbooks say of the families (claims.yaml), and what the measurements say to that."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from genus.config import Section
from genus.contract import family_names
from genus.data.options import checked
from genus.errors import UserError, nearest
from genus.evaluation.properties import ROWS
from genus.files import read_yaml

Figure = Mapping[str, Any]
Cells = Mapping[str, Mapping[str, Figure | None]]  # measure: {model: its figure, or None}
SUPPORTED, CONTRADICTED, UNDECIDED, WAITING = "supported", "contradicted", "undecided", "waiting"
COMPARISONS = ("at_most", "at_least", "less_than", "more_than", "is_in", "present")


class Condition(Section):
    """One comparison of one measure; exactly one of the keys after ``measure`` is given.

    Numbers are compared with the measure's 95% interval: decided only where all of it lies on one side. Rivals are the
    models of all other families, or of those that are named: every one must be beaten for sure.
    """

    measure: str  # key of a row of properties.py
    at_most: float | None = None
    at_least: float | None = None
    less_than: Literal["others"] | list[str] | None = None  # all other families, or folders and families by name
    more_than: Literal["others"] | list[str] | None = None
    is_in: list[str] | None = None  # kinds
    present: bool | None = None  # whether the model has the measure at all

    @model_validator(mode="after")
    def _one(self) -> Condition:
        if sum(getattr(self, name) is not None for name in COMPARISONS) != 1:
            raise ValueError(f"needs exactly one of {', '.join(COMPARISONS)}")
        return self


class Claim(Section):
    """A claim about some families; it holds where all of its conditions do, for every model of the families."""

    id: int
    claim: str
    property: Literal["stability", "capacity", "density", "constraints", "speed"]
    families: list[str]  # folders of genus/families, or single families
    all: list[Condition] = Field(default_factory=list)
    waits_for: str = ""  # the model or data without which it cannot be measured yet
    source: str = ""

    @model_validator(mode="after")
    def _says_something(self) -> Claim:
        if not self.all and not self.waits_for:
            raise ValueError("needs conditions under all, or says under waits_for what it waits for")
        return self


class Ledger(Section):
    """All of claims.yaml."""

    source: str  # of the claims that name none of their own
    claims: list[Claim] = Field(min_length=1)


def read(path: str | os.PathLike[str] = "claims.yaml") -> list[Claim]:
    """Reads and checks the claims. Raises UserError naming the file and the key of the first thing that is wrong."""
    raw = read_yaml(path, "it holds the claims that the report judges")
    if not isinstance(raw, dict):
        raise UserError(f"{path}: right would be a mapping with source and claims")
    ledger = checked(Ledger, raw, str(path))
    ids = [claim.id for claim in ledger.claims]
    twice = {number for number in ids if ids.count(number) > 1}
    if twice:
        raise UserError(f"{path}: two claims have the id {min(twice)}")
    known = [row.key for row in ROWS]
    families = {part for name in family_names() for part in (name, name.partition("/")[0])}
    for claim in ledger.claims:
        for family in claim.families:
            if family not in families and not claim.waits_for:  # else it may be of a family that is still to come
                raise UserError(f"{path}: claim {claim.id}: families: {family}: {nearest(family, families)}")
        for place, condition in enumerate(claim.all):
            if condition.measure not in known:
                hint = nearest(condition.measure, known)
                raise UserError(f"{path}: claim {claim.id}: all.{place}.measure: {condition.measure}: {hint}")
    return [claim.model_copy(update={"source": claim.source or ledger.source}) for claim in ledger.claims]


def judge(
    claims: Iterable[Claim], families: Mapping[str, str], cells: Cells, failed: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """A verdict for each claim, from the figures in ``cells`` of the models in ``families`` (model: family).

    Contradicted where one condition is, for one of the claim's models; else waiting where there is no model or no
    figure to judge by; else undecided where one condition is; else supported. ``failed``: models (and their families)
    that came to nothing, which a claim may wait for.
    """
    return [_judged(claim, families, cells, failed or {}) for claim in claims]


def _judged(claim: Claim, families: Mapping[str, str], cells: Cells, failed: Mapping[str, str]) -> dict[str, Any]:
    members = [model for model, family in families.items() if within(family, claim.families)]
    described = {
        "id": claim.id,
        "claim": claim.claim,
        "property": claim.property,
        "families": claim.families,
        "models": members,
        "measures": [condition.measure for condition in claim.all],
        "source": claim.source,
    }
    if claim.waits_for:
        return described | {"verdict": WAITING, "because": f"waits for {claim.waits_for}"}
    if not members:
        lost = [model for model, family in failed.items() if within(family, claim.families)]
        missing = f"{' and '.join(lost)}, which failed" if lost else f"a model of {' or '.join(claim.families)}"
        return described | {"verdict": WAITING, "because": f"waits for {missing}"}
    found = [
        _compare(condition, model, _rivals(condition, members, families), cells)
        for condition in claim.all
        for model in members
    ]
    verdicts = [verdict for verdict, _ in found]
    for verdict in (CONTRADICTED, WAITING, UNDECIDED):
        if verdict in verdicts:
            decisive = [reason for given, reason in found if given == verdict]
            return described | {"verdict": verdict, "because": "; ".join(dict.fromkeys(decisive))}
    return described | {"verdict": SUPPORTED, "because": "; ".join(dict.fromkeys(reason for _, reason in found))}


def _rivals(condition: Condition, members: list[str], families: Mapping[str, str]) -> list[str]:
    """The models that a condition compares with."""
    named = condition.less_than or condition.more_than
    if not isinstance(named, list):
        return [model for model in families if model not in members]
    return [model for model, family in families.items() if within(family, named) and model not in members]


def within(family: str, named: Iterable[str]) -> bool:
    """Whether a family is one of those named, or in a folder that is."""
    return any(family == name or family.startswith(f"{name}/") for name in named)


def _compare(condition: Condition, model: str, others: list[str], cells: Cells) -> tuple[str, str]:
    """A verdict on one condition for one model, and the figures it stands on."""
    figures = cells[condition.measure]
    figure, name = figures.get(model), condition.measure
    if condition.present is not None:
        there = figure is not None
        return SUPPORTED if there == condition.present else CONTRADICTED, f"{name} is {'there' if there else 'none'}"
    if figure is None or figure.get("value") is None:
        return WAITING, f"no figure of {name} for {model}"
    told = f"{name} {describe(figure)}"
    low, high = interval(figure)
    if condition.is_in is not None:
        return SUPPORTED if figure.get("kind") in condition.is_in else CONTRADICTED, f"{name} is {figure.get('kind')}"
    if condition.at_most is not None:
        bound = condition.at_most
        return _decide(high <= bound, low > bound), f"{told}, asked at most {bound:g}"
    if condition.at_least is not None:
        bound = condition.at_least
        return _decide(low >= bound, high < bound), f"{told}, asked at least {bound:g}"
    known = [(m, f) for m in others if (f := figures.get(m)) is not None and f.get("value") is not None]
    if not known:
        return WAITING, f"no figure of {name} to compare with"
    sign = 1 if condition.less_than else -1  # more_than is less_than of the negated figures
    mine = sorted((sign * low, sign * high))
    rival, figure = min(known, key=lambda pair: sign * pair[1]["value"])
    rivals = [sorted(sign * end for end in interval(f)) for _, f in known]
    wins = all(mine[1] < ends[0] for ends in rivals)
    loses = any(ends[1] < mine[0] for ends in rivals)
    return _decide(wins, loses), f"{told}; {rival} {describe(figure)}"


def _decide(holds: bool, fails: bool) -> str:
    return SUPPORTED if holds else CONTRADICTED if fails else UNDECIDED


def interval(figure: Figure) -> tuple[float, float]:
    """The ends of a figure's interval.

    A figure that has neither ``low`` nor ``high`` is exact: a count, a size. One that says ``open``, or has an end that
    is None, is known on that side no further: a noisy figure from a single run decides nothing.
    """
    low, high = figure.get("low"), figure.get("high")
    if not figure.get("open") and "low" not in figure and "high" not in figure:
        return figure["value"], figure["value"]
    return (-math.inf if low is None else low), (math.inf if high is None else high)


def describe(figure: Figure) -> str:
    """``0.33 (0.31 to 0.36)``; an end that is not known says so."""
    low, high = interval(figure)
    value = f"{figure['value']:.3g}"
    if low == high:
        return value
    if math.isinf(low) and math.isinf(high):
        return f"{value} (interval unknown)"
    if math.isinf(low) or math.isinf(high):
        return f"{value} (at most {high:.3g})" if math.isinf(low) else f"{value} (at least {low:.3g})"
    return f"{value} ({low:.3g} to {high:.3g})"
