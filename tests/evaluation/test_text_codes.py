"""Texts from codes: of which documents, in which order, from which models; and how the report sets them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genus.data.spec import DataSpec
from genus.evaluation import report
from genus.evaluation.latent import spherical
from genus.evaluation.text import codes
from genus.families.autoregressive.lstm import LSTM
from genus.families.vae.sentence_vae import SentenceVAE
from tests.evaluation import card as example

SPEC = DataSpec((6,), 0, (), "abcd")


class Data(SimpleNamespace):
    spec = SPEC

    def split(self, name: str) -> np.ndarray:
        assert name == "test"
        return np.concatenate(self.stored).astype(np.uint8)

    def offsets(self, name: str) -> np.ndarray:
        assert name == "test"
        return np.cumsum([0, *(len(row) for row in self.stored)])


class Corners:
    """The code of a document is a corner for its first symbol; what is decoded is the symbol that a code is nearest."""

    latent = 4

    def encode(self, x: Tensor) -> Tensor:
        return 2 * torch.nn.functional.one_hot(x[:, 0] - 1, 4).double()

    def decode(self, code: Tensor) -> Tensor:
        return torch.nn.functional.pad(code.argmax(1, keepdim=True) + 1, (0, 5))


def task(model: Any, n: int = 30) -> Any:
    """Documents of one to five symbols, the first ones in turn, each with its end."""
    random = np.random.default_rng(0)
    stored = [[i % 4 + 1, *random.integers(1, 5, size=random.integers(5)), 0] for i in range(n)]
    return SimpleNamespace(model=model, data=Data(stored=stored), device=torch.device("cpu"))


def test_documents_stand_beside_what_is_decoded_from_their_codes() -> None:
    made = task(Corners())
    order = np.random.default_rng(0).permutation(30)[: codes.AGAIN + 2 * codes.PAIRS]
    real = [SPEC.text(made.data.stored[row]) for row in order]
    parts = codes.from_codes(made)
    assert [part["kind"] for part in parts] == ["reconstruction"] * codes.AGAIN + ["interpolation"] * codes.PAIRS
    for document, part in zip(real, parts[: codes.AGAIN], strict=False):
        assert part["texts"] == [document, document[0]]
    ends = real[codes.AGAIN :]
    assert len({one[0] == other[0] for one, other in zip(ends[::2], ends[1::2], strict=True)}) == 2, (
        "both kinds of pair"
    )
    for one, other, part in zip(ends[::2], ends[1::2], parts[codes.AGAIN :], strict=True):
        assert part["texts"] == [one, *one[0] * 3, *other[0] * 3, other], (
            "half of the way is the one's, half the other's"
        )


@torch.no_grad()
def test_a_sentence_vae_goes_along_the_sphere() -> None:
    torch.manual_seed(0)
    model = SentenceVAE(SPEC, latent=3, hidden=8, encoder=6, embedding=5, context=5).eval()
    model.decoder.weight_ih_l0[:, 5:].mul_(50)  # else it writes the same whatever the code
    model.encoder_head.weight.mul_(50)
    model.head.weight.mul_(50)
    made = task(model)
    pair = [made.data.stored[row] for row in np.random.default_rng(0).permutation(30)[codes.AGAIN :][:2]]
    ends = [model.encode(torch.tensor([document]))[0] for document in pair]
    way = spherical(*ends, torch.linspace(0, 1, codes.STEPS))
    written = [SPEC.text(row) for row in model.decode(way).tolist()]
    assert codes.from_codes(made)[codes.AGAIN]["texts"][1:-1] == written and len(set(written)) > 1


@pytest.mark.parametrize(("n", "kinds"), [(3, [3, 0]), (6, [5, 0]), (8, [5, 1])])
def test_few_documents_give_few_texts(n: int, kinds: list[int]) -> None:
    found = [part["kind"] for part in codes.from_codes(task(Corners(), n))]
    assert [found.count("reconstruction"), found.count("interpolation")] == kinds


def test_models_without_such_codes_show_none() -> None:
    assert codes.from_codes(task(LSTM(SPEC, hidden=4, embedding=4))) == []


def test_the_report_sets_them_apart_from_samples_and_as_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    texts = [{"label": "temperature 1", "texts": ["drawn"]}]
    texts += [{"kind": "reconstruction", "label": "r", "texts": [f"{bad} real", f"{bad} again"]}]
    texts += [{"kind": "interpolation", "label": "i", "texts": ["one", bad, "", "other"]}]
    records = {
        f"verses-{name}": {"name": f"verses-{name}", "family": "vae/sentence_vae", "dataset": "verses", "texts": shown}
        for name, shown in (("coded", texts), ("plain", texts[:1]))
    }
    page = report.page(example.card(records, {"verses": {"kind": "text", "alphabet": "ab"}}), tmp_path)
    assert bad not in page
    samples, _, rest = page.partition('<section id="inside"')
    inside = rest.partition("</section>")[0]
    assert samples.count("<li>drawn</li>") == 2 and "alert(1)" not in samples
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;"
    items = re.findall(r"<li( class=\"real\")?>([^<]*)</li>", inside)
    assert [text for _, text in items] == [f"{escaped} real", f"{escaped} again", "one", escaped, "(nothing)", "other"]
    assert [bool(real) for real, _ in items] == [True, False, True, False, False, True]
    assert "coded" in inside and "plain" not in inside
    without = report.page(
        example.card({"verses-plain": records["verses-plain"]}, {"verses": {"kind": "text"}}), tmp_path
    )
    assert 'id="inside"' not in without and 'href="#inside"' not in without and 'href="#inside"' in page
