"""The judge: a small classifier trained by the pipeline, whose penultimate features the sample metrics live on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from genus import progress
from genus.data.spec import DataSpec

FEATURES = 128


class Judge(nn.Module):
    """A small convolutional classifier. ``features``: [B, C, H, W] in [-1, 1] to [B, 128].

    Its first step moves each 2 × 2 block into channels: at the same accuracy three times as fast as convolving the
    full picture. Data without labels are judged by a classifier of four mirrorings, a task any image offers.
    """

    def __init__(self, spec: DataSpec):
        super().__init__()
        self.spec = spec
        channels, height, width = spec.shape
        self.pad = (0, -width % 4, 0, -height % 4)
        self.labelled = len(spec.classes) > 1
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * channels, 48, 3, padding=1, bias=False),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(48, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (-(-height // 4)) * (-(-width // 4)), FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, len(spec.classes) if self.labelled else 4)
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        return self.body(functional.pad(x, self.pad, value=-1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@torch.inference_mode()
def classes(judge: Judge, seen: np.ndarray) -> np.ndarray:
    """The class that the judge gives to each row of its features [N, 128]: int64 [N]."""
    weight = judge.head.weight
    return judge.head(torch.from_numpy(seen).to(weight.device, weight.dtype)).argmax(1).cpu().numpy()


def train_judge(
    spec: DataSpec,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    device: torch.device,
) -> Judge:
    """Trains a judge on stored images. Draws from torch's global generator: seed it first."""
    judge = Judge(spec).to(device).train()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=5e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=max(2, steps), pct_start=0.15)
    data, targets = torch.from_numpy(np.array(images)), torch.from_numpy(np.array(labels))
    batch_size = min(batch_size, len(data))
    an_epoch = len(data) // batch_size
    for step in range(steps):
        if step % an_epoch == 0:
            order = torch.randperm(len(data))
        chosen = order[step % an_epoch * batch_size :][:batch_size]
        x, target = spec.to_float(data[chosen].to(device)), targets[chosen].to(device)
        if not judge.labelled:
            x, target = _mirrored(x)
        loss = functional.cross_entropy(judge(x), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        progress.report(step + 1, steps, loss=float(loss.detach()))
    return judge.eval()


@torch.inference_mode()
def features(judge: Judge, images: np.ndarray, batch_size: int = 500) -> np.ndarray:
    """Judge features of stored images: [N, 128] float64."""
    return np.concatenate([judge.features(x).double().cpu().numpy() for x in _batches(judge, images, batch_size)])


@torch.inference_mode()
def accuracy(judge: Judge, images: np.ndarray, labels: np.ndarray, batch_size: int = 500) -> float:
    """Share of stored images whose label (or mirroring, where there are no labels) the judge names."""
    right = 0
    for index, x in enumerate(_batches(judge, images, batch_size)):
        target = torch.from_numpy(np.array(labels[index * batch_size : (index + 1) * batch_size])).to(x.device)
        if not judge.labelled:
            x, target = _mirrored(x)
        right += int((judge(x).argmax(1) == target).sum())
    return right / len(images)


def _batches(judge: Judge, images: np.ndarray, batch_size: int):
    device = judge.head.weight.device
    for start in range(0, len(images), batch_size):
        yield judge.spec.to_float(torch.from_numpy(np.array(images[start : start + batch_size])).to(device))


def _mirrored(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every image mirrored in one of four ways, in turn, and which way."""
    target = torch.arange(len(x), device=x.device) % 4
    across, down = (target % 2).bool().view(-1, 1, 1, 1), (target // 2).bool().view(-1, 1, 1, 1)
    x = torch.where(across, x.flip(3), x)
    return torch.where(down, x.flip(2), x), target
