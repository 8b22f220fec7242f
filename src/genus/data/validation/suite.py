"""What must hold of a data set, as Great Expectations' expectations, and how bad it is when one does not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from genus.config import Section
from genus.data.loaders import SPLITS
from genus.data.spec import DataSpec

if TYPE_CHECKING:
    from great_expectations.expectations import Expectation


class Checks(Section):
    """Limits of the suite: ``datasets.<name>.checks`` in params.yaml."""

    constant: float = Field(0.0, ge=0, le=1)  # share of images of one single level
    duplicates: float = Field(0.001, ge=0, le=1)  # share of a split's examples that are in another split too
    repeats: float = Field(0.01, ge=0, le=1)  # share of examples that are there more than once; a warning
    balance: float = Field(0.5, ge=0, le=1)  # rarest class of a split over the mean class; a warning
    drift: float = Field(0.1, ge=0, le=1)  # see tables.drift; half of it is a warning
    rows: int = Field(100, ge=1)  # fewest examples in a split; a warning


def of_examples(spec: DataSpec, counts: dict[str, int], checks: Checks) -> list[Expectation]:
    """Expectations on table.parquet, one row an example."""
    import great_expectations.expectations as gxe
    from great_expectations.expectations.metadata_types import FailureSeverity

    columns = ["split", "label", "mean", "std", "min", "max", "entropy", "sha1"]
    top = spec.levels - 1
    labels = list(range(max(1, len(spec.classes))))
    return [
        gxe.ExpectTableColumnsToMatchSet(column_set=columns, exact_match=True, notes="columns of the table"),
        gxe.ExpectTableRowCountToEqual(value=sum(counts.values()), notes="as many rows as dataset.json counts"),
        gxe.ExpectColumnDistinctValuesToEqualSet(column="split", value_set=list(SPLITS), notes="splits"),
        gxe.ExpectColumnDistinctValuesToEqualSet(column="label", value_set=labels, notes="every class, and no other"),
        gxe.ExpectColumnMinToBeBetween(column="min", min_value=0, notes="darkest level"),
        gxe.ExpectColumnMaxToBeBetween(column="max", max_value=top, notes="brightest level"),
        gxe.ExpectColumnMaxToBeBetween(
            column="max",
            min_value=math.ceil(top / 2),
            severity=FailureSeverity.WARNING,
            notes="the range of levels is used",
        ),
        gxe.ExpectColumnMinToBeBetween(column="entropy", min_value=0, notes="bits a pixel"),
        gxe.ExpectColumnMaxToBeBetween(column="entropy", max_value=math.log2(spec.levels), notes="bits a pixel"),
        gxe.ExpectColumnValuesToBeBetween(
            column="std", min_value=0, strict_min=True, mostly=1 - checks.constant, notes="no constant images"
        ),
        gxe.ExpectColumnValuesToMatchRegex(column="sha1", regex="^[0-9a-f]{40}$", notes="a hash for every example"),
        gxe.ExpectColumnProportionOfUniqueValuesToBeBetween(
            column="sha1",
            min_value=1 - checks.repeats,
            severity=FailureSeverity.WARNING,
            notes="few examples are there twice",
        ),
    ]


def of_splits(spec: DataSpec, checks: Checks) -> list[Expectation]:
    """Expectations on the table of tables.split_table, one row a split."""
    import great_expectations.expectations as gxe
    from great_expectations.expectations.metadata_types import FailureSeverity

    shape = "×".join(map(str, spec.shape))
    drifts = [
        gxe.ExpectColumnMaxToBeBetween(
            column=f"drift of {figure}", max_value=limit, severity=severity, notes="splits look alike: drift from train"
        )
        for figure in ("mean", "std", "entropy")
        for limit, severity in ((checks.drift, FailureSeverity.CRITICAL), (checks.drift / 2, FailureSeverity.WARNING))
    ]
    return [
        gxe.ExpectColumnValuesToBeInSet(column="shape", value_set=[shape], notes="shape of an example"),
        gxe.ExpectColumnValuesToBeInSet(column="type", value_set=["uint8"], notes="type of the images"),
        gxe.ExpectColumnValuesToBeInSet(column="label type", value_set=["int64"], notes="type of the labels"),
        gxe.ExpectColumnPairValuesToBeEqual(column_A="rows", column_B="counted", notes="rows and dataset.json"),
        gxe.ExpectColumnPairValuesToBeEqual(column_A="rows", column_B="labels", notes="rows and labels"),
        gxe.ExpectColumnPairValuesToBeEqual(column_A="rows", column_B="tabled", notes="rows and table.parquet"),
        gxe.ExpectColumnMinToBeBetween(
            column="agreeing", min_value=1.0, notes="share of the images that are what the table says"
        ),
        gxe.ExpectColumnMaxToBeBetween(
            column="shared", max_value=checks.duplicates, notes="share of a split that is in another split too"
        ),
        gxe.ExpectColumnMinToBeBetween(
            column="rows",
            min_value=checks.rows,
            severity=FailureSeverity.WARNING,
            notes="examples in the smallest split",
        ),
        gxe.ExpectColumnMinToBeBetween(
            column="balance",
            min_value=checks.balance,
            severity=FailureSeverity.WARNING,
            notes="rarest class over the mean class",
        ),
        *drifts,
    ]
