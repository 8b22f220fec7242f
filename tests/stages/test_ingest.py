"""Stage ingest, from params.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from genus.data.loaders import open_dataset
from genus.errors import UserError
from genus.stages.ingest import run

PARAMS = "seed: 3\ncollections: {}\nmodels: {}\ndatasets:\n  digits: {source: SOURCE, validation: 0.2}\n"


def test_digits_from_params(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PARAMS.replace("SOURCE", "digits"))
    run("digits")
    assert len(open_dataset("digits").split("validation")) == 288  # a fifth of what the test split leaves
    assert "1,150 train, 288 validation, 359 test; 0 quarantined" in capsys.readouterr().out


def test_names_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PARAMS.replace("SOURCE", "digitz"))
    with pytest.raises(UserError, match="unknown data set 'digit': did you mean 'digits'"):
        run("digit")
    with pytest.raises(UserError, match="unknown source 'digitz': did you mean 'digits'"):
        run("digits")
