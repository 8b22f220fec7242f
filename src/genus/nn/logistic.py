"""The discretised mixture of logistics: a likelihood for pixels of any number of levels.

Salimans et al. 2017, "PixelCNN++", arXiv:1701.05517, section 2.1. A level's probability is the mass that a mixture of
K logistic distributions puts on the level's interval; the lowest and highest level take the tails, so that the levels'
probabilities sum to 1.

Everywhere: ``parameters`` is [B, 3K, *rest], the components' K logits, K means and K log scales in the units of
``DataSpec`` (levels lie in [-1, 1], 2 / (levels - 1) apart); ``x`` is [B, *rest].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# Narrower than this every component is a spike inside one level: nothing to win, and the gradients explode.
MIN_LOG_SCALE = -7.0
# Wider than this a level's share underflows in float32, and its logarithm has no gradient: pixels that are always black
# drive a component that they do not need there.
MAX_LOG_SCALE = 80.0


def split(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log weights (normalised), means and log scales (bounded), each [B, K, *rest]."""
    if parameters.dtype in (torch.bfloat16, torch.float16):  # autocast's: too coarse for differences between levels
        parameters = parameters.float()
    logits, means, log_scales = parameters.chunk(3, dim=1)
    return logits.log_softmax(1), means, log_scales.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)


def log_prob(parameters: Tensor, x: Tensor, levels: int) -> Tensor:
    """Log-probability in nats of each value's level: [B, *rest].

    With a and b the standardised ends of the level's interval, σ(a) - σ(b) = σ(a) σ(-b) (1 - exp(b - a)), whose
    logarithm is a sum of three terms that lose no precision in the tails. The lowest level has σ(a) alone, the highest
    σ(-b) alone.
    """
    weights, means, log_scales = split(parameters)
    half = 1 / (levels - 1)
    x = x.unsqueeze(1)
    precision = torch.exp(-log_scales)
    centred = (x - means) * precision
    reach = half * precision
    lowest, highest = x < half - 1, x > 1 - half
    below_upper_end = F.logsigmoid(centred + reach).masked_fill(highest, 0)
    above_lower_end = F.logsigmoid(reach - centred).masked_fill(lowest, 0)
    between = torch.log(-torch.expm1(-2 * reach)).masked_fill(lowest | highest, 0)
    return torch.logsumexp(weights + below_upper_end + above_lower_end + between, dim=1)


def sample(parameters: Tensor, levels: int, *, generator: Generator, temperature: float = 1.0) -> Tensor:
    """Draws levels, in the units of ``DataSpec``: [B, *rest].

    Rounding a draw from the continuous mixture to the nearest level gives exactly the distribution of ``log_prob``.
    ``temperature`` scales the logistic noise and sharpens the choice of the component: 1 is the model's distribution,
    0 the mean of the likeliest component.
    """
    weights, means, log_scales = split(parameters)
    gumbel = -torch.log(_exponential(weights, generator))
    chosen = (weights + temperature * gumbel).argmax(1, keepdim=True)
    mean, log_scale = (values.gather(1, chosen).squeeze(1) for values in (means, log_scales))
    noise = torch.log(_exponential(mean, generator)) - torch.log(_exponential(mean, generator))
    return nearest_level(mean + temperature * log_scale.exp() * noise, levels)


def mean(parameters: Tensor) -> Tensor:
    """The mixture's mean (the tails folded in by clipping each component's mean): [B, *rest]."""
    weights, means, _ = split(parameters)
    return (weights.exp() * means.clamp(-1, 1)).sum(1)


def nearest_level(x: Tensor, levels: int) -> Tensor:
    """The level nearest to each value, in the units of ``DataSpec``."""
    half_range = (levels - 1) / 2
    return ((x.clamp(-1, 1) + 1) * half_range).round() / half_range - 1


def _exponential(like: Tensor, generator: Generator) -> Tensor:
    """Standard exponential draws: -log of one is a Gumbel draw, the log of two's ratio a logistic one."""
    return torch.empty_like(like).exponential_(generator=generator)
