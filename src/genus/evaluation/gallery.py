"""Pictures of what a model does, for people: a table of them, each with the capability that it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genus.contract import Decodes, Denoises, Encodes, Samples, Translates, Walks
from genus.data.sources import two_d as known
from genus.evaluation import metrics, two_d
from genus.evaluation.evaluate import Task
from genus.evaluation.latent import spherical
from genus.evaluation.translation import strips
from genus.pictures import grid

SHOWN, ROWS, COLUMNS = 64, 6, 10


class Picture(NamedTuple):
    name: str
    needs: tuple[type, ...]
    draw: Callable[[Task], np.ndarray | None]  # uint8 [H, W] or [H, W, 3]; None: there is nothing to show


def gallery(task: Task) -> dict[str, np.ndarray]:
    """All pictures whose capabilities the model has, by name. Seeds are the same for every model."""
    drawn = {
        picture.name: picture.draw(task)
        for picture in PICTURES
        if all(isinstance(task.model, needed) for needed in picture.needs)
    }
    return {name: pixels for name, pixels in drawn.items() if pixels is not None}


def samples(task: Task) -> np.ndarray:
    """The first of the samples that were measured: nobody chose them."""
    return _sheet(task, task.drawn[0][:SHOWN], None)


def nearest(task: Task) -> np.ndarray:
    """A row a sample: the sample, then the training images nearest to it by pixels."""
    drawn, train = task.drawn[0][:ROWS], task.data.split("train")
    _, where = metrics.nearest(drawn, train, COLUMNS - 1)
    rows = [image for sample, own in zip(drawn, where, strict=True) for image in (sample, *(train[i] for i in own))]
    return _sheet(task, np.stack(rows), COLUMNS)


@torch.inference_mode()
def interpolation(task: Task) -> np.ndarray:
    """A row a pair: from code to code along the sphere; the codes of real images where it can encode, else drawn."""
    if isinstance(task.model, Encodes):
        codes = task.model.encode(task.test(2 * ROWS))
    else:
        shape = (2 * ROWS, task.model.latent)
        codes = torch.randn(shape, generator=task.generator(16), device=task.device)
    between = torch.linspace(0, 1, COLUMNS, device=codes.device)
    path = torch.cat([spherical(a, b, between) for a, b in zip(codes[::2], codes[1::2], strict=True)])
    return _sheet(task, _stored(task, task.model.decode(path)), COLUMNS)


@torch.inference_mode()
def reconstruction(task: Task) -> np.ndarray:
    """Real images above what is left of each after the code."""
    x = task.test(3 * COLUMNS)
    again = task.model.decode(task.model.encode(x))
    rows = [part for pair in zip(x.split(COLUMNS), again.split(COLUMNS), strict=True) for part in pair]
    return _sheet(task, _stored(task, torch.cat(rows)), COLUMNS)


@torch.inference_mode()
def trajectory(task: Task) -> np.ndarray:
    """A row a sample: the way from noise to the finished image."""
    frames = task.model.trajectory(ROWS, frames=COLUMNS, generator=task.generator(17))  # [frames, n, *shape]
    return _sheet(task, _stored(task, frames.transpose(0, 1).flatten(0, 1)), frames.shape[0])


def translation(task: Task) -> np.ndarray | None:
    """Real images, their translations and these translated back: a row each, first one direction, then the other."""
    if not set(task.model.domains) <= set(np.unique(task.data.labels("test")).tolist()):
        return None
    rows = strips(task.model, task.data, "test", columns=COLUMNS, seed=task.seed + 19, device=task.device)
    return _sheet(task, rows, COLUMNS)


def field(task: Task) -> np.ndarray | None:
    """True and learnt scores side by side, where the data's density is known."""
    shape = known.shape_of(task.data.description)
    if shape is None:
        return None
    return two_d.fields(task.model, known.truth(shape, task.data.spec.levels), device=task.device)


def _stored(task: Task, x: Tensor) -> np.ndarray:
    return task.data.spec.to_stored(x.float()).cpu().numpy()


def _sheet(task: Task, images: np.ndarray, columns: int | None) -> np.ndarray:
    return grid(images, levels=task.data.spec.levels, columns=columns)


PICTURES = (
    Picture("samples", (Samples,), samples),
    Picture("nearest", (Samples,), nearest),
    Picture("interpolation", (Decodes,), interpolation),
    Picture("reconstruction", (Encodes,), reconstruction),
    Picture("trajectory", (Walks,), trajectory),
    Picture("translation", (Translates,), translation),
    Picture("field", (Denoises,), field),
)
