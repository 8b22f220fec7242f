"""Drawing from any family that can sample, and translating by any that can: in chunks, from one seed, as stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from genus import progress
from genus.contract import Family, Samples, Translates
from genus.training import autocast


@torch.inference_mode()
def draw(
    model: Family,
    n: int,
    *,
    seed: int,
    device: torch.device,
    batch_size: int = 100,
    knobs: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> np.ndarray:
    """``n`` samples as stored values [n, *shape] (uint8 for images, uint16 tokens for text, zeros after a document's
    end and no wider than the longest). Same seed and batch size, same bytes.

    ``knobs`` are keyword arguments of the family's ``sample``; ``quiet`` reports no progress.
    Raises FloatingPointError, naming the sample, where one is not finite: as levels it would look like any other.
    """
    if not isinstance(model, Samples):
        raise TypeError(f"{type(model).__module__} cannot sample")
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for start in range(0, n, batch_size):
        with autocast(device):
            x = model.sample(min(batch_size, n - start), generator=generator, **(knobs or {}))
        if not x.isfinite().all():
            bad = start + int((~x.isfinite().flatten(1).all(1)).nonzero()[0])
            raise FloatingPointError(f"sample {bad} of {n} is not finite")
        parts.append(model.spec.to_stored(x.float()).cpu().numpy())  # float holds every token
        if not quiet:
            progress.report(min(start + batch_size, n), n, unit="sample")
    if model.spec.kind == "text":
        widest = max(part.shape[1] for part in parts)
        parts = [np.pad(part, ((0, 0), (0, widest - part.shape[1]))) for part in parts]
    return np.concatenate(parts)


@torch.inference_mode()
def translate(
    model: Family, images: np.ndarray, to: int, *, seed: int, device: torch.device, batch_size: int = 100
) -> np.ndarray:
    """Stored images [n, *shape] of the model's one domain as stored images of the domain ``to``.

    Raises FloatingPointError, naming the image, where a translation is not finite.
    """
    if not isinstance(model, Translates):
        raise TypeError(f"{type(model).__module__} cannot translate")
    generator = torch.Generator(device).manual_seed(seed)
    parts = [np.array(images[:0])]
    for start in range(0, len(images), batch_size):
        x = model.spec.to_float(torch.from_numpy(np.array(images[start : start + batch_size])).to(device))
        with autocast(device):
            y = model.translate(x, to, generator=generator)
        if not y.isfinite().all():
            bad = start + int((~y.isfinite().flatten(1).all(1)).nonzero()[0])
            raise FloatingPointError(f"translation {bad} of {len(images)} to '{model.spec.classes[to]}' is not finite")
        parts.append(model.spec.to_stored(y.float()).cpu().numpy())
    return np.concatenate(parts)
