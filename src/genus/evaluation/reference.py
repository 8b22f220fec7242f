"""What samples of a data set are measured against: made once by the judge stage, read by every evaluation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from genus.data.loaders import Dataset
from genus.errors import UserError
from genus.evaluation import metrics
from genus.evaluation.judge import Judge, accuracy, features
from genus.files import read_json, replacing, write_json

SAMPLES = 10_000  # of the Gaussian control, and at most of train features for the floors


@dataclass(frozen=True)
class Reference:
    """A trained judge, its features of test and of train images, and the control's distance."""

    judge: Judge
    test: np.ndarray  # [N, 128] float64: what samples are compared with
    train: np.ndarray  # [≤ 10,000, 128]: the floor, that is what real images score
    control: float  # Fréchet distance of the Gaussian control
    accuracy: float  # of the judge on test
    frechet: metrics.Frechet

    def floor(self, n: int) -> np.ndarray:
        """Features of ``n`` training images (fewer where the data are fewer), to be scored as a model's samples are."""
        return self.train[:n]


def make_reference(judge: Judge, data: Dataset, folder: Path, *, seed: int) -> Reference:
    """Scores the judge and the control and writes weights, features and figures to ``folder``.

    The test split is read here to be measured against, never to choose anything.
    """
    images = data.split("train")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:SAMPLES])
    chosen = np.random.default_rng(seed + 1).permutation(chosen)
    test, train = features(judge, data.split("test")), features(judge, images[chosen])
    frechet = metrics.Frechet(test)
    drawn = metrics.gaussian_control(np.asarray(images), SAMPLES, levels=data.spec.levels, seed=seed)
    control = frechet(features(judge, drawn))
    right = accuracy(judge, data.split("test"), data.labels("test"))
    with replacing(folder) as temporary:
        temporary.mkdir()
        state = {name: value.cpu().contiguous() for name, value in judge.state_dict().items()}
        save_file(state, temporary / "weights.safetensors")
        np.save(temporary / "test.npy", test.astype(np.float32))  # the judge computes in float32: nothing is lost
        np.save(temporary / "train.npy", train.astype(np.float32))
        write_json(
            temporary / "judge.json",
            {
                "spec": data.spec.to_json(),
                "accuracy": right,
                "control": control,
                "control_n": SAMPLES,
                "floor": frechet(train),
                "floor_n": len(train),
                "data_sha256": data.description["sha256"],
            },
        )
    return Reference(judge, test, train, control, right, frechet)


def open_reference(data: Dataset, folder: str | os.PathLike[str]) -> Reference:
    """Reads what the judge stage left. Raises UserError where it is not there."""
    folder = Path(folder)
    if not (folder / "judge.json").exists():
        raise UserError(f"{folder}: no judge yet; `genus judge {data.folder.name}` trains it")
    about = read_json(folder / "judge.json")
    judge = Judge(data.spec)
    judge.load_state_dict(load_file(folder / "weights.safetensors"))
    test = np.load(folder / "test.npy", allow_pickle=False).astype(np.float64)
    train = np.load(folder / "train.npy", allow_pickle=False).astype(np.float64)
    return Reference(judge.eval(), test, train, about["control"], about["accuracy"], metrics.Frechet(test))
