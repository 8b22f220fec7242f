"""What samples of a data set are measured against: made once by the judge stage, read by every evaluation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from genus.config import Backbone
from genus.data.loaders import Dataset
from genus.errors import UserError
from genus.evaluation import metrics
from genus.evaluation.features import Components, Extract, backbone
from genus.evaluation.judge import Judge, accuracy, features
from genus.files import read_array, read_json, read_tensors, replacing, write_json

SAMPLES = 10_000  # of the Gaussian control, and at most of train features for the floors


@dataclass(frozen=True)
class View:
    """One set of features: how to take them, those of real images, and what the Gaussian control scores on them."""

    name: str
    extract: Extract
    test: np.ndarray  # [N, D] float64: what samples are compared with
    train: np.ndarray  # [≤ 10,000, D]: the floor, that is what real images score
    control: float  # Fréchet distance of the Gaussian control
    frechet: metrics.Frechet

    def floor(self, n: int) -> np.ndarray:
        """Features of ``n`` training images (fewer where the data are fewer), to be scored as a model's samples are."""
        return self.train[:n]


@dataclass(frozen=True)
class Reference:
    """A trained judge, its accuracy on test, and a view of the data for each set of features, the judge's first."""

    judge: Judge
    accuracy: float
    views: dict[str, View]


def make_reference(
    judge: Judge, data: Dataset, folder: Path, *, seed: int, config: Backbone | None = None
) -> Reference:
    """Takes the features of test and train images, scores judge and control, and writes all of it to ``folder``.

    ``config`` adds a pretrained network's features. The test split is read here to be measured against, never to
    choose anything. Raises UserError as ``backbone`` does.
    """
    images, test = data.split("train"), data.split("test")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:SAMPLES])
    chosen = np.random.default_rng(seed + 1).permutation(chosen)
    components = Components.of(np.asarray(images))
    drawn = metrics.gaussian_control(np.asarray(images), SAMPLES, levels=data.spec.levels, seed=seed)
    views = {}
    for name, extract in _extracts(judge, components, data, config).items():
        # In float32, as they are stored: the judge computes in it, and all readers have the same numbers.
        real, seen = (extract(part).astype(np.float32).astype(np.float64) for part in (test, images[chosen]))
        frechet = metrics.Frechet(real)
        views[name] = View(name, extract, real, seen, frechet(extract(drawn)), frechet)
    right = accuracy(judge, test, data.labels("test"))
    with replacing(folder) as temporary:
        temporary.mkdir()
        state = {name: value.cpu().contiguous() for name, value in judge.state_dict().items()}
        save_file(state, temporary / "weights.safetensors")
        np.save(temporary / "components.npy", np.concatenate([components.mean[None], components.axes.T]))
        for name, view in views.items():
            np.save(temporary / f"{name}-test.npy", view.test.astype(np.float32))
            np.save(temporary / f"{name}-train.npy", view.train.astype(np.float32))
        first = views["judge"]
        write_json(
            temporary / "judge.json",
            {
                "spec": data.spec.to_json(),
                "accuracy": right,
                "control": first.control,
                "control_n": SAMPLES,
                "controls": {name: view.control for name, view in views.items()},
                "floor": first.frechet(first.train),
                "floor_n": len(first.train),
                "backbone": config.model_dump(mode="json") if config else None,
                "data_sha256": data.description["sha256"],
            },
        )
    return Reference(judge, right, views)


def open_reference(data: Dataset, folder: str | os.PathLike[str]) -> Reference:
    """Reads what the judge stage left. Raises UserError where it is not there."""
    folder = Path(folder)
    if not all((folder / name).exists() for name in ("judge.json", "components.npy")):
        raise UserError(f"{folder}: no judge yet, or an older version's; `genus judge {data.folder.name}` trains it")
    about = read_json(folder / "judge.json")
    judge = Judge(data.spec)
    judge.load_state_dict(read_tensors(folder / "weights.safetensors"))
    stored = read_array(folder / "components.npy")
    config = Backbone.model_validate(about["backbone"]) if about["backbone"] else None
    views = {}
    for name, extract in _extracts(judge.eval(), Components(stored[0], stored[1:].T), data, config).items():
        test, train = (read_array(folder / f"{name}-{split}.npy").astype(np.float64) for split in ("test", "train"))
        views[name] = View(name, extract, test, train, about["controls"][name], metrics.Frechet(test))
    return Reference(judge, about["accuracy"], views)


def _extracts(judge: Judge, components: Components, data: Dataset, config: Backbone | None) -> dict[str, Extract]:
    found: dict[str, Extract] = {"judge": partial(features, judge), "pixels": components}
    return found | ({"backbone": backbone(config, data.spec)} if config else {})
