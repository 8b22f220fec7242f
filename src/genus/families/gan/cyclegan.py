"""CycleGAN: from one kind of image to another and back, learnt without pairs.

Zhu et al. 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks"
(https://arxiv.org/abs/1703.10593). The adversarial loss is that of Mao et al. 2017 (https://arxiv.org/abs/1611.04076),
the pool of earlier fakes that of Shrivastava et al. 2016 (https://arxiv.org/abs/1612.07828).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec


class CycleGAN(Family):
    """Two translators, G from the first domain to the second and F back, and a critic of each domain. No density.

    A translation must pass for a real image of its domain, and translated back it must be the image that it came from:
    F(G(x)) = x and G(F(y)) = y (section 3.2). It draws nothing by itself: there is no sample().

    ``domains``: the names of two classes, else the first two; a batch's other rows are not looked at.
    ``width`` and ``critic_width``: channels at half resolution, twice as many at a quarter. ``blocks``: residual blocks
    of a translator, at a quarter of the resolution. ``cycle``: the weight λ of the cycle loss (equation 3), and
    ``identity`` that of |G(y) - y| and |F(x) - x|, which leaves alone what is of the domain already (section 5.2). The
    paper has 10 and 5, with which the translators here stay near the identity that they start as: a shoe must change
    its shape, not its colours alone.
    ``pool``: the earlier fakes of each domain that its critic is shown among the new ones (section 4); 0: none.
    Raises ValueError for unknown or equal domains, data of fewer than two classes, and sides that are no multiples of 4
    or less than 8.
    """

    pool: Tensor
    pooled: Tensor
    paper = "Zhu et al. 2017, arXiv 1703.10593"
    widths = ("width", "critic_width")
    kinds = ("image",)

    def __init__(
        self,
        spec: DataSpec,
        *,
        domains: Sequence[str] = (),
        width: int = 16,
        critic_width: int = 16,
        blocks: int = 2,
        cycle: float = 2.0,
        identity: float = 0.5,
        pool: int = 50,
    ):
        super().__init__(spec)
        channels, high, across = spec.shape
        if high % 4 or across % 4 or min(high, across) < 8:
            raise ValueError(f"CycleGAN: height and width must be multiples of 4 and at least 8, not {spec.shape}")
        self.domains = _labels(spec.classes, domains)
        self.cycle, self.identity = cycle, identity
        self.forth = Translator(channels, (high, across), width, blocks)  # the paper's G
        self.back = Translator(channels, (high, across), width, blocks)  # and F
        self.critics = nn.ModuleList(_critic(channels, critic_width) for _ in range(2))  # a domain each
        self.register_buffer("pool", torch.zeros(2, pool, *spec.shape))
        self.register_buffer("pooled", torch.zeros(2, dtype=torch.int64))  # how many of each domain are in it
        for network in (self.forth, self.back, self.critics):
            network.to(memory_format=torch.channels_last)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {
            "generator": [*self.forth.parameters(), *self.back.parameters()],
            "critic": list(self.critics.parameters()),
        }

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """Section 4: one step of both translators, then one of both critics, whose loss is halved to slow them down.

        A batch that lacks one of the domains teaches nothing: its losses are 0.
        """
        here, there, weight = self._rows(batch)
        x, y = batch.x[here], batch.x[there]
        # Nothing in a translator mixes examples: what is only to be left alone goes along.
        fake_y, same_y = self.forth(torch.cat([x, y])).split([len(x), len(y)])
        fake_x, same_x = self.back(torch.cat([y, x])).split([len(y), len(x)])
        adversarial = self._off(1, fake_y, 1.0) + self._off(0, fake_x, 1.0)
        cycle = functional.l1_loss(self.back(fake_y), x) + functional.l1_loss(self.forth(fake_x), y)
        identity = functional.l1_loss(same_y, y) + functional.l1_loss(same_x, x)
        loss = weight * (adversarial + self.cycle * cycle + self.identity * identity)
        yield "generator", {"loss": loss, "adversarial": adversarial, "cycle": cycle, "identity": identity}

        draws = torch.rand(len(batch.x), 2, generator=generator, device=batch.x.device)
        shown_x = self._remember(0, fake_x.detach(), draws[there]) if weight else fake_x.detach()
        shown_y = self._remember(1, fake_y.detach(), draws[here]) if weight else fake_y.detach()
        real = self._off(0, x, 1.0) + self._off(1, y, 1.0)
        fake = self._off(0, shown_x, 0.0) + self._off(1, shown_y, 0.0)
        yield "critic", {"loss": weight * (real + fake) / 2}

    def translate(self, x: Tensor, to: int, *, generator: Generator) -> Tensor:
        """[B, *shape] in [-1, 1], in one pass: what ``x`` of the other domain would be as one of class ``to``.

        Raises ValueError for a class that is no domain of this model. There is one translation: nothing is drawn.
        """
        if to not in self.domains:
            raise ValueError(f"to: this model translates to class {self.domains[0]} or {self.domains[1]}, not {to}")
        return (self.forth if to == self.domains[1] else self.back)(x)

    def _off(self, domain: int, x: Tensor, target: float) -> Tensor:
        """Mean square of what a domain's critic says of each patch of ``x``, less what it is to say."""
        return (self.critics[domain](x).to(x.dtype) - target).square().mean()

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor, float]:
        """Where the batch's examples of each domain are, int64 [n], and the weight of what they teach.

        It is 0, and the first row stands in for those, where a domain has none: the steps are asked for all the same,
        since other processes may have some.
        """
        if batch.cond is None:
            raise ValueError("CycleGAN learns from labelled examples: the batch has no labels")
        here, there = ((batch.cond == label).nonzero()[:, 0] for label in self.domains)
        if len(here) and len(there):
            return here, there, 1.0
        first = torch.zeros(1, dtype=torch.int64, device=batch.x.device)
        return first, first, 0.0

    @torch.no_grad()
    def _remember(self, domain: int, fake: Tensor, draws: Tensor) -> Tensor:
        """What that domain's critic is shown for ``fake`` [n, *shape]: half of them, and in place of the other half
        earlier ones, which those now replace. ``draws``: uniform [n, 2], the coin of each and its place.
        """
        size = self.pool.shape[1]
        if not size:
            return fake
        shown = fake.clone()
        for row, (coin, where) in enumerate(draws.tolist()):
            count = int(self.pooled[domain])
            if count < size:  # until the pool is full all are kept, and shown
                self.pool[domain, count] = fake[row]
                self.pooled[domain] += 1
            elif coin < 0.5:
                place = min(int(where * size), size - 1)
                shown[row] = self.pool[domain, place]
                self.pool[domain, place] = fake[row]
        return shown


class Translator(nn.Module):
    """[B, C, H, W] in [-1, 1] to the same: a residual network as in section 7.2, for small images.

    Pixels are moved into channels and back, where the paper convolves at full resolution, and the image itself is
    added before the last tanh: at the start it is let through, and what is to stay need not be learnt.
    """

    def __init__(self, channels: int, size: tuple[int, int], width: int, blocks: int):
        super().__init__()
        high, across = size[0] // 2, size[1] // 2
        self.enter = nn.Conv2d(4 * channels, width, 3, padding=1)
        # What is where in a centred picture, which convolutions see only by the border's padding.
        self.place = nn.Parameter(torch.zeros(width, high, across))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Residual(2 * width) for _ in range(blocks)))
        self.up = nn.Conv2d(2 * width, 4 * width, 1)
        self.after = Residual(width)
        self.leave = nn.Conv2d(width, 4 * channels, 3, padding=1)
        nn.init.normal_(self.leave.weight, std=1e-3)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.enter(functional.pixel_unshuffle(x, 2)) + self.place)  # [B, w, H/2, W/2]
        low = self.blocks(functional.relu(self.down(h)))  # [B, 2w, H/4, W/4]
        h = self.after(h + functional.pixel_shuffle(self.up(low), 2))
        change = functional.pixel_shuffle(self.leave(functional.relu(h)), 2)  # [B, C, H, W]
        return torch.tanh(torch.atanh(KEPT * x.clamp(-1, 1)) + change)


KEPT = 0.98  # of the image's contrast: at ±1 the tanh has no slope, and black could not become white


class Residual(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), each image normalised by itself, eight channels together.

    The paper normalises each channel apart (Ulyanov et al. 2016, arXiv:1607.08022), which takes a quarter more time.
    """

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(width // 8, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(width // 8, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _critic(channels: int, width: int) -> nn.Sequential:
    """[B, C, H, W] to a score for each patch, [B, 1, H/4, W/4], which sees 26 x 26 pixels (section 4's PatchGAN)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, 2, 1),  # [B, w, H/2, W/2]
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),  # [B, 2w, H/4, W/4]
        nn.GroupNorm(width // 4, 2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
        nn.GroupNorm(width // 4, 2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 3, padding=1),
    )


def _labels(classes: Sequence[str], names: Sequence[str]) -> tuple[int, int]:
    """The labels of two classes by name; without names 0 and 1. Raises ValueError where there are no such two."""
    if len(classes) < 2:
        raise ValueError("domains: the data has no two classes to translate between")
    chosen = [str(name) for name in names] or list(classes[:2])  # YAML reads 7 as a number
    unknown = [name for name in chosen if name not in classes]
    if len(chosen) != 2 or unknown or chosen[0] == chosen[1]:
        raise ValueError(f"domains: right would be two of {', '.join(classes)}, not {', '.join(chosen)}")
    return classes.index(chosen[0]), classes.index(chosen[1])


Model = CycleGAN
