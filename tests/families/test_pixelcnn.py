"""PixelCNN: the order of its dependencies, an exact density, and a sampler that equals the naive loop."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.autoregressive.pixelcnn import PixelCNN
from genus.nn import logistic


def _model(spec: DataSpec, **params) -> PixelCNN:
    """A tiny model in float64, every weight random: zero and small initial values would hide dependencies."""
    torch.manual_seed(0)
    model = PixelCNN(spec, **({"channels": 6, "layers": 3, "mixtures": 2, "head": 8} | params)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _images(spec: DataSpec, n: int) -> torch.Tensor:
    levels = torch.randint(spec.levels, (n, *spec.shape), generator=torch.Generator().manual_seed(1))
    return spec.to_float(levels).double()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@pytest.mark.parametrize(("shape", "block"), [((1, 6, 6), 2), ((1, 4, 4), 1), ((3, 4, 4), 2), ((3, 3, 3), 1)], ids=str)
def test_a_value_depends_on_exactly_the_earlier_ones(shape, block):
    """The Jacobian of the conditionals is strictly lower triangular, and full below the diagonal."""
    spec = DataSpec(shape, 17)
    model = _model(spec, block=block)

    def conditionals(x: torch.Tensor) -> torch.Tensor:
        """A mix of each value's 3K mixture parameters, in the order of the factorisation: [P * D]."""
        found = model.conditionals(x)  # [D, 3K, P]
        return (found * torch.linspace(0.5, 1.5, found.shape[1], dtype=x.dtype).view(1, -1, 1)).sum(1).T.flatten()

    influence = torch.zeros(spec.dims, spec.dims, dtype=torch.float64)
    for x in F.pixel_unshuffle(_images(spec, 3), block).split(1):  # several: a ReLU may block one image's path
        jacobian = torch.autograd.functional.jacobian(conditionals, x)[:, 0]  # [P * D, D, rows, columns]
        influence += jacobian.abs().permute(0, 2, 3, 1).flatten(1)  # inputs in the same order
    earlier = torch.ones_like(influence).tril(-1).bool()
    assert (influence[~earlier] == 0).all()
    assert (influence[earlier] > 0).all()


def test_the_receptive_field_has_no_holes():
    """On a 14 x 14 grid the last position sees all rows and columns up to 2 + the sum of dilations away."""
    model = _model(DataSpec((1, 14, 14), 17), block=1, layers=3)
    x = _images(model.spec, 1).requires_grad_()
    last = model.conditionals(x)[..., -1].sum()
    (gradient,) = torch.autograd.grad(last, x)
    reach = 2 + 1 + 2 + 4
    rows = (gradient[0, 0] != 0).any(1).nonzero().flatten().tolist()
    own_row = (gradient[0, 0, -1] != 0).nonzero().flatten().tolist()
    assert rows == list(range(13 - reach, 14))
    assert own_row == list(range(13 - reach, 13))


def test_probabilities_of_all_images_sum_to_one():
    spec = DataSpec((1, 2, 4), 2)
    model = _model(spec)
    levels = torch.tensor(list(itertools.product(range(2), repeat=8))).view(-1, 1, 2, 4)
    log_p = model.log_prob(Batch(spec.to_float(levels).double()), generator=_generator())
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)  # both levels are exact in float32


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4)], ids=str)
def test_log_prob_is_the_sum_over_values_and_the_loss_its_mean(shape):
    spec = DataSpec(shape, 256)
    model = _model(spec)
    x = _images(spec, 3)
    folded = F.pixel_unshuffle(x, 2)
    parameters = model.conditionals(folded).unflatten(2, (3, 2, 2))  # [D, 3K, B, rows, columns]
    by_hand = torch.zeros(3, dtype=torch.float64)
    for j, b, r, c in itertools.product(range(model.values), range(3), range(2), range(2)):
        by_hand[b] += logistic.log_prob(parameters[j, None, :, b, r, c], folded[b, j, r, c][None], 256)[0]
    log_p = model.log_prob(Batch(x), generator=_generator())
    assert torch.allclose(log_p, by_hand, rtol=0, atol=1e-9)
    terms = model.loss(Batch(x), generator=_generator())
    assert terms["loss"].item() == pytest.approx(-log_p.mean().item(), abs=1e-9)
    bits = -log_p.mean().item() / (math.prod(shape) * math.log(2))
    assert terms["bits_per_dim"].item() == pytest.approx(bits, abs=1e-9)


@torch.no_grad()
def _naive_sample(model: PixelCNN, n: int, generator: torch.Generator, seen: list[torch.Tensor]) -> torch.Tensor:
    """One full forward pass a value."""
    x = torch.zeros(n, model.values, model.rows, model.columns, dtype=torch.float64)
    for r, c, j in itertools.product(range(model.rows), range(model.columns), range(model.values)):
        all_parameters = model.conditionals(x).unflatten(2, (n, model.rows, model.columns))
        parameters = all_parameters[j, None, :, :, r, c]
        seen.append(parameters)
        x[:, j, r, c] = logistic.sample(parameters, model.spec.levels, generator=generator)[0]
    return F.pixel_shuffle(x, model.block)


@pytest.mark.parametrize(
    ("shape", "levels", "block"), [((1, 12, 10), 256, 2), ((1, 5, 5), 17, 1), ((3, 4, 6), 256, 2)], ids=str
)
def test_the_sampler_equals_the_naive_loop(shape, levels, block, monkeypatch):
    """Equal stored bytes; the conditionals agree to 1e-9 in float64 (sums are taken in another order)."""
    spec = DataSpec(shape, levels)
    model = _model(spec, block=block)
    naive: list[torch.Tensor] = []
    expected = _naive_sample(model, 3, _generator(), naive)

    cached: list[torch.Tensor] = []
    draw = logistic.sample

    def recording(parameters, *args, **kwargs):
        cached.append(parameters.clone())
        return draw(parameters, *args, **kwargs)

    monkeypatch.setattr(logistic, "sample", recording)
    found = model.sample(3, generator=_generator())
    assert len(cached) == len(naive) == spec.dims
    assert max((a - b).abs().max().item() for a, b in zip(cached, naive, strict=True)) < 1e-9
    assert torch.equal(spec.to_stored(found), spec.to_stored(expected))
    assert spec.to_stored(found).unique().numel() > 2  # the draws are not stuck at the edges


@pytest.mark.parametrize(("shape", "block"), [((1, 12, 10), 2), ((3, 5, 5), 1)], ids=str)
def test_sampling_an_image_costs_one_forward_pass(shape, block):
    """Multiplications are counted, which are the same on every machine; the naive loop has a pass a value."""
    model = _model(DataSpec(shape), block=block)

    def multiplications(work: Callable[[], torch.Tensor]) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    folded = F.pixel_unshuffle(_images(model.spec, 1), block)
    one_pass = multiplications(lambda: model.conditionals(folded))
    assert multiplications(lambda: model.sample(1, generator=_generator())) == one_pass > 0


def test_a_vector_is_drawn_value_by_value():
    """The sampler's draws are those of conditionals that are computed anew for every value."""
    spec = DataSpec((3, 1, 1), 17)
    model = _model(spec)
    generator, x = _generator(), torch.zeros(5, 3, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        for j in range(3):
            x[:, j, 0, 0] = logistic.sample(model.conditionals(x)[j, None], 17, generator=generator)[0]
    assert torch.equal(model.sample(5, generator=_generator()), x)


def test_sizes_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="7x8 image cannot be cut into 2x2 blocks"):
        PixelCNN(DataSpec((1, 7, 8)))
    with pytest.raises(ValueError, match="continuous"):
        PixelCNN(DataSpec((1, 8, 8), levels=0))
