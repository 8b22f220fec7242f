"""What sample metrics are measured on: vectors of images. Each set of features is independent of the others.

``judge``: the pipeline's classifier. ``pixels``: principal components of the raw pixels, which no training chose.
``backbone``: a pretrained torchvision network, where params.yaml names a local weights file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from genus.config import Backbone
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.evaluation import metrics
from genus.files import sha256

Extract = Callable[[np.ndarray], np.ndarray]  # stored images [N, C, H, W] to float64 [N, D]
COMPONENTS = 64
SIDE = 224  # pixels a side that torchvision's classifiers were trained on
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that they were trained on


class Components:
    """The first principal components of stored pixels, [N, C, H, W] to [N, D], D at most ``COMPONENTS``."""

    def __init__(self, mean: np.ndarray, axes: np.ndarray):
        self.mean, self.axes = mean, axes

    @classmethod
    def of(cls, images: np.ndarray) -> Components:
        """Fitted to images; in units of the largest component's standard deviation, so that no scale is huge."""
        mean, covariance = metrics.moments(images.reshape(len(images), -1))
        values, vectors = np.linalg.eigh(covariance)
        return cls(mean, vectors[:, ::-1][:, :COMPONENTS] / np.sqrt(values[-1]))

    def __call__(self, images: np.ndarray, chunk: int = 1000) -> np.ndarray:
        rows = images.reshape(len(images), -1)
        return np.concatenate([(rows[i : i + chunk] - self.mean) @ self.axes for i in range(0, len(rows), chunk)])


def backbone(config: Backbone, spec: DataSpec) -> Extract:
    """The penultimate features of a torchvision classifier whose weights are a local file.

    Raises UserError where the file is missing, is not the one whose SHA-256 is written down, or does not fit.
    """
    import torchvision
    from safetensors.torch import load_file

    path = Path(config.weights)
    if not path.exists():
        raise UserError(f"{path}: no such file; judge.backbone.weights names a safetensors file of {config.model}")
    if (found := sha256(path)) != config.sha256:
        raise UserError(f"{path}: its SHA-256 is {found}, and judge.backbone.sha256 asks for {config.sha256}")
    if config.model not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"judge.backbone.model: torchvision has no classifier '{config.model}'")
    network = torchvision.models.get_model(config.model, weights=None).eval()
    try:
        network.load_state_dict(load_file(path))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not the weights of {config.model}: {' '.join(str(error).split())[:200]}") from error
    _without_head(network)
    mean, deviation = (torch.tensor(part).view(1, 3, 1, 1) for part in (MEAN, DEVIATION))

    @torch.inference_mode()
    def extract(images: np.ndarray, batch_size: int = 50) -> np.ndarray:
        parts = []
        for start in range(0, len(images), batch_size):
            x = torch.from_numpy(np.array(images[start : start + batch_size])).float() / (spec.levels - 1)
            x = nn.functional.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
            x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
            parts.append(network((x - mean) / deviation).double().numpy())
        return np.concatenate(parts)

    return extract


def _without_head(network: nn.Module) -> None:
    """Replaces the last linear layer by the identity: every torchvision classifier ends in one."""
    last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, name = last.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
