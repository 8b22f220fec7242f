"""VQ-VAE-2: an autoencoder whose code is two grids of tokens, a coarse one and a fine one.

Razavi et al. 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2", https://arxiv.org/abs/1906.00446; the
losses and the straight-through gradient are those of van den Oord et al. 2017, https://arxiv.org/abs/1711.00937.
Mentzer et al. 2023, "Finite Scalar Quantization", https://arxiv.org/abs/2309.15505: the other quantiser.

It gives no density, and draws each token by itself: which ones go together is for a second model to learn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec

RECENT = 0.99  # decay of how often a token is seen at a place, by which samples are drawn
DEAD = 0.05  # an entry is dead that is used so much as often as the mean one, or less
NUDGE = 0.1  # distance of an entry that was dead from the used one that it is put beside, in deviations of all entries


class Codebook(nn.Module):
    """Vector quantisation. Entries follow the means of what is assigned to them (1711.00937, appendix A.1).

    ``decay``: of these moving averages. A dead entry is put beside a used one, drawn by its use, and shares what is
    assigned to that, as in the splitting of Linde, Buzo & Gray 1980.
    """

    vectors: Tensor
    average: Tensor

    def __init__(self, entries: int, width: int, decay: float):
        super().__init__()
        self.entries, self.width, self.decay = entries, width, decay
        self.register_buffer("vectors", torch.randn(entries, width))
        self.register_buffer("average", torch.ones(entries, 1 + width))  # an example's uses, and the sums of features

    def tokens(self, z: Tensor) -> Tensor:
        """Where the nearest entry stands: features [..., width] to int64 [...]."""
        return torch.cdist(z.reshape(-1, self.width), self.vectors).argmin(1).view(z.shape[:-1])

    def look_up(self, tokens: Tensor) -> Tensor:
        """The entries [..., width] of tokens [...]."""
        return F.embedding(tokens, self.vectors)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, P, width] to their entries, tokens [B, P], and the commitment loss (1711.00937, eq. 3).

        The gradient of the entries is passed straight through to the features.
        """
        tokens = self.tokens(z.detach())
        entries = self.look_up(tokens)
        return z + (entries - z).detach(), tokens, F.mse_loss(z, entries)

    @torch.no_grad()
    def start(self, z: Tensor, generator: Generator) -> None:
        """Puts the entries on some of the features [B, P, width] of a first batch."""
        drawn = torch.randint(z[..., 0].numel(), (self.entries,), generator=generator, device=z.device)
        self._put(z.flatten(0, 1)[drawn], z.new_full((self.entries,), z.shape[1] / self.entries))

    @torch.no_grad()
    def follow(self, z: Tensor, tokens: Tensor, generator: Generator) -> None:
        """One step of the moving averages, from features [B, P, width] and their tokens [B, P]."""
        places, width = z.shape[1:]
        chosen = F.one_hot(tokens, self.entries).to(z.dtype)
        with torch.autocast(z.device.type, enabled=False):
            sums = chosen.mT @ torch.cat([torch.ones_like(z[..., :1]), z], 2)  # [B, entries, 1 + width]
        uses, totals = moving_mean(self.average, sums, self.decay).split([1, width], 1)
        means = totals / uses.clamp(min=1e-12)
        share = (uses / uses.sum()).squeeze(1)
        dead = share <= DEAD / self.entries
        # As many draws for every batch, so all processes make the same.
        where = torch.rand((1, self.entries), generator=generator, device=z.device, dtype=z.dtype)[0]
        nudges = torch.randn((1, self.entries, width), generator=generator, device=z.device, dtype=z.dtype)[0]
        beside = torch.searchsorted(share.cumsum(0), where).clamp(max=self.entries - 1)
        spread = NUDGE * means[~dead].std(0, correction=0)
        moved = torch.where(dead.unsqueeze(1), means[beside] + spread * nudges, means)
        # One that was moved counts as used as the mean one: it is given time.
        self._put(moved, torch.where(dead, places / self.entries, uses.squeeze(1)))

    def perplexity(self) -> Tensor:
        """The exponential of the entropy of the entries' use, on average: from 1 to their number, if it is alike."""
        uses = self.average[:, 0]
        return torch.special.entr(uses / uses.sum()).sum().exp()

    def _put(self, vectors: Tensor, uses: Tensor) -> None:
        self.vectors.copy_(vectors)
        self.average.copy_(torch.cat([uses.unsqueeze(1), uses.unsqueeze(1) * vectors], 1))


class Scalars(nn.Module):
    """Finite scalar quantisation: each number of the code is rounded to one of a few levels; there is nothing to learn.

    ``levels``: how many for each number; their product is the number of entries. Mentzer et al. 2023, section 3 and
    appendix A.1.
    """

    strides: Tensor
    levels: Tensor

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.entries, self.width = math.prod(levels), len(levels)
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.get_default_dtype()), persistent=False)
        strides = torch.tensor([math.prod(levels[:k]) for k in range(len(levels))])
        self.register_buffer("strides", strides, persistent=False)

    def bounded(self, z: Tensor) -> Tensor:
        """Squashes features into what rounds to the levels, which are whole numbers around 0."""
        half = (self.levels - 1) * (1 + 1e-3) / 2  # a little beyond the outermost levels: they can be reached
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)  # an even number of levels is not symmetric about 0
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def tokens(self, z: Tensor) -> Tensor:
        """Features [..., width] to int64 [...]."""
        return ((self.bounded(z).round() + self.levels // 2).long() * self.strides).sum(-1)

    def look_up(self, tokens: Tensor) -> Tensor:
        """Codes [..., width] in [-1, 1] of tokens [...]."""
        digits = tokens.unsqueeze(-1) // self.strides % self.levels  # floats of the module's precision
        return digits / (self.levels // 2) - 1

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``Codebook.forward``; there is nothing to commit to."""
        bounded = self.bounded(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self.levels // 2), self.tokens(z.detach()), z.new_zeros(())

    def start(self, z: Tensor, generator: Generator) -> None:
        """Nothing: the levels are fixed."""

    def follow(self, z: Tensor, tokens: Tensor, generator: Generator) -> None:
        """Nothing: the levels are fixed."""


class Residual(nn.Module):
    """ReLU-conv twice, added to what it was given; the second one 1 x 1."""

    def __init__(self, width: int):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.relu(self.inner(F.relu(x))))


class VQVAE2(Family):
    """Two levels: tokens at a half of the resolution, given those at a quarter (1906.00446, figure 2 and algorithm 1).

    ``quantiser``: "ema", ``entries`` vectors of ``code`` numbers a level, or "fsq", whose entries are all combinations
    of ``levels``. ``width``: channels. ``commitment``: weight of the loss that holds the features near their entries;
    less than the paper's 0.25, as the features of codebooks are brought to unit variance here, an image's place each.
    The loss is the mean squared error a number, in the units of DataSpec, and that.

    Raises ValueError for sizes that are below 8 or no multiples of 4, and for an unknown quantiser.
    """

    frequency: Tensor
    paper = "Razavi et al. 2019, arXiv:1906.00446"
    widths = ("width",)
    kinds = ("image",)

    def __init__(
        self,
        spec: DataSpec,
        *,
        width: int = 48,
        code: int = 16,
        entries: int = 32,
        quantiser: str = "ema",
        levels: Sequence[int] = (4, 4, 4),
        commitment: float = 0.05,
        decay: float = 0.95,
    ):
        super().__init__(spec)
        colours, height, across = spec.shape
        if height % 4 or across % 4 or min(height, across) < 8:
            raise ValueError(f"a {height}x{across} image: height and width must be multiples of 4, and 8 at least")
        if quantiser not in ("ema", "fsq"):
            raise ValueError(f"quantiser must be ema or fsq, not {quantiser}")
        self.commitment = commitment
        self.grids = [(height // 4, across // 4), (height // 2, across // 2)]

        def codes() -> Codebook | Scalars:
            return Codebook(entries, code, decay) if quantiser == "ema" else Scalars(levels)

        self.top, self.bottom = codes(), codes()
        self.entries, code = self.top.entries, self.top.width
        # Without, the features start small and shrink together before the decoder has learnt to tell them apart.
        self.scale = nn.LayerNorm(code, elementwise_affine=False) if quantiser == "ema" else nn.Identity()
        self.fine = nn.Sequential(  # [width, H/2, W/2]
            nn.Conv2d(colours, width, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.coarse = nn.Sequential(  # [width, H/4, W/4]
            nn.ReLU(), nn.Conv2d(width, width, 4, stride=2, padding=1), Residual(width), Residual(width), nn.ReLU()
        )
        self.to_top = nn.Conv2d(width, code, 1)
        self.up = nn.Sequential(  # [width, H/2, W/2]
            nn.Conv2d(code, width, 3, padding=1),
            Residual(width),
            nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1),
            nn.PixelShuffle(2),
        )
        self.to_bottom = nn.Sequential(Residual(2 * width), nn.ReLU(), nn.Conv2d(2 * width, code, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(code + width, width, 3, padding=1),
            Residual(width),
            Residual(width),
            nn.ReLU(),
            nn.Conv2d(width, 4 * colours, 3, padding=1),
            nn.PixelShuffle(2),
        )
        places = sum(math.prod(grid) for grid in self.grids)
        self.register_buffer("frequency", torch.full((places, self.entries), 1 / self.entries))  # of tokens, a place
        self.to(memory_format=torch.channels_last)  # small convolutions run up to twice as fast on a CPU

    def initialise(self, batch: Batch, *, generator: Generator) -> None:
        """Puts the entries of each level where the features of a first batch are."""
        for level, quantiser in enumerate((self.top, self.bottom)):  # the bottom's features depend on the top's entries
            quantiser.start(self._coded(batch.x).features[level], generator)

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """Algorithm 1 of 1906.00446. The entries of codebooks move after the step, by the features before it."""
        coded = self._coded(batch.x)
        error = F.mse_loss(self._decoded(coded.up, coded.entries).to(batch.x.dtype), batch.x)
        terms = {"loss": error + self.commitment * coded.commitment, "reconstruction": error.detach()}
        for name, quantiser in (("top", self.top), ("bottom", self.bottom)):
            if isinstance(quantiser, Codebook):
                terms[f"{name}_perplexity"] = quantiser.perplexity()
        yield "model", terms
        for quantiser, features, tokens in zip((self.top, self.bottom), coded.features, coded.tokens, strict=True):
            quantiser.follow(features.detach(), tokens, generator)
        seen = F.one_hot(torch.cat(coded.tokens, 1), self.entries).to(self.frequency.dtype)
        self.frequency.copy_(moving_mean(self.frequency, seen, RECENT))

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None) -> Tensor:
        """[n, C, H, W] of tokens drawn each by itself, as often as it was seen at its place.

        The simplest prior there is: what a model of the tokens must beat.
        """
        return self.decode(torch.multinomial(self.frequency, n, replacement=True, generator=generator).T)

    def quantise(self, x: Tensor) -> list[Tensor]:
        """Images [B, C, H, W] to tokens 0 … entries - 1, int64 [B, H/4, W/4] and [B, H/2, W/2]."""
        return [tokens.unflatten(1, grid) for tokens, grid in zip(self._coded(x).tokens, self.grids, strict=True)]

    def dequantise(self, tokens: Sequence[Tensor]) -> Tensor:
        """Tokens as ``quantise`` gives them to images [B, C, H, W]."""
        top, bottom = (grid.flatten(1) for grid in tokens)
        return self._decoded(self._raised(self.top.look_up(top)), self.bottom.look_up(bottom))

    def encode(self, x: Tensor) -> Tensor:
        """All tokens of an image, the top's first: [B, H/4 W/4 + H/2 W/2]."""
        return torch.cat(self._coded(x).tokens, 1)

    def decode(self, code: Tensor) -> Tensor:
        """Tokens as ``encode`` gives them to images [B, C, H, W]."""
        parts = code.split([math.prod(grid) for grid in self.grids], 1)
        return self.dequantise([part.unflatten(1, grid) for part, grid in zip(parts, self.grids, strict=True)])

    def _coded(self, x: Tensor) -> Coded:
        fine = self.fine(x.contiguous(memory_format=torch.channels_last))
        top = self.scale(flat(self.to_top(self.coarse(fine))).to(x.dtype))  # which is nearest is no matter of bf16
        entries, top_tokens, loss = self.top(top)
        up = self._raised(entries)
        bottom = self.scale(flat(self.to_bottom(torch.cat([fine, up], 1))).to(x.dtype))
        entries, tokens, bottom_loss = self.bottom(bottom)
        return Coded([top, bottom], [top_tokens, tokens], up, entries, loss + bottom_loss)

    def _raised(self, top: Tensor) -> Tensor:
        """The top's entries [B, P, code] as features at twice their resolution: [B, width, H/2, W/2]."""
        return self.up(on_grid(top, self.grids[0]))

    def _decoded(self, up: Tensor, bottom: Tensor) -> Tensor:
        """Images [B, C, H, W] from ``_raised`` and the bottom's entries [B, P, code]."""
        return self.decoder(torch.cat([up, on_grid(bottom, self.grids[1]).to(up.dtype)], 1)).contiguous()


def moving_mean(average: Tensor, values: Tensor, decay: float) -> Tensor:
    """One step of a moving average [...] by the mean of values [B, ...] over the whole batch, however many processes
    share it: batch normalisation keeps such a one.
    """
    kept, unused = average.flatten(), torch.ones_like(average).flatten()
    F.batch_norm(values.flatten(1), kept, unused, training=True, momentum=1 - decay)
    return kept.view_as(average)


class Coded(NamedTuple):
    """Two levels of an image's code, the top's first, and what came out on the way."""

    features: list[Tensor]  # [B, P, code] before they are quantised
    tokens: list[Tensor]  # int64 [B, P]
    up: Tensor  # the top's entries at the bottom's resolution, [B, width, H/2, W/2]
    entries: Tensor  # the bottom's, [B, P, code], with the features' gradient
    commitment: Tensor  # of both levels


def flat(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H * W, C]; no copy where the channels lie last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def on_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, H * W, C] to [B, C, H, W], the channels last in memory."""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


Model = VQVAE2
