"""Layers of equalised learning rate against closed forms, and how far images are halved."""

from __future__ import annotations

import math

import pytest
import torch

from genus.families.gan._equalised import Conv, Deviation, Linear, PixelNorm, doubled, halved


@pytest.mark.parametrize(
    ("full", "sides"),
    [
        ((28, 28), [(7, 7), (14, 14), (28, 28)]),
        ((20, 12), [(10, 6), (20, 12)]),
        ((32, 32), [(4, 4), (8, 8), (16, 16), (32, 32)]),
        ((7, 7), [(7, 7)]),
        ((6, 6), [(6, 6)]),
    ],
)
def test_images_are_halved_to_the_coarsest(full: tuple[int, int], sides: list[tuple[int, int]]) -> None:
    assert halved(*full) == sides
    assert doubled(3, len(sides)) == [3 * 2 ** (len(sides) - 1 - k) for k in range(len(sides))]


def test_layers_start_with_he_s_variance_and_weights_of_variance_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64, 12, 12)
    for layer, given in ((Conv(64, 64, 3), x), (Linear(64, 512), torch.randn(512, 64))):
        made = layer(given)
        made = made[..., 2:-2, 2:-2] if made.ndim == 4 else made  # the border sees zeros
        assert made.var().item() == pytest.approx(2.0, rel=0.1), layer  # √2 makes up for the leaky ReLU
        assert layer.weight.std().item() == pytest.approx(1.0, rel=0.05), layer


@pytest.mark.parametrize("inputs", [8, 128])
def test_a_step_changes_a_weight_by_the_same_share_whatever_the_width(inputs: int) -> None:
    """Of the optimiser's step in w, the layer sees c times as much, and its weights are of size c themselves."""
    layer = Linear(inputs, 3)
    x = torch.ones(1, inputs)
    before = layer(x)
    with torch.no_grad():
        layer.weight += 0.01
    assert (layer(x) - before).mean().item() == pytest.approx(0.01 * inputs * math.sqrt(2 / inputs), rel=1e-3)


def test_a_slow_layer_computes_the_same_and_learns_so_many_times_slower() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    usual = Linear(32, 8)
    slow = Linear(32, 8, slow=0.1)
    with torch.no_grad():
        slow.weight.copy_(usual.weight / 0.1)
    torch.testing.assert_close(usual(x), slow(x))
    with torch.no_grad():
        before = usual(x)
        for layer in (usual, slow):
            layer.weight += 0.01
            layer.bias += 0.01
    torch.testing.assert_close(slow(x) - before, 0.1 * (usual(x) - before), rtol=1e-3, atol=1e-6)


def test_pixel_norm_and_deviation() -> None:
    x = torch.randn(5, 7, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(PixelNorm()(x).square().mean(1), torch.ones(5, 3, 2, dtype=torch.float64))
    spread = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)[:, None, None, None]
    scales = torch.tensor([1.0, 3.0], dtype=torch.float64)[:, None, None].expand(2, 3, 3)
    made = Deviation()(spread * scales)  # standard deviations 1 and 3: 2 in the mean
    assert made.shape == (4, 3, 3, 3)
    torch.testing.assert_close(made[:, 2], torch.full((4, 3, 3), 2.0, dtype=torch.float64))
    assert Deviation()(torch.ones(4, 2, 3, 3))[:, 2].max() < 1e-3, "one image, many times: the critic is told"
