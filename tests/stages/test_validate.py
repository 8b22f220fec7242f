"""Stage validate, from params.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from genus.errors import UserError
from genus.files import read_json
from genus.stages import ingest, validate

PARAMS = "collections: {}\nmodels: {}\ndatasets:\n  digits: {source: digits, checks: CHECKS}\n"


def test_digits_are_fit_and_limits_come_from_params(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PARAMS.replace("CHECKS", "{}"))
    with pytest.raises(UserError, match="`genus ingest digits` makes it"):
        validate.run("digits")
    ingest.run("digits")
    validate.run("digits")
    assert "28 of 28 expectations hold" in capsys.readouterr().out
    Path("params.yaml").write_text(PARAMS.replace("CHECKS", "{rows: 1000}"))
    validate.run("digits")  # a warning goes on
    assert "examples in the smallest split" in capsys.readouterr().err
    assert read_json("reports/validation/digits.json")["checks"]["rows"] == 1000
