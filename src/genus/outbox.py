"""What a run's tracking store has not got yet, on disk: a store that is away, or a kill -9, loses no figure."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genus.errors import UserError
from genus.files import read_json, replacing, write_json

if TYPE_CHECKING:
    import numpy as np

FOLDER = Path(".genus/runs")
Entry = tuple[int, dict[str, float]]  # a row of the history and when it was made, in ms


def waiting(model: str, key: str) -> bool:
    """Whether the tracking store may not have all of a training."""
    return bool(key) and (FOLDER / model / key).exists()


class Outbox:
    """``.genus/runs/<model>/<key>/``: there from the beginning of a run until the store has all of it.

    A disk that takes nothing costs one warning: the run holds everything in memory as well.
    """

    def __init__(self, model: str, key: str):
        self.folder = FOLDER / model / key
        self._rows = self.folder / "rows.jsonl"
        self._known = self._works = bool(key)  # a run without a key cannot be found again

    def begun(self) -> dict[str, Any] | None:
        """What ``begin`` has kept, None where nothing is left of a run."""
        path = self.folder / "begin.json"
        try:
            return read_json(path) if self._works and path.exists() else None
        except UserError:  # damaged; the files of the model know the rest
            return None

    def begin(self, about: dict[str, Any]) -> dict[str, Any]:
        """Keeps what a run begins with, its tags with an id of its own; what was kept of this run stands."""
        kept = self.begun()
        if kept is None:
            kept = about | {"tags": about["tags"] | {"genus.training": uuid.uuid4().hex}}
            self._try(lambda: write_json(self.folder / "begin.json", kept))
        return kept

    def rows(self) -> dict[int, Entry]:
        """{step: entry} of those that may not have arrived."""
        found: dict[int, Entry] = {}
        if self._works and self._rows.exists():
            for line in self._rows.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    when, row = json.loads(line)
                except ValueError:  # cut by a kill
                    continue
                found[int(row["step"])] = (when, row)
        return found

    def add(self, entry: Entry) -> None:
        """Keeps a row."""

        def append() -> None:
            with open(self._rows, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(entry))  # a line that a kill has cut spoils no other

        self._try(append)

    def rows_arrived(self) -> None:
        """Forgets all rows."""
        if self._works:
            self._try(lambda: self._rows.unlink(missing_ok=True))

    def pictures(self) -> dict[int, np.ndarray]:
        """{step: uint8 [H, W] or [H, W, 3]} of those that may not have arrived."""
        found: dict[int, np.ndarray] = {}
        for path in self.folder.glob("*.png") if self._works else ():
            import numpy as np
            from PIL import Image

            with contextlib.suppress(OSError), Image.open(path) as picture:  # damaged: one picture less
                found[int(path.stem)] = np.asarray(picture)
        return dict(sorted(found.items()))

    def keep(self, pixels: np.ndarray, step: int) -> None:
        """Keeps a picture."""
        from PIL import Image

        def save() -> None:
            with replacing(self.folder / f"{step}.png") as temporary:
                Image.fromarray(pixels).save(temporary, format="PNG")

        self._try(save)

    def picture_arrived(self, step: int) -> None:
        """Forgets a picture."""
        if self._works:
            self._try(lambda: (self.folder / f"{step}.png").unlink(missing_ok=True))

    def close(self) -> None:
        """Forgets the run, and what is left of this model's others: they were given up."""
        if self._known:
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _try(self, write: Callable[[], object]) -> None:
        if not self._works:
            return
        try:
            write()
        except (OSError, UserError) as error:
            self._works = False
            print(f"warning: {error}; what the tracking store has not got yet stays in memory", file=sys.stderr)
