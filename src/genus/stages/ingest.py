"""Stage ``ingest``: a data set from its source to data/processed/<name>."""

from __future__ import annotations

from genus import config


def run(name: str) -> None:
    """Reads params.yaml in the current folder. Raises UserError where the data cannot be had or is too broken."""
    from genus.data.ingestion import ingest

    params = config.load()
    description = ingest(name, params.dataset(name), params.seed)
    counts = ", ".join(f"{count:,} {split}" for split, count in description["counts"].items())
    print(f"data/processed/{name}: {counts}; {description['quarantined']:,} quarantined")
