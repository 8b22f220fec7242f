"""The 8×8 handwritten digits that scikit-learn ships: 1,797 images of 17 grey levels. The smoke data set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from genus.config import Section
from genus.data.sources import About, Example
from genus.data.spec import DataSpec


class Digits(Section):
    """``test``: share of the images that becomes the test split."""

    test: float = Field(0.2, gt=0, lt=1)

    def about(self) -> About:
        return About(
            spec=DataSpec((1, 8, 8), levels=17, classes=tuple("0123456789")),
            licence="CC BY 4.0",
            source="UCI Optical Recognition of Handwritten Digits (Alpaydin & Kaynak 1998), as in scikit-learn",
            count=1797,
            test=self.test,
        )

    def examples(self) -> Iterator[Example]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            yield Example("train", image.astype(np.uint8)[None], int(label), f"digit {number}")


Source = Digits
