"""MADE: a network whose output i depends on the inputs before i alone (Germain et al. 2015, arXiv:1502.03509).

Every unit has a degree, the number of inputs that it may see; weights from a unit of a higher degree are masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPREAD = 4.0  # the pitch of a MADE's sines goes from a fourth to four times of what is asked


class MADE(nn.Module):
    """[B, D] to parameters [B, D, outputs]; those of number i are a function of x[:, :i].

    Two hidden layers. With a ``pitch`` the first is of sines, that many radians a unit of its inputs (Sitzmann et al.
    2020, arXiv:2006.09661): of a few numbers it can tell small differences at once, which ReLUs are slow to learn.
    With ``labels``, each call is told one of so many for each row: it moves the units of the first layer and, as
    those of number 0 see no unit, the parameters that come out.
    """

    enters: Tensor
    stays: Tensor
    leaves: Tensor

    def __init__(self, dims: int, hidden: int, outputs: int, *, pitch: float = 0.0, labels: int = 0):
        super().__init__()
        self.pitch = pitch
        inputs = torch.arange(1, dims + 1)
        degree = 1 + torch.arange(hidden) * max(dims - 1, 1) // hidden  # 1 … D - 1, spread evenly
        for name, mask in (
            ("enters", degree[:, None] >= inputs),
            ("stays", degree[:, None] >= degree),
            ("leaves", (inputs[:, None] > degree)[:, None]),  # [D, 1, hidden]
        ):
            self.register_buffer(name, mask, persistent=False)
        self.first = nn.Parameter((pitch or math.sqrt(2 / dims)) * torch.randn(hidden, dims))
        if pitch:
            self.first.data *= SPREAD ** (2 * torch.rand(hidden, 1) - 1)
        self.first_bias = nn.Parameter(math.pi * (2 * torch.rand(hidden) - 1) if pitch else torch.zeros(hidden))
        self.middle = nn.Parameter(math.sqrt(2 / hidden) * torch.randn(hidden, hidden))
        self.middle_bias = nn.Parameter(torch.zeros(hidden))
        self.last = nn.Parameter(torch.zeros(dims, outputs, hidden))  # at first only the biases speak
        self.last_bias = nn.Parameter(torch.zeros(dims, outputs))
        if labels:
            self.label_first = nn.Parameter(torch.randn(labels, hidden))
            self.label_last = nn.Parameter(torch.zeros(labels, dims, outputs))

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        entered = F.linear(x, self.first * self.enters, self.first_bias)
        last_bias: Tensor = self.last_bias
        if label is not None:
            entered, last_bias = entered + self.label_first[label], last_bias + self.label_last[label]
        h = self._hidden(entered, self.middle * self.stays)
        return F.linear(h, (self.last * self.leaves).flatten(0, 1)).unflatten(1, self.last_bias.shape) + last_bias

    def unroll(
        self, y: Tensor, solve: Callable[[Tensor, Tensor], Tensor], label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, D], number by number: x_i = solve(y_i [B], parameters_i [B, outputs]), which see x before i.

        Also the parameters, [B, D, outputs], equal to ``self(x, label)`` but for rounding. Differentiable.
        """
        first, middle, last = self.first * self.enters, self.middle * self.stays, self.last * self.leaves
        entered, found, told = self.first_bias.expand(len(y), -1), [], []
        if label is not None:
            entered = entered + self.label_first[label]
        for i in range(y.shape[1]):
            told.append(F.linear(self._hidden(entered, middle), last[i], self.last_bias[i]))
            if label is not None:
                told[-1] = told[-1] + self.label_last[label, i]
            found.append(solve(y[:, i], told[-1]))
            entered = torch.addcmul(entered, found[-1].unsqueeze(1), first[:, i])  # only what is new is added
        return torch.stack(found, 1), torch.stack(told, 1)

    def _hidden(self, entered: Tensor, middle: Tensor) -> Tensor:
        h = entered.sin() if self.pitch else entered.relu()
        return F.relu(F.linear(h, middle, self.middle_bias))
