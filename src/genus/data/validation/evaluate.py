"""Runs the suite with Great Expectations: a record without times or ids, and a page that needs no network."""

from __future__ import annotations

import json
import logging
import os
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from genus.data.loaders import Dataset
from genus.data.validation import suite, tables, text
from genus.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.expectations import Expectation


def evaluate(dataset: Dataset, checks: suite.Checks | text.TextChecks) -> tuple[dict[str, Any], str]:
    """The record of all expectations (with the table of splits), and the page as HTML."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when the package is imported
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    import pandas as pd

    path = dataset.folder / "table.parquet"
    try:
        examples = pd.read_parquet(path)
        splits = (text if isinstance(checks, text.TextChecks) else tables).split_table(dataset, examples)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"{path}: unreadable table: {str(error).splitlines()[0]}; ingest again") from error
    counts = dataset.description["counts"]
    if isinstance(checks, text.TextChecks):
        of_examples, of_splits = text.of_documents(dataset.spec, counts, checks), text.of_splits(dataset.spec, checks)
    else:
        of_examples, of_splits = suite.of_examples(dataset.spec, counts, checks), suite.of_splits(dataset.spec, checks)
    results = {"examples": _run("examples", examples, of_examples), "splits": _run("splits", splits, of_splits)}
    expectations = [_outcome(table, result) for table in results for result in results[table]["results"]]
    record = {
        "dataset": dataset.description["name"],
        "sha256": dataset.description["sha256"],
        "checks": checks.model_dump(),
        "expectations": sorted(expectations, key=lambda outcome: json.dumps(outcome, sort_keys=True)),
        "splits": [_rounded(row) for row in splits.to_dict("records")],
    }
    return record, _page(dataset.description["name"], results)


def _run(table: str, frame: pd.DataFrame, expectations: list[Expectation]) -> dict[str, Any]:
    """Great Expectations' result as plain JSON values. Nothing is stored: the context lives in memory."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("genus").add_dataframe_asset(table)
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
    result = batch.validate(gx.ExpectationSuite(name=table, expectations=expectations))
    return json.loads(json.dumps(result.to_json_dict()))


def _outcome(table: str, result: dict[str, Any]) -> dict[str, Any]:
    """One expectation: what was expected, how bad a failure is, and what was seen."""
    configuration = result["expectation_config"]
    kwargs = {key: value for key, value in configuration["kwargs"].items() if key != "batch_id"}
    columns = [kwargs.pop(key) for key in ("column", "column_A", "column_B") if key in kwargs]
    return {
        "table": table,
        "expectation": configuration["type"],
        "column": " = ".join(columns),
        "about": configuration["notes"],
        "severity": configuration["severity"],
        "expected": _rounded(kwargs),
        "observed": _rounded(_observed(result)),
        "success": result["success"],
    }


def _observed(result: dict[str, Any]) -> Any:
    """The figures of a result, whatever kind of expectation it is of."""
    figures = result["result"]
    if not figures:
        errors = [info["exception_message"] for info in result["exception_info"].values() if isinstance(info, dict)]
        return " ".join(errors) or "nothing"
    if figures.get("observed_value") is not None:
        return figures["observed_value"]
    keys = ("element_count", "unexpected_count", "partial_unexpected_list", "missing_count", "partial_missing_list")
    return {
        key.removeprefix("partial_"): figures[key][:5] if isinstance(figures[key], list) else figures[key]
        for key in keys
        if figures.get(key)
    } or "as expected"


def _rounded(value: Any) -> Any:
    """Six significant digits: figures for people, the same on every machine."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def _page(name: str, results: dict[str, dict[str, Any]]) -> str:
    """Great Expectations' own page for both tables. Styles and scripts from elsewhere are replaced by docs.css."""
    from great_expectations.core.expectation_validation_result import expectationSuiteValidationResultSchema
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    merged = {**results["examples"], "suite_name": name}
    merged["results"] = [result for table in results.values() for result in table["results"]]
    merged["success"] = all(table["success"] for table in results.values())
    figures = [table["statistics"] for table in results.values()]
    evaluated, successful = (sum(f[f"{kind}_expectations"] for f in figures) for kind in ("evaluated", "successful"))
    merged["statistics"] = {
        "evaluated_expectations": evaluated,
        "successful_expectations": successful,
        "unsuccessful_expectations": evaluated - successful,
        "success_percent": 100 * successful / evaluated,
    }
    # The renderer fails on live results with NumPy numbers in them; this one has been through JSON.
    page = ValidationResultsPageRenderer().render(expectationSuiteValidationResultSchema.load(merged))
    html = DefaultJinjaPageView().render(page)
    html = re.sub(r"<(script|style|footer)\b.*?</\1>|<(link|img)\b[^>]*>", "", html, flags=re.DOTALL)
    html = re.sub(r'<a href="\.\.[^"]*">(.*?)</a>', r"\1", html, flags=re.DOTALL)  # pages of a site that is not made
    style = resources.files("genus.data.validation").joinpath("docs.css").read_text(encoding="utf-8")
    return html.replace("</head>", f"<style>{style}</style></head>", 1)
