"""What a run looks like: one live line a stage on a terminal, one plain line a change of state elsewhere."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipelines.children import log_path, progress_path

STYLES = {
    "waiting": "dim",
    "running": "bold",
    "retrying": "yellow",
    "done": "green",
    "cached": "cyan",
    "failed": "bold red",
    "left out": "yellow",
}


@dataclass
class Line:
    """One stage's line."""

    state: str = "waiting"
    since: float = 0.0
    seconds: float = 0.0
    note: str = ""


class Screen:
    """Use as a context manager: ``set`` a stage's state from any thread, the terminal follows."""

    def __init__(self, stages: list[str], console: Console | None = None):
        self.console = console or Console(file=sys.stdout, highlight=False)
        self.lines = {stage: Line() for stage in stages}
        self._lock = threading.Lock()
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(get_renderable=self.table, console=self.console, refresh_per_second=2)

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def set(self, stage: str, state: str, *, seconds: float = 0.0, note: str = "") -> None:
        """A stage's new state: waiting, running, retrying, done, cached, failed or left out."""
        with self._lock:
            line = self.lines[stage]
            line.state, line.seconds, line.note = state, seconds, note
            line.since = time.monotonic()
        if not self.console.is_terminal and state != "waiting":
            self.console.print(f"{stage:<34} {self._says(stage, line)}", soft_wrap=True, markup=False)

    def table(self) -> Table:
        """All stages as they are now."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        for stage, line in self.lines.items():
            grid.add_row(stage, self._says(stage, line), style=STYLES[line.state])
        return grid

    def _says(self, stage: str, line: Line) -> str:
        if line.state == "running" and self.console.is_terminal:
            return f"running  {_so_far(stage, time.monotonic() - line.since)}"
        seconds = f"  {line.seconds:.1f} s" if line.seconds else ""
        note = f"  {line.note}" if line.note else ""
        log = f"  log: {log_path(stage)}" if line.state == "failed" else ""
        return f"{line.state}{seconds}{note}{log}"


def _so_far(stage: str, seconds: float) -> str:
    """What the stage itself says of its progress, else the seconds since it started."""
    try:
        said: dict[str, Any] = json.loads(progress_path(stage).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return f"{seconds:.0f} s"
    parts = [f"{said['unit']} {said['step']:,}/{said['total']:,}"]
    if "loss" in said:
        parts.append(f"loss {said['loss']:.4g}")
    for speed in ("images_per_s", "tokens_per_s"):
        if speed in said:
            parts.append(f"{said[speed]:,.0f} {speed.replace('_per_', '/').replace('_', ' ')}")
    if "seconds_left" in said:
        parts.append(f"{max(0.0, said['seconds_left'] - (time.time() - said['time'])):.0f} s left")
    shown = {"step", "total", "unit", "time", "loss", "images_per_s", "tokens_per_s", "windows_per_s", "seconds_left"}
    parts += [f"{name} {value:.4g}" for name, value in said.items() if name not in shown]
    return "  ".join(parts)
