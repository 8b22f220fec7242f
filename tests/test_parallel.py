"""Training in several real processes under torchrun: it follows one process, and ends as one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genus.config import Train, load
from genus.contract import Batch, Family, Terms, build
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.parallel import ALONE, VARIABLE, Group, join
from genus.training import NonFiniteLoss, Result, set_up, train

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SPEC = DataSpec((1, 8, 8), 17)
# pixelcnn draws nothing and has nothing that the others have not; `python tests/test_parallel.py` measures it as well.
NAMES = ["digits-glow", "digits-vae", "digits-gan", "digits-ncsn"]
STEPS = 16


def fit(model: Family, config: Train, processes: Group, **options) -> Result:
    from sklearn.datasets import load_digits

    images = load_digits().images[:, None].astype(np.uint8)
    labels = np.zeros(len(images), np.int64)
    options = {"steps": STEPS, "seed": 0, "device": CPU, "processes": processes, "log_every": 1} | options
    return train(model, images, labels, config, **options)


def fit_named(name: str, processes: Group, **options) -> Result:
    section = load(ROOT / "params.yaml").models[name]
    set_up(1, 0)
    model = build(section.family, SPEC, section.params)
    return fit(model, section.train.model_copy(update={"ema": 0.9}), processes, **options)


def deviations(one: Result, other: Result) -> dict[str, float]:
    """The largest of every logged term over all steps, and of the weights, each relative to its largest value."""
    found = {}
    for name in [name for row in one.history for name in row]:
        a, b = (np.array([row.get(name, 0.0) for row in result.history]) for result in (one, other))
        found[name] = float(np.abs(a - b).max() / np.abs(a).max())
    a, b = (torch.cat([t.double().flatten() for t in r.model.state_dict().values()]) for r in (one, other))
    return found | {"weights": float((a - b).abs().max() / a.abs().max())}


class Explodes(Family):
    """Its KL term is no number from step 14 on, and only where the whole batch's last examples are."""

    def __init__(self, spec: DataSpec):
        super().__init__(spec)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.steps = 0

    def loss(self, batch: Batch, *, generator: torch.Generator) -> Terms:
        self.steps += 1
        kl = batch.x.new_tensor(float("nan") if self.steps >= 14 and os.environ["RANK"] == "1" else 1.0)
        return {"loss": self.weight.sum(), "kl": kl}


def in_a_process(names: list[str], folder: Path) -> None:
    """What each of the processes does; leaves what it has seen in ``folder``."""
    processes, _ = join(CPU)
    first = not processes.rank
    seen: dict = {"deviations": {}}
    to_float = DataSpec.to_float
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        DataSpec.to_float = lambda self, stored: to_float(self, stored).to(torch.get_default_dtype())  # type: ignore
        for name in names:
            several = fit_named(name, processes)
            if first:
                seen["deviations"] |= {f"{name} {dtype}": deviations(fit_named(name, ALONE), several)}

    class Interrupted(Exception):
        pass

    def interrupt(row: dict[str, float], speed: dict[str, float]) -> None:
        if row["step"] == 10:
            raise Interrupted

    options: dict = {"checkpoint": folder / f"only-{processes.rank}", "checkpoint_every": 0}
    try:
        fit_named("digits-vae", processes, on_log=interrupt, **options)
    except Interrupted:
        steps: list[float] = []
        resumed = fit_named("digits-vae", processes, on_log=lambda row, speed: steps.append(row["step"]), **options)
        whole = fit_named("digits-vae", processes)
        same = [torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)]
        seen |= {"resumed at": steps[0], "same": all(same) and whole.history == resumed.history}
    try:
        fit(Explodes(SPEC), Train(steps=STEPS, batch_size=8), processes, log_every=10)
    except NonFiniteLoss as error:
        seen["stopped"] = str(error)
    seen["files"] = sorted(path.name for path in folder.iterdir() if path.name.startswith("only"))
    (folder / f"{processes.rank}.json").write_text(json.dumps(seen))
    processes.leave()


def measure(names: list[str], folder: Path, count: int = 2) -> list[dict]:
    """Runs ``in_a_process`` under torchrun in ``count`` processes and returns what each has seen."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *start, __file__, "process", str(folder), *names]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=400)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return measure(NAMES, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_follow_one_with_the_whole_batch(name: str, two: list[dict]) -> None:
    """In double precision to the last digits: noise, batch statistics, penalties, clipping and averages are the same.

    Terms are logged in single precision, hence 1e-6. In single precision the orders of summation differ by 1e-7, and
    AdamW divides a gradient by its own size, so that where it is nearly nothing rounding decides a weight's step: the
    adversarial game, whose networks amplify each other's, is given 5%, the others 1e-3.
    """
    exact, rounded = (two[0]["deviations"][f"{name} torch.float{bits}"] for bits in (64, 32))
    assert len(exact) >= 4 and exact["weights"] < 1e-10, exact
    assert max(exact.values()) < 1e-6, exact
    tolerance = 0.05 if "generator_loss" in rounded else 1e-3
    assert max(value for term, value in rounded.items() if "grad_norm" not in term) < tolerance, rounded


def test_a_training_in_processes_resumes_to_the_same_bytes_from_the_first_ones_file(two: list[dict]) -> None:
    for seen in two:
        assert seen["resumed at"] == 10 and seen["same"] and seen["files"] == ["only-0"]


def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_step_and_term(two: list[dict]) -> None:
    assert [seen["stopped"] for seen in two] == ["step 14: kl is nan"] * 2


def test_a_batch_that_cannot_be_shared_equally_is_a_user_error() -> None:
    assert Group(1, 4).share(32) == slice(8, 16)
    with pytest.raises(UserError, match="32 examples cannot be shared equally by 3 processes"):
        Group(0, 3).share(32)


@pytest.mark.parametrize(
    "draw",
    [
        lambda g, b: torch.randn(b, 3, 2, generator=g),
        lambda g, b: torch.rand(torch.Size([b, 5]), generator=g, dtype=torch.float64),
        lambda g, b: torch.randint(2, 9, (b, 40), generator=g),
        lambda g, b: torch.multinomial(torch.tensor([1.0, 2.0, 3.0]), b, replacement=True, generator=g),
        lambda g, b: torch.empty(b, 17).exponential_(generator=g),
        lambda g, b: torch.zeros(b).normal_(1.0, 2.0, generator=g),
        lambda g, b: torch.zeros(b, 3).uniform_(-1, 1, generator=g),
    ],
)
def test_noise_is_the_whole_batchs_whatever_the_number_of_processes(draw) -> None:
    def drawn(processes: Group, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        with processes.as_one(rows):
            # What has no row an example is the same everywhere, and the next draw comes after it.
            return draw(generator, rows), torch.randn(5, generator=generator), draw(generator, rows)

    whole = drawn(ALONE, 12)
    parts = [drawn(Group(rank, 3), 4) for rank in range(3)]
    for place in (0, 2):
        assert torch.equal(torch.cat([part[place] for part in parts]), whole[place])
    assert all(torch.equal(part[1], whole[1]) for part in parts)


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: torch.randn(8, 3, generator=g),  # two rows an example?
        lambda g: torch.bernoulli(torch.full((4,), 0.5), generator=g),
        lambda g: torch.normal(torch.zeros(4), 1.0, generator=g),
        lambda g: torch.multinomial(torch.ones(4, 3), 1, generator=g),
        lambda g: torch.randperm(4, generator=g),
        lambda g: torch.zeros(3, 4).T.normal_(generator=g),
        lambda g: torch.randn(4, 3),  # not from the generator
        lambda g: F.dropout(torch.ones(4, 3), 0.5),
        lambda g: torch.arange(4) / 4,  # the place of an example in its batch
    ],
)
def test_what_would_differ_from_one_process_is_refused(draw) -> None:
    with Group(0, 2).as_one(4), pytest.raises(UserError, match="processes"):
        draw(torch.Generator())


def test_attention_without_dropout_is_no_draw() -> None:
    x = torch.randn(4, 2, 8, 8)
    with Group(0, 2).as_one(4):
        F.scaled_dot_product_attention(x, x, x)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from genus.stages import ingest

    folder = tmp_path_factory.mktemp("ingested")
    shutil.copy(ROOT / "params.yaml", folder)
    with contextlib.chdir(folder):
        ingest.run("digits")
    return folder / "data"


@pytest.fixture
def project(tmp_path: Path, ingested: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which the digits are ready to be trained on, for longer than a test takes."""
    from tests.registry.workspace import new_store

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ingested, tmp_path / "data")
    text = re.sub(r"^budget: .*$", "budget: 1000", (ROOT / "params.yaml").read_text(), flags=re.M)
    (tmp_path / "params.yaml").write_text(text)
    new_store(tmp_path)
    yield tmp_path


def processes_of(launcher: int) -> dict[str, int]:
    """Process numbers by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        rank = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes())
        found |= {rank.group(1).decode(): int(child)} if rank else {}
    return found


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("end", ["a rank", "the launcher"])
def test_whichever_process_is_killed_all_end(end: str, project: Path) -> None:
    progress = project / "progress.json"
    environment = os.environ | {VARIABLE: "--nproc-per-node 2", "GENUS_PROGRESS": str(progress)}
    command = [sys.executable, "-m", "genus.cli", "train", "digits-vae"]
    errors = project / "errors"
    with errors.open("w") as file:
        launcher = subprocess.Popen(command, env=environment, stderr=file)
    try:
        deadline = time.monotonic() + 180
        while not progress.exists() and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert progress.exists(), errors.read_text()
        ranks = processes_of(launcher.pid)
        assert sorted(ranks) == ["0", "1"]
        os.kill(ranks["1"] if end == "a rank" else launcher.pid, signal.SIGKILL)
        status = launcher.wait(120)
    finally:
        launcher.kill()
    deadline = time.monotonic() + 60
    while any(running(process) for process in ranks.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(running(process) for process in ranks.values()), "no orphan goes on training"
    assert not (project / "models").exists()
    if end == "a rank":
        lines = [line for line in errors.read_text().splitlines() if not line.startswith("step ")]
        assert status == 128 + signal.SIGKILL and lines[-1] == "genus: process 1 was ended by signal 9"
        assert set(lines[:-1]) <= {"genus: another process of this training has ended"}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--nprocs 2", "unrecognized arguments: --nprocs"),
        ("--nproc-per-node 3", "train.batch_size: 32 examples cannot be shared equally by 3 processes"),
    ],
)
def test_what_cannot_be_started_is_one_line(options: str, line: str, project: Path) -> None:
    command = [sys.executable, "-m", "genus.cli", "train", "digits-vae"]
    ended = subprocess.run(command, env=os.environ | {VARIABLE: options}, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 2, ended.stderr
    (said,) = ended.stderr.splitlines()
    assert line in said


if __name__ == "__main__":
    if sys.argv[1:2] == ["process"]:
        in_a_process(sys.argv[3:], Path(sys.argv[2]))
    else:  # the table: python tests/test_parallel.py FOLDER
        for run, found in measure(["digits-pixelcnn", *NAMES], Path(sys.argv[1]))[0]["deviations"].items():
            print(run, "  ".join(f"{term} {value:.1e}" for term, value in sorted(found.items())))
