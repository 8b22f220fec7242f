"""Neural Spline Flows (Durkan, Bekasov, Murray & Papamakarios 2019, https://arxiv.org/abs/1906.04032).

The coupling flow of the paper, RQ-NSF (C): each number is bent by a monotonic spline of rational quadratics (section
3.1), whose knots and slopes the other half of the numbers tells. For images it is a Glow (section 4.2.2): actnorm,
invertible 1x1 convolution and coupling, a step; scales lose half of their channels.

Differences from the paper:
- a coupling shifts and scales before it bends: a spline of few bins need not do that too, nor leave its interval;
- the 1x1 convolutions start as permutations: a random rotation hides what splines could use, such as pixels that are
  exactly 0 or a checkerboard's edges: after 60 steps on Fashion-MNIST it is 0.4 bits/dim behind;
- slopes are bounded by more than the paper's 1e-3, so that inverses in single precision keep their digits;
- the networks are small: three layers and no residual blocks, for a minute or two of one CPU thread;
- what leaves a scale has a mean and scale that depend on what stays, as Glow's;
- pixels are Gaussianised by their histogram before the first layer (see genus.nn.dequantisation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genus.data.spec import DataSpec
from genus.families.flows._coupling import (
    Base,
    Conditional,
    Convolutions,
    Coupling,
    CouplingFlow,
    Dense,
    Layer,
    Mixing,
)

LEAST = 1e-3  # of a bin's share of the interval, and of a slope at a knot: the default of the paper's code


class Spline(CouplingFlow):
    """``steps`` and ``hidden``: steps of flow and width of the coupling networks, one number a scale.

    ``bins`` of each spline on [-``tail``, ``tail``]; beyond it is the identity. With ``affine`` a coupling first shifts
    and scales, by e^-bound … e^bound. ``least``: of a bin's share of the interval and of a slope at a knot; the paper's
    code has 1e-3, by which inverses in single precision lose a digit more.
    Vectors [D, 1, 1] have one scale of ``turns`` couplings, which bend the second half of the numbers and the first by
    turns, with ``fine`` bins and dense networks of ``dense`` units.
    ``onto_reals``: "gaussianise", or "logit" with its ``alpha``.
    Raises ValueError for an image whose sides can't be halved once a scale, and for bins that can't be.
    """

    paper = "Durkan, Bekasov, Murray & Papamakarios 2019, arXiv:1906.04032"

    def __init__(
        self,
        spec: DataSpec,
        *,
        steps: Sequence[int] = (3, 5),
        hidden: Sequence[int] = (32, 64),
        bins: int = 6,
        tail: float = 4.0,
        affine: bool = True,
        bound: float = 1.0,
        least: float = 1e-2,
        turns: int = 2,
        fine: int = 32,
        dense: int = 96,
        onto_reals: str = "gaussianise",
        alpha: float = 1e-6,
    ):
        if not steps or len(steps) != len(hidden):
            raise ValueError(f"steps and hidden need one number a scale each, not {list(steps)} and {list(hidden)}")
        for name, count, share in (("bins", bins, least), ("fine", fine, LEAST)):
            if not (count >= 2 and 0 < count * share < 1):
                raise ValueError(f"{name} must be at least 2 and leave room for shares of {share:g}, not {count}")
        super().__init__(spec, len(steps), onto_reals=onto_reals, alpha=alpha)
        if spec.flat:
            layers: list[Layer] = [Mixing(torch.eye(spec.dims))]
            for turn in range(turns):
                flip = turn % 2 > 0
                changed = (spec.dims + flip) // 2  # as chunk() halves an odd number
                # With one plateau nearly twice as much of a checkerboard's density leaks over its edges.
                network = Dense(spec.dims - changed, dense, (3 * fine - 1) * changed, pace=4.0, plateaus=2)
                layers.append(Bend(network, fine, tail, flip=flip))
            self.scales.append(nn.ModuleList(layers))
            return
        for (height, width, channels), count, wide in zip(self.sizes(len(steps)), steps, hidden, strict=True):
            changed = channels // 2
            last = len(self.scales) + 1 == len(steps)
            layers = []
            for _ in range(count):
                outputs = (3 * bins - 1 + 2 * affine) * changed
                conv = Convolutions(channels - changed, wide, outputs, (height, width), whole=last)
                layers += [
                    Mixing(torch.eye(channels)[torch.randperm(channels)]),
                    Bend(conv, bins, tail, bound if affine else None, least=least),
                ]
            self.scales.append(nn.ModuleList(layers))
            self.priors.append(Base(channels, height, width) if last else Conditional(channels - changed, changed))
        self.to(memory_format=torch.channels_last)


class Bend(Coupling):
    """Coupling by rational-quadratic splines (section 3.1), after a shift and a scale where that has a ``bound``."""

    def __init__(
        self,
        network: Convolutions | Dense,
        bins: int,
        tail: float,
        bound: float | None = None,
        *,
        least: float = LEAST,
        flip: bool = False,
    ):
        super().__init__(network, flip=flip)
        self.bins, self.tail, self.bound, self.least = bins, tail, bound, least
        with torch.no_grad():  # slopes of 1 and equal bins: an untrained coupling is the identity
            bias = network.last.bias
            assert bias is not None
            each = 3 * bins - 1
            splines = bias[: len(bias) // (each if bound is None else each + 2) * each].view(-1, each)
            splines[:, 2 * bins :] = math.log(math.expm1(1 - least))  # the raw slope that stands for 1

    def bend(self, x: Tensor, parameters: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        channels, each = x.shape[-1], 3 * self.bins - 1
        raw, affine = parameters.split([channels * each, parameters.shape[-1] - channels * each], -1)
        # The parameters first: operations run along the numbers, not along a spline's few bins, four times as fast.
        raw = raw.reshape(*x.shape, each).movedim(-1, 0).contiguous()
        if self.bound is None:
            return rational_quadratic(x, raw, self.tail, inverse=inverse, least=self.least)
        stretch, shift = affine.chunk(2, -1)
        log_scale = self.bound * torch.tanh(stretch / self.bound)
        if inverse:
            y, log_slope = rational_quadratic(x, raw, self.tail, inverse=True, least=self.least)
            return (y - shift) * (-log_scale).exp(), log_slope - log_scale
        x = torch.addcmul(shift, x, log_scale.exp())
        y, log_slope = rational_quadratic(x, raw, self.tail, least=self.least)
        return y, log_slope + log_scale


def rational_quadratic(
    x: Tensor, raw: Tensor, tail: float, *, inverse: bool = False, least: float = LEAST
) -> tuple[Tensor, Tensor]:
    """Monotonic rational-quadratic splines of K bins (Gregory & Delbourgo 1982; section 3.1, equations 4 to 8).

    ``x``: [...]; ``raw``: [3K - 1, ...], of each spline the raw widths and heights of its K bins and the raw slopes at
    its K - 1 inner knots. Returns y and log dy/dx, [...]; of the inverse: x of y and log dx/dy. The spline is on
    [-tail, tail] in both; beyond it, and at its ends the slope, is the identity's. ``least``: a bin's share of the
    interval and the slope at a knot are no smaller.
    """
    bins = (len(raw) + 1) // 3
    shares, slopes = raw.split([2 * bins, bins - 1])
    shares = least + (1 - least * bins) * shares.unflatten(0, (2, bins)).softmax(1)
    sizes = 2 * tail * shares  # [2, K, ...]
    t = x.clamp(-tail, tail) + tail
    below = t >= sizes.detach()[int(inverse)].cumsum(0)  # [K, ...]: the bins that lie wholly before x
    below[-1] = False
    k = below.sum(0, keepdim=True)
    left, bottom = (sizes * below).sum(1).unbind()
    width, height = sizes.gather(1, k.expand(2, *k.shape)).squeeze(1).unbind()
    knots = torch.cat([k - 1, k])  # left and right of x, among the inner ones
    slopes = least + F.softplus(slopes.gather(0, knots.clamp(0, bins - 2)))
    before, after = torch.where((knots >= 0) & (knots < bins - 1), slopes, 1.0).unbind()
    secant = height / width
    bend = before + after - 2 * secant
    if inverse:  # the quadratic of equations 6 to 8, by the root that loses no digits
        rise = t - bottom
        b = height * before - rise * bend
        root = (b.square() + 4 * (height * (secant - before) + rise * bend) * secant * rise).clamp(min=0).sqrt()
        xi = 2 * secant * rise / (b + root)
    else:
        xi = (t - left) / width
    xi = xi.clamp(0, 1)  # rounding puts numbers at a knot a little beyond it, where steep slopes would have poles
    hump = xi * (1 - xi)
    denominator = secant + bend * hump
    slope = (secant / denominator).square() * (after * xi.square() + 2 * secant * hump + before * (1 - xi).square())
    y = left + xi * width if inverse else bottom + height * (secant * xi.square() + before * hump) / denominator
    inside = x.abs() <= tail
    return torch.where(inside, y - tail, x), torch.where(inside, -slope.log() if inverse else slope.log(), 0.0)


Model = Spline
