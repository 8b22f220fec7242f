"""What is said at the end of a run: the models, what came out bit for bit as committed, and where the time went."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genus.errors import UserError
from genus.files import read_json
from pipelines.children import LOGS, Ran

# The one list of outputs that hold figures of time, or are made from some: they differ from run to run.
TIMED = ("reports/timing/", "reports/records/", "reports/scorecard")


@dataclass(frozen=True)
class Reproduced:
    """The outputs of some stages beside those of the committed lock."""

    same: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)  # not in the committed lock
    committed: bool = True  # False: the last commit holds no dvc.lock

    def __str__(self) -> str:
        if not self.committed:
            return "reproduced: nothing to compare with, the last commit holds no dvc.lock"
        said = f"reproduced {len(self.same)} of {len(self.same) + len(self.different)} artifacts bit for bit"
        if self.new:
            said += f" ({len(self.new)} more are not in the committed dvc.lock)"
        return said + "".join(f"\n  differs: {path}" for path in self.different)


def reproduced(stages: Collection[str] | None = None) -> Reproduced:
    """Compares dvc.lock with the committed one, for ``stages`` or all; outputs made from timings are left out."""
    committed = _committed_lock()
    if committed is None:
        return Reproduced(committed=False)
    before, now = _outputs(committed, stages), _outputs(_lock_text(), stages)
    return Reproduced(
        same=[path for path in now if before.get(path) == now[path]],
        different=[path for path in now if path in before and before[path] != now[path]],
        new=[path for path in now if path not in before],
    )


def _lock_text() -> str:
    try:
        return Path("dvc.lock").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _committed_lock() -> str | None:
    try:
        # ./ : the project may be a folder inside a repository
        done = subprocess.run(["git", "show", "HEAD:./dvc.lock"], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout if done.returncode == 0 else None


def _outputs(lock: str, stages: Collection[str] | None) -> dict[str, str]:
    """Path -> hash of every output that a lock's text holds."""
    from ruamel.yaml import YAML, YAMLError

    try:
        read = YAML(typ="safe").load(lock) or {}
    except YAMLError as error:
        raise UserError("dvc.lock: not YAML; `git checkout dvc.lock` brings the committed one back") from error
    return {
        out["path"]: out.get("md5", "")
        for name, stage in read.get("stages", {}).items()
        if stages is None or name in stages
        for out in stage.get("outs", [])
        if not out["path"].startswith(TIMED)
    }


@dataclass(frozen=True)
class Cost:
    """Where a run's time went, in seconds."""

    work: float  # the stages' own work, as they report it
    processes: float  # their processes from start to end, DVC and imports included
    flow: float  # this process while no stage was running
    imports: float = 0.0  # what was imported once for all stages

    @classmethod
    def of(cls, ran: Collection[Ran], flow: float, imports: float = 0.0) -> Cost:
        return cls(sum(r.work for r in ran), sum(r.seconds for r in ran), flow, imports)

    @property
    def orchestration(self) -> float:
        return self.processes - self.work + self.flow + self.imports

    def __str__(self) -> str:
        share = f" = {100 * self.orchestration / self.work:.1f}% of it" if self.work >= 1 else ""
        return (
            f"orchestration: {self.orchestration:.1f} s beside {self.work:.1f} s of the stages' own work{share} "
            f"({self.processes - self.work:.1f} s process starts and DVC; {self.imports:.1f} s imports for all stages; "
            f"{self.flow:.1f} s the flow itself)"
        )


def results(models: Collection[str], versions: dict[str, str]) -> Table:
    """One line a model, from the files that the stages left; ``versions`` is what the registry says of each."""
    table = Table(box=None, header_style="bold", padding=(0, 1), pad_edge=False)
    for heading in ("model", "family", "paper"):
        table.add_column(heading, no_wrap=heading == "model", overflow="fold")
    for heading in ("bits", "Fréchet", "share", "floor", "n", "train s", "ms/image"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("registry", no_wrap=True)
    for model in models:
        about = _read(f"models/{model}/model.json")
        metrics = _read(f"reports/metrics/{model}.json")
        timing = _read(f"reports/timing/train/{model}.json") | _read(f"reports/timing/{model}.json")
        bits = metrics.get("bits_per_dim") or metrics.get("bits_per_char") or {}
        unit = "/char" if "bits_per_char" in metrics else "/dim" if bits else ""
        distance = metrics.get("frechet_distance") or {}
        table.add_row(
            model,
            about.get("family", "-"),
            _short(about.get("paper", "-")),
            " ".join(filter(None, (_number(bits.get("value"), ".3f") + unit, bits.get("kind")))),
            _number(distance.get("value"), ".1f"),
            _number(distance.get("relative"), ".3f"),  # of the Gaussian control's distance
            _number(distance.get("floor"), ".2f"),
            _number(distance.get("n"), ",.0f"),
            _number(timing.get("train_seconds"), ".0f"),
            _number(timing.get("sample_ms"), ".3g"),
            versions.get(model, "-"),
        )
    return table


def _short(paper: str) -> str:
    """The arXiv numbers alone, where the paper has any: the whole citation is in `genus models` and the scorecard."""
    return ", ".join(re.findall(r"\d{4}\.\d{4,5}", paper)) or paper


def _read(path: str) -> dict[str, Any]:
    """A stage's JSON; empty where the stage has not run."""
    return read_json(path) if Path(path).exists() else {}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def advice(report: str) -> list[str]:
    """``best density: pixelcnn, 3.11 bits/dim (exact); then glow, …`` for each need that a scorecard answers."""
    card = _read(f"reports/{report}.json")
    return [
        f"{found['need']}: {found['model']}, {found['figure']}"
        + (f"; then {found['runner_up']}, {found['runner_up_figure']}" if found["runner_up"] else "")
        for found in card.get("advice", [])
        if found["model"]
    ]


def markdown(report: str) -> str:
    """A scorecard as Prefect shows it: what to use, the headline figures, and the verdicts on the claims."""
    card = _read(f"reports/{report}.json")
    lines = [f"# {card['about']}", "", f"The whole report: `reports/{report}.html` (`genus report` opens it)", ""]
    lines += [*(f"- {line}" for line in advice(report)), "", "## Figures", ""]
    models = list(card["models"])
    lines += [_line("", *models), _line(*["---"] * (len(models) + 1))]
    for row in card["properties"]:
        cells = [row["cells"].get(model) for model in models]
        lines.append(_line(f"{row['title']} {row['unit']}", *(_cell(cell) for cell in cells)))
    lines += ["", "## What textbooks say", "", _line("claim", "verdict", "because"), _line("---", "---", "---")]
    lines += [_line(f"{v['id']}. {v['claim']}", v["verdict"], v["because"]) for v in card["verdicts"]]
    failed = [f"- {name}: {record['failure']}" for name, record in card["models"].items() if record.get("failure")]
    return "\n".join([*lines, *(["", "## Failed", "", *failed] if failed else [])])


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(cell: dict[str, Any] | None) -> str:
    return "none" if cell is None else " ".join(filter(None, (f"{cell['value']:.4g}", cell.get("kind"))))


def seconds_by_stage(ran: Collection[Ran]) -> str:
    """``train@… 93 s, judge@… 88 s``, longest first, of the stages that really ran."""
    longest = sorted((r for r in ran if r.ran), key=lambda r: -r.seconds)
    return ", ".join(f"{r.stage} {r.seconds:.1f} s" for r in longest)


def where_to_look(console: Console, models: Collection[str], reports: Collection[str]) -> None:
    """The files and commands to go on with."""
    grids = [f"models/{model}/samples.png" for model in models if Path(f"models/{model}/samples.png").exists()]
    for label, places in (("report", reports), ("samples", grids)):
        if places:
            console.print(f"{label:<8} {'  '.join(places)}", markup=False, soft_wrap=True)
    console.print(f"runs     make ui\nlogs     {LOGS}/", markup=False)
