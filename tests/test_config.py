"""params.yaml: what is wrong in it is one line that names the key and what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from genus import config
from genus.errors import UserError
from tests.conftest import ROOT

GLOW, VAE = "digits-glow", "digits-vae"


def written(folder: Path, **parents: str) -> Path:
    """The project's parameters with other parents, by short name."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, parent in parents.items():
        content["models"][f"digits-{name}"]["parent"] = parent
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("parents", "line"),
    [
        ({"glow": "digits-vea"}, f"models.{GLOW}.parent: digits-vea: did you mean '{VAE}'?"),
        ({"glow": "fashion-mnist-vae"}, "learns data set 'fashion-mnist': a parent must learn the same"),
        ({"glow": GLOW}, f"models.{GLOW}.parent: {GLOW}: a model cannot be its own parent"),
        ({"glow": VAE, "vae": GLOW}, f"models.{VAE}.parent: {GLOW}: a model cannot be its own parent"),
    ],
)
def test_wrong_parents(tmp_path: Path, parents: dict[str, str], line: str) -> None:
    path = written(tmp_path, **parents)
    with pytest.raises(UserError) as caught:
        config.load(path)
    assert line in str(caught.value) and str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_model_is_described_with_its_line_of_parents(tmp_path: Path) -> None:
    params = config.load(written(tmp_path, glow=VAE, gan=GLOW))
    described = params.described("digits-gan")
    assert described is not None and described["family"] == params.models["digits-gan"].family
    assert described["parent"]["family"] == "flows/glow" and described["parent"]["parent"]["family"] == "vae/vae"
    assert described["parent"]["parent"]["parent"] is None and params.described(config.NONE) is None
