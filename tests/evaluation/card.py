"""An example of all that a report can show: invented figures of five models, and pictures drawn to go with them.

The card is made by ``scorecard`` itself, from records as the stages leave them, so that it has the shape of a real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genus.evaluation import claims
from genus.evaluation.scorecard import scorecard

ROOT = Path(__file__).parents[2]
DATASET = "fashion-mnist"
CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]
PAPERS = {
    "autoregressive/pixelcnn": "van den Oord et al. 2016, arXiv:1606.05328; Salimans et al. 2017, arXiv:1701.05517",
    "flows/glow": "Kingma & Dhariwal 2018, arXiv:1807.03039",
    "vae/vae": "Kingma & Welling 2013, arXiv:1312.6114",
    "gan/gan": "Radford et al. 2015, arXiv 1511.06434",
    "score/ncsn": "Song & Ermon 2019, 1907.05600; 2020, 2006.09011",
}
# family: bits/dim and kind, Fréchet share, KID, recall, ms a sample, calls, training images/s, parameters
FIGURES: dict[str, tuple[Any, ...]] = {
    "autoregressive/pixelcnn": (3.112, "exact", 0.214, 0.041, 0.61, 21.4, 784, 118, 126_940),
    "flows/glow": (3.391, "dequantised", 0.482, 0.092, 0.47, 1.92, 1, 402, 412_316),
    "vae/vae": (3.724, "elbo", 0.391, 0.083, 0.38, 0.21, 1, 1_655, 1_771_234),
    "gan/gan": (None, "", 0.118, 0.024, 0.22, 0.34, 1, 1_210, 460_801),
    "score/ncsn": (None, "", 0.156, 0.031, 0.58, 48.7, 196, 388, 365_122),
}


def figure(value: float, spread: float = 0.05, n: int = 10_000, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread), "n": n} | more


def records() -> dict[str, dict[str, Any]]:
    """The five models, as evaluation and probe leave them."""
    return {f"{DATASET}-{family.split('/')[1]}": _record(family, place) for place, family in enumerate(FIGURES)}


def failed(text: str = "train: step 13: loss is nan") -> dict[str, Any]:
    return {"name": f"{DATASET}-realnvp", "family": "flows/realnvp", "dataset": DATASET, "failure": text}


def example(folder: Path, more: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The card, with ``more`` models; its pictures are drawn into ``folder``."""
    draw(folder)
    return card(records() | (more or {}))


def card(models: dict[str, dict[str, Any]], datasets: dict[str, Any] | None = None) -> dict[str, Any]:
    about = "one good model of each family on Fashion-MNIST"
    return scorecard(about, models, datasets or {DATASET: dataset()}, claims.read(ROOT / "claims.yaml"))


def dataset() -> dict[str, Any]:
    anchors = {"histogram": 4.59, "png": 5.19, "webp": 4.05, "xz": 3.87}
    texts = (
        "histogram of each pixel over train",
        "PNG, each image by itself",
        "WebP, as one mosaic",
        "xz, the whole split",
    )
    return {
        "counts": {"train": 54_000, "validation": 6_000, "test": 10_000},
        "judge": {"accuracy": 0.9043, "control": 434.8, "floor": 0.52},
        "anchors": {
            name: {"value": value, "n": 10_000, "text": text}
            for (name, value), text in zip(anchors.items(), texts, strict=True)
        },
        "controls": {
            "held_out": _control("held-out real images: the best there is", 0.0012, 0.0001, 0.97, 0.97, 0.51, 0, 1.0),
            "gaussian": _control("a Gaussian fitted to the pixels", 1.0, 0.31, 0.08, 0.11, 0.999, 0, 1.62),
            "blurred": _control("real images, blurred (σ = 1 pixel)", 0.33, 0.11, 0.83, 0.55, 0.98, 0, 0.21),
            "noisy": _control("real images with noise", 0.57, 0.2, 0.35, 0.41, 0.997, 0, 3.4),
            "class_dropped": _control("real images without one class", 0.021, 0.003, 0.97, 0.88, 0.55, 1, 1.01),
            "one_image": _control("one real image, again and again", 2.9, 0.9, 1.0, 0.0, 1.0, 9, 0.8),
            "copycat": _control("training images, returned as samples", 0.0011, 0.0001, 0.97, 0.97, 0.5, 0, 1.0, 1.0),
        },
    }


def _control(
    title: str,
    share: float,
    kid: float,
    precise: float,
    recall: float,
    told: float,
    gone: int,
    fine: float,
    near: float = 0.5,
) -> dict[str, Any]:
    return {"title": title, "metrics": _sample_metrics(share, kid, precise, recall, told, gone, fine, near)}


def _sample_metrics(
    share: float, kid: float, precise: float, recall: float, told: float, gone: int, fine: float, near: float
) -> dict[str, Any]:
    expected = [0.1] * 10
    shares = np.full(10, 0.1) * (1 + 0.4 * np.sin(np.arange(10) * (1 + share)))
    shares[[8, 5, 9, 1, 3, 7, 0, 2, 4][:gone]] = 0.002
    shares /= shares.sum()
    distance = 434.8 * share
    found = {
        "frechet_distance": figure(
            distance, 0.04, floor=0.52, floor_n=10_000, relative=share, control=434.8, kind="judge"
        ),
        "kid": figure(kid, 0.06, floor=0.00002, kind="judge"),
        "precision": figure(precise, 0.01, 5_000, floor=0.97, kind="judge"),
        "recall": figure(recall, 0.02, 5_000, floor=0.97, kind="judge"),
        "density": figure(precise * 0.98, 0.02, 5_000, floor=1.0, kind="judge"),
        "coverage": figure((precise + recall) / 2, 0.02, 5_000, floor=0.96, kind="judge"),
        "pixels_frechet_distance": figure(
            distance * 2, 0.04, floor=1.1, relative=share * 0.8, control=1_087.0, kind="pixels"
        ),
        "pixels_kid": figure(kid * 0.7, 0.06, floor=0.00002, kind="pixels"),
        "pixels_precision": figure(precise * 0.9, 0.01, 5_000, floor=0.9, kind="pixels"),
        "two_sample": figure(told, 0.01, 4_000, floor=0.5, kind="judge and pixels"),
        "missing_classes": {"value": gone, "low": gone, "high": gone, "n": 10_000, "floor": 0, "kind": "judge"}
        | {"classes": [CLASSES[i] for i in [8, 5, 9, 1, 3, 7, 0, 2, 4][:gone]], "names": CLASSES}
        | {"histogram": shares.tolist(), "expected": expected},
        "memorisation": figure(near, 0.04, 2_000, floor=0.5, kind="pixels", p_value=0.41, flagged=near > 0.6),
        "high_frequency": figure(fine, 0.02, floor=1.0, kind="pixels"),
    }
    return found


def _record(family: str, place: int) -> dict[str, Any]:
    bits, kind, share, kid, recall, ms, calls, speed, parameters = FIGURES[family]
    blur = 0.62 if kind == "elbo" else 0.97
    metrics = _sample_metrics(
        share, kid, 0.9 - share * 0.7, recall, 0.7 + share / 2, int(family == "gan/gan"), blur, 0.5
    )
    metrics |= {
        "nfe": {"value": calls, "n": 1},
        "trained_share": {"value": 1.0 if family != "gan/gan" else 0.63, "n": 1},
        "noise_dims": {"value": 784 if kind != "elbo" else 32, "n": 1},
    }
    if bits:
        metrics["bits_per_dim"] = figure(bits, 0.004, kind=kind)
    if kind == "dequantised":
        metrics |= {"latent_share": {"value": 1.0, "n": 1}, "inverse_error": {"value": 2.4e-5, "n": 500}}
    if kind == "elbo":
        points = [{"k": k, "value": 3.724 - 0.032 * np.log2(k) / 6 * (2 - np.log2(k) / 6)} for k in (1, 4, 16, 64)]
        metrics["iwae_bits_per_dim"] = figure(3.692, 0.004, kind="iwae-64", gap=figure(0.032, 0.1), points=points)
        metrics["latent_share"] = {"value": 32 / 784, "n": 1}
    curve_ms = []
    if calls > 1:
        steps = (0.1, 0.25, 0.5, 1.0) if family.startswith("score") else ()
        metrics["curve"] = {
            "points": [
                {"knobs": {"steps": round(calls * s)}, "calls": round(calls * s)}
                | {"relative": share / s**0.8, "low": share / s**0.8 * 0.95, "high": share / s**0.8 * 1.06, "n": 2_000}
                for s in steps[:-1]
            ]
        }
        if family.startswith("score"):
            metrics["ode_bits_per_dim"] = figure(3.301, 0.006, 1_000, kind="ode")
        curve_ms = [ms * s for s in steps[:-1]]
    timing = {
        "train_images_per_s": float(speed),
        "train_seconds": 85.2,
        "sample_ms": ms,
        "sample_ms_1": ms * 4.2,
        "sample_ms_64": ms * 1.02,
        "peak_memory_mb": 512.0 + 40 * place,
        "curve_sample_ms": curve_ms,
        "probe_curve_seconds": [2.1, 4.2, 6.4, 8.6],
    }
    if bits:
        timing["likelihood_ms"] = 2.1 + place
    return {
        "name": f"{DATASET}-{family.split('/')[1]}",
        "family": family,
        "paper": PAPERS[family],
        "dataset": DATASET,
        "parameters": parameters,
        "steps": 1_500,
        "seed": 0,
        "budget": 1,
        "sha256": "9f2c" * 16,
        "metrics": metrics,
        "timing": timing,
        "history": _history(family, place),
        "probe": _probe(family, place, share, parameters),
    }


def _history(family: str, place: int) -> dict[str, list[float]]:
    random = np.random.default_rng(place)
    steps = np.arange(1, 1_501, 5)
    fall = 2_100 + 2_400 * np.exp(-steps / 160) + random.normal(0, 45, len(steps))
    found: dict[str, Any] = {"step": steps, "learning_rate": 0.002 * (1 - steps / 1_600), "grad_norm": 1 + 0 * steps}
    if family.startswith("gan"):
        wobble = random.normal(0, 0.08, len(steps)).cumsum() / 6
        found |= {
            "critic_loss": 0.62 + wobble * 0.5,
            "generator_loss": 0.85 - wobble,
            "critic_accuracy": 0.6 + 0 * steps,
        }
    elif family.startswith("vae"):
        kl = 18 + 20 * (1 - np.exp(-steps / 300)) + random.normal(0, 0.7, len(steps))
        found |= {"loss": fall, "kl": kl, "reconstruction": fall - kl, "bits_per_dim": fall / 543}
    else:
        found |= {"loss": fall, "bits_per_dim": fall / 543}
    return {name: [float(value) for value in values] for name, values in found.items()}


def _probe(family: str, place: int, share: float, parameters: int) -> dict[str, Any]:
    gan = family.startswith("gan")
    base = {"seed": 0, "learning_rate": 1.0, "width": 1.0, "batch": 1.0, "outliers": 0.0, "size": 0, "params": []}
    rates = (0.1, 0.3, 1.0, 3.0, 10.0)
    jobs = []
    for rate in rates:
        quality = share * (1.6 + 1.1 * np.log10(rate) ** 2 * (1 + place % 3))
        broken = rate == 10.0 and place in (1, 3)
        jobs.append(
            {"job": base | {"learning_rate": rate}, "quality": None if broken else quality}
            | {"failed": "step 7: loss is nan" if broken else None}
        )
    widths = [
        {
            "width": w,
            "parameters": int(parameters / 8 * w**1.8),
            "flops": 2e6 * w**1.9,
            "quality": share * 1.7 * w**-0.4,
        }
        | {"coverage": 0.5, "missing_classes": 0}
        for w in (0.5, 1.0, 2.0)
    ]
    vary = {}
    if family.startswith("vae"):
        points = [(None, 38.0, 2_060.0), (0.25, 61.0, 2_031.0), (4.0, 14.0, 2_122.0), (16.0, 3.1, 2_240.0)]
        vary["beta"] = [
            {"value": v, "quality": share, "failed": None, "terms": {"kl": kl, "reconstruction": r}}
            for v, kl, r in points
        ]
    two_d = {}
    if not gan:
        two_d = {
            shape: {"kl": figure(0.03 * (1 + place) * (1 + at), 0.1, 10_000)}
            for at, shape in enumerate(("rings", "moons"))
        }
    share_of_places = 0.4 if family.startswith("flows") else 1.0
    places = [
        {"module": "BatchNorm2d", "where": "coupling.net", "broken": ""},
        {"module": "Dropout", "where": "inverse", "broken": "the inverse is no inverse"},
    ]
    return {
        "curve": [{"step": s, "quality": share * (1.5 + 300 / s)} for s in (100.0, 200.0, 300.0, 400.0)],
        "stability": {
            "diverged": {
                "value": 0.1 if gan else 0.0,
                "low": 0.02 if gan else 0.0,
                "high": 0.4 if gan else 0.28,
                "n": 10,
            },
            "spread": {
                "value": 0.31 if gan else 0.05 + 0.02 * place,
                "low": 0.02,
                "high": 0.45 if gan else 0.2,
                "n": 5,
            },
            "spikes": figure(0.4 + place, 0.6, 5),
            "gradient_ratio": figure(2.4 + 1.7 * place, 0.2, 5),
            "usable_learning_rates": {"value": 1.0, "low": 1.0, "high": 2.0, "n": 5} if place != 3 else None,
            "small_batch_cost": figure(1.1 + 0.9 * gan, 0.2, 5),
            "small_batch_spread": figure(0.1 + 0.2 * gan, 0.6, 5),
            "outlier_cost": figure(1.3 if place == 1 else 1.05, 0.1, 5),
            "outlier_pull": figure(4.8 if place == 1 else 1.6, 0.1, 5),
        },
        "capacity": {
            "flops": {"value": 2.1e7 * (1 + place), "n": 1},
            "slope": {"value": 0.82, "low": None, "high": None, "n": 3, "points": widths},
            "at_equal_parameters": figure(share * 1.6, 0.1, 3),
            "resolution_cost": {"value": 1.0 + 0.2 * place, "low": None, "high": None, "n": 3}
            | {"points": [{"size": s, "quality": share * (1 + s / 40 * (1 + place / 4))} for s in (8, 14, 28)]},
        },
        "vary": vary,
        "constraints": {
            "free_places": {"value": share_of_places, "low": share_of_places, "high": share_of_places, "n": 10}
            | {"places": places if share_of_places < 1 else []},
            "jacobian": {"value": 3e-6, "n": 8} if family.startswith("flows") else None,
            "networks": {"value": 2 if gan else 1, "n": 1},
        },
        "jobs": jobs,
        "two_d": two_d,
    }


# Pictures


def draw(folder: Path) -> None:
    """Pixel pictures of things to wear, worse or better drawn, and of densities."""
    random = np.random.default_rng(0)
    _save(folder / DATASET / "real.png", _sheet([garment(random) for _ in range(64)], 8))
    _save(folder / DATASET / "controls.png", _sheet([garment(random) for _ in range(56)], 14))
    _save(folder / DATASET / "copycat.png", _sheet([garment(random) for _ in range(10)], 10))
    for place, family in enumerate(FIGURES):
        home = folder / f"{DATASET}-{family.split('/')[1]}"
        _save(home / "samples.png", _sheet([worn(garment(random), place, random) for _ in range(64)], 8))
        pairs = [garment(random) for _ in range(8)]
        if place in (1, 2):
            _save(home / "reconstruction.png", _sheet([*pairs, *(worn(image, place, random) for image in pairs)], 8))
            rows = [a + (b - a) * t for a, b in zip(pairs[:4], pairs[4:], strict=True) for t in np.linspace(0, 1, 10)]
            _save(home / "interpolation.png", _sheet([worn(image, place, random) for image in rows], 10))
        if place == 4:
            rows = [image + random.normal(0, s, image.shape) for image in pairs[:4] for s in np.linspace(2, 0, 10) ** 2]
            _save(home / "trajectory.png", _sheet(rows, 10))
        _save(home / "nearest.png", _sheet([*(worn(image, place, random) for image in pairs), *pairs], 8))
        if not family.startswith("gan"):
            for shape in ("rings", "moons"):
                _save(home / f"two_d-{shape}-truth.png", density(shape, 0.0))
                _save(home / f"two_d-{shape}.png", density(shape, 0.06 + 0.05 * place))


def garment(random: np.random.Generator) -> np.ndarray:
    """A shirt, trousers, a dress, a shoe or a bag: [28, 28] in [0, 1]."""
    y, x = np.mgrid[0:28, 0:28] - 13.5
    kind, wide, shade = random.integers(5), random.uniform(0.85, 1.1), random.uniform(0.45, 0.95)
    x = np.abs(x) / wide
    if kind == 0:
        shape = (x < 6) & (np.abs(y) < 10) | (x < 12 - (y + 9) * 0.35) & (y > -10) & (y < -2)
        shape &= ~((x < 2.5) & (y < -8.5))
    elif kind == 1:
        shape = (x < 6) & (np.abs(y) < 12) & ~((x < 1 + (y + 5) * 0.1) & (y > -5))
    elif kind == 2:
        shape = (x < 3.2 + np.maximum(0, y + 3) * 0.35) & (np.abs(y) < 12)
    elif kind == 3:
        side = np.mgrid[0:28, 0:28][1] - 13.5
        shape = (y > -1) & (y < 6) & (np.abs(side) < 12) & (y > side * -0.25 - 3 + np.maximum(0, -side) * 0.1)
        shape |= (side > 5) & (side < 11) & (y > -6) & (y < 6)
    else:
        shape = (x < 11) & (y > -3) & (y < 9) | (np.abs(np.hypot(x, y + 3) - 6) < 1) & (y < -3)
    texture = 1 + 0.18 * np.sin(x * random.uniform(0.3, 1.6)) * np.cos(y * random.uniform(0.2, 1.2))
    return shape * shade * texture + shape * random.normal(0, 0.05, shape.shape)


def worn(image: np.ndarray, place: int, random: np.random.Generator) -> np.ndarray:
    """What a model makes of it: speckles, holes, blur, crisp but bent, or grain."""
    from scipy import ndimage

    if place == 0:
        return image * (random.random(image.shape) > 0.06) + 0.3 * (random.random(image.shape) > 0.985)
    if place == 1:
        return ndimage.gaussian_filter(image, 0.6) + ndimage.gaussian_filter(random.normal(0, 0.5, image.shape), 1.2)
    if place == 2:
        return ndimage.gaussian_filter(image, 1.5)
    if place == 3:
        return np.roll(image, random.integers(-2, 3), random.integers(2))
    return image + random.normal(0, 0.06, image.shape) * (image > 0)


def density(shape: str, error: float) -> np.ndarray:
    """A density on [-1, 1]², blurred by ``error``, in blues: uint8 [112, 112, 3]."""
    y, x = np.mgrid[1:-1:112j, -1:1:112j]
    width = 0.06 + error
    if shape == "rings":
        shade = sum(np.exp(-(((np.hypot(x, y) - r) / width) ** 2)) for r in (0.35, 0.8))
    else:
        upper = np.exp(-(((np.hypot(x + 0.25, y + 0.1) - 0.5) / width) ** 2)) * (y > -0.1)
        lower = np.exp(-(((np.hypot(x - 0.25, y - 0.1) - 0.5) / width) ** 2)) * (y < 0.1)
        shade = upper + lower
    shade = np.clip(shade, 0, 1)[..., None]
    return (np.array([68, 1, 84]) * (1 - shade) + np.array([253, 231, 37]) * shade).astype(np.uint8)


def _sheet(images: list[np.ndarray], columns: int, zoom: int = 2) -> np.ndarray:
    rows = [np.concatenate(images[start : start + columns], 1) for start in range(0, len(images), columns)]
    picture = (np.concatenate(rows).clip(0, 1) * 255).astype(np.uint8)
    return picture.repeat(zoom, 0).repeat(zoom, 1)


def _save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
