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
    """A two-stage convolutional classifier. ``features``: [B, C, H, W] in [-1, 1] to [B, 128]."""

    def __init__(self, spec: DataSpec):
        super().__init__()
        self.spec = spec
        channels, height, width = spec.shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, max(2, len(spec.classes)))

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def train_judge(
    spec: DataSpec, images: np.ndarray, labels: np.ndarray, *, steps: int, batch_size: int, learning_rate: float
) -> Judge:
    """Trains a judge on stored images with shifts of up to two pixels. Draws from torch's global generator."""
    judge = Judge(spec).train()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps)
    data, target = torch.from_numpy(np.array(images)), torch.from_numpy(np.array(labels))
    for step in range(steps):
        chosen = torch.randint(len(data), (batch_size,))
        down, right = torch.randint(-2, 3, (2,)).tolist()
        x = spec.to_float(data[chosen]).roll((down, right), (2, 3))
        loss = functional.cross_entropy(judge(x), target[chosen])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        progress.report(step + 1, steps, loss=loss.item())
    return judge.eval()


@torch.inference_mode()
def features(judge: Judge, images: np.ndarray, batch_size: int = 500) -> np.ndarray:
    """Judge features of stored images: [N, 128] float64."""
    parts = [
        judge.features(_input(judge, images[start : start + batch_size])).double().numpy()
        for start in range(0, len(images), batch_size)
    ]
    return np.concatenate(parts)


@torch.inference_mode()
def accuracy(judge: Judge, images: np.ndarray, labels: np.ndarray, batch_size: int = 500) -> float:
    """Share of stored images whose label the judge names."""
    right = 0
    for start in range(0, len(images), batch_size):
        named = judge(_input(judge, images[start : start + batch_size])).argmax(1).numpy()
        right += int((named == labels[start : start + batch_size]).sum())
    return right / len(images)


def _input(judge: Judge, images: np.ndarray) -> Tensor:
    return judge.spec.to_float(torch.from_numpy(np.array(images)))
