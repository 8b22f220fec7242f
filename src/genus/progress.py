"""How a stage says how far it is: into the file that the flow watches, or as plain lines for a person."""

from __future__ import annotations

import json
import os
import sys
import time

_last = 0.0


def report(step: int, total: int, *, unit: str = "step", every: float = 0.5, **figures: float) -> None:
    """Says that ``step`` of ``total`` is done; ``figures`` are shown beside (loss, images_per_s …).

    At most one write each ``every`` seconds, so it may stand in a hot loop. The flow sets GENUS_PROGRESS to the file
    it watches; without it one line goes to stderr every 10 s, enough for ``dvc repro``.
    """
    global _last
    now = time.monotonic()
    target = os.environ.get("GENUS_PROGRESS")
    if step < total and now - _last < (every if target else 10):
        return
    _last = now
    if target:
        temporary = f"{target}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"step": step, "total": total, "unit": unit, "time": time.time(), **figures}, file)
        os.replace(temporary, target)
    else:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"{unit} {step}/{total}  {shown}", file=sys.stderr, flush=True)
