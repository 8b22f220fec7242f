"""Is a processed data set fit to train on? Two tables, one suite of expectations, one page for people.

The only place that imports Great Expectations, and only when a data set is validated: the import takes seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from genus.data.loaders import Dataset
from genus.data.options import checked
from genus.data.validation.suite import Checks
from genus.data.validation.text import TextChecks
from genus.errors import UserError
from genus.files import write_json, write_text


def validate(dataset: Dataset, checks: dict[str, Any], reports: Path = Path("reports")) -> dict[str, Any]:
    """Judges a data set; returns the record and writes it to ``reports``/validation/<name>.json.

    The record holds no times or ids: equal data gives equal bytes. The page for people is
    ``reports``/data_docs/<name>/index.html. Warnings go to stderr. Raises UserError, naming the first critical
    expectation that failed, its figures and the page, and leaves no record then.
    """
    name = dataset.description["name"]
    kind: type[Checks | TextChecks] = TextChecks if dataset.spec.kind == "text" else Checks
    limits = checked(kind, checks, f"datasets.{name}.checks")
    record_file = reports / "validation" / f"{name}.json"
    page_file = reports / "data_docs" / name / "index.html"
    record_file.unlink(missing_ok=True)  # a failed validation must not look like the last good one

    from genus.data.validation.evaluate import evaluate

    record, page = evaluate(dataset, limits)
    write_text(page_file, page)
    failed = [outcome for outcome in record["expectations"] if not outcome["success"]]
    critical = [outcome for outcome in failed if outcome["severity"] == "critical"]
    for outcome in failed:
        if outcome["severity"] != "critical":
            print(f"warning: data set '{name}': {_line(outcome)}; see {page_file}", file=sys.stderr)
    if critical:
        more = f" (and {len(critical) - 1} more)" if len(critical) > 1 else ""
        raise UserError(f"data set '{name}' is not fit to train on: {_line(critical[0])}{more}; open {page_file}")
    write_json(record_file, record)
    return record


def _line(outcome: dict[str, Any]) -> str:
    """An expectation, what was expected and what was seen, in one line."""
    expected = ", ".join(f"{key} {value}" for key, value in outcome["expected"].items())
    seen = outcome["observed"]
    return f"{outcome['about']}: {outcome['expectation']}({outcome['column']}): {expected}; observed {seen}"
