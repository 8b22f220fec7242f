"""Effort counted: the same with and without gradients, whatever else the machine does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from genus.evaluation.effort import CALL, ELEMENT, OPERATION, Effort


def effort(model: nn.Module, *shape: int) -> Effort:
    x = torch.zeros(shape)
    with Effort() as found:
        model(x)
    return found


@pytest.mark.parametrize("gradients", [False, True])
def test_layers_are_counted_by_their_products_and_what_they_write(gradients: bool) -> None:
    with torch.inference_mode(not gradients):
        linear, twice = (effort(nn.Linear(30, 20), batch, 30) for batch in (7, 14))
        assert linear.growing == pytest.approx(OPERATION * 2 * 7 * 30 * 20 + ELEMENT * 7 * 20)
        assert twice.growing == pytest.approx(2 * linear.growing) and twice.fixed == linear.fixed >= CALL
        found = effort(nn.Conv2d(3, 8, 3, padding=1), 2, 3, 10, 10).growing
        assert found == pytest.approx(OPERATION * 2 * 2 * 8 * 100 * 27 + ELEMENT * 2 * 8 * 100)
        found = effort(nn.Sequential(nn.Flatten(), nn.ReLU()), 5, 4, 3).growing
        assert found == pytest.approx(ELEMENT * 60)  # a view writes nothing


def test_attention_and_recurrent_layers_are_counted_as_a_cpu_has_them() -> None:
    x = torch.zeros(2, 3, 10, 8)
    with torch.inference_mode(), Effort() as found:
        functional.scaled_dot_product_attention(x, x, x)
    products = 2 * 2 * 3 * (10 * 8 * 10 + 10 * 10 * 8)
    assert OPERATION * products < found.growing < OPERATION * products + ELEMENT * 4 * x.numel()
    with torch.inference_mode():
        found = effort(nn.LSTM(8, 16, batch_first=True), 4, 7, 8)
    products = 2 * 4 * 7 * (4 * 16 * 8 + 4 * 16 * 16)
    assert OPERATION * products < found.growing < OPERATION * products + ELEMENT * 20 * 4 * 7 * 16


def test_results_are_what_they_would_be() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)), torch.randn(5, 2, 4, 4)
    with torch.inference_mode():
        plain = model(x)
        with Effort():
            assert torch.equal(model(x), plain)
