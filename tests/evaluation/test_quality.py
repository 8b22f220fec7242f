"""What sets of known quality score: every metric must see the fault that it is there for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genus.config import Backbone
from genus.errors import UserError
from genus.evaluation import controls as known
from genus.evaluation import features, quality
from genus.evaluation.reference import make_reference, open_reference
from genus.files import sha256
from tests.evaluation.conftest import Digits


@pytest.fixture(scope="module")
def rows(digits: Digits) -> dict[str, dict[str, Any]]:
    found, sets = known.controls(digits.data, digits.reference, seed=0)
    assert list(found) == list(sets) == list(known.TITLES)
    return {name: row["metrics"] for name, row in found.items()}


@pytest.mark.parametrize("prefix", ["", "pixels_"])
def test_real_images_are_the_best_and_one_image_the_worst(rows: dict[str, dict[str, Any]], prefix: str) -> None:
    for name in ("kid", *(["frechet_distance"] if prefix + "frechet_distance" in rows["copycat"] else [])):
        figures = {row: figure[prefix + name]["value"] for row, figure in rows.items() if prefix + name in figure}
        assert max(figures, key=lambda row: figures[row]) == "one_image"
        assert min(figures, key=lambda row: figures[row]) in ("held_out", "copycat")
    coverage = {row: figure[prefix + "coverage"]["value"] for row, figure in rows.items()}
    assert min(coverage, key=lambda row: coverage[row]) == "one_image"
    assert max(coverage, key=lambda row: coverage[row]) in ("held_out", "copycat")
    assert rows["one_image"][prefix + "recall"]["value"] == 0
    assert rows["one_image"][prefix + "precision"]["value"] == 1  # one good image: precision alone is no quality


def test_each_fault_is_seen_by_its_metric(rows: dict[str, dict[str, Any]]) -> None:
    sharp = {row: figures["high_frequency"] for row, figures in rows.items()}
    assert sharp["blurred"]["high"] < 0.9 and sharp["noisy"]["low"] > 1
    assert sharp["held_out"]["low"] < 1 < sharp["held_out"]["high"]
    assert rows["class_dropped"]["missing_classes"]["value"] == 1
    assert rows["one_image"]["missing_classes"]["value"] == 9
    assert rows["held_out"]["missing_classes"]["value"] == rows["copycat"]["missing_classes"]["value"] == 0
    assert rows["held_out"]["two_sample"]["low"] < 0.5 < rows["gaussian"]["two_sample"]["low"]


def test_only_the_copycat_is_flagged(rows: dict[str, dict[str, Any]]) -> None:
    assert {row for row, figures in rows.items() if figures["memorisation"]["flagged"]} == {"copycat"}
    assert rows["copycat"]["memorisation"]["p_value"] < 1e-6
    assert rows["held_out"]["memorisation"]["p_value"] > 1e-3


def test_every_figure_has_its_n_and_its_interval(rows: dict[str, dict[str, Any]]) -> None:
    for row, figures in rows.items():
        for name, figure in figures.items():
            assert figure["n"] > 0 and "floor" in figure, (row, name)
            # A basic bootstrap interval of a biased metric need not hold its own value, all others must.
            if "frechet" not in name:
                assert figure["low"] <= figure["value"] <= figure["high"], (row, name)


def test_same_samples_same_figures(digits: Digits) -> None:
    samples = np.asarray(digits.data.split("validation"))
    first, again = (quality.quality(samples, digits.data, digits.reference, seed=0) for _ in range(2))
    assert first == again


def test_the_stored_reference_is_the_one_that_was_made(digits: Digits) -> None:
    samples = np.asarray(digits.data.split("validation"))
    made = quality.quality(samples, digits.data, digits.reference, seed=0)
    assert quality.quality(samples, digits.data, open_reference(digits.data, digits.folder), seed=0) == made


def test_features_of_a_stream_do_not_depend_on_its_pieces(digits: Digits) -> None:
    images = np.asarray(digits.data.split("train")[:200])
    whole = digits.reference.views["pixels"].extract(images)
    parts = np.concatenate([digits.reference.views["pixels"].extract(part) for part in np.split(images, 4)])
    assert np.allclose(whole, parts, atol=1e-12)
    # The first component has unit variance over the images that it was fitted to: an eigenvector is one.
    every = features.Components.of(np.asarray(digits.data.split("train")))(np.asarray(digits.data.split("train")))
    covariance = np.cov(every, rowvar=False)
    assert covariance[0, 0] == pytest.approx(1, rel=1e-9) and abs(covariance[0, 1:]).max() < 1e-9


@pytest.mark.parametrize(
    ("samples", "line"),
    [
        (np.zeros((0, 1, 8, 8), np.uint8), "no samples to measure: the set is empty"),
        (np.zeros((9, 1, 4, 4), np.uint8), r"samples have shape \(1, 4, 4\), the data \(1, 8, 8\)"),
        (np.zeros((5, 1, 8, 8), np.uint8), "5 samples are too few"),
    ],
)
def test_unusable_samples_are_one_line(digits: Digits, samples: np.ndarray, line: str) -> None:
    with pytest.raises(UserError, match=line):
        quality.quality(samples, digits.data, digits.reference, seed=0)


def test_a_pretrained_network_is_one_more_set_of_features(digits: Digits, tmp_path: Any) -> None:
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.get_model("shufflenet_v2_x0_5", weights=None).eval()
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    config = Backbone(model="shufflenet_v2_x0_5", weights=str(path), sha256=sha256(path))
    images = np.asarray(digits.data.split("test")[:3])
    x = torch.from_numpy(images).float() / 16
    x = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    mean, deviation = (torch.tensor(part).view(1, 3, 1, 1) for part in (features.MEAN, features.DEVIATION))
    caught: list[torch.Tensor] = []
    network.fc.register_forward_hook(lambda module, inputs, output: caught.append(inputs[0]))
    with torch.inference_mode():
        network((x - mean) / deviation)
    assert np.allclose(features.backbone(config, digits.data.spec)(images), caught[0].numpy(), atol=1e-6)


def test_wrong_backbones_are_one_line(digits: Digits, tmp_path: Any) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    right = {"model": "resnet18", "weights": str(path), "sha256": sha256(path)}
    cases: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {
        "no such file": lambda c: c | {"weights": "nowhere.safetensors"},
        "its SHA-256 is": lambda c: c | {"sha256": "0" * 64},
        "torchvision has no classifier 'resnet19'": lambda c: c | {"model": "resnet19"},
        "not the weights of resnet18": lambda c: c,
    }
    for line, change in cases.items():
        with pytest.raises(UserError, match=line):
            features.backbone(Backbone(**change(right)), digits.data.spec)


def test_coders_are_decodable_rates(digits: Digits) -> None:
    found = known.anchors(digits.data)
    assert set(found) == {"histogram", "png", "webp", "xz"}
    test = np.asarray(digits.data.split("test")).reshape(len(digits.data.split("test")), -1)
    train = np.asarray(digits.data.split("train")).reshape(-1, 64)
    # The histogram by hand, a place at a time.
    bits = 0.0
    for place in range(64):
        counts = dict.fromkeys(range(17), 1)
        for value in train[:, place]:
            counts[int(value)] += 1
        bits -= sum(np.log2(counts[int(value)] / (len(train) + 17)) for value in test[:, place])
    assert found["histogram"]["value"] == pytest.approx(bits / test.size, rel=1e-9)
    assert 1 < found["xz"]["value"] < 17 and found["png"]["n"] == len(test)


def test_make_reference_keeps_what_it_had_when_it_fails(digits: Digits, tmp_path: Any) -> None:
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "old").write_text("here")
    config = Backbone(model="resnet18", weights="nowhere.safetensors", sha256="0" * 64)
    with pytest.raises(UserError, match="no such file"):
        make_reference(digits.reference.judge, digits.data, folder, seed=0, config=config)
    assert (folder / "old").read_text() == "here"
