"""Transformer: causal, an exact density whatever the document's length, and a cache that changes nothing."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from genus.contract import Batch, Carries, Reads
from genus.data.spec import DataSpec
from genus.families.autoregressive.transformer import Transformer, rotations, turned

TEXT = DataSpec((40,), 0, (), "abcd")


def _model(spec: DataSpec = TEXT, dtype: torch.dtype = torch.float64, **params) -> Transformer:
    """Every weight random: those that start at zero would hide dependencies."""
    torch.manual_seed(0)
    small = {"width": 12, "layers": 2, "heads": 3, "context": 8, "near": 3, "wide": 2}
    model = Transformer(spec, **(small | params)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def _generator(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _documents(n: int, length: int) -> torch.Tensor:
    """Of every length up to ``length`` symbols, zeros after their end."""
    x = torch.randint(1, TEXT.vocabulary, (n, length), generator=_generator(1))
    lengths = torch.linspace(0, length - 1, n).long()
    return x * (torch.arange(length) < lengths.unsqueeze(1))


def _turn(x: torch.Tensor, place: int) -> torch.Tensor:
    """Rotary positions as in Su et al. 2021, section 3.2.1: pairs as complex numbers times e^(i place frequency)."""
    half = x.shape[-1] // 2
    angle = place * 1000.0 ** -(torch.arange(half) / half)
    pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half).double(), angle.double())
    return torch.cat([pairs.real, pairs.imag])


def _by_hand(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """Logits after the last of the tokens of a window, with loops over places, heads and earlier places."""
    stream = []
    for t in range(len(tokens)):
        stream.append(sum(model.tables[d, tokens[t - d]] for d in range(min(model.near, t + 1))))
    for block in model.blocks:
        size = stream[0].shape[0] // block.heads
        parts = [(block.ask.weight @ F.layer_norm(x, x.shape)).view(3, block.heads, size) for x in stream]
        attended = []
        for t in range(len(tokens)):
            heads = []
            for h in range(block.heads):
                query = _turn(parts[t][0, h], t)
                weights = torch.stack([query @ _turn(parts[s][1, h], s) / math.sqrt(size) for s in range(t + 1)])
                heads.append(sum(w * parts[s][2, h] for s, w in enumerate(weights.softmax(0))))
            attended.append(stream[t] + block.answer.weight @ torch.cat(heads))
        stream = [x + block.down.weight @ (block.up.weight @ F.layer_norm(x, x.shape)).relu() ** 2 for x in attended]
    return model.head.weight @ F.layer_norm(stream[-1], stream[-1].shape) + model.head.bias


def _windowed(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """Logits after the last of the tokens of a document (an end before it included), however long it is."""
    half = model.context // 2
    start = 0
    while len(tokens) - start > model.context:
        start += half
    return _by_hand(model, tokens[start:])


def test_its_log_probabilities_are_those_of_the_equations_in_overlapping_windows():
    model, documents = _model(), _documents(4, 26)
    found = model.log_prob(Batch(documents), generator=_generator())
    for document, nats in zip(documents, found, strict=True):
        tokens = [0, *document[: document.count_nonzero() + 1].tolist()]  # its end included
        expected = sum(_windowed(model, tokens[:t]).log_softmax(-1)[tokens[t]] for t in range(1, len(tokens)))
        assert nats.item() == pytest.approx(expected.item(), abs=1e-6)  # angles are float32's in the model


def test_the_cache_changes_nothing():
    """Token by token, as the sampler reads, the logits are those of the whole window."""
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, x = _model(dtype=dtype), torch.randint(5, (3, 8), generator=_generator())
        whole, _ = model.read(x)
        logits, cache = model.read(x[:, :3])
        steps = [logits]
        for t in range(3, 8):
            logits, cache = model.read(x[:, t : t + 1], cache)
            steps.append(logits)
        assert (torch.cat(steps, 1) - whole).abs().max() < close


def test_probabilities_of_all_documents_sum_to_one():
    """Every document of up to six symbols and what goes on after these, with windows of four tokens."""
    spec = DataSpec((7,), 0, (), "ab")
    model = _model(spec, context=4)
    rows = [[*d, *[0] * (7 - len(d))] for k in range(7) for d in itertools.product((1, 2), repeat=k)]
    unfinished = [list(d) for d in itertools.product((1, 2), repeat=7)]
    log_p = model.log_prob(Batch(torch.tensor([*rows, *unfinished])), generator=_generator())
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_a_token_depends_on_all_before_it_and_on_none_after(monkeypatch):
    """In the blocks by gradients; in the embedding, whose reach is ``near``, by changing a token."""
    model, x = _model(), torch.randint(1, 5, (1, 8), generator=_generator())
    embedded = model.embed(x).detach()
    monkeypatch.setattr(model, "embed", lambda tokens: embedded.requires_grad_())
    logits = model.read(x)[0][0] @ torch.linspace(0.5, 1.5, 5).double()
    rows = [torch.autograd.grad(logit, embedded, retain_graph=True)[0] for logit in logits]
    influence = torch.stack(rows)[:, 0].abs().sum(-1)
    seen = torch.ones(8, 8).tril().bool()
    assert (influence[~seen] == 0).all() and (influence[seen] > 0).all()
    monkeypatch.undo()
    for place in range(8):
        other = x.clone()
        other[0, place] = 1 + other[0, place] % 4
        changed = (model.embed(other) != model.embed(x)).any(-1)[0]
        assert changed.nonzero().flatten().tolist() == list(range(place, min(place + 3, 8)))


def test_attention_knows_distances_alone():
    """Turned queries and keys give the same product wherever they are (Su et al. 2021, eq. 11)."""
    turns = rotations(64, 6).double()
    q, k = torch.randn(2, 6, generator=_generator()).double()
    products = torch.stack([turned(q, turns[:, t]) @ turned(k, turns[:, t - 5]) for t in range(5, 64)])
    assert (products - products[0]).abs().max() < 1e-5
    assert torch.allclose(turned(q, turns[:, 7]), _turn(q, 7), rtol=0, atol=1e-6)


def test_the_loss_is_the_mean_over_the_tokens():
    model, document = _model(), torch.tensor([[1, 2, 3, 4, 2, 0]])
    assert isinstance(model, Reads) and not isinstance(model, Carries)
    terms = model.loss(Batch(torch.cat([torch.zeros(1, 1).long(), document], 1)), generator=_generator())
    nats = -model.log_prob(Batch(document), generator=_generator()).item() / 6
    assert terms["loss"].item() == pytest.approx(nats, abs=1e-9)
    assert terms["bits_per_char"].item() == pytest.approx(nats / math.log(2), abs=1e-9)


def test_a_new_model_is_uniform():
    log_p = Transformer(TEXT).log_prob(Batch(_documents(3, 20)), generator=_generator())
    lengths = _documents(3, 20).count_nonzero(1) + 1
    assert torch.allclose(log_p, -lengths * math.log(5), rtol=0, atol=1e-4)


def test_samples_come_from_log_prob():
    """Among 4,000 draws of up to four tokens, in windows of two, each document is as frequent as its probability."""
    spec = DataSpec((4,), 0, (), "ab")
    model = _model(spec, context=2)
    rows, counts = model.sample(4000, generator=_generator()).unique(dim=0, return_counts=True)
    expected = 4000 * model.log_prob(Batch(rows), generator=_generator()).exp()
    assert expected.sum().item() == pytest.approx(4000, rel=0.01)
    assert len(rows) > 12
    assert ((counts - expected).square() / expected).sum().item() < 2.5 * len(rows)


def test_greedy_samples_are_the_likeliest_in_every_window():
    model, x = _model(), [0, 3, 1]
    for _ in range(20):
        x.append(_windowed(model, x)[1:].argmax().item() + 1)
    with torch.no_grad():
        model.head.bias[0] = -1e3  # no end
    found = model.sample(1, generator=_generator(), temperature=0.0, prompt="ca", length=22)
    assert found[0].tolist() == x[1:]


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="for text, not for data of shape"):
        Transformer(DataSpec((1, 8, 8)))
    with pytest.raises(ValueError, match="width 100 is no multiple of twice the 4 heads"):
        Transformer(TEXT, width=100)
    with pytest.raises(ValueError, match="context is an even number"):
        Transformer(TEXT, context=7)
