"""The trainer: resume, schedule, averages and its errors, on a family of a few numbers."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Generator, nn

from genus.config import Train
from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.training import NonFiniteLoss, _schedule, pick_device, train

SPEC = DataSpec((1, 4, 4), 256)
CPU = torch.device("cpu")


class Duel(Family):
    """Two groups, noise from the generator, a buffer that counts: everything a resume has to bring back."""

    def __init__(self, spec: DataSpec):
        super().__init__(spec)
        self.left, self.right = nn.Linear(16, 4), nn.Linear(4, 16)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"left": list(self.left.parameters()), "right": list(self.right.parameters())}

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        flat = batch.x.flatten(1)
        noise = torch.randn(flat.shape, generator=generator)
        yield "left", {"loss": ((self.right(self.left(flat + noise)) - flat) ** 2).mean()}
        self.calls += 1
        yield "right", {"loss": ((self.right(self.left(flat)) - flat).abs()).mean(), "calls": self.calls.float()}


def images(n: int = 70) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 1, 4, 4), dtype=np.uint8)


def fit(steps: int = 120, seed: int = 3, model: Family | None = None, settings: dict | None = None, **options):
    torch.manual_seed(seed)
    model = model or Duel(SPEC)
    config = Train(**({"steps": steps, "batch_size": 8, "learning_rate": 1e-2, "ema": 0.99} | (settings or {})))
    labels = np.zeros(len(images()), np.int64)
    return train(model, images(), labels, config, steps=steps, seed=seed, device=CPU, log_every=10, **options)


def weights(result) -> dict[str, torch.Tensor]:
    return dict(result.model.state_dict())


def test_same_seed_same_bytes_and_other_seed_other_bytes() -> None:
    one, two, other = weights(fit()), weights(fit()), weights(fit(seed=4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["left.weight"], other["left.weight"])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [10, 60, 110])
def test_interrupted_training_ends_byte_identical(tmp_path: Path, at: int) -> None:
    whole = fit()

    def interrupt(row: dict[str, float], speed: dict[str, float]) -> None:
        if row["step"] == at + 10:
            raise Interrupted

    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(Interrupted):
        fit(checkpoint=checkpoint, checkpoint_every=0, on_log=interrupt)
    seen: list[float] = []
    resumed = fit(checkpoint=checkpoint, on_log=lambda row, speed: seen.append(row["step"]))
    assert seen[0] == at + 10, "it went on from the checkpoint"
    assert resumed.history == whole.history
    assert all(torch.equal(weights(whole)[name], weights(resumed)[name]) for name in weights(whole))


def test_killed_process_resumes_byte_identical(tmp_path: Path) -> None:
    """A real process, ended by SIGKILL in the middle: the next one ends in the same bytes as an undisturbed one."""
    script = tmp_path / "fit.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom safetensors.torch import save_file\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_training import fit, weights\n"
        "folder, pause = Path(sys.argv[1]), float(sys.argv[2])\n"
        "result = fit(checkpoint=folder / 'c', checkpoint_every=0, on_log=lambda row, speed: time.sleep(pause))\n"
        "save_file(weights(result), folder / 'w.safetensors')\n"
    )
    (tmp_path / "killed").mkdir()
    command = [sys.executable, str(script), str(tmp_path / "killed")]
    process = subprocess.Popen([*command, "0.5"])
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "c").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "w.safetensors").exists()
    subprocess.run([*command, "0"], check=True)
    save_file(weights(fit()), tmp_path / "whole.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "killed" / "w.safetensors").read_bytes()


def test_average_follows_the_weights() -> None:
    plain, averaged = fit(settings={"ema": 0.0}), fit(settings={"ema": 0.9})
    assert not torch.equal(weights(plain)["left.weight"], weights(averaged)["left.weight"])
    assert weights(averaged)["calls"] == 120, "buffers are copied, not averaged"


def test_samples_are_shown_at_their_steps_without_changing_the_result() -> None:
    shown: list[int] = []

    def on_samples(model: Family, step: int) -> None:
        assert not model.training
        torch.rand(3)
        shown.append(step)

    watched = fit(on_samples=on_samples, samples_at=frozenset({5, 50}))
    assert shown == [5, 50]
    assert torch.equal(weights(watched)["left.weight"], weights(fit())["left.weight"])


class Explodes(Family):
    def __init__(self, spec: DataSpec):
        super().__init__(spec)
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("step", torch.zeros(()))

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        self.step += 1
        kl = torch.log(13.5 - self.step)  # step 14: the logarithm of a negative number
        return {"loss": (self.weight * kl).sum(), "kl": kl}


def test_a_loss_that_is_not_finite_is_named_with_step_and_term() -> None:
    with pytest.raises(NonFiniteLoss, match=r"step 14: loss is nan"):
        fit(model=Explodes(SPEC), settings={"ema": 0.0})


def test_learning_rate_schedule() -> None:
    config = Train(steps=100, batch_size=1, warmup=0.1, final_lr=0.1)
    values = [_schedule(step, 100, config) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == values[10] == pytest.approx(1.0)
    assert values[55] == pytest.approx(0.55) and values[99] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_every_example_is_seen_once_an_epoch() -> None:
    class Watches(Explodes):
        def loss(self, batch: Batch, *, generator: Generator) -> Terms:
            seen.extend(self.spec.to_stored(batch.x)[:, 0, 0, :3].tolist())
            return {"loss": self.weight.sum()}

    seen: list[list[int]] = []
    fit(model=Watches(SPEC), steps=7, settings={"batch_size": 10, "ema": 0.0})
    assert sorted(seen) == sorted(images()[:, 0, 0, :3].tolist())


def test_wrong_groups_and_devices_are_user_errors() -> None:
    with pytest.raises(UserError, match="parameter groups are left, right"):
        fit(settings={"learning_rate": {"left": 1e-3}})
    with pytest.raises(UserError, match="unknown device 'gpuu'"):
        pick_device("gpuu")
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(UserError, match="no CUDA device"):
            pick_device("cuda")
