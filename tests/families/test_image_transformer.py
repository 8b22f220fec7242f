"""Image Transformer: the order of its dependencies, an exact density, and a sampler that equals the naive loop."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.autoregressive.image_transformer import ImageTransformer
from genus.nn import logistic
from genus.nn.raster import Attention


def _model(spec: DataSpec, **params) -> ImageTransformer:
    """A tiny model in float64, every weight random: zero and small initial values would hide dependencies."""
    torch.manual_seed(0)
    small = {"channels": 8, "layers": 2, "heads": 2, "above": 2, "mixtures": 2, "head": 16}
    model = ImageTransformer(spec, **(small | params)).double().eval()
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
        jacobian = torch.autograd.functional.jacobian(conditionals, x)[:, 0]  # [P * D, D, R, W]
        influence += jacobian.abs().permute(0, 2, 3, 1).flatten(1)  # inputs in the same order
    earlier = torch.ones_like(influence).tril(-1).bool()
    assert (influence[~earlier] == 0).all()
    assert (influence[earlier] > 0).all()


def test_attention_is_softmax_over_the_keys_within_reach():
    """Equal to a loop over queries that picks its keys by their places, with the biases looked up one by one."""
    rows, columns, heads, above, d = 4, 3, 2, 1, 2
    torch.manual_seed(0)
    attention = Attention(heads * d, heads, above, rows, columns).double()
    with torch.no_grad():
        attention.bias.add_(torch.randn_like(attention.bias))
    x = torch.randn(1, rows, columns, heads * d, dtype=torch.float64, generator=_generator())
    projected = (x @ attention.qkv.weight.T).view(rows, columns, 3, heads, d)
    expected = torch.zeros(rows, columns, heads, d, dtype=torch.float64)
    for r, c, h in itertools.product(range(rows), range(columns), range(heads)):
        places = [
            (i, j) for i, j in itertools.product(range(max(0, r - above), r + 1), range(columns)) if i < r or j <= c
        ]
        scores = torch.stack(
            [
                projected[r, c, 0, h] @ projected[i, j, 1, h] / math.sqrt(d)
                + attention.bias.view(heads, columns, above + 1, columns)[h, c, i - r + above, j]
                for i, j in places
            ]
        )
        values = torch.stack([projected[i, j, 2, h] for i, j in places])
        expected[r, c, h] = scores.softmax(0) @ values
    expected = expected.flatten(2) @ attention.out.weight.T
    assert (attention(x)[0] - expected).abs().max() < 1e-12


def test_attention_reaches_its_rows_and_no_further():
    """One layer on a 6 x 4 grid: the last position sees ``above`` rows, plus two of the embedding's."""
    model = _model(DataSpec((1, 7, 4), 17), block=1, layers=1, above=1)
    x = _images(model.spec, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(model.conditionals(x)[..., -1].sum(), x)
    assert (gradient[0, 0] != 0).any(1).nonzero().flatten().tolist() == [3, 4, 5, 6]


def test_probabilities_of_all_images_sum_to_one():
    spec = DataSpec((1, 2, 4), 2)
    model = _model(spec)
    levels = torch.tensor(list(itertools.product(range(2), repeat=8))).view(-1, 1, 2, 4)
    log_p = model.log_prob(Batch(spec.to_float(levels).double()), generator=_generator())
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)  # both levels are exact in float32


@torch.no_grad()
def _naive_sample(model: ImageTransformer, n: int, generator: torch.Generator, seen: list) -> torch.Tensor:
    """One full forward pass a value."""
    net = model.network
    x = torch.zeros(n, net.values, net.rows, net.columns, dtype=net.place.dtype)
    for r, c, j in itertools.product(range(net.rows), range(net.columns), range(net.values)):
        all_parameters = model.conditionals(x).unflatten(2, (n, net.rows, net.columns))
        parameters = all_parameters[j, None, :, :, r, c]
        seen.append(parameters)
        x[:, j, r, c] = logistic.sample(parameters, model.spec.levels, generator=generator)[0]
    return F.pixel_shuffle(x, model.block)


@pytest.mark.parametrize(
    ("shape", "levels", "block", "dtype"),
    [
        ((1, 12, 10), 256, 2, torch.float64),
        ((1, 5, 5), 17, 1, torch.float64),
        ((3, 4, 6), 256, 2, torch.float64),
        ((1, 8, 8), 256, 2, torch.float32),
    ],
    ids=str,
)
def test_the_cached_sampler_equals_the_naive_loop(shape, levels, block, dtype, monkeypatch):
    """Equal stored bytes; the conditionals agree to 1e-9 in float64, 1e-5 in float32 (sums come in another order)."""
    spec = DataSpec(shape, levels)
    model = _model(spec, block=block).to(dtype)
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
    error = max((a - b).abs().max().item() for a, b in zip(cached, naive, strict=True))
    assert error < (1e-9 if dtype == torch.float64 else 1e-5)
    assert torch.equal(spec.to_stored(found), spec.to_stored(expected))
    assert spec.to_stored(found).unique().numel() > 2  # the draws are not stuck at the edges


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        (DataSpec((1, 7, 8)), {}, "7x8 image cannot be cut into 2x2 blocks"),
        (DataSpec((1, 8, 8), levels=0), {}, "continuous"),
        (DataSpec((2, 1, 1)), {}, "not for vector"),
        (DataSpec((1, 8, 8)), {"channels": 30, "heads": 4}, "30 is none of 4"),
    ],
)
def test_what_cannot_work_is_named(spec, options, says):
    with pytest.raises(ValueError, match=says):
        ImageTransformer(spec, **options)
