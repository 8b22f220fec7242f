"""MADE: who sees whom, by gradient; number by number it says the same as all at once."""

from __future__ import annotations

import pytest
import torch

from genus.nn.made import MADE


def random_made(dims: int, hidden: int, pitch: float, labels: int = 0) -> MADE:
    torch.manual_seed(0)
    made = MADE(dims, hidden, 3, pitch=pitch, labels=labels).double()
    for parameter in (made.last, made.last_bias, *((made.label_last,) if labels else ())):
        parameter.data.normal_()
    return made


@pytest.mark.parametrize("pitch", [0.0, 2.0])
@pytest.mark.parametrize(("dims", "hidden"), [(1, 4), (2, 8), (6, 40), (9, 5)])
def test_outputs_see_what_is_before_them_and_no_more(dims: int, hidden: int, pitch: float) -> None:
    made = random_made(dims, hidden, pitch)
    x = torch.randn(dims, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: made(x[None])[0], x)  # [D, outputs, D]
    sees = jacobian.abs().sum(1) > 0
    assert not sees.triu().any(), "number i may not depend on itself nor on what follows"
    if hidden > 4 * dims:
        assert sees[torch.tril_indices(dims, dims, -1).unbind()].all(), "and does on all before it"


@pytest.mark.parametrize("labels", [0, 3])
def test_unrolled_it_is_its_own_fixed_point(labels: int) -> None:
    """solve() gives x_i = y_i + its first parameter: the x that comes out satisfies it all at once, with gradients."""
    made = random_made(5, 30, 2.0, labels)
    label = torch.tensor([2, 0, 1, 2]) if labels else None
    y = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    x, told = made.unroll(y, lambda y, told: y + told[:, 0], label)
    assert torch.allclose(told, made(x, label), rtol=0, atol=1e-12)
    assert torch.allclose(x, y + made(x, label)[..., 0], rtol=0, atol=1e-12)
    if label is not None:
        assert ((made(x, (label + 1) % 3) - told).abs() > 1e-6).all(), "those of the first number see it as well"
    x.sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
