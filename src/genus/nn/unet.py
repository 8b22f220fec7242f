"""The networks of the score families: a small U-Net for images and a dense one for vectors, told of a noise level.

Residual blocks as in Karras et al. 2022, https://arxiv.org/abs/2206.00364, scaled and shifted by the level (FiLM, Perez
et al. 2017, https://arxiv.org/abs/1709.07871); the sizes are for seconds of one CPU thread.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genus.data.spec import DataSpec


def denoiser(spec: DataSpec, width: int, blocks: tuple[int, int], hidden: int, aside: int = 0) -> UNet | Dense:
    """The network for examples of ``spec``: for vectors a dense one of half as many hidden units.

    Raises ValueError where height or width is no multiple of 4.
    """
    if spec.flat:
        return Dense(spec.dims, hidden // 2, aside=aside)
    if spec.shape[1] % 4 or spec.shape[2] % 4:
        raise ValueError(f"a U-Net needs height and width divisible by 4, not {spec.shape[1]}x{spec.shape[2]}")
    return UNet(spec.shape, width, blocks, hidden, aside)


class Block(nn.Module):
    """Residual block, GroupNorm-SiLU-conv twice, scaled and shifted in between by the embedding of the noise level."""

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(width // 8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(width // 8, width), nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * width)
        nn.init.zeros_(self.conv2.weight)  # starts as the identity

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.film(embedded)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return x + h


class Whole(nn.Module):
    """Residual: all positions of a few channels through two linear layers.

    Convolutions need many steps to learn that the two halves of a shirt belong together; this sees the whole at once,
    and is told at once what the picture is to be, [B, aside] numbers.
    """

    def __init__(self, width: int, size: int, hidden: int, aside: int = 0, channels: int = 16):
        super().__init__()
        self.norm = nn.GroupNorm(width // 8, width)
        self.gather, self.spread = nn.Conv2d(width, channels, 1), nn.Conv2d(channels, width, 1)
        self.inner, self.outer = nn.Linear(channels * size, hidden), nn.Linear(hidden, channels * size)
        nn.init.zeros_(self.spread.weight)  # starts as the identity
        self.tell = nn.Linear(aside, hidden, bias=False) if aside else None

    def forward(self, x: Tensor, *aside: Tensor) -> Tensor:
        h = self.gather(self.norm(x))
        inner = self.inner(h.flatten(1))
        if self.tell is not None:
            inner = inner + self.tell(*aside)
        return x + self.spread(self.outer(F.silu(inner)).view(h.shape))


class UNet(nn.Module):
    """[B, C, H, W] and ln sigma [B] to [B, C, H, W]. Works on the 2x2-unshuffled image, where a 3x3 convolution costs
    a quarter and sees twice as far, and one level below it; what goes down needs little work, what comes up more.

    ``width``: channels at half resolution, twice as many at a quarter; ``blocks``: at half, at a quarter; ``hidden``:
    of the layers that see it whole; ``aside``: how many further numbers [B, aside] it is told beside the level.
    """

    frequencies: Tensor

    def __init__(self, shape: tuple[int, ...], width: int, blocks: tuple[int, int], hidden: int, aside: int = 0):
        super().__init__()
        channels, (high, across) = shape[0], (shape[1] // 2, shape[2] // 2)
        embedding, size = 4 * width, high * across // 4
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(0.3), math.log(10.0), width)))
        self.embed = nn.Sequential(
            nn.Linear(2 * width + aside, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.enter = nn.Conv2d(4 * channels, width, 3, padding=1)
        # What is where in a centred picture, which convolutions see only by the border's padding.
        self.place_high = nn.Parameter(torch.zeros(width, high, across))
        self.place_low = nn.Parameter(torch.zeros(2 * width, high // 2, across // 2))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.whole = nn.ModuleList(Whole(2 * width, size, hidden, aside) for _ in range(blocks[1]))
        self.below = nn.ModuleList(Block(2 * width, embedding) for _ in range(blocks[1]))
        self.up = nn.Conv2d(2 * width, 4 * width, 1)
        self.after = nn.ModuleList(Block(width, embedding) for _ in range(blocks[0]))
        self.norm, self.leave = nn.GroupNorm(width // 8, width), nn.Conv2d(width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, log_sigma: Tensor, *aside: Tensor) -> Tensor:
        angles = log_sigma[:, None] * self.frequencies
        embedded = self.embed(torch.cat([angles.sin(), angles.cos(), *aside], 1))
        h = self.enter(F.pixel_unshuffle(x, 2)) + self.place_high  # [B, width, H/2, W/2]
        low = self.down(h) + self.place_low  # [B, 2 width, H/4, W/4]
        for whole, block in zip(self.whole, self.below, strict=True):
            low = block(whole(low, *aside), embedded)
        h = h + F.pixel_shuffle(self.up(low), 2)
        for block in self.after:
            h = block(h, embedded)
        return F.pixel_shuffle(self.leave(F.silu(self.norm(h))), 2)


class Dense(nn.Module):
    """The network for vectors: [B, D, 1, 1] and ln sigma [B] to [B, D, 1, 1].

    Residual, scaled and shifted by the level. It sees x also as sines and cosines (Tancik et al. 2020, 2006.10739):
    edges and thin lines come much sooner. ``aside`` as in UNet.
    """

    waves: Tensor
    frequencies: Tensor

    def __init__(self, dims: int, hidden: int, blocks: int = 3, aside: int = 0):
        super().__init__()
        self.register_buffer("waves", math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0]), persistent=False)
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(0.3), math.log(10.0), 16)))
        self.embed = nn.Sequential(nn.Linear(32 + aside, 32), nn.SiLU())
        self.enter, self.leave = nn.Linear((1 + 2 * len(self.waves)) * dims, hidden), nn.Linear(hidden, dims)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.film = nn.ModuleList(nn.Linear(32, 2 * hidden) for _ in range(blocks))

    def forward(self, x: Tensor, log_sigma: Tensor, *aside: Tensor) -> Tensor:
        angle = log_sigma[:, None] * self.frequencies
        embedded = self.embed(torch.cat([angle.cos(), angle.sin(), *aside], 1))
        phase = (x.flatten(1).unsqueeze(-1) * self.waves).flatten(1)
        h = self.enter(torch.cat([x.flatten(1), phase.cos(), phase.sin()], 1))
        for block, film in zip(self.blocks, self.film, strict=True):
            scale, shift = film(embedded).chunk(2, 1)
            h = h + block(F.silu(torch.addcmul(shift, h, 1 + scale)))
        return self.leave(F.silu(h)).view(x.shape)
