"""What kills and bad disks have left in a project: found, said and put right before it costs anybody a result.

DVC itself trusts what it has once written: a file whose time and size are as before, and every read-only object of its
cache. So a flipped bit would be trained on, or brought back from the cache as good. And its two records, dvc.lock and
the list of the paths in use, are written in place: a kill in that moment leaves half of one, and every later run fails.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from genus.files import write_text
from pipelines.children import GROUPS, STATE
from pipelines.reaper import let_go

LOCK = Path("dvc.lock")
PATHS = Path(".dvc/tmp/rwlock")
# What models/none says in git: the stages of most models depend on it, and who deletes models/ deletes it too.
PARENTLESS = Path("models/none/README.md")
SAID = (
    "The parent of models that learn from no other one: `parent: none` in params.yaml. A model that does, a prior over "
    "the codes\nof a VQ-VAE-2, say, names it, and dvc.yaml then trains it anew when that one changes.\n"
)


def records() -> Iterator[str]:
    """Puts away what DVC cannot read of its own records, and yields a line for each.

    Nothing is lost: what dvc.lock said, DVC finds again in its cache of runs. Only for a process that holds the lock of
    the runs: no other may be writing, and what a killed run has started is waited for.
    """
    for group in GROUPS.glob("*.lock"):
        let_go(group)
    if not PARENTLESS.exists():
        write_text(PARENTLESS, SAID)
        yield f"{PARENTLESS.parent}: not there; made again, the models without a parent depend on it"
    if _read_lock() is None:
        STATE.mkdir(exist_ok=True)
        broken = LOCK.rename(STATE / "dvc.lock.broken")
        yield f"{LOCK}: not readable; put away as {broken}, every stage is looked up in DVC's cache"
    try:
        json.loads(PATHS.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        PATHS.unlink()
        yield f"{PATHS}: not readable; removed, it only named paths that a killed process was using"


def outputs(stages: Collection[str], changed: Collection[str] = ()) -> list[str]:
    """The outputs of ``stages`` that are not what dvc.lock says, by their content.

    They are removed, and so are their objects in DVC's cache where those are damaged as well: DVC then takes the output
    from the cache or makes it again. Of stages in ``changed`` DVC knows already: only the cache is looked at.
    """
    found: dict[Path, str] = {}
    for stage, entry in (_read_lock() or {}).items():
        for out in entry.get("outs", []) if stage in stages else []:
            path, known = Path(out["path"]), str(out.get("md5", ""))
            if known and path.exists() and _hash(path) != known:
                found[path] = known
                if stage not in changed:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if found:
        _drop_damaged(found.values())
    return [str(path) for path in found]


def _read_lock() -> dict[str, Any] | None:
    """The stages of dvc.lock; empty where there is none, None where it cannot be read."""
    from ruamel.yaml import YAML, YAMLError

    try:
        read = YAML(typ="safe").load(LOCK.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (YAMLError, UnicodeDecodeError):
        return None
    stages = read.get("stages", {}) if isinstance(read, dict) and "schema" in read else None
    return stages if isinstance(stages, dict) else None


def _hash(path: Path) -> str:
    """DVC's hash of a file or folder, taken anew: not what DVC remembers of a file of this time and size."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import LocalFileSystem

    files = LocalFileSystem()
    _, _, built = build(HashFileDB(files, ""), str(path.absolute()), files, "md5", dry_run=True)
    return str(built.hash_info.value)


def _drop_damaged(known: Iterable[str]) -> None:
    """Removes the cache's objects, also those of the files in a folder, whose content is not what their name says."""
    from dvc.repo import Repo

    with Repo(".") as repo:
        where = repo.cache.local.oid_to_path
    left = list(known)
    while left:
        name = left.pop()
        path = Path(where(name))
        if not path.exists():
            continue
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if actual != name.removesuffix(".dir"):
            path.unlink()
        elif name.endswith(".dir"):
            left += [entry["md5"] for entry in json.loads(path.read_text(encoding="utf-8"))]
