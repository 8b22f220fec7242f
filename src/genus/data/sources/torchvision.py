"""Any of torchvision's image data sets by class name (CIFAR10, SVHN, CelebA …), for those who are online."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any
from urllib.error import URLError

import numpy as np
from PIL import Image
from pydantic import Field, PrivateAttr

from genus.data.sources import About, Broken, Example
from genus.data.sources._images import Look, Unusable, fit
from genus.data.spec import DataSpec
from genus.errors import TransientError, UserError, nearest

SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # ours: theirs, where it is an argument
OTHER_NAMES = {"valid": "val"}


class Torchvision(Look):
    """``name``: the class; ``arguments``: what else it is made with; ``folder``: where downloads are kept.

    Labels are kept where torchvision says what classes there are; else the data set has none.
    """

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    folder: str = "data/raw/torchvision"
    test: float = Field(0.1, gt=0, lt=1)  # share that becomes the test split, where torchvision has none
    licence: str = "see torchvision's documentation"
    _splits: dict[str, Any] = PrivateAttr(default_factory=dict)

    def about(self) -> About:
        self._splits = self._load()
        return About(
            spec=DataSpec(self.shape, levels=256, classes=self._classes()),
            licence=self.licence,
            source=f"torchvision's {self.name}, {self.crop} to {self.size}×{self.size} {self.mode}",
            count=sum(len(data) for data in self._splits.values()),
            test=self.test,
        )

    def examples(self) -> Iterator[Example | Broken]:
        labelled = bool(self._classes())
        for split, data in self._splits.items():
            for index in range(len(data)):
                origin = f"{split} {index}"
                try:
                    image, target = data[index]
                    if not isinstance(image, Image.Image):
                        raise Unusable("not a picture")
                    yield Example(split, fit(image, self), int(target) if labelled else 0, origin)
                except (Unusable, OSError, SyntaxError) as error:
                    yield Broken(origin, str(error))

    def _classes(self) -> tuple[str, ...]:
        data = self._splits["train"]
        if names := getattr(data, "classes", None):
            return tuple(map(str, names))
        if count := getattr(data, "num_classes", None):
            return tuple(map(str, range(count)))
        labels = np.asarray(next((found for key in ("targets", "labels", "_labels") if (found := _get(data, key))), []))
        return tuple(map(str, range(labels.max() + 1))) if labels.ndim == 1 and labels.dtype.kind in "iu" else ()

    def _load(self) -> dict[str, Any]:
        """The data set's splits, downloaded where they are not in the folder. Raises UserError."""
        from torchvision import datasets

        if self.name not in datasets.__all__:
            raise UserError(f"torchvision has no data set '{self.name}': {nearest(self.name, datasets.__all__)}")
        kind = getattr(datasets, self.name)
        known = inspect.signature(kind.__init__).parameters
        if "kwargs" not in known:
            for argument in self.arguments:
                if argument not in known:
                    hint = nearest(argument, known)
                    raise UserError(f"torchvision's {self.name} has no argument '{argument}': {hint}")
        given = {key: value for key, value in {"root": self.folder, "download": True}.items() if key in known}
        given |= self.arguments
        if "train" in known and "train" not in given:
            return {split: self._make(kind, given | {"train": split == "train"}) for split in ("train", "test")}
        if "split" in known and "split" not in given:
            found = {split: self._make_split(kind, given, theirs) for split, theirs in SPLITS.items()}
            return {split: data for split, data in found.items() if data is not None}
        return {"train": self._make(kind, given)}

    def _make_split(self, kind: Any, given: dict[str, Any], theirs: str) -> Any:
        """The split of that name, or None where there is no such split (which torchvision says by ValueError)."""
        for name in (theirs, OTHER_NAMES.get(theirs, theirs)):
            with contextlib.suppress(ValueError):
                return self._make(kind, given | {"split": name})
        return None

    def _make(self, kind: Any, given: dict[str, Any]) -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return kind(**given)
        except (OSError, RuntimeError, TypeError) as error:  # no network, a damaged download, a missing argument
            passing = isinstance(error, URLError | TimeoutError | ConnectionError)
            raise (TransientError if passing else UserError)(
                f"torchvision's {self.name} in {self.folder}: {' '.join(str(error).split())}"
            ) from error


def _get(data: Any, key: str) -> list[Any]:
    """An attribute with all labels, as a list; empty where there is none."""
    found = getattr(data, key, None)
    return np.asarray(found).tolist() if found is not None else []


Source = Torchvision
