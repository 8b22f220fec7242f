"""Sample sets whose quality is known beforehand, and coders whose rate is: what any honest metric must rank.

Held-out images are the best that a model can do; each other set has one fault, and the metric that is there for that
fault must see it.
"""

from __future__ import annotations

import io
import lzma
import math
from typing import Any

import numpy as np

from genus import progress
from genus.data.loaders import Dataset
from genus.evaluation import metrics
from genus.evaluation.judge import Judge, classes, features
from genus.evaluation.quality import COPIES, Figures, copied, quality
from genus.evaluation.reference import Reference

SAMPLES = 5000  # of each set, where the data are as many
BLUR, NOISE = 1.0, 0.15  # standard deviations: pixels, and share of the range of levels
TITLES = {
    "held_out": "held-out real images: the best there is",
    "gaussian": "a Gaussian fitted to the pixels",
    "blurred": f"real images, blurred (σ = {BLUR:g} pixel)",
    "noisy": f"real images with noise (σ = {NOISE:.0%} of the range)",
    "class_dropped": "real images without the class that the judge knows best",
    "one_image": "one real image, again and again",
    "copycat": "training images, returned as samples",
}


def control_sets(data: Dataset, judge: Judge, *, seed: int) -> dict[str, np.ndarray]:
    """The sample sets by name, stored images [≤ SAMPLES, C, H, W], in the order of ``TITLES``.

    The faulty ones are made from held-out (validation) images: no metric can know them for training images. The class
    that is left out is the one that the judge takes the fewest others for: a metric can see no better than its judge.
    """
    random = np.random.default_rng(seed)
    held_out, labels = np.asarray(data.split("validation")[:SAMPLES]), np.asarray(data.labels("validation")[:SAMPLES])
    train, levels = data.split("train"), data.spec.levels
    named = classes(judge, features(judge, held_out)) if judge.labelled else labels
    mistaken = np.bincount(named[named != labels], minlength=max(1, len(data.spec.classes)))
    noisy = held_out + random.normal(0, NOISE * (levels - 1), held_out.shape)
    return {
        "held_out": held_out,
        "gaussian": metrics.gaussian_control(np.asarray(train), SAMPLES, levels=levels, seed=seed),
        "blurred": blurred(held_out),
        "noisy": noisy.round().clip(0, levels - 1).astype(held_out.dtype),
        **({"class_dropped": held_out[labels != mistaken.argmin()]} if judge.labelled else {}),
        "one_image": np.repeat(held_out[:1], len(held_out), 0),
        "copycat": np.asarray(train[np.sort(random.permutation(len(train))[:SAMPLES])]),
    }


def blurred(images: np.ndarray, sigma: float = BLUR) -> np.ndarray:
    """Stored images [N, C, H, W] through a Gaussian filter, stored again."""
    from scipy import ndimage

    smooth = ndimage.gaussian_filter(images.astype(np.float32), (0, 0, sigma, sigma), mode="nearest")
    return smooth.round().astype(images.dtype)


def controls(data: Dataset, reference: Reference, *, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """{set: {"title", "metrics"}} with all sample metrics, and the sets themselves."""
    sets = control_sets(data, reference.judge, seed=seed)
    best = copied(sets["held_out"][:COPIES], data, None)
    found: dict[str, dict[str, Any]] = {}
    for done, (name, samples) in enumerate(sets.items(), 1):
        figures: Figures = quality(samples, data, reference, seed=seed, memorisation=best)
        found[name] = {"title": TITLES[name], "metrics": figures}
        progress.report(done, len(sets), unit="control")
    return found, sets


def anchors(data: Dataset) -> dict[str, dict[str, Any]]:
    """Bits/dim of the test split by coders that everybody knows: what a model of the density has to beat."""
    train, test, spec = data.split("train"), np.asarray(data.split("test")), data.spec
    found = {"histogram": _histogram(np.asarray(train), test, spec.levels)}
    pictures = spec.levels <= 256 and spec.shape[0] in (1, 3)
    if pictures:
        found["png"] = sum(len(_picture(image, "PNG", optimize=True)) for image in test) * 8
        found["webp"] = len(_picture(_mosaic(test), "WEBP", lossless=True, quality=100, method=4)) * 8
    found["xz"] = len(lzma.compress(test.tobytes(), preset=9 | lzma.PRESET_EXTREME)) * 8
    texts = {
        "histogram": "histogram of each pixel over train",
        "png": "PNG, each image by itself",
        "webp": "WebP lossless, all images as one mosaic",
        "xz": "xz, the whole split",
    }
    numbers = len(test) * spec.dims
    return {
        name: {"value": found[name] / numbers, "n": len(test), "text": texts[name]} for name in texts if name in found
    }


def _histogram(train: np.ndarray, test: np.ndarray, levels: int) -> float:
    """Bits of all of test when every place has its own code, from its counts over train and one more of each level."""
    train, test = train.reshape(len(train), -1), test.reshape(len(test), -1)
    bits = 0.0
    for place in range(train.shape[1]):
        counts = np.bincount(train[:, place], minlength=levels) + 1
        bits -= float(np.log2(counts / counts.sum())[test[:, place]].sum())
    return bits


def _picture(image: np.ndarray, form: str, **options: Any) -> bytes:
    from PIL import Image

    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, form, **options)
    return buffer.getvalue()


def _mosaic(images: np.ndarray) -> np.ndarray:
    """All images [N, C, H, W] as one [C, H', W'], nearly square; what is left of the last row is 0."""
    n, channels, height, width = images.shape
    across = math.ceil(math.sqrt(n))
    sheet = np.zeros((math.ceil(n / across) * across, channels, height, width), images.dtype)
    sheet[:n] = images
    return (
        sheet.reshape(-1, across, channels, height, width)
        .transpose(2, 0, 3, 1, 4)
        .reshape(channels, -1, across * width)
    )
