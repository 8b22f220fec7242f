"""Our Glow beside normflows', our spline flow beside nflows': training images/s and seconds to 3.8 bits/dim.

python benchmarks/flows.py

Equal steps, widths, kernels, batch, optimiser and data, one thread, in turns, so that what else the machine does slows
both. Both sides get the same Gaussianised reals: only the flows differ. The spline flows hold the same weights first,
and must then give the same loss. Needs the extra `bench` and `genus ingest fashion-mnist`.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.flows._coupling import Convolutions, CouplingFlow, Mixing
from genus.families.flows.glow import Glow
from genus.families.flows.spline import LEAST, Bend, Spline
from genus.nn.dequantisation import LOG_2PI

TRAIN = Path(__file__).parents[1] / "data" / "processed" / "fashion-mnist" / "train.npy"
STEPS, HIDDEN, BINS, TAIL = (4, 8), (32, 64), 6, 4.0  # Glow's defaults, and the spline flow's
BATCH, RATE, WARMUP = 32, 2e-3, 20  # steps with a rising rate
ROUNDS, EACH = 8, 4  # of steps whose time is taken
TARGET, WINDOW, PATIENCE = 3.8, 20, 120.0  # bits/dim, mean of so many batches, seconds at most

Loss = Callable[[Tensor], Tensor]  # of stored images: nats an image, mean


def peer_glow(normflows: Any) -> nn.Module:
    """normflows' Glow of the same size; its deepest scale comes first."""
    scales, merges, bases = [], [], []
    channels, side = 1, 28
    for index, (count, wide) in enumerate(zip(STEPS, HIDDEN, strict=True)):
        channels, side = 4 * channels, side // 2
        blocks = [normflows.flows.GlowBlock(channels, wide) for _ in range(count)]
        scales.insert(0, [*blocks, normflows.flows.Squeeze()])
        if index + 1 < len(STEPS):
            channels //= 2
            merges.append(normflows.flows.Merge())
        bases.insert(0, normflows.distributions.DiagGaussian((channels, side, side)))
    return normflows.MultiscaleFlow(bases, scales, merges, class_cond=False)


class Wrapped(nn.Module):
    """Our network for their coupling, which has [B, C, H, W]."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.network(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def peer_spline(transforms: Any) -> nn.Module:
    """nflows' spline flow of the same size, its scales in our order of channels."""
    whole = transforms.MultiscaleCompositeTransform(len(STEPS))
    channels = 1
    for index, (side, count, wide) in enumerate(zip((14, 7), STEPS, HIDDEN, strict=True)):
        layers = [transforms.SqueezeTransform()]
        if channels > 1:  # theirs squeezes into the four pixels of a channel, ours into the channels of a pixel
            order = torch.arange(4 * channels).view(channels, 4).t().flatten()
            layers.append(transforms.Permutation(order, dim=1))
        channels *= 4
        last = index + 1 == len(STEPS)
        for _ in range(count):

            def network(inputs: int, outputs: int, side=side, wide=wide, last=last) -> nn.Module:
                return Wrapped(Convolutions(inputs, wide, outputs, (side, side), whole=last))

            mask = [0] * (channels // 2) + [1] * (channels // 2)
            coupling = transforms.PiecewiseRationalQuadraticCouplingTransform(mask, network, BINS, "linear", TAIL)
            layers += [transforms.ActNorm(channels), transforms.OneByOneConvolution(channels), coupling]
        if not last:  # theirs keeps the second half, ours the first
            layers.append(transforms.Permutation(torch.arange(channels).roll(channels // 2), dim=1))
            channels //= 2
        whole.add_transform(transforms.CompositeTransform(layers), (channels if last else 2 * channels, side, side))
    return whole


@torch.no_grad()
def copy_weights(ours: Spline, theirs: nn.Module) -> None:
    """Random weights in both, the same. Ours has W = P L U, theirs L U P: they agree where P is the identity."""
    torch.manual_seed(1)
    for parameter in [p for name, p in ours.named_parameters() if not name.startswith("priors")]:
        parameter.add_(0.05 * torch.randn_like(parameter))
    steps = [layer for scale in ours.scales for layer in scale.children()]
    kinds = {name: [m for m in theirs.modules() if type(m).__name__ == name] for name in PARTS}
    for mixing, norm, convolution in zip(steps[::2], kinds[PARTS[0]], kinds[PARTS[1]], strict=True):
        assert isinstance(mixing, Mixing)
        mixing.permutation.copy_(mixing.eye)
        norm.log_scale.copy_(mixing.log_scale)
        norm.shift.copy_(mixing.bias * mixing.log_scale.exp())
        norm.initialized.fill_(True)
        convolution.permutation._permutation.copy_(torch.arange(len(mixing.bias)))
        convolution.lower_entries.copy_(mixing.lower[convolution.lower_indices])
        convolution.upper_entries.copy_(mixing.upper[convolution.upper_indices])
        convolution.unconstrained_upper_diag.copy_((mixing.log_diagonal.exp() - convolution.eps).expm1().log())
    for bend, coupling in zip(steps[1::2], kinds[PARTS[2]], strict=True):
        assert isinstance(bend, Bend)
        coupling.transform_net.network.load_state_dict(bend.network.state_dict())


PARTS = ("ActNorm", "OneByOneConvolution", "PiecewiseRationalQuadraticCouplingTransform")


def losses(ours: CouplingFlow, theirs: nn.Module, peer: Callable[[Tensor], Tensor]) -> tuple[Loss, Loss]:
    """Of both on stored images; ``peer``: the log-density of reals. The noise is drawn by one generator each."""
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]

    def mine(stored: Tensor) -> Tensor:
        return ours.loss(Batch(ours.spec.to_float(stored)), generator=generators[0])["loss"]

    def other(stored: Tensor) -> Tensor:
        y, log_det = ours.dequantise(ours.spec.to_float(stored), generator=generators[1])
        return -(log_det + peer(y)).mean()

    return mine, other


class Race:
    """One model on the way to the target."""

    def __init__(self, name: str, model: nn.Module, loss: Loss, images: np.ndarray):
        self.name, self.loss, self.images = name, loss, images
        self.optimiser = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.99), weight_decay=0.0, fused=True)
        self.order = np.random.default_rng(0).permutation(len(images))
        self.parameters = sum(p.numel() for p in model.parameters())
        self.seconds = 0.0
        self.bits: list[float] = []
        self.speeds: list[float] = []

    def step(self) -> None:
        chosen = self.order[len(self.bits) * BATCH :][:BATCH]
        started = time.monotonic()
        loss = self.loss(torch.from_numpy(self.images[np.sort(chosen)]))
        for slot in self.optimiser.param_groups:
            slot["lr"] = RATE * min(1.0, (len(self.bits) + 1) / WARMUP)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.seconds += time.monotonic() - started
        self.bits.append(loss.item() / (784 * math.log(2)))

    def round(self) -> None:
        before = self.seconds
        for _ in range(EACH):
            self.step()
        self.speeds.append(EACH * BATCH / (self.seconds - before))

    def finish(self) -> float:
        """Seconds of training to the target; infinite where it is not reached in time."""
        while len(self.bits) < WINDOW or not statistics.fmean(self.bits[-WINDOW:]) <= TARGET:
            if self.seconds > PATIENCE or not math.isfinite(self.bits[-1]):
                return math.inf
            self.step()
        return self.seconds


def race(title: str, ours: CouplingFlow, theirs: nn.Module, peer: Callable, images: np.ndarray) -> None:
    mine, other = losses(ours, theirs, peer)
    both = [Race("ours", ours, mine, images), Race(title, theirs, other, images)]
    for each in both:  # what is set up at the first call is no training
        with torch.no_grad():
            each.loss(torch.from_numpy(images[:BATCH]))
    for _ in range(ROUNDS):
        for each in both:
            each.round()
    ratio = statistics.median(a / b for a, b in zip(both[0].speeds, both[1].speeds, strict=True))
    print(f"ours against {title}: {ratio:.2f} times its images/s, median of {ROUNDS} rounds in turns", flush=True)
    for each in both:
        seconds = each.finish()
        reached = f"{seconds:.1f} s" if math.isfinite(seconds) else f"not in {PATIENCE:.0f} s ({each.bits[-1]:.2f})"
        print(
            f"{each.name:22} {each.parameters:>8,} parameters  {statistics.median(each.speeds):6.0f} images/s  "
            f"to {TARGET} bits/dim: {reached}, {len(each.bits)} steps",
            flush=True,
        )


def main() -> int:
    try:
        import nflows.transforms
        import normflows
    except ImportError as missing:
        print(f"benchmarks/flows.py: skipped: {missing.name} is not installed: pip install genus[bench]")
        return 0
    if not TRAIN.exists():
        print("benchmarks/flows.py: skipped: no data/processed/fashion-mnist: genus ingest fashion-mnist")
        return 0
    warnings.simplefilter("ignore")  # theirs use what torch has replaced
    torch.set_num_threads(1)
    spec, images = DataSpec((1, 28, 28)), np.load(TRAIN, mmap_mode="r")
    first = Batch(spec.to_float(torch.from_numpy(images[:BATCH].copy())))

    def started(model: Any) -> Any:
        with torch.no_grad():
            model.initialise(first, generator=torch.Generator().manual_seed(0))
        return model

    def density_of(transform: nn.Module) -> Callable[[Tensor], Tensor]:
        def log_prob(y: Tensor) -> Tensor:
            z, log_det = transform(y)
            return log_det - 0.5 * (z.square() + LOG_2PI).sum(1)

        return log_prob

    torch.manual_seed(0)
    ours = started(Spline(spec, steps=STEPS, hidden=HIDDEN, bins=BINS, tail=TAIL, affine=False, least=LEAST))
    theirs = peer_spline(nflows.transforms)
    copy_weights(ours, theirs)
    with torch.no_grad():
        a, b = (loss(torch.from_numpy(images[:256].copy())).item() for loss in losses(ours, theirs, density_of(theirs)))
    print(f"spline flows, same weights: {a:.4f} and {b:.4f} nats an image, {abs(a - b) / abs(b):.1e} apart")
    if abs(a - b) > 1e-5 * abs(b):
        return 1

    ours = started(Spline(spec, steps=STEPS, hidden=HIDDEN, bins=BINS, tail=TAIL, affine=False, least=LEAST))
    theirs = peer_spline(nflows.transforms)
    race("nflows' spline flow", ours, theirs, density_of(theirs), images)
    glow = started(Glow(spec, steps=STEPS, hidden=HIDDEN))
    peer = peer_glow(normflows)
    race("normflows' Glow", glow, peer, lambda y: peer.log_prob(y, None), images)
    return 0


if __name__ == "__main__":
    sys.exit(main())
