"""``dvc``, but of dvc.lock a stage reads and writes its own lines only.

    python -P pipelines/repro.py --wait-for-lock repro --single-item STAGE

DVC parses the whole lock, and after the stage writes it anew through ruamel.yaml's round trip, which is Python: seconds
a stage for the lock of many models, while all other stages that are done wait for their turn. What then stands in the
file is the same to the byte, so that `dvc repro` and this may take turns, and it is replaced whole: a kill leaves no
half of it. A lock that is not as DVC writes it is left to DVC.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvc import dvcfile
from dvc.cli import main
from dvc.utils.serialize import dumps_yaml, loads_yaml, modify_yaml

from genus.files import write_text

HEAD = "schema: '2.0'\nstages:\n"
# A stage's name, and the lines that stand further right; those of a text of several lines may be empty.
STAGE = re.compile(r"  (?P<name>[A-Za-z][\w.@-]*):\n(?:(?: {4}.*)?\n)+")


class Stages(dict[str, Any]):
    """Stage -> its lines in the lock, its name on top. What they say is read when it is asked for."""

    def get(self, name: str, default: Any = None) -> Any:
        return loads_yaml(self[name])[name] if name in self else default


def stages(path: str) -> Stages | None:
    """The stages of a lock, in its order; None where it is not written as DVC writes it, or is not there."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    found, end = Stages(), len(HEAD)
    while match := STAGE.match(text, end):
        found[match["name"]], end = match[0], match.end()
    return found if text.startswith(HEAD) and end == len(text) else None


class Lockfile(dvcfile.Lockfile):
    def _load_yaml(self, **options: Any) -> tuple[Any, str]:
        known = None if options else stages(self.path)
        return super()._load_yaml(**options) if known is None else ({"schema": "2.0", "stages": known}, "")


@contextlib.contextmanager
def modified(path: str, fs: Any = None) -> Iterator[Any]:
    """For ``modify_yaml``: what the block changes in the value that it is given, the file then says."""
    known = stages(path) if path.endswith(".lock") else None
    if known is None:
        with modify_yaml(path, fs=fs) as value:
            yield value
        return
    yield {"schema": "2.0", "stages": known}
    text = HEAD
    for name, said in known.items():  # lines as they were, or what DVC has set
        text += said if isinstance(said, str) else dumps_yaml({"stages": {name: said}}).removeprefix("stages:\n")
    write_text(path, text)


if __name__ == "__main__":
    dvcfile.modify_yaml, dvcfile.Lockfile = modified, Lockfile
    sys.exit(main())
