"""Where data comes from: one short file a source, chosen by name in ``params.yaml`` (``datasets.<name>.source``).

A source is a class of checked options (``datasets.<name>.options``) that ends its file as ``Source = …``. It says what
its data looks like and then streams it, one example at a time, so that nothing here needs room for all of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from genus.config import Section
from genus.data.options import checked
from genus.data.spec import DataSpec
from genus.errors import UserError, nearest


class Example(NamedTuple):
    """One example as it will be stored. ``image``: uint8 [C, H, W]."""

    split: str  # train, validation or test
    image: np.ndarray
    label: int
    origin: str  # where it came from, for people


class Document(NamedTuple):
    """A document of text, or a part of one: what is longer than the source's ``longest`` comes in several."""

    split: str  # train, validation or test; that of its first part where it is a part
    text: str  # not empty
    origin: str
    goes_on: bool = False  # whether it continues the document before


class Broken(NamedTuple):
    """An example that cannot be used, and why. ``open`` gives its bytes where they are worth keeping."""

    origin: str
    reason: str
    open: Callable[[], AbstractContextManager[BinaryIO]] | None = None


@dataclass(frozen=True)
class About:
    """What a source's data is. ``test``: share to carve out where the source has no test split of its own.

    Text has no ``spec`` before it has been read: its alphabet is the symbols that are at least ``least`` times in the
    train split.
    """

    spec: DataSpec | None
    licence: str
    source: str
    count: int  # examples, broken ones included, for the progress line; 0: not known
    test: float = 0.0
    kind: str = "image"  # or text
    least: int = 1


class Source(Protocol):
    """What ingestion needs of a source."""

    def about(self) -> About:
        """Fetches what is missing and describes it. Raises UserError where the data cannot be had."""
        ...

    def examples(self) -> Iterator[Example | Document | Broken]:
        """Streams all examples (text: documents), always in the same order."""
        ...


def source_names() -> list[str]:
    """Every source there is, as ``params.yaml`` names them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def open_source(name: str, options: dict[str, Any]) -> Source:
    """The source of that name. Raises UserError, naming the nearest right one, for a wrong name or option."""
    if name not in source_names():
        raise UserError(f"unknown source '{name}': {nearest(name, source_names())}")
    kind: type[Section] = importlib.import_module(f"{__name__}.{name}").Source
    return checked(kind, options, f"options of source '{name}'")  # type: ignore[return-value]
