"""Text for the short trainings of the probe: windows to learn from, and validation documents to be judged by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genus.contract import Batch, Family, Scores
from genus.data.loaders import Dataset
from genus.evaluation.probe import PULLED, Job, Scale
from genus.evaluation.text.documents import Documents
from genus.evaluation.text.ngram import NGram

SCORED = 24_000  # tokens of validation documents, about, that are scored after each job
AT_ONCE = 100  # documents
PAIRS = 2_000_000  # tokens of train, at most, whose pairs are counted


class Text:
    """A ``Bench``: quality is the bits a token of validation documents, beside those of a model of pairs of symbols.

    That control is to text what a Gaussian is to images: 1 is no better than knowing which symbol follows which.
    """

    # Bits move less than distances do: between the pairs of symbols and the best models there is a factor of two.
    scale, needs, size = Scale(usable=1.1, lost=1.3, bits="bits_per_char"), Scores, 0

    def __init__(self, data: Dataset, tokens: int):
        """``tokens``: of train, in whole documents: as many as a job reads, an outlier among them too."""
        self.spec = data.spec
        train, offsets = data.split("train"), np.asarray(data.offsets("train"))
        reach = int(np.searchsorted(offsets[1:-1], tokens)) + 1
        self.tokens, self.starts = train[: offsets[reach]], offsets[: reach + 1]
        share = SCORED / len(data.split("validation"))
        self.real = Documents.stored(data, "validation", max(1, round(share * data.count("validation"))))
        pairs = NGram.fit(np.asarray(train[:PAIRS]), data.spec.vocabulary, 2)
        self.control = float(pairs.bits(self.real.tokens, self.real.offsets).mean())
        self.told = {"train_tokens": len(self.tokens), "real_documents": self.real.n}

    def train_set(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.tokens
        if job.outliers:
            tokens, random = np.array(tokens), np.random.default_rng(job.seed)
            count = max(1, round(job.outliers * (len(self.starts) - 1)))
            for row in random.permutation(len(self.starts) - 1)[:count]:
                begin, end = self.starts[row], self.starts[row + 1] - 1  # a document's end stays
                tokens[begin:end] = random.integers(1, self.spec.vocabulary, size=end - begin)
        return tokens, np.zeros(0, np.int64)

    def quality(self, model: Family, sample: Callable[[], Tensor]) -> tuple[float, dict[str, Any]]:
        device = next(model.parameters()).device
        bits = self.bits(model, torch.Generator(device).manual_seed(0))
        return bits / self.control, {"bits": bits}

    @torch.inference_mode()
    def bits(self, model: Any, generator: torch.Generator) -> float:
        order, nats = np.argsort(self.real.lengths, kind="stable"), 0.0
        for start in range(0, len(order), AT_ONCE):
            x = torch.from_numpy(self.real.padded(order[start : start + AT_ONCE])).to(generator.device)
            nats += model.log_prob(Batch(x), generator=generator).double().sum().item()
        if not math.isfinite(nats):
            raise FloatingPointError("log_prob of a validation document is not finite")
        return -nats / (len(self.real.tokens) * math.log(2))

    def few(self, model: Any, n: int, device: torch.device) -> Batch:
        return Batch(self._windows(self.tokens, model.context, n, 0).to(device))

    def odd(self, model: Any, place: int, seed: int, device: torch.device) -> tuple[Batch, Batch]:
        usual = self._windows(self.real.tokens, model.context, PULLED, place)
        odd, random = usual.clone(), np.random.default_rng(seed)
        odd[0] = torch.from_numpy(random.integers(1, self.spec.vocabulary, size=usual.shape[1]))
        return Batch(usual.to(device)), Batch(odd.to(device))

    def units(self, batch: Batch) -> int:
        return batch.x[:, 1:].numel()

    def _windows(self, tokens: np.ndarray, context: int, n: int, place: int) -> Tensor:
        """``n`` windows, evenly over the tokens, other ones for each ``place``: int64 [n, context + 1]."""
        room = max(1, len(tokens) - context)
        starts = (np.linspace(0, room, n, endpoint=False).astype(np.int64) + place * (context + 1)) % room
        rows = [np.asarray(tokens[start : start + context + 1], np.int64) for start in starts]
        return torch.from_numpy(np.stack([np.pad(row, (0, context + 1 - len(row))) for row in rows]))
