"""Sentence VAE: its bound against the decoder step by step, padding that says nothing, annealing and word dropout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from genus.config import Train
from genus.contract import Batch, Reads, Whole
from genus.data.spec import DataSpec
from genus.families.vae.sentence_vae import SentenceVAE, alive
from genus.training import _Documents, train

TEXT = DataSpec((12,), 0, (), "abcd")
CPU = torch.device("cpu")


def _generator(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model(spec: DataSpec = TEXT, **params) -> SentenceVAE:
    torch.manual_seed(0)
    small = {"latent": 3, "hidden": 8, "encoder": 6, "embedding": 5, "context": 10, "spread": 0.0}
    return SentenceVAE(spec, **(small | params)).double().eval()


def _documents() -> Tensor:
    return torch.tensor([[1, 2, 3, 0, 0, 0], [4, 0, 0, 0, 0, 0], [2, 2, 1, 3, 4, 0], [0, 0, 0, 0, 0, 0]])


def _by_hand(model: SentenceVAE, document: list[int], z: Tensor) -> float:
    """log p(document|z), a token at a time through LSTM cells of the same weights."""
    lstm = model.decoder
    cell = torch.nn.LSTMCell(lstm.input_size, lstm.hidden_size).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    h = c = torch.zeros(1, lstm.hidden_size, dtype=torch.float64)
    nats, before = 0.0, 0
    for token in document:
        h, c = cell(torch.cat([model.embedding.weight[before], z])[None], (h, c))
        nats += model.head(h).log_softmax(-1)[0, token].item()
        before = token
    return nats


@torch.no_grad()
def test_log_prob_is_the_bound_token_by_token() -> None:
    model, x = _model(), _documents()
    mean, log_std = model.posterior(x)
    z = mean + log_std.exp() * torch.randn(mean.shape, generator=_generator(), dtype=mean.dtype)
    kl = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum(1)
    found = model.log_prob(Batch(x), generator=_generator())
    for row, document in enumerate(([1, 2, 3, 0], [4, 0], [2, 2, 1, 3, 4, 0], [0])):
        assert found[row].item() == pytest.approx(_by_hand(model, document, z[row]) - kl[row].item(), abs=1e-9)
    assert model.rate(Batch(x), generator=_generator()).tolist() == pytest.approx(kl.tolist(), abs=1e-12)


@torch.no_grad()
def test_padding_says_nothing() -> None:
    model, x = _model(), _documents()
    padded = torch.nn.functional.pad(x, (0, 4))
    assert torch.allclose(model.encode(padded), model.encode(x), rtol=0, atol=1e-12)
    a, b = (model.log_prob(Batch(each), generator=_generator()) for each in (x, padded))
    assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert alive(x).sum(1).tolist() == [4, 2, 6, 1]


@torch.no_grad()
def test_the_bound_is_below_the_likelihood() -> None:
    """By quadrature over the only latent: log p(x) = log of the mean of p(x|z) over the prior."""
    model, x = _model(latent=1), _documents()
    grid = torch.linspace(-8, 8, 401, dtype=torch.float64)
    log_prior = Normal(0.0, 1.0).log_prob(grid) + math.log((grid[1] - grid[0]).item())
    exact = torch.stack(
        [(model.log_likelihood(one.expand(len(grid), -1), grid[:, None]) + log_prior).logsumexp(0) for one in x]
    )
    bound = torch.stack([model.log_prob(Batch(x), generator=_generator(k)) for k in range(400)]).mean(0)
    assert (bound < exact).all() and (bound > exact - 2).all()


def test_the_weight_of_the_kl_rises_with_the_steps() -> None:
    model, batch = _model(anneal=4, word_dropout=0.0).train(), Batch(_documents())
    weights = []
    for _ in range(6):
        for _, terms in model.updates(batch, generator=_generator()):
            weights.append(terms["kl_weight"].item())
    assert weights == [0, 0.25, 0.5, 0.75, 1, 1]
    model.steps.fill_(2)
    half = model.loss(batch, generator=_generator())
    nats = -model.log_prob(batch, generator=_generator()).mean()
    assert half["loss"].item() == pytest.approx((nats - 0.5 * half["kl"]).item(), abs=1e-9)
    assert half["bits_per_char"].item() == pytest.approx(nats.item() * 4 / 13 / math.log(2), abs=1e-9)
    model.eval()
    assert half["kl"].item() == pytest.approx(model.rate(batch, generator=_generator()).mean().item(), abs=1e-9)


def test_means_held_apart_keep_the_kl_above_its_bound() -> None:
    """In training over the batch; afterwards by what was seen of the batches before, so that documents stay alone."""
    model = _model(spread=0.6, anneal=0, word_dropout=0.0).train()
    x = torch.randint(1, 5, (64, 6), generator=_generator())
    for _ in range(300):  # the running figures start elsewhere, and forget a tenth of it each time
        mean, _ = model.posterior(x)
    assert torch.allclose(mean.std(0, correction=0), torch.full((3,), 0.6, dtype=torch.float64), rtol=0.01)
    assert mean.mean(0).abs().max() < 1e-9
    least = 3 * 0.6**2 / 2
    assert model.loss(Batch(x), generator=_generator())["kl"].item() > 0.98 * least
    model.eval()
    again = model.encode(x)
    assert torch.allclose(again, mean, rtol=0, atol=0.02)
    assert torch.allclose(model.encode(x[:1]), again[:1], rtol=0, atol=1e-12)


def test_words_are_dropped_in_training_alone() -> None:
    x = _documents()
    model = _model(word_dropout=0.5, anneal=0)
    still = model.loss(Batch(x), generator=_generator())["loss"].item()
    assert still == pytest.approx(-model.log_prob(Batch(x), generator=_generator()).mean().item(), abs=1e-9)
    assert model.train().loss(Batch(x), generator=_generator())["loss"].item() != still


@torch.no_grad()
def test_what_is_dropped_is_not_read() -> None:
    """Other tokens where nothing is shown: the same likelihood of what comes after."""
    model, z = _model(), torch.ones(2, 3, dtype=torch.float64)
    x = torch.tensor([[1, 2, 3, 4], [3, 2, 1, 4]])
    shown = torch.tensor([[True, False, True, False]]).expand(2, -1)
    a, b = model.read(x, z, None, shown)[0]
    assert not torch.allclose(a, b), "the first token is shown"
    x[1, 0] = 1
    x[0, 1] = 4
    a, b = model.read(x, z, None, shown)[0][:, :2]
    assert torch.equal(a, b)


@torch.no_grad()
def test_the_inputless_decoder_knows_the_code_and_the_place_alone() -> None:
    model = _model(word_dropout=1.0)
    a, b = model.read(torch.tensor([[1, 2, 3], [4, 4, 0]]), torch.ones(2, 3, dtype=torch.float64), None)[0]
    assert torch.equal(a, b)
    assert not torch.allclose(a[0], a[1])


@torch.no_grad()
def test_samples_come_from_the_decoder_of_codes_from_the_prior() -> None:
    """Among 4,000 draws of up to two tokens each is as frequent as the prior's mean of p(x|z) says: chi-squared."""
    model = _model(DataSpec((2,), 0, (), "ab"), latent=1)
    rows, counts = model.sample(4000, generator=_generator()).unique(dim=0, return_counts=True)
    grid = torch.linspace(-6, 6, 201, dtype=torch.float64)
    prior = Normal(0.0, 1.0).log_prob(grid).exp() * (grid[1] - grid[0])
    expected = torch.stack([model.log_likelihood(row.expand(201, -1), grid[:, None]).exp() @ prior for row in rows])
    assert len(rows) == 7 and expected.sum().item() == pytest.approx(1, abs=1e-6)
    assert ((counts - 4000 * expected).square() / (4000 * expected)).sum().item() < 22.5  # 0.999 of 6 degrees


@torch.no_grad()
def test_a_code_decodes_to_one_document_whatever_the_others() -> None:
    """Step by step by hand, by the Gumbel-max trick: the noise is the same for every code and every call."""
    model = _model()
    model.head.weight.mul_(5)
    code = 3 * torch.randn(40, 3, generator=_generator(), dtype=torch.float64)
    written = model.decode(code)
    assert written.shape == (40, 12) and len(written.unique(dim=0)) > 10
    for row in (0, 7):
        noise, before, memory, document = _generator(0), 0, None, []
        for _ in range(12):
            logits, memory = model.read(torch.tensor([[before]]), code[row : row + 1], memory)
            drawn = torch.empty(5, dtype=torch.float64).exponential_(generator=noise)
            before = int((logits[0, -1] / 0.5 - drawn.log()).argmax())
            document.append(before)
            if not before:
                break
        assert TEXT.text(written[row].tolist()) == TEXT.text(document)
        alone = model.decode(code[row : row + 1])
        assert TEXT.text(alone[0].tolist()) == TEXT.text(document)


@torch.no_grad()
def test_samples_begin_with_the_prompt() -> None:
    again = _model().sample(1, generator=_generator(), prompt="ca", length=7)
    assert again.shape == (1, 7) and TEXT.text(again[0].tolist()).startswith("ca")


def test_the_code_is_used_where_it_is_worth_it() -> None:
    """Documents of one letter, again and again, which an inputless decoder cannot know: the code tells which."""
    stored = np.concatenate([[letter] * 6 + [0] for letter in (1, 2, 3, 4) for _ in range(40)]).astype(np.uint8)
    model = _model(word_dropout=1.0, anneal=60).float()
    config = Train(steps=120, batch_size=32, learning_rate=2e-2, clip=100.0)
    model = train(model, stored, stored[:1], config, steps=120, seed=0, device=CPU).model
    assert int(model.steps) == 120
    x = torch.tensor([[letter] * 6 + [0] for letter in (1, 2, 3, 4)])
    with torch.no_grad():
        assert model.rate(Batch(x), generator=_generator()).min() > 0.7 * math.log(4)
        code = model.encode(x)
        likeliest = model.read(torch.zeros_like(x), code, None)[0].argmax(-1)
        assert torch.equal(likeliest[:, :6], x[:, :6])
        assert torch.equal(model.decode(code)[:, :6].mode(1).values, x[:, 0])
        own, other = (model.log_likelihood(x, z) for z in (code, code.roll(1, 0)))
        assert (own - other).mean() > 4 * math.log(4), "the code of another document tells another letter"


def test_data_that_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="for text, not for data of shape"):
        SentenceVAE(DataSpec((1, 8, 8)))
    with pytest.raises(ValueError, match="word_dropout is a share from 0 to 1, not 2"):
        SentenceVAE(TEXT, word_dropout=2.0)


# --- the batches that it is given


def _batches(lengths: list[int], *, batch_size: int, context: int = 10, steps: int = 0, seed: int = 0) -> list[Batch]:
    """Documents of these lengths, ends not counted, document i all of token i % 4 + 1."""
    tokens = np.concatenate([[i % 4 + 1] * length + [0] for i, length in enumerate(lengths)]).astype(np.uint8)
    model, config = _model(context=context), Train(steps=1, batch_size=batch_size)
    assert isinstance(model, Whole) and isinstance(model, Reads)
    data = _Documents(model, tokens, tokens[:1], config, seed, CPU)
    return [data.batch(step) for step in range(steps or data.a_epoch)]


def test_an_epoch_has_every_document_once() -> None:
    lengths = [3, 0, 9, 5, 5, 1, 7, 2]
    seen = [row[: int(alive(row[None]).sum())].tolist() for batch in _batches(lengths, batch_size=2) for row in batch.x]
    expected = [[i % 4 + 1] * length + [0] for i, length in enumerate(lengths)]
    assert sorted(seen) == sorted(expected)


def test_long_documents_are_cut_and_have_no_end() -> None:
    (batch,) = _batches([30, 4], batch_size=2)
    assert batch.x.shape == (2, 10)
    assert sorted(alive(batch.x).sum(1).tolist()) == [5, 10] and batch.x.bool().all(1).any()


def test_a_batch_s_documents_are_alike_in_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 9, size=400).tolist()
    padding = [1 - alive(batch.x).float().mean().item() for batch in _batches(lengths, batch_size=8)]
    assert np.mean(padding) < 0.05


def test_epochs_differ_and_steps_have_no_state() -> None:
    lengths = list(range(1, 9))
    first, again = (_batches(lengths, batch_size=2, steps=8) for _ in range(2))
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, again, strict=True))
    sets = [[tuple(sorted(row.count_nonzero().item() for row in b.x)) for b in part] for part in (first[:4], first[4:])]
    assert sets[0] != sets[1], "another order of batches in the next epoch"
    other = _batches(lengths, batch_size=2, steps=4, seed=1)
    assert any(a.x.shape != b.x.shape or not torch.equal(a.x, b.x) for a, b in zip(first, other, strict=False))
