"""Stage ``validate``: is data/processed/<name> fit to train on?"""

from __future__ import annotations

from genus import config


def run(name: str) -> None:
    """Reads params.yaml in the current folder. Raises UserError where a critical expectation fails."""
    from genus.data.loaders import open_dataset
    from genus.data.validation import validate

    params = config.load()
    checks = params.dataset(name).checks
    record = validate(open_dataset(name), checks)
    good = sum(outcome["success"] for outcome in record["expectations"])
    print(
        f"data set '{name}': {good} of {len(record['expectations'])} expectations hold; "
        f"reports/data_docs/{name}/index.html"
    )
