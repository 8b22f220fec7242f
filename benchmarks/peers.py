"""Training through our trainer beside other people's: pythae's VAE, denoising-diffusion-pytorch's U-Net, a plain loop.

python benchmarks/peers.py [vae] [unet] [gan] prints a line a race and keeps it in benchmarks/results/peers.json: the
median over rounds of the ratio of both speeds, and its quartiles. It needs `genus ingest fashion-mnist`, and the others
in an environment beside that of Genus, without what else they ask for:

    pip install --no-deps pythae==0.1.2 denoising-diffusion-pytorch==2.3.4 einops==0.8.2 ema-pytorch==0.8.3 \\
        accelerate==1.15.0 imageio==2.38.1 pytorch-fid==0.3.0

Each side trains in a process of its own, set up as its makers have it, on one thread, and takes a few steps in turns
with the other, so that what else the machine does slows both; seconds are those of the processor. All steps are those
of the side's own trainer, batches and logging included: ours is ``genus.training.train``. A race is fair as far as its
line says what is equal in it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from genus import config
from genus.contract import Family, build, parameter_count
from genus.data.spec import DataSpec
from genus.families.gan.r1 import R1, gradient_penalty
from genus.files import read_json, write_json
from genus.nn import logistic
from genus.nn.unet import UNet
from genus.training import set_up, train

TRAIN = Path(__file__).parents[1] / "data" / "processed" / "fashion-mnist" / "train.npy"
SPEC, BATCH = DataSpec((1, 28, 28)), 32
ROUNDS = 12  # turns of a side,
EACH = {"vae": 12, "unet": 3, "gan": 16}  # and steps in one: R1's penalty comes every 16
QUARTILES = (0.25, 0.5, 0.75)
RESULTS = Path("benchmarks/results/peers.json")
CPU = torch.device("cpu")
UNET = {"dim": 32, "dim_mults": (1, 2), "channels": 4, "learned_sinusoidal_cond": True}


class Turns:
    """To be called after each step: says how long the steps of a turn took, and waits for the next turn.

    The first one is no part of a race.
    """

    def __init__(self, pipe: Connection, each: int):
        self.pipe, self.each, self.done, self.started = pipe, each, 0, time.process_time()

    def __call__(self, *_: Any, steps: int = 1) -> None:
        self.done += steps
        if self.done % self.each:
            return
        self.pipe.send(time.process_time() - self.started)
        if not self.pipe.recv():
            raise SystemExit
        self.started = time.process_time()


Side = Callable[[Turns], None]  # trains for ever


def images() -> np.ndarray:
    return np.load(TRAIN)


def unit() -> Tensor:
    """The images as float32 [N, 1, 28, 28] in [0, 1], which is what the others want."""
    return torch.from_numpy(images()).float().div_(255)


# --- ours


def chosen(name: str) -> config.Model:
    return config.load().model(name)


def ours(model: Family, name: str, after: Turns) -> None:
    stored = images()
    settings = chosen(name).train.model_copy(update={"batch_size": BATCH})

    def on_log(*_: Any) -> None:
        after(steps=after.each)

    labels = np.zeros(len(stored), np.int64)
    train(model, stored, labels, settings, steps=1 << 20, seed=0, device=CPU, log_every=after.each, on_log=on_log)


def our_vae(after: Turns) -> None:
    set_up(1, 0)
    ours(build("vae/vae", SPEC, {}), "fashion-mnist-vae", after)


def our_unet(after: Turns, network: str = "ours") -> None:
    set_up(1, 0)
    model: Any = build("score/edm", SPEC, {})
    model.network = unet(network)
    ours(model, "fashion-mnist-edm", after)


def unet(network: str) -> nn.Module:
    """Of 32 channels at 14x14 and 64 at 7x7: ours as it is trained, ours as large as theirs, or theirs."""
    if network == "theirs":
        return Folded(their_unet())
    blocks, hidden = ((2, 2), 256) if network == "ours" else ((14, 3), 16)
    return UNet(SPEC.shape, 32, blocks, hidden)


def size(network: str) -> str:
    """Parameters, and the work of one image, forwards."""
    model = unet(network)
    with FlopCounterMode(display=False) as count, torch.no_grad():
        model(torch.zeros(1, *SPEC.shape), torch.zeros(1))
    return f"{parameter_count(model):,} parameters and {count.get_total_flops() / 1e6:.0f} MFLOP"


def our_gan(after: Turns) -> None:
    set_up(1, 0)
    ours(build("gan/r1", SPEC, {}), "fashion-mnist-gan", after)


# --- pythae


def their_vae(after: Turns, own_loss: bool = False) -> None:
    """Our networks in pythae's VAE, with the loss of ours or with its own, and its trainer."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as Theirs
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    logging.disable()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mine: Any = build("vae/vae", SPEC, {})

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = mine.encoder

        def forward(self, x: Tensor) -> ModelOutput:
            mean, log_std = self.network(x).chunk(2, 1)
            return ModelOutput(embedding=mean, log_covariance=2 * log_std)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = mine.decoder
            if own_loss:  # one number a pixel, in [0, 1]
                self.network[-1] = nn.Conv2d(self.network[-1].in_channels, 4, 1)
                self.network.extend([nn.PixelShuffle(2), nn.Sigmoid()])

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.network(z))

    class Mixture(Theirs):
        """The likelihood of ours, as its makers mean a loss to be changed."""

        def loss_function(self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> tuple:
            told = recon_x.contiguous().unflatten(1, (3 * mine.mixtures, -1))
            log_px = logistic.log_prob(told, F.pixel_unshuffle(x, 2), SPEC.levels).flatten(1).sum(1)
            kl = -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp(), dim=-1)
            return (kl - log_px).mean(), -log_px.mean(), kl.mean()

    class Turning(TrainingCallback):
        def on_train_step_end(self, *_: Any, **__: Any) -> None:
            after()

    data = unit() if own_loss else unit().mul_(2).sub_(1)
    settings = VAEConfig(input_dim=SPEC.shape, latent_dim=mine.latent, reconstruction_loss="bce")
    model = (Theirs if own_loss else Mixture)(settings, Encoder(), Decoder())
    with tempfile.TemporaryDirectory() as folder:
        running = BaseTrainerConfig(
            output_dir=folder, num_epochs=1 << 10, per_device_train_batch_size=BATCH, learning_rate=2e-3, no_cuda=True
        )
        dataset = BaseDataset(data, torch.zeros(len(data)))
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            BaseTrainer(model, dataset, training_config=running, callbacks=[Turning()]).train()


# --- denoising-diffusion-pytorch


def their_unet() -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return Unet(**UNET)


class Folded(nn.Module):
    """Their network in the place of ours, on the image folded 2x2 into channels."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, log_sigma: Tensor, *_: Tensor) -> Tensor:
        return F.pixel_shuffle(self.network(F.pixel_unshuffle(x, 2), log_sigma / 4), 2)


def their_diffusion(after: Turns) -> None:
    """Their U-Net, their EDM loss, their trainer; on images folded 2x2 into channels, as ours has them.

    Their images come from a folder through other processes; here from memory through their loader in this one.
    """
    import denoising_diffusion_pytorch.denoising_diffusion_pytorch as library
    from denoising_diffusion_pytorch.elucidated_diffusion import ElucidatedDiffusion

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ElucidatedDiffusion(their_unet(), image_size=14, channels=4, sigma_data=0.7)
    model.is_ddim_sampling = True  # their trainer asks
    library.Dataset = lambda *_, **__: F.pixel_unshuffle(unit(), 2)
    library.cpu_count = lambda: 0
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        rate = {"train_lr": 4e-3, "adam_betas": (0.9, 0.99), "train_num_steps": 1 << 20}
        never = {"save_and_sample_every": 1 << 20, "calculate_fid": False}
        trainer = library.Trainer(model, folder, train_batch_size=BATCH, results_folder=folder, **rate, **never)
        update = trainer.ema.update
        trainer.ema.update = lambda: (update(), after())  # what a step ends with
        trainer.train()


# --- a plain loop


def plain_gan(after: Turns, lean: bool = False) -> None:
    """The networks and losses of gan/r1 as one would write them in a page; ``lean``: without averaged weights."""
    set_up(1, 0)
    model: Any = build("gan/r1", SPEC, {})
    assert isinstance(model, R1)
    stored, settings = torch.from_numpy(images()), chosen("fashion-mnist-gan").train
    assert isinstance(settings.learning_rate, dict)
    networks = {"critic": model.critic, "generator": model.generator}
    steppers = {
        name: torch.optim.Adam(network.parameters(), settings.learning_rate[name], settings.betas, fused=True)
        for name, network in networks.items()
    }
    weights = list(model.parameters())
    average = [p.detach().clone() for p in weights]
    step = 0
    while True:
        for chosen_rows in torch.randperm(len(stored)).split(BATCH)[:-1]:
            real = stored[chosen_rows].float() / 127.5 - 1
            fake = model.generator(torch.randn(BATCH, model.latent))
            penalised = step % model.r1_every == 0
            real.requires_grad_(penalised)
            score = model.critic(real)
            loss = F.softplus(-score).mean() + F.softplus(model.critic(fake.detach())).mean()
            if penalised:
                loss = loss + model.r1 / 2 * model.r1_every * gradient_penalty(score, real)
            steppers["critic"].zero_grad()
            loss.backward()
            steppers["critic"].step()
            model.critic.requires_grad_(False)
            loss = F.softplus(-model.critic(fake)).mean()
            steppers["generator"].zero_grad()
            loss.backward()
            steppers["generator"].step()
            model.critic.requires_grad_(True)
            if not lean:
                with torch.no_grad():
                    torch._foreach_lerp_(average, weights, 1 - settings.ema)
            step += 1
            after()


# --- races


def races() -> dict[str, list[tuple[str, str, Side, Side]]]:
    """By the name of a peer: what stands beside ours, what is equal, and both sides."""
    same, grids = "the networks and the loss", "the loss, 14x14 pixels of 32 channels and 7x7 of 64"
    crossed, lean = partial(their_vae, own_loss=True), partial(plain_gan, lean=True)
    sizes = {network: size(network) for network in ("ours", "large", "theirs")}
    diffusion = "denoising-diffusion-pytorch's U-Net"
    return {
        "vae": [
            ("pythae's VAE", same, our_vae, their_vae),
            ("pythae's VAE, its cross-entropy", "the networks but for the last layer", our_vae, crossed),
        ],
        "unet": [
            (
                f"{diffusion}, ours as large",
                f"{grids}; {sizes['large']} against {sizes['theirs']}",
                partial(our_unet, network="large"),
                their_diffusion,
            ),
            (f"{diffusion}, ours as it is", f"{grids}; {sizes['ours']}", our_unet, their_diffusion),
            (f"{diffusion} in both", same, partial(our_unet, network="theirs"), their_diffusion),
        ],
        "gan": [
            ("a plain loop", f"{same}, optimiser, averaged weights, set-up", our_gan, plain_gan),
            ("a plain loop without averaged weights", f"{same}, optimiser, set-up", our_gan, lean),
        ],
    }


def run(side: Side, pipe: Connection, each: int) -> None:
    side(Turns(pipe, each))


def race(sides: tuple[Side, Side], each: int) -> tuple[list[float], list[float]]:
    """Images a second of both, a number a turn; who goes first changes from round to round."""
    context = multiprocessing.get_context("fork")  # no thread has been started yet
    pipes: list[Connection] = []
    speeds: tuple[list[float], list[float]] = ([], [])
    for side in sides:
        here, there = context.Pipe()
        context.Process(target=run, args=(side, there, each), daemon=True).start()
        there.close()  # else the end of a process would not be the end of its pipe
        here.recv()
        pipes.append(here)
    for number in range(ROUNDS):
        for k in (0, 1) if number % 2 else (1, 0):
            pipes[k].send(True)
            speeds[k].append(each * BATCH / pipes[k].recv())
    for pipe in pipes:
        pipe.send(False)
    return speeds


def main(names: list[str]) -> int:
    try:
        versions = {name: importlib.metadata.version(name) for name in ("pythae", "denoising-diffusion-pytorch")}
    except importlib.metadata.PackageNotFoundError as missing:
        print(f"benchmarks/peers.py: skipped: {missing.name} is not installed: this file says how")
        return 0
    if not TRAIN.exists():
        print("benchmarks/peers.py: skipped: no data/processed/fashion-mnist: genus ingest fashion-mnist")
        return 0
    torch.set_num_threads(1)
    settings = {"batch_size": BATCH, "steps_a_turn": EACH, "torch": torch.__version__} | versions
    kept = read_json(RESULTS)["races"] if RESULTS.exists() else {}
    for name, some in races().items():
        for title, equal, ours, theirs in some if name in names or not names else ():
            mine, other = race((ours, theirs), EACH[name])
            low, ratio, high = (round(float(value), 3) for value in np.quantile(np.divide(mine, other), QUARTILES))
            speeds = [round(statistics.median(each), 1) for each in (mine, other)]
            kept[title] = {"ratio": ratio, "quartiles": [low, high], "rounds": ROUNDS, "images_per_s": speeds}
            kept[title]["equal"] = equal
            write_json(RESULTS, {"settings": settings, "races": kept})
            told = f"{ratio:.2f} ({low:.2f} to {high:.2f}) times its images/s, {speeds[0]:.0f} and {speeds[1]:.0f}"
            print(f"beside {title}: {told}; equal: {equal}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
