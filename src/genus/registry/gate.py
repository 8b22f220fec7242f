"""The gate: what a challenger must show before it becomes champion.

1. It works: in a fresh process with pickle forbidden its package loads through ``mlflow.pyfunc``, its weights and
   samples are finite and of the right shape and type, and a seed gives the same bytes in another process as well.
2. It is better: its primary metric beats the champion's by more than chance, which is the 95% bootstrap interval of
   the difference. Bits/dim, of text bits/char, where both have a likelihood of one kind (paired over the same
   examples), else the Fréchet distance (both sample sets resampled), and of models that only translate the share of
   translations that arrive (paired). Both versions are measured anew, side by side,
   each in a process of its own with its package's own code, on the same data: the *validation* split, for the test
   split is for reports.
3. It pays for that with nothing: no guard (coverage, of text distinct-2; copied training examples; sampling time) falls
   by more than its tolerance below.

What else there is, and its rule:

- first version: it becomes champion if it works.
- lost champion (no alias, a deleted version, a package that is not what was registered or no longer works): the
  challenger that works becomes champion. One that only a newer Genus can read, or that can't be fetched, is not lost.
- changed data: both are measured on the data as they are now, so their figures stay comparable; a champion that can't
  take them (another shape) is replaced by a challenger that can. A decision holds for the data it was taken on.
- changed metric: as both are measured anew, nothing is compared across definitions. ``METRICS`` numbers the
  definition, and a decision holds for its number.
- the same content again: there is nothing to decide.
- rolled back: no run promotes it again; ``genus promote NAME --version N --reason TEXT`` can.
- no data or no judge here: it stays challenger, and is judged when they are there.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genus.config import fixed_threads
from genus.errors import UserError
from genus.files import read_json

METRICS = 1  # one more whenever a trial would find other figures of the same version on the same data
# Tolerances of the guards. Coverage and copying are shares of samples and uncertain: only a fall that is beyond its
# 95% interval *and* the tolerance counts, else chance would veto every second challenger.
COVERAGE = 0.05  # a twentieth of the real images is about half a class of ten
DISTINCT = 0.05  # of text: of 500 pairs of words 25 more said again
COPIED = 0.02  # one sample in fifty: above that, copying is what the model does
CYCLE = 0.01  # of white, in what is translated there and back
SLOWER = 1.5  # times; timings of one model on a busy machine differ by a third
UNNOTICED_MS = 0.1  # more a sample: below that nobody waits, and timings are mostly overhead
DRAWS = 2000  # of the bootstrap
FIRST = "it is the first version"
LONGEST = 300.0  # seconds for the trials of one decision, which take a tenth of it: something hangs


class NotTried(Exception):
    """A trial could not be made, through no fault of the version: it is made again another time."""


@dataclass(frozen=True)
class Quality:
    """What so many samples score: the Fréchet distance, also resampled, and shares with half of their intervals.

    Images have a Fréchet distance and coverage, text has distinct-2.
    """

    frechet: float | None = None
    resampled: tuple[float, ...] = ()
    coverage: float | None = None
    coverage_half: float = 0.0
    copied: float = 0.0
    copied_half: float = 0.0
    distinct: float | None = None
    distinct_half: float = 0.0


@dataclass(frozen=True)
class Trial:
    """What one version has shown. ``fault``: why it does not work; ``unfit``: why this data can't measure it."""

    fault: str = ""
    unfit: str = ""
    kind: str = "none"  # of the likelihood
    bits: tuple[float, ...] = ()  # bits/dim of the first validation examples; of documents bits/char,
    tokens: tuple[int, ...] = ()  # and their numbers of characters
    domains: tuple[str, ...] = ()  # between which it translates,
    translated: tuple[float, ...] = ()  # whether validation images have arrived, 1 or 0,
    cycle: tuple[float, ...] = ()  # and the error of each that was translated back
    quality: Mapping[int, Quality] = field(default_factory=dict)  # by number of samples
    sample_ms: float | None = None

    @classmethod
    def of(cls, found: dict[str, Any]) -> Trial:
        """From what ``genus.stages.trial`` writes."""
        quality = {
            int(n): Quality(**(q | {"resampled": tuple(q.get("resampled", ()))})) for n, q in found["quality"].items()
        }
        lists = {name: tuple(found.get(name, ())) for name in ("bits", "tokens", "domains", "translated", "cycle")}
        return cls(**(found | lists | {"quality": quality}))


@dataclass(frozen=True)
class Row:
    """A figure of both. The change is the challenger's less the champion's, with its 95% interval, if it has one."""

    name: str
    champion: float
    challenger: float
    ends: tuple[float, float] | None
    good: bool
    asked: str  # what was asked of the change
    n: int = 0

    def cells(self) -> tuple[str, ...]:
        interval = f" ({self.ends[0]:+.4g} to {self.ends[1]:+.4g})" if self.ends else ""
        change = f"{self.challenger - self.champion:+.4g}{interval}"
        n = f"{self.n:,}" if self.n else ""
        return (
            self.name,
            f"{self.champion:.4g}",
            f"{self.challenger:.4g}",
            change,
            n,
            self.asked,
            "yes" if self.good else "no",
        )

    def __str__(self) -> str:
        _, champion, challenger, change, *_ = self.cells()
        return f"{self.name} {challenger} against {champion}: {change}"


HEADINGS = ("figure", "champion", "challenger", "change (95% interval)", "n", "asked", "passed")


@dataclass(frozen=True)
class Decision:
    """Whether a version becomes champion, by which rule, why in one line, and the figures."""

    promoted: bool
    rule: str  # first, lost champion, better, data, forced; not better, guard, broken, unfit, no data, not tried
    reason: str
    rows: tuple[Row, ...] = ()
    works: bool | None = True  # None: not known
    remembered: bool = True  # else the next run tries again

    def tags(self) -> dict[str, str]:
        """All of it as tags of the version."""
        figures = {f"genus.gate.{row.name.partition(' ')[0]}": str(row) for row in self.rows}
        works = {} if self.works is None else {"genus.works": "yes" if self.works else "no"}
        return {"genus.decision": self.reason, "genus.rule": self.rule, "genus.metrics": str(METRICS)} | works | figures

    def markdown(self) -> str:
        """All of it as a part of the version's description."""
        lines = [f"## Gate: {'champion' if self.promoted else 'not champion'} ({self.rule})", "", f"{self.reason}."]
        if self.rows:
            table = [HEADINGS, ("---",) * len(HEADINGS), *(row.cells() for row in self.rows)]
            lines += ["", *("| " + " | ".join(cells) + " |" for cells in table)]
            lines += ["", f"Both measured anew on the validation split, by definition {METRICS} of the metrics."]
        return "\n".join(lines)


def decide(challenger: Trial, champion: Trial | None, holder: str | None, vacant: str = FIRST) -> Decision:
    """Whether a challenger becomes champion, by the rules above.

    ``holder`` is the champion's version and ``champion`` its trial; where there is no champion that could be tried,
    ``vacant`` says why: then it is enough to work.
    """
    if challenger.fault:
        return Decision(False, "broken", f"it does not work: {challenger.fault}", works=False)
    if champion is None:
        return Decision(True, "first" if vacant == FIRST else "lost champion", f"{vacant}, and it works")
    if champion.fault:
        return Decision(True, "lost champion", f"version {holder} does not work any more: {champion.fault}")
    if challenger.unfit:
        return Decision(False, "unfit", f"it can't be measured: {challenger.unfit}")
    if champion.unfit:
        return Decision(True, "data", f"version {holder} can't be measured on the data as they are: {champion.unfit}")
    primary = _bits(challenger, champion) or _frechet(challenger, champion) or _arrived(challenger, champion)
    if primary is None:
        return Decision(False, "not better", f"it shares no figure with version {holder} to beat it with")
    guards = _guards(challenger, champion)
    rows, fallen = (primary, *guards), [row for row in guards if not row.good]
    if not primary.good:
        return Decision(False, "not better", f"it does not beat version {holder} by more than chance: {primary}", rows)
    if fallen:
        paid = "; ".join(f"{row}, asked {row.asked}" for row in fallen)
        return Decision(False, "guard", f"it beats version {holder}, but at a price: {paid}", rows)
    return Decision(True, "better", f"it beats version {holder} by more than chance: {primary}", rows)


def forced(challenger: Trial, holder: str | None, reason: str) -> Decision:
    """What ``--force`` decides: to work is enough."""
    if challenger.fault:
        return decide(challenger, None, holder)
    return Decision(True, "forced", f"promoted by hand over {f'version {holder}' if holder else 'none'}: {reason}")


def without_data(challenger: Trial, dataset: str) -> Decision:
    """It stays challenger until the data, or their judge, are here."""
    if challenger.fault:
        return decide(challenger, None, None)
    why = f"data/processed/{dataset} or its judge is not here, or they don't belong together"
    return Decision(False, "no data", f"it works, but can't be compared: {why}")


def not_tried(why: str) -> Decision:
    """It stays challenger, and is judged another time."""
    return Decision(False, "not tried", f"it could not be judged: {why}", works=None, remembered=False)


def _bits(challenger: Trial, champion: Trial) -> Row | None:
    """Bits/dim, paired over the examples that both have scored; None where unlike kinds can't be compared.

    Of text bits/char, where a document counts by its length.
    """
    n = min(len(challenger.bits), len(champion.bits))
    if challenger.kind != champion.kind or n < 2:
        return None
    unit = "bits_per_char" if challenger.tokens else "bits_per_dim"
    weights = np.array(challenger.tokens[:n]) if challenger.tokens else np.ones(n)
    ours, theirs = (weights * np.array(trial.bits[:n]) for trial in (challenger, champion))
    change, drawn = ours - theirs, np.random.default_rng(0).integers(n, size=(DRAWS, n))
    means = change[drawn].sum(1) / weights[drawn].sum(1)
    ends = (float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)))
    before, now = (float(bits.sum() / weights.sum()) for bits in (theirs, ours))
    return Row(f"{unit} ({challenger.kind})", before, now, ends, ends[1] < 0, "below 0", n)


def _shared(challenger: Trial, champion: Trial) -> tuple[int, Quality, Quality] | None:
    """The most samples that both were measured with: figures of unlike numbers are not comparable."""
    both = set(challenger.quality) & set(champion.quality)
    return (max(both), challenger.quality[max(both)], champion.quality[max(both)]) if both else None


def _frechet(challenger: Trial, champion: Trial) -> Row | None:
    """The Fréchet distance, its change resampled in both: the basic bootstrap, which takes their bias out."""
    shared = _shared(challenger, champion)
    if shared is None:
        return None
    n, ours, theirs = shared
    if ours.frechet is None or theirs.frechet is None:
        return None
    change = ours.frechet - theirs.frechet
    resampled = np.subtract(ours.resampled, theirs.resampled)
    low, high = (float(2 * change - np.quantile(resampled, q)) for q in (0.975, 0.025))
    return Row("frechet_distance", theirs.frechet, ours.frechet, (low, high), high < 0, "below 0", n)


def _arrived(challenger: Trial, champion: Trial) -> Row | None:
    """The share of translations that the judge takes for the target, paired over the images; None between others."""
    ours, theirs = (np.array(trial.translated) for trial in (challenger, champion))
    if challenger.domains != champion.domains or len(ours) != len(theirs) or len(ours) < 2:
        return None
    ends = _paired(ours - theirs)
    before, now = float(theirs.mean()), float(ours.mean())
    return Row("translated_accuracy", before, now, ends, ends[0] > 0, "above 0", len(ours))


def _paired(change: np.ndarray) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean."""
    means = change[np.random.default_rng(0).integers(len(change), size=(DRAWS, len(change)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def _guards(challenger: Trial, champion: Trial) -> list[Row]:
    """What must not fall by more than its tolerance."""
    rows = []
    shared = _shared(challenger, champion)
    if shared is not None:
        n, ours, theirs = shared
        for name, limit in (("coverage", COVERAGE), ("distinct", DISTINCT)):
            mine, other = getattr(ours, name), getattr(theirs, name)
            if mine is None or other is None:
                continue
            half = math.hypot(getattr(ours, f"{name}_half"), getattr(theirs, f"{name}_half"))
            change = mine - other
            ends, good = (change - half, change + half), change + half >= -limit
            rows.append(Row(name, other, mine, ends, good, f"not surely below -{limit}", n))
        half = math.hypot(ours.copied_half, theirs.copied_half)
        # Below 0 nothing is copied: samples of a poor model may lie nearer to held-out images than chance has it.
        copied = max(ours.copied, 0.0), max(theirs.copied, 0.0)
        change = copied[0] - copied[1]
        good = change - half <= COPIED
        asked = f"not surely above {COPIED}"
        rows.append(Row("copied", copied[1], copied[0], (change - half, change + half), good, asked, n))
    if challenger.domains == champion.domains and len(challenger.cycle) == len(champion.cycle) > 1:
        ours_lost, theirs_lost = np.array(challenger.cycle), np.array(champion.cycle)
        ends = _paired(ours_lost - theirs_lost)
        before, now = float(theirs_lost.mean()), float(ours_lost.mean())
        asked = f"not surely above {CYCLE}"
        rows.append(Row("cycle_error", before, now, ends, ends[0] <= CYCLE, asked, len(ours_lost)))
    if challenger.sample_ms is not None and champion.sample_ms is not None:
        most = champion.sample_ms * SLOWER + UNNOTICED_MS
        good = challenger.sample_ms <= most
        rows.append(
            Row("sample_ms", champion.sample_ms, challenger.sample_ms, None, good, f"at most {most:.4g} ms a sample")
        )
    return rows


def data_hash(dataset: str) -> str:
    """The hash of the data set that trials here are made on; empty where it, or its judge, is not here."""
    described = Path("data/processed") / dataset / "dataset.json"
    judge = Path("data/judge") / dataset / "judge.json"
    with contextlib.suppress(UserError):
        content = read_json(described)["sha256"]
        if read_json(judge)["data_sha256"] == content:
            return content
    return ""


def trials(packages: Sequence[Path], dataset: str = "") -> list[Trial]:
    """The trials of verified package folders, two side by side, each in a fresh process.

    Without ``dataset`` only whether they work. Raises NotTried where a trial does not come to an end.
    """
    with tempfile.TemporaryDirectory() as scratch:
        results = [Path(scratch) / f"{number}.json" for number in range(len(packages))]
        pairs = [str(part) for pair in zip(packages, results, strict=True) for part in pair]
        variables = fixed_threads(1) | {
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONDONTWRITEBYTECODE": "1",  # the packages stay as they were verified
        }
        command = [sys.executable, "-m", "genus.stages.trial", f"--dataset={dataset}", *pairs]
        try:
            done = subprocess.run(
                command,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired as error:
            raise NotTried(f"its trial did not end within {LONGEST:.0f} s") from error
        if done.returncode or not all(path.exists() for path in results):
            said = done.stderr.strip().splitlines()
            raise NotTried(f"its trial ended with status {done.returncode}: {said[-1][:200] if said else 'silent'}")
        return [Trial.of(read_json(path)) for path in results]
