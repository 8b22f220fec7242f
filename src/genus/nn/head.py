"""What an autoregressive model of patches ends with: a mixture for every value of a patch, given those before it.

The values of a patch are conditioned on one another in a network of two layers, as PixelCNN++ conditions a pixel's
colours (Salimans et al. 2017, arXiv:1701.05517, section 2.2), masked as MADE's are (Germain et al. 2015,
arXiv:1502.03509). That is an exact factorisation like any other order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """Mixture parameters of the D values of a patch: value j from the patch's features and values 0 … j - 1.

    ``width``: units a value. ``inputs``: numbers by which each earlier value is seen. The components start with equal
    weights, at ``means`` [K], all of the one ``log_scale``.
    """

    mask: Tensor

    def __init__(self, channels: int, values: int, width: int, means: Tensor, log_scale: float, *, inputs: int = 2):
        super().__init__()
        self.width, mixtures = width, len(means)
        self.features = nn.Linear(channels, values * width)
        self.earlier = nn.Parameter(0.3 * torch.randn(values * width, inputs * values)) if values > 1 else None
        self.hidden = nn.Parameter(torch.randn(values, width, width) / math.sqrt(width))
        self.hidden_bias = nn.Parameter(torch.zeros(values, width, 1))
        self.out = nn.Parameter(0.1 * torch.randn(values, 3 * mixtures, width) / math.sqrt(width))
        start = torch.cat([torch.zeros(mixtures), means, torch.full((mixtures,), log_scale)])
        self.out_bias = nn.Parameter(start.repeat(values, 1).unsqueeze(-1))
        mask = torch.ones(values, values).tril(-1).repeat_interleave(width, 0).repeat(1, inputs)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, features: Tensor, seen: Tensor, only: int | None = None) -> Tensor:
        """Features [P, channels] and what is seen of the values, [P, inputs * D] -> parameters [D, 3K, P].

        ``only``: those of this value alone, [1, 3K, P].
        """
        value = slice(None) if only is None else slice(only, only + 1)
        units = slice(None) if only is None else slice(only * self.width, (only + 1) * self.width)
        hidden = F.linear(features, self.features.weight[units], self.features.bias[units])
        if self.earlier is not None:
            hidden = hidden + F.linear(seen, self.earlier[units] * self.mask[units])
        hidden = F.relu(hidden).T.unflatten(0, (-1, self.width))  # [D, width, P]
        hidden = F.relu(torch.baddbmm(self.hidden_bias[value], self.hidden[value], hidden))
        return torch.baddbmm(self.out_bias[value], self.out[value], hidden)
