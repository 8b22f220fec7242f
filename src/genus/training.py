"""The one trainer: optimisers, EMA, precision, devices, checkpoints, resume. Knows no family and no tracker."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from genus.config import Train
from genus.contract import Batch, Carries, Family, Initialises, Reads, Whole
from genus.errors import UserError
from genus.files import replacing
from genus.parallel import ALONE, Group

ROUNDS = 6  # of the network that shuffles windows, and
MIX = np.uint64(0xBF58476D1CE4E5B9)  # its multiplier (SplitMix64's; Steele, Lea & Flood 2014)
AT_ONCE = 64  # batches whose windows are shuffled in one go
HELD = 1 << 26  # bytes of a text that are held in memory; a longer one is read window by window

Row = dict[str, float]  # one line of the history: step, learning rate, gradient norms and the mean of each term


class NonFiniteLoss(RuntimeError):
    """The loss is no longer a number: training stops and says at which step and in which term."""


@dataclass
class Result:
    """What a training leaves: the model with its final (averaged, where asked for) weights and how it got there."""

    model: Family
    history: list[Row]
    timing: dict[str, float] = field(default_factory=dict)


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is cuda where there is one, else cpu. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: unknown device '{name}'; right would be auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: '{name}' is asked for, but no CUDA device is there; use auto or cpu")
    return device


def set_up(threads: int, seed: int) -> None:
    """Fixes what a result may depend on: threads, seeds, kernels. Once a process, before the model is built."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports the compiler as well: 1.6 s
    # Else every new tensor is first filled with NaN, a debugging aid that costs a third of the speed.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Denormals slow a CPU down by an order of magnitude where activations die out.
    torch.set_flush_denormal(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS needs it
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Lets glibc reuse large blocks instead of asking the kernel for zeroed pages each step: about 10% of the time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: merely slower
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bf16 where it is fast and safe (cuda), float32 elsewhere."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def train(
    model: Family,
    images: np.ndarray,
    labels: np.ndarray,
    config: Train,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    processes: Group = ALONE,
    log_every: int = 25,
    checkpoint: Path | None = None,
    checkpoint_every: float = 20.0,
    on_log: Callable[[Row, dict[str, float]], None] | None = None,
    on_samples: Callable[[Family, int], None] | None = None,
    samples_at: frozenset[int] = frozenset(),
) -> Result:
    """Trains ``model`` on stored examples [N, ...], or on a text's tokens [N], for ``steps`` batches.

    Every draw comes from generators seeded by ``seed``, so the same call gives the same bytes, interrupted or not:
    where ``checkpoint`` exists, training goes on from it. ``on_log(row, speed)`` is called every ``log_every`` steps,
    ``on_samples(model, step)`` with the averaged model after the steps in ``samples_at``. A checkpoint that is damaged
    or cannot be written is said once on stderr and costs time, never the training.

    Where ``processes`` are several each calls this with the same arguments, but for the callbacks, which are for
    process 0, as are the checkpoint's file and the result's history: ``config.batch_size`` is what all take together.

    Raises NonFiniteLoss, naming step and term, in every process; UserError for settings that the data does not allow.
    """
    model.to(device)
    text = _Documents if isinstance(model, Whole) else _Windows
    kind = text if model.spec.kind == "text" else _Examples
    data = kind(model, images, labels, config, seed, device)
    if isinstance(model, Carries) and processes.size > 1:
        raise UserError("this model carries what it has read from batch to batch: train it in one process")
    mine = processes.share(data.batch_size)
    generator = torch.Generator(device).manual_seed(seed + 1)
    if isinstance(model, Initialises):
        with torch.no_grad():
            model.initialise(data.batch(0), generator=generator)
    model.train()
    average = copy.deepcopy(model).requires_grad_(False) if config.ema else None
    groups = {name: [p for p in parameters if p.requires_grad] for name, parameters in model.groups().items()}
    optimisers = {name: _optimiser(name, parameters, config) for name, parameters in groups.items()}
    state = _State(model, average, optimisers, generator)
    step, history = state.load(checkpoint, processes, device) if checkpoint else (0, [])

    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    first, started, saved, apart = step, time.monotonic(), time.monotonic(), 0.0
    window: list[dict[str, Tensor]] = []  # terms stay on the device: one synchronisation a window, not a step
    while step < steps:
        rates = {name: rate * _schedule(step, steps, config) for name, rate in _rates(groups, config).items()}
        batch = data.batch(step, mine)
        if isinstance(data, _Windows) and isinstance(model, Carries) and data.begins(step):
            model.restart()
        seen: dict[str, Tensor] = {}
        updates = iter(model.updates(batch, generator=generator))
        while True:
            # The generator's body runs here: the loss, and what stands after its yield.
            with autocast(device), processes.as_one(len(batch.x)):
                group, terms = next(updates, (None, None))
            if group is None or terms is None:
                break
            optimiser, parameters = optimisers[group], groups[group]
            optimiser.zero_grad(set_to_none=True)
            terms["loss"].backward(inputs=parameters)
            processes.average_gradients(parameters)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if config.clip:  # else each gradient would be multiplied by 1
                torch.nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
            for slot in optimiser.param_groups:
                slot["lr"] = rates[group]
            optimiser.step()
            label = "" if group == "model" else f"{group}_"
            seen |= {f"{label}{name}": value.detach() for name, value in terms.items()}
            seen[f"{label}grad_norm"] = norm.detach()
        step += 1
        window.append(seen)
        if average is not None:
            _average(average, model, min(config.ema, (1 + step) / (10 + step)))
        if step % log_every == 0 or step == steps:
            row = {"step": float(step), "learning_rate": max(rates.values())} | _means(window, step, processes)
            window = []
            history.append(row)
            elapsed = time.monotonic() - started - apart
            speed = data.speed((step - first) / elapsed)
            speed["seconds_left"] = elapsed / (step - first) * (steps - step)
            if on_log:
                on_log(row, speed)
            # Only here, where the window is empty: a checkpoint needs no half-filled means.
            if checkpoint and not processes.rank and step < steps and time.monotonic() - saved > checkpoint_every:
                state.save(checkpoint, step, history)
                saved = time.monotonic()
        if step in samples_at:
            pause = time.monotonic()
            # A loss that is no number is said to be one, before samples are drawn from it.
            _means(window, step, processes)
            if on_samples:
                shown = (average or model).eval()
                with torch.no_grad():
                    on_samples(shown, step)
                model.train()
            apart += time.monotonic() - pause

    seconds = time.monotonic() - started - apart
    timing = {
        "train_seconds": seconds,
        "train_steps": float(steps - first),
        **{f"train_{name}": value for name, value in data.speed((steps - first) / max(seconds, 1e-9)).items()},
        "peak_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20 if on_cuda else peak_memory_mb(),
    }
    return Result((average or model).eval(), history, timing)


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class _Examples:
    """Batches by step, with no state: step k of seed s is the same examples in every process.

    The examples are in memory, on the device where they fit, and a batch is one gather.
    """

    def __init__(
        self, model: Family, images: np.ndarray, labels: np.ndarray, config: Train, seed: int, device: torch.device
    ):
        if not len(images):
            raise UserError("the training split is empty")
        self.spec, self.seed, self.flip, self.device = model.spec, seed, config.flip, device
        self.batch_size = min(config.batch_size, len(images))
        self.images, self.labels = torch.from_numpy(np.array(images)), torch.from_numpy(np.array(labels))
        if device.type == "cuda" and self.images.nbytes < 0.25 * torch.cuda.mem_get_info(device)[0]:
            self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.a_epoch = len(images) // self.batch_size
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The given rows of this step's batch."""
        epoch, position = divmod(step, self.a_epoch)
        if epoch != self.epoch:
            order = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = torch.randperm(len(self.images), generator=order).to(self.images.device)
            self.epoch = epoch
        chosen = self.order[position * self.batch_size : (position + 1) * self.batch_size][rows]
        stored = self.images[chosen].to(self.device, non_blocking=True)
        if self.flip:
            coin = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 100_003 + position)
            mirrored = torch.rand(self.batch_size, generator=coin)[rows].lt(0.5).to(self.device)
            stored = torch.where(mirrored.view(-1, 1, 1, 1), stored.flip(-1), stored)
        return Batch(self.spec.to_float(stored), self.labels[chosen].to(self.device, non_blocking=True))

    def speed(self, steps_per_s: float) -> dict[str, float]:
        return {"images_per_s": steps_per_s * self.batch_size}


class _Windows:
    """Windows of a text by step, with no state: step k of seed s is the same windows in every process.

    A window is ``context`` + 1 tokens int64, of which the first is the last of the window before: the tokens of an
    epoch are each predicted once, but for fewer than a batch's at the ends. Before the text stands the end of a
    document. Where the windows begin is shifted at random from epoch to epoch.
    A model that ``Carries`` gets as many stretches of the text as a batch has rows, each window by window; the others
    get all windows in random order. A text of any length takes the same memory.
    """

    def __init__(
        self, model: Family, tokens: np.ndarray, _: np.ndarray, config: Train, seed: int, device: torch.device
    ):
        if config.flip:
            raise UserError("train.flip: a text cannot be mirrored; leave it out")
        if not isinstance(model, Reads):
            raise TypeError(f"{type(model).__module__} takes text, but says no context")
        if len(tokens) < model.context:
            said = f"the training split has {len(tokens):,} tokens, fewer than the {model.context:,} of a window"
            raise UserError(f"{said}; give the model a smaller context")
        self.tokens, self.length = _readable(tokens), len(tokens)
        self.context, self.seed, self.device = model.context, seed, device
        # Not counting the last, incomplete one: so there is room for any shift.
        self.windows = max(1, (len(tokens) + 1) // self.context - 1)
        self.batch_size = min(config.batch_size, self.windows)
        self.a_epoch = self.windows // self.batch_size
        self.ordered = isinstance(model, Carries)
        self.epoch, self.shift, self.keys = -1, 0, np.empty(0, np.uint64)
        self.block, self.order = -1, np.empty((0, 0), np.int64)

    def begins(self, step: int) -> bool:
        """Whether this step's windows do not go on where those of the step before ended."""
        return step % self.a_epoch == 0

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The given rows of this step's windows."""
        epoch, position = divmod(step, self.a_epoch)
        if epoch != self.epoch:
            draws = np.random.default_rng([self.seed, epoch])
            spare = self.length - self.windows * self.context
            self.shift = int(draws.integers(min(spare + 1, self.context)))
            self.keys, self.epoch, self.block = draws.integers(1 << 63, size=ROUNDS, dtype=np.uint64), epoch, -1
        row = np.arange(self.batch_size)[rows]
        chosen = row * self.a_epoch + position if self.ordered else self._order(position)[row]
        return Batch(torch.from_numpy(self._gather(self.shift + self.context * chosen)).to(self.device))

    def _order(self, position: int) -> np.ndarray:
        """The windows of the epoch's batch at that position: int64 [batch_size]. Shuffled some batches at a time."""
        block, within = divmod(position, AT_ONCE)
        if block != self.block:
            places = np.arange(block * AT_ONCE, min((block + 1) * AT_ONCE, self.a_epoch))[:, None] * self.batch_size
            places = (places + np.arange(self.batch_size)).ravel()
            self.order = shuffled(places, self.windows, self.keys).reshape(-1, self.batch_size)
            self.block = block
        return self.order[within]

    def _gather(self, starts: np.ndarray) -> np.ndarray:
        """The windows that begin so many tokens behind the end of a document before the text."""
        windows = np.zeros((len(starts), self.context + 1), np.int64)
        for window, start in zip(windows, starts.tolist(), strict=True):
            if start:
                window[:] = self.tokens[start - 1 : start + self.context]
            else:
                window[1:] = self.tokens[0 : self.context]
        return windows

    def speed(self, steps_per_s: float) -> dict[str, float]:
        windows = steps_per_s * self.batch_size
        return {"windows_per_s": windows, "tokens_per_s": windows * self.context}


class _Documents:
    """Documents of a text by step, with no state: step k of seed s is the same documents in every process.

    A batch is documents of about the same length, so that little of it is padding: int64 [B, T], zeros behind their
    ends. One of more than ``context`` tokens is cut there. Which documents come together differs from epoch to epoch.
    """

    def __init__(
        self, model: Family, tokens: np.ndarray, _: np.ndarray, config: Train, seed: int, device: torch.device
    ):
        if config.flip:
            raise UserError("train.flip: a text cannot be mirrored; leave it out")
        assert isinstance(model, Whole)
        ends = np.flatnonzero(np.asarray(tokens) == 0) + 1
        if not len(ends):
            raise UserError("the training split has no document that ends")
        self.starts = np.concatenate([[0], ends[:-1]])
        self.lengths = np.minimum(ends - self.starts, model.context)
        self.tokens, self.seed, self.device = _readable(tokens), seed, device
        self.batch_size = min(config.batch_size, len(ends))
        self.a_epoch = len(ends) // self.batch_size
        self.epoch, self.order = -1, np.empty((0, 0), np.int64)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The given rows of this step's documents."""
        epoch, position = divmod(step, self.a_epoch)
        if epoch != self.epoch:
            draws = np.random.default_rng([self.seed, epoch])
            order = draws.permutation(len(self.starts))[: self.a_epoch * self.batch_size]
            pool = np.arange(len(order)) // (AT_ONCE * self.batch_size)  # only within one are documents sorted
            order = order[np.lexsort((self.lengths[order], pool))].reshape(self.a_epoch, self.batch_size)
            self.order, self.epoch = order[draws.permutation(self.a_epoch)], epoch
        chosen = self.order[position]
        documents = np.zeros((self.batch_size, self.lengths[chosen].max()), np.int64)
        for row, start, length in zip(documents, self.starts[chosen], self.lengths[chosen], strict=True):
            row[:length] = self.tokens[int(start) : int(start + length)]
        return Batch(torch.from_numpy(documents[rows]).to(self.device))

    def speed(self, steps_per_s: float) -> dict[str, float]:
        documents = steps_per_s * self.batch_size
        return {"documents_per_s": documents, "tokens_per_s": documents * float(self.lengths.mean())}


class _Stored:
    """The tokens of an array file, read where they are asked for: the pages of a map would count as memory in use."""

    def __init__(self, tokens: np.memmap):
        self.file = open(str(tokens.filename), "rb")  # noqa: SIM115 (open for as long as this lives)
        self.offset, self.kind = tokens.offset, tokens.dtype

    def __getitem__(self, part: slice) -> np.ndarray:
        start, count = self.offset + part.start * self.kind.itemsize, part.stop - part.start
        return np.frombuffer(os.pread(self.file.fileno(), count * self.kind.itemsize, start), self.kind)


def _readable(tokens: np.ndarray) -> np.ndarray | _Stored:
    """A text to take windows of: in memory where it is short, else where it is."""
    if tokens.nbytes <= HELD or not isinstance(tokens, np.memmap):
        return np.array(tokens)
    whole = tokens.offset + tokens.nbytes == os.path.getsize(str(tokens.filename))
    return _Stored(tokens) if whole else np.asarray(tokens)


def shuffled(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a random permutation of 0 … n - 1 has each of the places: int64 [k]. Nothing of length n is held.

    A Feistel network with the rounds' keys uint64 [ROUNDS] (Luby & Rackoff 1988) on the next power of four, walked
    until inside (Black & Rogaway 2002, section 4).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    walking, values = np.arange(len(places)), places.astype(np.uint64)
    while len(walking):
        left, right = values[walking] >> half, values[walking] & low
        for key in keys:
            mixed = (right ^ key) * MIX  # modulo 2^64
            mixed = (mixed ^ (mixed >> np.uint64(31))) * MIX
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        values[walking] = left << half | right
        walking = walking[values[walking] >= n]
    return values.astype(np.int64)


def _rates(groups: dict[str, Any], config: Train) -> dict[str, float]:
    if isinstance(config.learning_rate, dict):
        if set(config.learning_rate) != set(groups):
            wanted, given = ", ".join(sorted(groups)), ", ".join(sorted(config.learning_rate))
            raise UserError(f"train.learning_rate: has {given}; the model's parameter groups are {wanted}")
        return dict(config.learning_rate)
    return dict.fromkeys(groups, config.learning_rate)


def _optimiser(name: str, parameters: list[torch.nn.Parameter], config: Train) -> torch.optim.Optimizer:
    # Fused: one kernel for all tensors, several times faster than the loop for small models on a CPU too.
    return torch.optim.AdamW(parameters, lr=1.0, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def _schedule(step: int, steps: int, config: Train) -> float:
    """Linear warm-up, then a cosine down to ``final_lr``: the share of the learning rate at this step."""
    warmup = max(1, round(config.warmup * steps if config.warmup < 1 else config.warmup))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def _average(average: Family, model: Family, decay: float) -> None:
    averaged: list[Tensor] = list(average.parameters())
    current: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(averaged, current, 1 - decay)
    for kept, new in zip(_lasting(average), _lasting(model), strict=True):
        kept.copy_(new)


def _lasting(model: Family) -> list[Tensor]:
    """The buffers that are part of a model; the others are constants, or what it carries from batch to batch."""
    named = ((module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items())
    return [b for module, name, b in named if b is not None and name not in module._non_persistent_buffers_set]


def _means(window: list[dict[str, Tensor]], step: int, processes: Group) -> Row:
    """Mean of every term over window and processes. Raises NonFiniteLoss, in all of them, at the first that is none."""
    row: Row = {}
    for name in dict.fromkeys(name for seen in window for name in seen):
        steps = [k for k, seen in enumerate(window) if name in seen]
        values = processes.mean(torch.stack([window[k][name].float() for k in steps])).cpu()
        if not values.isfinite().all():
            bad = steps[int((~values.isfinite()).nonzero()[0])]
            raise NonFiniteLoss(f"step {step - len(window) + bad + 1}: {name} is {values[steps.index(bad)].item()}")
        row[name] = values.double().mean().item()
    return row


class _State:
    """Everything a resumed training needs, as one safetensors file (no pickle): written aside and renamed.

    It holds a hash of its content, for disks and people change bytes and safetensors would not see it.
    """

    def __init__(
        self,
        model: Family,
        average: Family | None,
        optimisers: dict[str, torch.optim.Optimizer],
        generator: torch.Generator,
    ):
        self.model, self.average, self.optimisers, self.generator = model, average, optimisers, generator
        self.warned = False

    def save(self, path: Path, step: int, history: list[Row]) -> None:
        """Keeps the state of the training after ``step``. Where that cannot be, the file before it stays."""
        tensors = dict(self._tensors()) | self._carried()
        tensors |= {"generator": self.generator.get_state(), "step": torch.tensor(step)}
        tensors["history"] = torch.frombuffer(bytearray(json.dumps(history).encode()), dtype=torch.uint8)
        for name, optimiser in self.optimisers.items():
            for index, values in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{name}.{index}.{key}": value for key, value in values.items()}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        tensors["sha256"] = _digest(tensors)
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary)
        except (UserError, OSError, SafetensorError) as error:
            if not self.warned:
                why = str(error).removeprefix(f"{path}: ")
                _warn(f"{path}: no checkpoint could be written, training goes on without: {why}")
            self.warned = True

    def load(self, path: Path, processes: Group, device: torch.device) -> tuple[int, list[Row]]:
        """Step and history of the training that goes on; 0 and none where there is no file, or no good one."""
        content = processes.first(b"" if processes.rank else _content(path), device)
        if not content:
            return 0, []
        try:
            stored = self._checked(content)
        except ValueError as error:
            if not processes.rank:
                aside = path.with_suffix(".damaged")
                _warn(f"{path}: {error}; put aside as {aside.name}, training starts from the beginning")
                with contextlib.suppress(OSError):  # a folder that may not be written: the next save will say so
                    os.replace(path, aside)
            return 0, []
        for name, tensor in self._tensors():
            tensor.data.copy_(stored[name])
        for name, (module, buffer) in self._carriers().items():  # of another shape than at the beginning, perhaps
            module._buffers[buffer] = stored[name].to(device) if name in stored else None
        self.generator.set_state(stored["generator"])
        for name, optimiser in self.optimisers.items():
            state: dict[int, dict[str, Tensor]] = {}
            prefix = f"optimiser.{name}."
            for key, value in stored.items():
                if key.startswith(prefix):
                    index, slot = key.removeprefix(prefix).split(".", 1)
                    like = optimiser.param_groups[0]["params"][int(index)]
                    if value.shape == like.shape:  # a fused step walks the memory: the strides must be the same
                        value = torch.empty_like(like).copy_(value)
                    state.setdefault(int(index), {})[slot] = value
            optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
        return int(stored["step"]), json.loads(stored["history"].numpy().tobytes())

    def _checked(self, content: bytes) -> dict[str, Tensor]:
        """The tensors of a checkpoint. Raises ValueError for one that is damaged or not of this training."""
        try:
            stored = load(content)
        except SafetensorError as error:
            raise ValueError(f"damaged checkpoint: {error}") from error
        if not torch.equal(stored.pop("sha256", torch.empty(0)), _digest(stored)):
            raise ValueError("damaged checkpoint: its content is not what was written")
        wanted = {name: tensor.shape for name, tensor in self._tensors()}
        found = {name: tensor.shape for name, tensor in stored.items() if name.split(".")[0] in ("model", "average")}
        if wanted != found:
            raise ValueError("checkpoint of another model")
        return stored

    def _carriers(self) -> dict[str, tuple[torch.nn.Module, str]]:
        """Where a model that Carries has what it carries: its buffers that are not persistent."""
        modules = self.model.named_modules() if isinstance(self.model, Carries) else ()
        return {
            f"carried.{path}.{name}": (module, name)
            for path, module in modules
            for name in sorted(module._non_persistent_buffers_set)
        }

    def _carried(self) -> dict[str, Tensor]:
        found = {name: module._buffers[buffer] for name, (module, buffer) in self._carriers().items()}
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for label, module in (("model", self.model), ("average", self.average)):
            if module is not None:
                for name, tensor in module.state_dict(keep_vars=True).items():
                    yield f"{label}.{name}", tensor


def _content(path: Path) -> bytes:
    """A file's bytes, at least one of them; none where there is no file."""
    try:
        return path.read_bytes() or b"\0"
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError:  # a bad block, say: nothing that could be a checkpoint
        return b"\0"


def _digest(tensors: dict[str, Tensor]) -> Tensor:
    """SHA-256 over names, types, shapes and values: uint8 [32]."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _warn(line: str) -> None:
    print(f"genus: warning: {' '.join(line.split())}", file=sys.stderr, flush=True)
