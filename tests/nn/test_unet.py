"""The networks of the score families: silent at first, and attentive to all that they are told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from genus.nn.unet import Dense, UNet


def network(kind: str, aside: int = 0) -> tuple[nn.Module, Tensor]:
    """A small one, and two examples for it."""
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(1)
    if kind == "dense":
        return Dense(3, 16, aside=aside), torch.randn(2, 3, 1, 1, generator=draws)
    return UNet((2, 12, 8), 8, (1, 1), 16, aside), torch.randn(2, 2, 12, 8, generator=draws)


def stirred(kind: str, aside: int = 0) -> tuple[nn.Module, Tensor]:
    """The same with every parameter moved: the layers that start at zero say something."""
    model, x = network(kind, aside)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return model, x


@pytest.mark.parametrize("kind", ["dense", "unet"])
def test_what_it_is_told_counts_for_each_example_alone(kind: str) -> None:
    model, x = stirred(kind, aside=2)
    level, told = torch.tensor([-1.0, 0.5]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    said = model(x, level, told)
    assert said.shape == x.shape
    for other in (model(x, level + torch.tensor([0, 1.0]), told), model(x, level, told * torch.tensor([[1.0], [2.0]]))):
        torch.testing.assert_close(other[0], said[0])
        assert (other[1] - said[1]).abs().max() > 1e-3
    alone = torch.cat([model(*(part[k : k + 1] for part in (x, level, told))) for k in range(2)])
    torch.testing.assert_close(alone, said, rtol=1e-4, atol=1e-5)


def test_with_nothing_aside_there_is_nothing_more_to_learn() -> None:
    plain, told = (dict(network("unet", aside)[0].named_parameters()) for aside in (0, 3))
    assert set(told) - set(plain) == {"whole.0.tell.weight"}
    assert {name for name in plain if plain[name].shape != told[name].shape} == {"embed.0.weight"}


def test_an_untrained_unet_says_its_last_bias() -> None:
    model, x = network("unet")
    bias = nn.functional.pixel_shuffle(model.leave.bias[None, :, None, None].expand(2, -1, 6, 4), 2)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(model(x, torch.zeros(2)), bias)


def test_every_pixel_of_a_unet_sees_every_other() -> None:
    model, x = stirred("unet")
    x = x[:1].requires_grad_()
    (slope,) = torch.autograd.grad(model(x, torch.zeros(1))[0, :, 0, 0].sum(), x)
    assert (slope != 0).all()
