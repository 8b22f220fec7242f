"""One training in several processes: torchrun starts them, each takes an equal share of every batch.

``train.batch_size`` stays the size of the whole batch, so params.yaml means the same on one device and on eight, and W
processes follow the run of one within rounding. For that

- every process has the same generators and draws noise for the whole batch, of which it takes its own rows: numbers do
  not depend on how many processes there are, and the generators stay in step, so any process can write the checkpoint;
- batch normalisation takes its statistics over all processes;
- gradients are averaged a parameter group, before they are clipped; logged terms are averaged before they are judged.

What is not a mean over the examples of a batch (a bound on a batch's mean, say) is taken within each process. What
cannot be made the same as in one process is refused, never done a little differently.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from genus.errors import UserError

VARIABLE = "GENUS_TORCHRUN"  # options of torchrun with which `genus train` starts itself: "--nproc-per-node 2"
LAUNCHED = "TORCHELASTIC_RUN_ID"  # torchrun sets it in the processes that it starts
ONLY_FIRST = ("GENUS_WORK", "GENUS_PROGRESS")  # files that one process writes for all


class PeerLost(RuntimeError):
    """Another process of this training has ended, so this one cannot go on."""


@dataclass(frozen=True)
class Group:
    """The processes of a training, ``size`` of them, and which of them this one is."""

    rank: int = 0
    size: int = 1

    def share(self, batch_size: int) -> slice:
        """This process's rows of a batch. Raises UserError where the processes' shares would differ."""
        if batch_size % self.size:
            raise UserError(
                f"train.batch_size: {batch_size} examples cannot be shared equally by {self.size} processes"
            )
        rows = batch_size // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes of what each has, in the same shape; ``values`` itself where there is one."""
        if self.size == 1:
            return values
        total = values.detach().clone(memory_format=torch.contiguous_format)
        _together(dist.all_reduce, total)
        return total / self.size

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces the parameters' gradients by their means over the processes, in one exchange."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        mean = self.mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        pieces = mean.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view(gradient.shape))

    def first(self, content: bytes, device: torch.device) -> bytes:
        """What process 0 passes as ``content``, in all of them: a file need not be on every host."""
        if self.size == 1:
            return content
        length = torch.tensor(len(content), device=device)
        _together(dist.broadcast, length, 0)
        if not length:
            return b""
        shared = torch.empty(int(length), dtype=torch.uint8, device=device)
        if not self.rank:
            shared.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        _together(dist.broadcast, shared, 0)
        return shared.cpu().numpy().tobytes()

    def as_one(self, rows: int) -> contextlib.AbstractContextManager[Any]:
        """A block in which the ``rows`` examples of this process are treated as a part of the whole batch."""
        if self.size == 1:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        stack.enter_context(_WholeBatchNorm(self))
        stack.enter_context(_WholeBatchNoise(self, rows))
        return stack

    def leave(self) -> None:
        """Says that this process needs the others no more."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = Group()


def join(device: torch.device) -> tuple[Group, torch.device]:
    """The group that torchrun has started this process in, and its own device; (ALONE, device) without torchrun.

    Raises UserError where there are more processes than devices, or where the processes cannot find each other.
    """
    size, rank, local = (int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if LAUNCHED not in os.environ or size < 2:
        return ALONE, device
    _end_with_parent()
    if rank:
        for name in ONLY_FIRST:
            os.environ.pop(name, None)
    if device.type == "cuda":
        here, devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > devices:
            raise UserError(f"{here} processes are asked for, but there are {devices} CUDA devices: one each")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise UserError(f"the {size} processes of the training cannot find each other: {error}") from error
    return Group(rank, size), device


def wanted() -> bool:
    """Whether this process is to start the training's processes: GENUS_TORCHRUN is set, and torchrun not yet there."""
    return bool(os.environ.get(VARIABLE)) and LAUNCHED not in os.environ


def launch(arguments: list[str]) -> NoReturn:
    """Runs ``genus *arguments`` in processes as GENUS_TORCHRUN says and exits as they do; ends all when one ends.

    Without ``--nnodes`` and ``--rdzv-…`` they are all on this machine, and talk over its loopback device.
    Raises UserError for options that torchrun does not have.
    """
    import io
    import logging
    import tempfile

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    logging.disable(logging.ERROR)  # else torchrun writes a page about what a process has said in a line
    options = shlex.split(os.environ[VARIABLE])
    if not any(option.replace("_", "-").startswith(("--nnodes", "--rdzv", "--master")) for option in options):
        options = ["--rdzv-backend", _meet_here(), *(option for option in options if option != "--standalone")]
        if sys.platform == "linux":
            for library in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as logs:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                parsed = parse_args([*options, "--log-dir", logs, "-m", "genus.cli", *arguments])
                config, command, rest = config_from_args(parsed)
        except (SystemExit, ValueError) as error:
            why = (said.getvalue().rpartition("error: ")[2] or str(error)).strip().rstrip(".")
            raise UserError(f"{VARIABLE}: {why}; right would be, say, '--nproc-per-node 2'") from error
        try:
            elastic_launch(config, command)(*rest)
        except SignalException as stopped:
            sys.exit(128 + stopped.sigval)
        except ChildFailedError as failed:
            ended = [(rank, failure.exitcode) for rank, failure in failed.failures.items()]
            for rank, status in ended:  # one that a signal ended could not say why
                if status < 0 and status != -signal.SIGTERM:  # which is how the rest is ended
                    print(f"genus: process {rank} was ended by signal {-status}", file=sys.stderr, flush=True)
                    sys.exit(128 - status)
            sys.exit(abs(failed.get_first_failure()[1].exitcode))
    sys.exit(0)


def _meet_here() -> str:
    """Has torchrun's processes meet at a free port of 127.0.0.1, where its own ways listen to every network.

    Returns the name of this way for ``--rdzv-backend``.
    """
    import socket

    from torch.distributed.elastic.rendezvous import RendezvousInfo, rendezvous_handler_registry
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class Loopback(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return "loopback"

        def next_rendezvous(self) -> RendezvousInfo:
            if not self._store:
                listener = socket.create_server((self.master_addr, 0))
                self.master_port = listener.getsockname()[1]
                there = (self.master_addr, self.master_port)
                self._store = dist.TCPStore(*there, is_master=True, master_listen_fd=listener.detach())
            return super().next_rendezvous()

    rendezvous_handler_registry.register("loopback", lambda asked: Loopback("127.0.0.1", 0, 0, 1, asked.run_id, 600))
    return "loopback"


def _end_with_parent() -> None:
    """Whatever ends torchrun, SIGKILL included, ends this process: no orphan goes on training. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _together(collective: Callable[..., Any], *arguments: Any) -> None:
    try:
        collective(*arguments)
    except RuntimeError as error:  # gloo and nccl say much, and in many ways, of a connection that was closed
        raise PeerLost("another process of this training has ended") from error


class _Mean(torch.autograd.Function):
    """The mean over the processes, differentiable any number of times: the gradient of a mean is the mean of it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.mean(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Mean.apply(gradients[0], ctx.group), None


class _WholeBatchNorm(TorchFunctionMode):
    """Batch normalisation with the whole batch's statistics. torch's SyncBatchNorm is for CUDA alone."""

    def __init__(self, group: Group):
        super().__init__()
        self.group = group

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.batch_norm:
            return self.batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """As torch.nn.functional's: [B, C, …] in the same shape."""
        if not training:
            return torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        others = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        # Two passes, for the sum of squares less the square of the sum loses what it is about.
        mean = _Mean.apply(wide.mean(others), self.group)
        centred = wide - mean.view(shape)
        variance = _Mean.apply(centred.square().mean(others), self.group)
        with torch.no_grad():
            count = self.group.size * x.numel() // x.shape[1]
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
        scale = torch.rsqrt(variance + eps) if weight is None else torch.rsqrt(variance + eps) * weight
        y = centred * scale.view(shape)
        return (y if bias is None else y + bias.view(shape)).to(x.dtype)


class _WholeBatchNoise(TorchDispatchMode):
    """Random numbers for the whole batch, of which a process gets its own rows.

    Looks at every operator that draws (torch marks them). One whose first dimension is this process's share of a batch
    is drawn at the whole batch's size and cut. Others are the same in all processes, as all have the same generator.
    """

    def __init__(self, group: Group, rows: int):
        super().__init__()
        self.group, self.rows = group, rows
        self.mine = slice(group.rank * rows, (group.rank + 1) * rows)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _draws(func):
            return func(*args, **kwargs)
        given = {
            a.name: args[i] if i < len(args) else kwargs.get(a.name, a.default_value)
            for i, a in enumerate(func._schema.arguments)
        }
        name = func._schema.name.removeprefix("aten::")
        if name == "arange":  # not drawn, but no share of anything either: places in the batch
            if given["end"] == self.rows and given.get("start") in (None, 0):
                raise self.refused(name)
            return func(*args, **kwargs)
        if given.get("dropout_p") == 0:
            return func(*args, **kwargs)
        if given.get("generator") is None:
            raise UserError(f"in several processes '{name}' must draw from the generator that the family is given")
        if name in ("rand", "randn", "randint"):
            if self.whole(name, given["size"]):
                given["size"] = [self.rows * self.group.size, *given["size"][1:]]
                return func(**given)[self.mine]
        elif name == "multinomial" and given["self"].dim() == 1 and given["replacement"]:
            if self.whole(name, [given["num_samples"]]):
                return func(**given | {"num_samples": self.rows * self.group.size})[self.mine]
        elif name in ("normal_", "uniform_", "exponential_", "rand_like", "randn_like"):
            tensor = given.pop("self")
            if self.whole(name, tensor.shape):
                if not tensor.is_contiguous():  # then the numbers come in another order
                    raise self.refused(name)
                drawn = func(tensor.new_empty(self.rows * self.group.size, *tensor.shape[1:]), **given)[self.mine]
                return tensor.copy_(drawn) if name.endswith("_") else drawn
        else:
            raise self.refused(name)
        return func(*args, **kwargs)

    def whole(self, name: str, size: Any) -> bool:
        """Whether a tensor of this size has a row an example. Raises UserError where it may have several."""
        if size and size[0] > self.rows and not size[0] % self.rows:
            raise self.refused(name)
        return bool(size) and size[0] == self.rows

    def refused(self, name: str) -> UserError:
        return UserError(
            f"this model cannot be trained in {self.group.size} processes of {self.rows} examples each: "
            f"what its '{name}' gives for a part of the batch is not known; train it in one process"
        )


@functools.cache
def _draws(func: Any) -> bool:
    named = {argument.name for argument in func._schema.arguments}
    marked = torch.Tag.nondeterministic_seeded in func.tags
    return marked or "generator" in named or func._schema.name == "aten::arange"
