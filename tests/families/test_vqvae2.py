"""VQ-VAE-2: both quantisers against their definitions, and codebooks that use all of their entries."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from genus.contract import Batch, Decodes, Encodes, Quantises, Samples, Scores
from genus.data.spec import DataSpec
from genus.families.vae.vqvae2 import VQVAE2, Codebook, Scalars

SPEC = DataSpec((1, 8, 12), 17)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def small(**params) -> VQVAE2:
    torch.manual_seed(0)
    model = VQVAE2(SPEC, **({"width": 8, "code": 4, "entries": 12, "levels": (3, 4)} | params)).double()
    model.initialise(images(16), generator=generator())
    return model


def images(n: int, seed: int = 0) -> Batch:
    return Batch(SPEC.to_float(torch.randint(17, (n, *SPEC.shape), generator=generator(seed))).double())


def book(entries: int, width: int, decay: float = 0.9) -> Codebook:
    return Codebook(entries, width, decay).double()


def test_a_token_is_the_nearest_entry() -> None:
    codebook, z = book(7, 3), normal(5, 4, 3)
    expected = (z.unsqueeze(-2) - codebook.vectors).square().sum(-1).argmin(-1)
    assert torch.equal(codebook.tokens(z), expected)
    assert torch.equal(codebook.look_up(expected), codebook.vectors[expected])


def test_gradients_go_straight_through_and_features_commit() -> None:
    """Of the entries: the identity. Of the commitment: 2 (z - e) / count, and entries get none."""
    codebook, z = book(7, 3), normal(5, 4, 3).requires_grad_()
    entries, tokens, commitment = codebook(z)
    assert torch.allclose(entries, codebook.vectors[tokens], rtol=0, atol=1e-15)
    weights = normal(5, 4, 3, seed=1)
    (through,) = torch.autograd.grad((entries * weights).sum(), z)
    assert torch.equal(through, weights)
    (slope,) = torch.autograd.grad(commitment, z)
    torch.testing.assert_close(slope, 2 * (z.detach() - codebook.vectors[tokens]) / z.numel(), rtol=1e-12, atol=1e-15)
    assert not list(codebook.parameters())


def test_entries_follow_the_moving_averages_of_their_features() -> None:
    """Three steps of 1711.00937, equations 6 to 8, one entry and one batch after the other."""
    codebook = book(4, 2, decay=0.8)
    codebook.start(normal(6, 5, 2), generator())
    uses, sums = codebook.average[:, 0].clone(), codebook.average[:, 1:].clone()
    assert torch.equal(sums, uses.unsqueeze(1) * codebook.vectors)
    for step in range(3):
        z = normal(6, 5, 2, seed=step)
        tokens = codebook.tokens(z)
        for entry in range(4):
            mine = z[tokens == entry]
            uses[entry] = 0.8 * uses[entry] + 0.2 * len(mine) / 6  # an example
            sums[entry] = 0.8 * sums[entry] + 0.2 * mine.sum(0) / 6
        codebook.follow(z, tokens, generator())
        assert (uses > 0.05 * uses.mean()).all(), "none is dead here"
        torch.testing.assert_close(codebook.vectors, sums / uses.unsqueeze(1), rtol=1e-12, atol=1e-14)


def test_dead_entries_are_put_to_use() -> None:
    """Eight clusters, and all entries but one far from any: in the end each cluster has its own, at its mean."""
    centres = 5 * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    codebook = book(16, 3, decay=0.8)
    codebook.vectors[0] = 0
    codebook.vectors[1:] = 1e3
    for step in range(200):
        which = torch.randint(8, (8, 20), generator=generator(step))
        z = centres[which] + 0.1 * normal(8, 20, 3, seed=step)
        codebook.follow(z, codebook.tokens(z), generator(step))
    tokens = codebook.tokens(centres)
    assert len(tokens.unique()) == 8
    assert (codebook.look_up(tokens) - centres).abs().max() < 0.3
    z = centres.repeat(40, 1).unsqueeze(1) + 0.1 * normal(320, 1, 3)
    assert len(codebook.tokens(z).unique()) >= 0.8 * 16


def test_the_moving_average_is_that_of_the_whole_batch_whatever_the_order() -> None:
    """Reordering examples changes nothing: sums an example are averaged, as processes average theirs."""
    one, other = book(6, 2), book(6, 2)
    for codebook in (one, other):
        codebook.start(normal(8, 4, 2), generator())
    z = normal(8, 4, 2, seed=1)
    one.follow(z, one.tokens(z), generator())
    other.follow(z.flip(0), other.tokens(z.flip(0)), generator())
    torch.testing.assert_close(one.vectors, other.vectors, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("levels", [(3,), (4,), (2, 2), (8, 5, 5), (4, 4, 4)], ids=str)
def test_scalars_reach_every_entry_and_name_each_once(levels: tuple[int, ...]) -> None:
    scalars = Scalars(levels).double()
    tokens = torch.arange(scalars.entries)
    codes = scalars.look_up(tokens)
    assert scalars.entries == math.prod(levels) == len(codes.unique(dim=0))
    assert codes.min() == -1 and codes.max() <= 1
    wide = 2 * normal(200 * scalars.entries, len(levels))
    assert len(scalars.tokens(wide).unique()) == scalars.entries
    entries, found, commitment = scalars(wide.unsqueeze(0))
    torch.testing.assert_close(entries, scalars.look_up(found), rtol=0, atol=1e-12)
    assert commitment == 0


def test_scalars_round_what_the_paper_bounds() -> None:
    """Listing 1 of 2309.15505 by hand, and its gradient: that of the bound alone."""
    scalars, z = Scalars((4, 5)).double(), normal(1, 50, 2).requires_grad_()
    half = torch.tensor([3, 4]).double() * 1.001 / 2
    shift = torch.tensor([math.atanh(0.5 / half[0]), 0.0])
    bounded = torch.tanh(z + shift) * half - torch.tensor([0.5, 0.0])
    entries, tokens, _ = scalars(z)
    torch.testing.assert_close(entries, bounded.round() / 2, rtol=0, atol=1e-12)
    digits = (bounded.round() + 2).long()
    assert torch.equal(tokens, digits[..., 0] + 4 * digits[..., 1])
    found, expected = (torch.autograd.grad(y.sum(), z)[0] for y in (entries, bounded / 2))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("quantiser", ["ema", "fsq"])
def test_tokens_hold_all_that_is_decoded(quantiser: str) -> None:
    model = small(quantiser=quantiser).eval()
    x = images(3).x
    tokens = model.quantise(x)
    assert [grid.shape[1:] for grid in tokens] == model.grids == [(2, 3), (4, 6)]
    assert all(grid.dtype == torch.int64 and grid.min() >= 0 and grid.max() < model.entries for grid in tokens)
    again = model.dequantise(tokens)
    assert again.shape == x.shape
    assert torch.equal(model.encode(x), torch.cat([grid.flatten(1) for grid in tokens], 1))
    assert torch.equal(model.decode(model.encode(x)), again)
    (_, terms), *_ = model.updates(Batch(x), generator=generator())
    assert terms["reconstruction"].item() == pytest.approx((again - x).square().mean().item(), rel=1e-9)


def test_what_it_can_do() -> None:
    model = small()
    assert isinstance(model, Quantises) and isinstance(model, Encodes)
    assert not any(isinstance(model, protocol) for protocol in (Scores, Decodes))
    assert isinstance(model, Samples)


def test_a_code_is_as_good_as_its_two_levels() -> None:
    """What is decoded depends on every token: of the top within reach, of the bottom too."""
    model = small().eval()
    tokens = [torch.zeros(1, 2, 3).long(), torch.zeros(1, 4, 6).long()]
    plain = model.dequantise(tokens)
    for level, grid in enumerate(model.grids):
        for row, column in itertools.product(*map(range, grid)):
            changed = [part.clone() for part in tokens]
            changed[level][0, row, column] = 5
            assert not torch.equal(model.dequantise(changed), plain)


@pytest.mark.parametrize(("quantiser", "share"), [("ema", 0.8), ("fsq", 0.5)])
def test_training_uses_the_entries_and_reconstructs(quantiser: str, share: float) -> None:
    """Blobs at random places: in 150 steps the error is a twentieth of the variance, and both levels are used."""
    place = torch.rand(256, 2, 1, 1, generator=generator()).double() * torch.tensor([8.0, 12.0]).view(2, 1, 1)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij")
    x = 2 * torch.exp(-((rows - place[:, 0]) ** 2 + (columns - place[:, 1]) ** 2) / 6).unsqueeze(1) - 1
    model = small(width=16, quantiser=quantiser)
    model.initialise(Batch(x[:32]), generator=generator())
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        for _, terms in model.updates(Batch(x[32 * (step % 8) :][:32]), generator=generator(step)):
            optimiser.zero_grad()
            terms["loss"].backward()
            optimiser.step()
    with torch.no_grad():
        tokens = model.eval().quantise(x)
        error = (model.dequantise(tokens) - x).square().mean()
    assert error < 0.05 * x.var()
    assert all(len(grid.unique()) > share * model.entries for grid in tokens)


def test_perplexity() -> None:
    codebook = book(6, 2)
    assert codebook.perplexity().item() == pytest.approx(6, rel=1e-12)
    codebook.average[:, 0] = torch.tensor([0.0, 6.0, 2.0, 0.0, 0.0, 0.0])
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert codebook.perplexity().item() == pytest.approx(expected, rel=1e-12)


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        VQVAE2(DataSpec((1, 10, 8)))
    with pytest.raises(ValueError, match="8 at least"):
        VQVAE2(DataSpec((1, 4, 8)))
    with pytest.raises(ValueError, match="ema or fsq, not vq"):
        VQVAE2(SPEC, quantiser="vq")


def test_samples_have_each_token_as_often_as_it_was_seen_at_its_place() -> None:
    model, x = small(), images(40, seed=2)
    counts = torch.nn.functional.one_hot(model.encode(x.x), model.entries).double().mean(0)  # [places, entries]
    model.frequency.copy_(counts)
    drawn = {}
    model.decode = lambda code: drawn.setdefault("tokens", code)  # type: ignore[method-assign,assignment]
    model.sample(8000, generator=generator())
    found = torch.nn.functional.one_hot(drawn["tokens"], model.entries).double().mean(0)
    # Five standard errors of a share of 8,000 draws, at most 0.0056 each; places are drawn apart.
    assert (found - counts).abs().max() < 5 * 0.5 / math.sqrt(8000)
    pairs = (drawn["tokens"][:, 0] == drawn["tokens"][:, 1]).double().mean()
    assert (pairs - (counts[0] * counts[1]).sum()).abs() < 5 * 0.5 / math.sqrt(8000)


def test_frequencies_follow_the_tokens() -> None:
    model, x = small(decay=0.9), images(16)
    before, seen = model.frequency.clone(), torch.nn.functional.one_hot(model.encode(x.x), model.entries).double()
    for _ in model.updates(x, generator=generator()):
        pass
    torch.testing.assert_close(model.frequency, 0.99 * before + 0.01 * seen.mean(0), rtol=1e-12, atol=1e-15)
