"""What a data set looks like to a model: shape, levels and the units of ``Batch.x``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing torch takes seconds and 300 MB, which ingest and validate do without
    from torch import Tensor


@dataclass(frozen=True)
class DataSpec:
    """Shape and units of one example.

    Images are stored as uint8 [C, H, W] with ``levels`` = 256 and reach a model as floats in [-1, 1]
    (level k is 2k / (levels - 1) - 1). ``levels`` = 0 means continuous data, kept as it is.
    """

    shape: tuple[int, ...]
    levels: int = 256
    classes: tuple[str, ...] = field(default=())

    @property
    def dims(self) -> int:
        """Numbers in one example, the D of bits/dim."""
        return math.prod(self.shape)

    @property
    def flat(self) -> bool:
        """Whether an example is a vector: an image of one place, [D, 1, 1]. Networks are dense then."""
        return self.shape[1:] == (1, 1)

    def to_float(self, stored: Tensor) -> Tensor:
        """Stored values to the units of ``Batch.x``."""
        return stored.float() * (2 / (self.levels - 1)) - 1 if self.levels else stored.float()

    def to_levels(self, x: Tensor) -> Tensor:
        """``Batch.x`` to int64 levels 0 … levels - 1, rounded and clipped."""
        return ((x + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).long()

    def to_stored(self, x: Tensor) -> Tensor:
        """``Batch.x``, or a model's samples, to what would be stored: uint8 for images."""
        return self.to_levels(x).byte() if self.levels else x

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DataSpec:
        return cls(tuple(value["shape"]), value["levels"], tuple(value["classes"]))
