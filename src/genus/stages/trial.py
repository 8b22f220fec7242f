"""A trial: what the gate wants to know of packaged versions, each found out in a process of its own.

    python -m genus.stages.trial --dataset=digits PACKAGE OUT.json [PACKAGE OUT.json]

imports the libraries once and then forks a process a package, two at a time, in which nothing but libraries has been
imported: so two versions' code never meets. A slow version is measured with fewer examples and samples, in the steps
of LADDER: as many as the computations counted in its code allow (genus.evaluation.effort), whatever else the machine
does meanwhile. A smaller number's are the first of a larger's, so that versions of unlike speed are compared by what
both have. Only ``sample_ms`` is measured, in CPU time of the one thread, which other work hardly changes.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from genus.files import write_json

SEEDS = (0, 1, 2)  # drawn to see whether it works
LADDER = (100, 250, 500, 1000, 2000)
LIKELIHOOD_SECONDS, SAMPLE_SECONDS = 6.0, 12.0  # by count, that the number's choice aims at
COUNTED = 4  # in the batch whose computations are counted
BATCH = 100  # samples drawn, and examples scored, at once: bytes depend on it
TIMED, REPEATS, PATIENCE = 32, 5, 3.0  # samples in a timed batch, how often, and seconds after which no more
RESAMPLED = 100  # Fréchet distances
COPIES = 1000  # most samples whose nearest training image is looked for, and
TRANSLATED = 500  # images of each class that are translated
SPANS = 300  # most documents whose longest span in common with the training text is
SEED = 0


def main() -> None:
    """Runs the trials; exit status 1 where a process was lost."""
    _end_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="")
    parser.add_argument("pairs", nargs="+", type=Path)
    given = parser.parse_args()
    packages, results = given.pairs[::2], given.pairs[1::2]

    import mlflow.pyfunc  # noqa: F401 (for all forks at once)
    import torch

    if given.dataset:
        import scipy.linalg  # noqa: F401

        import genus.evaluation.effort
        import genus.evaluation.reference
        import genus.sampling  # noqa: F401
    torch.set_num_threads(1)
    running = 0
    failed = False
    for package, result in zip(packages, results, strict=True):
        if running == 2:
            failed |= bool(os.wait()[1])
            running -= 1
        _fork(lambda package=package, result=result: write_json(result, trial(package, given.dataset)))  # type: ignore[misc]
        running += 1
    for _ in range(running):
        failed |= bool(os.wait()[1])
    sys.exit(1 if failed else 0)


def trial(package: Path, dataset: str = "") -> dict[str, Any]:
    """What ``genus.registry.gate.Trial`` holds of one package, as JSON; without ``dataset`` only whether it works."""
    found: dict[str, Any] = {"fault": "", "unfit": "", "kind": "none", "bits": [], "quality": {}, "sample_ms": None}
    try:
        runtime = works(package)
    except (OSError, MemoryError):  # this machine's fault, not the package's
        raise
    except Exception as error:  # noqa: BLE001 (whatever the package's code raises: that is what is asked here)
        return found | {"fault": _line(error)}
    if not dataset:
        return found
    try:
        return found | measured(runtime, dataset)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        return found | {"unfit": _line(error)}


def works(package: Path) -> Any:
    """Loads a package as a consumer does and draws from it, here and in another process; its Runtime.

    Raises whatever the package does, and ValueError for weights or samples that are not what they should be.
    """
    theirs = _other_process(lambda: _digest(_drawn(_loaded(package), SEEDS[::-1])[::-1]))
    model = _loaded(package)
    runtime = model.unwrap_python_model().runtime
    for name, weights in runtime.model.named_parameters():
        if not weights.isfinite().all():
            raise ValueError(f"its weights '{name}' are not all finite")
    drawn = _drawn(model, SEEDS)
    if _writes(runtime):
        if drawn.shape != (len(SEEDS),) or not all(isinstance(text, str) for text in drawn):
            raise ValueError(f"its samples are {drawn.dtype} {list(drawn.shape)}, not a text each")
    else:
        dtype = np.dtype(np.uint8 if runtime.spec.levels else np.float32)
        if drawn.shape != (len(SEEDS), *runtime.spec.shape) or drawn.dtype != dtype:
            raise ValueError(f"its samples are {drawn.dtype} {list(drawn.shape)}, not {dtype} of {runtime.spec.shape}")
        if not np.isfinite(drawn).all():
            raise ValueError("its samples are not all finite")
    if theirs() != _digest(drawn):
        raise ValueError("a seed gives other bytes in another process")
    return runtime


def measured(runtime: Any, dataset: str) -> dict[str, Any]:
    """Figures on the validation split of ``dataset``. Raises ValueError where the model is of other data."""
    from genus.data.loaders import open_dataset

    data = open_dataset(dataset)
    if _writes(runtime) or data.spec.kind == "text":
        return _text(runtime, data)
    ours, theirs = ((spec.shape, spec.levels) for spec in (runtime.spec, data.spec))
    if ours != theirs:
        raise ValueError(f"it is a model of {ours[0]} with {ours[1]} levels, the data are {theirs[0]} with {theirs[1]}")
    found: dict[str, Any] = {"kind": runtime.kind}
    if runtime.kind != "none":
        found["bits"] = _bits(runtime, data.split("validation"))
    if hasattr(runtime.model, "sample"):
        found |= _quality(runtime, data)
    elif _translates(runtime):
        found |= _translated(runtime, data)
    return found


def _text(runtime: Any, data: Any) -> dict[str, Any]:
    """``measured`` of a model of text."""
    from genus.evaluation.text.documents import Documents

    if getattr(runtime.spec, "alphabet", "") != data.spec.alphabet:
        raise ValueError("it is a model of another alphabet than the data have")
    found: dict[str, Any] = {"kind": runtime.kind}
    if runtime.kind != "none":
        documents = Documents.stored(data, "validation", LADDER[-1]).texts(data.spec)
        n = _affordable(lambda: runtime.log_prob(documents[:COUNTED], SEED), LIKELIHOOD_SECONDS)
        bits = runtime.bits_per_char(runtime.log_prob(documents[:n], SEED), documents[:n])
        if not np.isfinite(bits).all():
            number = int(np.flatnonzero(~np.isfinite(bits))[0])
            raise ValueError(f"its likelihood of validation document {number} is not finite")
        found |= {"bits": bits.tolist(), "tokens": [len(text) + 1 for text in documents[:n]]}
    if hasattr(runtime.model, "sample"):
        found |= _text_quality(runtime, data)
    return found


def _text_quality(runtime: Any, data: Any) -> dict[str, Any]:
    """Variety and copying of samples at every step of LADDER that the model's speed allows, and its speed."""
    from genus.evaluation.text.documents import Documents
    from genus.evaluation.text.quality import copied, distinct
    from genus.evaluation.text.spans import longest_spans

    rows, one = _sampled(runtime)
    samples, held_out = Documents.drawn(rows), Documents.stored(data, "validation", SPANS)
    texts, real = samples.texts(data.spec), held_out.texts(data.spec)
    train = data.split("train")
    spans, usual = longest_spans(samples.take(range(min(SPANS, samples.n))), train), longest_spans(held_out, train)
    quality = {}
    for n in (step for step in LADDER if step <= len(rows)):
        found = copied(spans[:n], usual, None)
        row = {"copied": found["value"], "copied_half": (found["high"] - found["low"]) / 2}
        if pairs := distinct(texts[:n], real).get("distinct_2"):
            row |= {"distinct": pairs["value"], "distinct_half": (pairs["high"] - pairs["low"]) / 2}
        quality[str(n)] = row
    return {"sample_ms": 1e3 * one, "quality": quality}


def _bits(runtime: Any, images: np.ndarray) -> list[float]:
    """Bits/dim of the first examples, with the same noise for every version."""
    n = _affordable(lambda: runtime.log_prob(images[:COUNTED], SEED), LIKELIHOOD_SECONDS)
    bits = runtime.bits_per_dim(runtime.log_prob(images[:n], SEED))
    if not np.isfinite(bits).all():
        raise ValueError(
            f"its likelihood of validation example {int(np.flatnonzero(~np.isfinite(bits))[0])} is not finite"
        )
    return bits.tolist()


def _quality(runtime: Any, data: Any) -> dict[str, Any]:
    """The sample metrics at every step of LADDER that the model's speed allows, and its speed."""
    from genus.evaluation import metrics
    from genus.evaluation.reference import open_reference

    samples, one = _sampled(runtime)
    view = open_reference(data, Path("data/judge") / data.folder.name).views["judge"]
    train, held_out = data.split("train"), data.split("validation")
    real, seen = view.extract(held_out), view.extract(samples)
    frechet = metrics.Frechet(real)
    copied = metrics.copying(np.unique(samples[:COPIES], axis=0), train, held_out)
    quality = {}
    for n in (step for step in LADDER if step <= len(samples)):
        # The same rows for every version: pairs, where samples of one seed are alike.
        random = np.random.default_rng(SEED)
        resampled = [frechet(seen[:n][random.integers(n, size=n)]) for _ in range(RESAMPLED)]
        few = min(n, len(real))
        points = metrics.neighbours(real[:few], seen[:few])["coverage"]
        mean, low, high = metrics.mean_interval(points)
        quality[str(n)] = {
            "frechet": frechet(seen[:n]),
            "resampled": resampled,
            "coverage": mean,
            "coverage_half": (high - low) / 2,
            "copied": copied.share,
            "copied_half": (copied.high - copied.low) / 2,
        }
    return {"sample_ms": 1e3 * one, "quality": quality}


def _translated(runtime: Any, data: Any) -> dict[str, Any]:
    """Of validation images of both classes: whether the judge takes the translation for the target, what is lost on
    the way there and back, and the speed.
    """
    import torch

    from genus.evaluation.judge import classes
    from genus.evaluation.reference import open_reference
    from genus.evaluation.translation import cycle_errors, ways

    reference = open_reference(data, Path("data/judge") / data.folder.name)
    started = time.process_time()
    found = ways(runtime.model, data, "validation", most=TRANSLATED, seed=SEED, device=torch.device("cpu"))
    n = sum(len(way.real) for way in found)
    if not n:
        raise ValueError(f"the data have no images of {' and '.join(runtime.domains)}")
    seconds = (time.process_time() - started) / (2 * n)
    taken = [classes(reference.judge, reference.views["judge"].extract(way.there)) == way.target for way in found]
    return {
        "domains": list(runtime.domains),
        "translated": np.concatenate(taken).astype(float).tolist(),
        "cycle": np.concatenate([cycle_errors(way, data.spec.levels) for way in found]).tolist(),
        "sample_ms": 1e3 * seconds,
    }


def _sampled(runtime: Any) -> tuple[np.ndarray, float]:
    """As many samples as the model's speed allows, stored, and the seconds of CPU time that one takes."""
    import torch

    from genus.sampling import draw

    def drawn(n: int, seed: int, batch_size: int = BATCH) -> np.ndarray:
        cpu = torch.device("cpu")
        return draw(runtime.model, n, seed=seed, device=cpu, batch_size=batch_size, knobs=runtime.knobs, quiet=True)

    n = _affordable(lambda: drawn(COUNTED, SEED), SAMPLE_SECONDS)
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < PATIENCE:
        started = time.process_time()
        drawn(TIMED, SEED, TIMED)
        seconds.append(time.process_time() - started)
    return drawn(n, SEED + 1), min(seconds) / TIMED  # the least disturbed


def _affordable(few: Callable[[], object], seconds: float) -> int:
    """The highest step of LADDER that by count takes no longer, the lowest at least; ``few`` computes COUNTED."""
    from genus.evaluation.effort import Effort

    with Effort() as effort:
        few()
    each = effort.fixed / BATCH + effort.growing / COUNTED
    return max((step for step in LADDER if step * each <= seconds), default=LADDER[0])


def _writes(runtime: Any) -> bool:
    """Whether a package draws text; those of an older Genus do not say."""
    return getattr(runtime, "text", False)


def _translates(runtime: Any) -> bool:
    """Whether all that a package does is translate; those of an older Genus do not say."""
    return bool(getattr(runtime, "domains", ())) and not hasattr(runtime.model, "sample")


def _loaded(package: Path) -> Any:
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(package), suppress_warnings=True)


def _drawn(model: Any, seeds: tuple[int, ...]) -> np.ndarray:
    import pandas as pd

    runtime = model.unwrap_python_model().runtime
    if _translates(runtime):  # images of noise, to each class in turn
        spec, drawn = runtime.spec, []
        for seed in seeds:
            noise = np.random.default_rng(seed).random((1, *spec.shape))
            stored = (noise * spec.levels).astype(np.uint8) if spec.levels else noise.astype(np.float32)
            drawn.append(np.asarray(model.predict(stored, params={"to": runtime.domains[seed % 2]})))
        return np.concatenate(drawn)
    columns = {"seed": np.array(seeds, np.int64)}
    labels = runtime.labels
    if labels:
        columns["label"] = columns["seed"] % labels
    return np.asarray(model.predict(pd.DataFrame(columns)))


def _digest(drawn: np.ndarray) -> str:
    content = repr(drawn.tolist()).encode() if drawn.dtype == object else np.ascontiguousarray(drawn).tobytes()
    return hashlib.sha256(content).hexdigest()


def _other_process(work: Callable[[], str]) -> Callable[[], str]:
    """Does ``work`` in a fork at once; returns what asks for its result, empty where it came to none."""
    reading, writing = os.pipe()
    _fork(lambda: os.write(writing, work().encode()))
    os.close(writing)

    def result() -> str:
        with os.fdopen(reading) as pipe:
            return pipe.read()

    return result


def _fork(work: Callable[[], object]) -> None:
    """Does ``work`` in a process of its own, which ends with this one; exit status 1 where it raises."""
    if os.fork():
        return
    status = 1
    try:
        _end_with_parent()
        work()
        status = 0
    except BaseException:  # noqa: BLE001 (a fork must never return)
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _end_with_parent() -> None:
    """Has the system kill this process when its parent ends: a decision that was stopped leaves nothing running."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return said[0][:300] if said else type(error).__name__


if __name__ == "__main__":
    main()
