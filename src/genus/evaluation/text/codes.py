"""What the codes of documents keep, to be read: documents beside what they decode to, and the way between two codes.

The figures of codes are in evaluation/latent.py, for images and text alike.
"""

from __future__ import annotations

from typing import Any

import torch

from genus.contract import Decodes, Encodes
from genus.evaluation.latent import spherical
from genus.evaluation.text.documents import Documents

AGAIN = 5  # documents that are shown beside what their codes decode to
PAIRS, STEPS = 3, 6  # pairs of other documents, and codes that are decoded on the way from one to the other
LABELS = {
    "reconstruction": "a document of the test split, and what its code decodes to",
    "interpolation": "two documents of the test split, and between them what codes from the one's to the other's say",
}


@torch.inference_mode()
def from_codes(task: Any) -> list[dict[str, Any]]:
    """Test documents, nobody chose them, and what is decoded from their codes: [{kind, label, texts}].

    The texts of a ``reconstruction`` are the document and what is left of it; those of an ``interpolation`` a document,
    what is decoded from ``STEPS`` codes along the sphere, its own first and the other's last, and the other document.
    Nothing of a model that has no such codes.
    """
    model, spec = task.model, task.data.spec
    if not (isinstance(model, Encodes) and isinstance(model, Decodes)):
        return []
    documents = Documents.stored(task.data, "test", AGAIN + 2 * PAIRS)
    codes = model.encode(torch.from_numpy(documents.padded(range(documents.n))).to(task.device))
    real = documents.texts(spec)
    t = torch.linspace(0, 1, STEPS, device=codes.device, dtype=codes.dtype)
    pairs = range(AGAIN, len(codes) - 1, 2)
    path = torch.cat([codes[:AGAIN], *(spherical(codes[a], codes[a + 1], t) for a in pairs)])
    written = iter([spec.text(row) for row in model.decode(path).tolist()])
    found = [_part("reconstruction", [one, next(written)]) for one in real[:AGAIN]]
    for a in pairs:
        way = [next(written) for _ in range(STEPS)]
        found.append(_part("interpolation", [real[a], *way, real[a + 1]]))
    return found


def _part(kind: str, texts: list[str]) -> dict[str, Any]:
    return {"kind": kind, "label": LABELS[kind], "texts": texts}
