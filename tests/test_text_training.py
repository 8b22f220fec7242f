"""The trainer on text: which windows a model is given, what it carries, and that an interruption changes nothing."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from genus import training
from genus.config import Train
from genus.contract import Batch, Family, Terms
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.parallel import Group
from genus.training import ROUNDS, _Windows, shuffled, train
from tests.test_training import CPU, Interrupted, weights

SPEC = DataSpec((30,), levels=0, alphabet="abcdefgh")
CONTEXT = 7


class Bigram(Family):
    """The next token by the one before it."""

    kinds = ("text",)
    context = CONTEXT

    def __init__(self, spec: DataSpec):
        super().__init__(spec)
        self.logits = nn.Embedding(spec.vocabulary, spec.vocabulary)
        self.seen: list[Tensor] = []

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        self.seen.append(batch.x)
        logits = self.logits(batch.x[:, :-1])
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), batch.x[:, 1:].flatten())}


class Recurrent(Bigram):
    """The same plus what it carries, whose shape depends on the batch."""

    def __init__(self, spec: DataSpec):
        super().__init__(spec)
        self.mix = nn.Linear(spec.vocabulary, spec.vocabulary)
        self.register_buffer("carried", torch.zeros(0, spec.vocabulary), persistent=False)
        self.restarts = 0

    def restart(self) -> None:
        self.restarts += 1
        self.carried = self.carried[:0]

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        self.seen.append(batch.x)
        before = self.carried if len(self.carried) else torch.zeros(len(batch.x), self.spec.vocabulary)
        logits = self.logits(batch.x[:, :-1]) + self.mix(before)[:, None]
        self.carried = (0.5 * before + logits.mean(1)).detach()
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), batch.x[:, 1:].flatten())}


def text(n: int = 1000) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 9, n, dtype=np.uint8)


def fit(model: Family, tokens: np.ndarray, steps: int = 40, settings: dict | None = None, seed: int = 3, **options):
    config = Train(**({"steps": steps, "batch_size": 6, "learning_rate": 1e-2, "ema": 0.9} | (settings or {})))
    options = {"log_every": 5} | options
    return train(model, tokens, np.zeros(0), config, steps=steps, seed=seed, device=CPU, **options)


def windows(kind: type[Family], tokens: np.ndarray, batch_size: int = 6, seed: int = 0) -> _Windows:
    return _Windows(kind(SPEC), tokens, np.zeros(0), Train(steps=1, batch_size=batch_size), seed, CPU)


def test_an_epoch_predicts_every_token_once_but_for_the_ends() -> None:
    tokens = np.arange(2000, dtype=np.uint16) + 1  # each tells its place
    data = windows(Bigram, tokens)
    for epoch in range(3):
        some = torch.cat([data.batch(epoch * data.a_epoch + step).x for step in range(data.a_epoch)])
        assert some.dtype == torch.int64 and some.shape[1] == CONTEXT + 1
        assert torch.equal(some[:, 1:], some[:, :1] + torch.arange(1, CONTEXT + 1)), "windows are of running text"
        predicted = some[:, 1:].flatten().tolist()
        assert len(set(predicted)) == len(predicted) > 2000 - (6 + 2) * CONTEXT
    shifts = {int(windows(Bigram, tokens, seed=seed).batch(0).x[0, 0]) % CONTEXT for seed in range(60)}
    assert shifts == set(range(CONTEXT)), "every phase comes"


def test_before_the_first_token_stands_the_end_of_a_document() -> None:
    data = windows(Recurrent, np.full(CONTEXT, 5, np.uint8))  # no room for a shift
    assert data.batch(0).x.tolist() == [[0] + [5] * CONTEXT]


def test_what_is_carried_goes_on_where_it_ended() -> None:
    data = windows(Recurrent, np.arange(2000, dtype=np.uint16) + 1)
    for step in range(1, data.a_epoch):
        assert torch.equal(data.batch(step).x[:, 0], data.batch(step - 1).x[:, -1])
    assert data.begins(0) and data.begins(data.a_epoch) and not data.begins(1)
    assert data.a_epoch == (2001 // CONTEXT - 1) // 6


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_text_on_disk_gives_the_windows_of_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    np.save(tmp_path / "x.npy", text().astype(kind))
    monkeypatch.setattr(training, "HELD", 0)
    for whole in (True, False):
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        mapped, memory = (mapped, text()) if whole else (mapped[100:], text()[100:])
        held, stored = windows(Bigram, memory), windows(Bigram, mapped)
        assert whole != isinstance(stored.tokens, np.ndarray)
        assert all(torch.equal(held.batch(step).x, stored.batch(step).x) for step in range(30))


def test_a_model_is_told_when_the_text_starts_again() -> None:
    model, tokens = Recurrent(SPEC), text(500)
    a_epoch = windows(Recurrent, tokens).a_epoch
    fit(model, tokens, steps=2 * a_epoch + 1, settings={"ema": 0.0})
    assert model.restarts == 3


@pytest.mark.parametrize("kind", [Bigram, Recurrent])
def test_a_step_is_the_same_windows_in_every_process(kind: type[Family]) -> None:
    whole, later = windows(kind, text()), windows(kind, text())
    wanted = [whole.batch(step).x for step in range(60)]
    assert all(torch.equal(later.batch(step).x, wanted[step]) for step in (59, 3, 30))
    parts = [later.batch(7, Group(rank, 3).share(6)).x for rank in range(3)]
    assert torch.equal(torch.cat(parts), wanted[7])
    other = windows(kind, text(), seed=1)
    assert any(not torch.equal(other.batch(step).x, wanted[step]) for step in range(3))


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 1000])
def test_shuffling_is_a_permutation(n: int) -> None:
    generator = np.random.default_rng(n)
    for _ in range(20):
        keys = generator.integers(1 << 63, size=ROUNDS, dtype=np.uint64)
        assert sorted(shuffled(np.arange(n), n, keys).tolist()) == list(range(n))


def test_shuffling_is_as_even_as_chance() -> None:
    """Where a place goes is uniform, and its neighbour goes elsewhere: against 4 standard errors."""
    n, draws, generator = 300, 4000, np.random.default_rng(0)
    every = [generator.integers(1 << 63, size=ROUNDS, dtype=np.uint64) for _ in range(draws)]
    went = np.array([shuffled(np.arange(4), n, keys) for keys in every])
    assert np.abs(went.mean(0) - (n - 1) / 2).max() < 4 * math.sqrt((n * n - 1) / 12 / draws)
    apart = np.abs(went[:, 1:] - went[:, :-1])
    assert np.abs(apart.mean(0) - (n + 1) / 3).max() < 4 * apart.std() / math.sqrt(draws)
    counts = np.bincount(went[:, 0], minlength=n)
    chi = ((counts - draws / n) ** 2 / (draws / n)).sum()
    assert abs(chi - (n - 1)) < 4 * math.sqrt(2 * (n - 1))


@pytest.mark.parametrize("kind", [Bigram, Recurrent])
@pytest.mark.parametrize("at", [5, 20, 35])
def test_interrupted_training_ends_byte_identical(tmp_path: Path, kind: type[Family], at: int) -> None:
    def new() -> Family:
        torch.manual_seed(0)
        return kind(SPEC)

    tokens, untouched = text(500), new()
    whole = fit(untouched, tokens)

    def interrupt(row: dict[str, float], speed: dict[str, float]) -> None:
        if row["step"] == at + 5:
            raise Interrupted

    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(Interrupted):
        fit(new(), tokens, checkpoint=checkpoint, checkpoint_every=0, on_log=interrupt)
    seen: list[float] = []
    going_on = new()
    resumed = fit(going_on, tokens, checkpoint=checkpoint, on_log=lambda row, speed: seen.append(row["step"]))
    assert seen[0] == at + 5, "it went on from the checkpoint"
    assert resumed.history == whole.history
    assert all(torch.equal(weights(whole)[name], weights(resumed)[name]) for name in weights(whole))
    if isinstance(untouched, Recurrent) and isinstance(going_on, Recurrent):
        assert torch.equal(untouched.carried, going_on.carried) and len(going_on.carried) == 6
        assert "carried" not in weights(resumed), "a package does without"


def test_a_bigram_learns_a_markov_chain() -> None:
    """Cross-entropy in nats a token, against the entropy rate of the chain that wrote the text."""
    generator = np.random.default_rng(0)
    chain = generator.dirichlet(np.full(9, 0.3), 9)
    tokens = [0]
    for _ in range(20_000):
        tokens.append(int(generator.choice(9, p=chain[tokens[-1]])))
    share = np.bincount(tokens, minlength=9) / len(tokens)
    entropy = -(share[:, None] * chain * np.log(np.maximum(chain, 1e-12))).sum()
    torch.manual_seed(0)
    settings = {"batch_size": 32, "learning_rate": 0.3, "ema": 0.0}
    result = fit(Bigram(SPEC), np.array(tokens, np.uint8), steps=300, settings=settings, log_every=50)
    assert result.history[-1]["loss"] == pytest.approx(entropy, abs=0.02)


def test_speed_is_in_tokens_and_windows() -> None:
    speeds: list[dict[str, float]] = []
    result = fit(Bigram(SPEC), text(), on_log=lambda row, speed: speeds.append(speed))
    assert set(speeds[0]) == {"windows_per_s", "tokens_per_s", "seconds_left"}
    assert result.timing["train_tokens_per_s"] == pytest.approx(result.timing["train_windows_per_s"] * CONTEXT)
    assert "train_images_per_s" not in result.timing


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"train\.flip: a text cannot be mirrored"):
        fit(Bigram(SPEC), text(), settings={"flip": True})
    with pytest.raises(UserError, match="6 tokens, fewer than the 7 of a window; give the model a smaller context"):
        fit(Bigram(SPEC), text(6))
    with pytest.raises(UserError, match="train it in one process"):
        fit(Recurrent(SPEC), text(), processes=Group(0, 2))
    with pytest.raises(TypeError, match="says no context"):
        fit(Family(SPEC), text())


def test_a_text_shorter_than_a_batch_is_a_smaller_batch() -> None:
    model = Bigram(SPEC)
    fit(model, text(3 * CONTEXT), steps=3, settings={"batch_size": 100})
    assert [x.shape for x in model.seen] == [(2, CONTEXT + 1)] * 3


@pytest.mark.parametrize("held", [0, 1 << 26])
def test_a_batch_is_gathered_in_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    """0.1 ms for 32 windows of 128 tokens, of memory or of a file; the bound is wide, for machines under load."""
    monkeypatch.setattr(training, "HELD", held)
    np.save(tmp_path / "x.npy", text(1_000_000))
    for kind in (Bigram, Recurrent):
        model = kind(SPEC)
        model.context = 128
        tokens = np.load(tmp_path / "x.npy", mmap_mode="r")
        data = _Windows(model, tokens, np.zeros(0), Train(steps=1, batch_size=32), 0, CPU)
        assert isinstance(data.tokens, np.ndarray) == bool(held)
        took = []
        for some in range(10):
            start = time.perf_counter()
            for step in range(100):
                data.batch(100 * some + step)
            took.append((time.perf_counter() - start) / 100)
        assert min(took) < 0.0005, took


PEAK = """
import collections, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from genus import training
from tests.test_text_training import Bigram, Recurrent, SPEC, fit
training.HELD = 1 << 20
for path in sys.argv[2:]:
    for kind in (Bigram, Recurrent):
        kind.context = 64
        model = kind(SPEC)
        model.seen = collections.deque(maxlen=1)
        fit(model, np.load(path, mmap_mode="r"), steps=100, settings={"batch_size": 64})
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_does_not_follow_the_length_of_the_text(tmp_path: Path) -> None:
    """Two megabytes, then 100, in one process: its peak grows by less than ten."""
    paths = [tmp_path / f"{megabytes}.npy" for megabytes in (2, 100)]
    for path in paths:
        np.save(path, np.resize(text(1_000_003), int(path.stem) * 1_000_000))
    command = [sys.executable, "-c", PEAK, str(Path(__file__).parents[1]), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    short, long = (int(line) / 1024 for line in done.stdout.split())
    assert long - short < 10, (short, long)


PARAMS = """
budget: 1
collections: {smoke: {about: x, records: r, probes: p, pictures: i, report: s}}
datasets: {python_docs: {source: python_docs}}
models:
  python_docs-bigram:
    family: autoregressive/pixelcnn
    dataset: python_docs
    collection: smoke
    train: {steps: 60, batch_size: 8, learning_rate: 0.1}
"""


def test_the_stage_trains_on_text_and_shows_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Through the stage, with a bigram in the place of the family that params.yaml names, which takes images."""
    import pandas as pd
    from PIL import Image

    from genus import contract, tracking
    from genus.files import read_json
    from genus.stages import ingest
    from genus.stages import train as stage
    from tests.registry.workspace import new_store

    class Draws(Bigram):
        def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None) -> Tensor:
            return torch.randint(1, self.spec.vocabulary, (n, 20), generator=generator)

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PARAMS)
    ingest.run("python_docs")
    with pytest.raises(UserError) as raised:
        stage.run("python_docs-bigram")
    takes = "family 'autoregressive/pixelcnn' takes image and vector data"
    assert str(raised.value) == f"models.python_docs-bigram: {takes}, and data set 'python_docs' is of kind text"

    new_store(tmp_path)
    monkeypatch.setattr(contract, "family_class", lambda _: Draws)
    monkeypatch.setattr(contract, "build", lambda family, spec, params, parent: Draws(spec))
    capsys.readouterr()
    stage.run("python_docs-bigram")
    folder = tmp_path / "models/python_docs-bigram"
    with Image.open(folder / "samples.png") as picture:
        assert picture.mode == "L" and picture.height > 16 * 20
    assert list(pd.read_csv(folder / "history.csv")["step"]) == [25, 50, 60]
    timing = read_json("reports/timing/train/python_docs-bigram.json")
    assert timing["train_tokens_per_s"] == pytest.approx(timing["train_windows_per_s"] * CONTEXT)
    about = read_json(folder / "model.json")
    assert DataSpec.from_json(about["spec"]).kind == "text" and about["parameters"] > 10_000
    run = tracking.find_run(tracking.client(), "python_docs", f"tags.`genus.key` = '{about['key']}'")
    assert run is not None and run.data.metrics["tokens_per_s"] > 0 and "images_per_s" not in run.data.metrics
    assert "tokens_per_s" in capsys.readouterr().err


def test_a_page_is_wrapped_cut_and_always_the_same() -> None:
    from genus.pictures import page

    short, long = page(["one line"]), page(["one line", "word " * 1000, "", "a\x07b"])
    assert short.dtype == np.uint8 and short.ndim == 2 and short.max() == 255 and short.min() < 60
    lines = (long.shape[0] - short.shape[0]) / 20
    assert lines == 1 + 8 + 1 + 1 + 1 + 1 and long.shape[1] < 1000
    assert (page(["one line"]) == short).all() and page([]).size
