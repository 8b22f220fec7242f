"""LSTM: its equations, an exact density of independent documents, and a memory that goes from window to window."""

import itertools
import math

import pytest
import torch

from genus.config import Train
from genus.contract import Batch, Carries, Initialises
from genus.data.spec import DataSpec
from genus.families.autoregressive.lstm import LSTM
from genus.training import train

TEXT = DataSpec((40,), 0, (), "abcd")


def _model(spec: DataSpec = TEXT, dtype: torch.dtype = torch.float64, **params) -> LSTM:
    torch.manual_seed(0)
    model = LSTM(spec, **({"hidden": 7, "layers": 2, "embedding": 5, "context": 8} | params)).to(dtype).eval()
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


def _by_hand(model: LSTM, tokens: list[int]) -> torch.Tensor:
    """Logits after each token, one at a time by the equations of Zaremba et al. 2014, section 3.1: [T, V]."""
    memory = [(torch.zeros(model.hidden).double(), torch.zeros(model.hidden).double()) for _ in model.layers]
    found = []
    for token in tokens:
        x = model.embedding.weight[token]
        for index, layer in enumerate(model.layers):
            h, c = memory[index]
            x = torch.cat([x, torch.tensor([float(token == 0)])])
            gates = layer.weight_ih_l0 @ x + layer.bias_ih_l0 + layer.weight_hh_l0 @ h + layer.bias_hh_l0
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            x = o.sigmoid() * c.tanh()
            memory[index] = (x, c)
        found.append(model.head.weight @ x + model.head.bias)
    return torch.stack(found)


def test_its_logits_and_log_probabilities_are_those_of_the_equations():
    model, documents = _model(), _documents(5, 30)
    found = model.log_prob(Batch(documents), generator=_generator())
    for document, nats in zip(documents, found, strict=True):
        tokens = document[: document.count_nonzero() + 1]  # its end included
        logits = _by_hand(model, [0, *tokens[:-1].tolist()])
        expected = logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).sum()
        assert nats.item() == pytest.approx(expected.item(), abs=1e-9)


def test_probabilities_of_all_documents_sum_to_one():
    """Every document of up to four symbols, and what goes on after these."""
    spec = DataSpec((5,), 0, (), "ab")
    model = _model(spec)
    rows = [[*d, *[0] * (5 - len(d))] for k in range(5) for d in itertools.product((1, 2), repeat=k)]
    unfinished = list(itertools.product((1, 2), repeat=5))
    log_p = model.log_prob(Batch(torch.tensor([*rows, *map(list, unfinished)])), generator=_generator())
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_what_stands_after_the_end_does_not_count_and_long_documents_are_read_in_pieces():
    model = _model(DataSpec((700,), 0, (), "abcd"))
    x = torch.randint(1, 5, (2, 700), generator=_generator())
    x[0, 300:] = 0
    log_p = model.log_prob(Batch(x), generator=_generator())
    alone = model.log_prob(Batch(x[:1, :301]), generator=_generator())
    assert log_p[0].item() == pytest.approx(alone.item(), abs=1e-9)
    logits = model.read(torch.cat([torch.zeros(2, 1).long(), x[:, :-1]], 1), model.blank(2))[0]
    whole = logits[1].log_softmax(-1).gather(1, x[1].unsqueeze(1)).sum()
    assert log_p[1].item() == pytest.approx(whole.item(), abs=1e-9)


def _influence(model: LSTM, x: torch.Tensor) -> torch.Tensor:
    """[T, T]: how much the logits after place t depend on the token at each place, by gradients."""
    embedded: list[torch.Tensor] = []

    def watch(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    model.embedding.register_forward_hook(watch)
    logits = model.read(x, model.blank(1))[0][0] @ torch.linspace(0.5, 1.5, model.spec.vocabulary).double()
    rows = [torch.autograd.grad(logit, embedded[0], retain_graph=True)[0] for logit in logits]
    return torch.stack(rows)[:, 0].abs().sum(-1)


def test_a_token_depends_on_all_before_it_and_on_none_after():
    influence = _influence(_model(), torch.randint(1, 5, (1, 9), generator=_generator()))
    seen = torch.ones(9, 9).tril().bool()
    assert (influence[~seen] == 0).all() and (influence[seen] > 0).all()


def test_the_end_of_a_document_empties_the_memory():
    """After an end the state is exactly zero, after steps of training too, so nothing depends on what was before."""
    influence = _influence(_model(), torch.tensor([[1, 2, 3, 0, 4, 1, 2]]))
    assert (influence[3:, :4] == 0).all() and (influence[4:, 4] > 0).all()
    model = _model(dtype=torch.float32, hidden=16)
    for step in range(30):
        model.zero_grad()
        windows = torch.randint(5, (4, 9), generator=_generator(step))
        model.loss(Batch(windows), generator=_generator())["loss"].backward()
        for parameter in model.parameters():
            parameter.data -= (
                1e-2 * parameter.grad.sign() * (parameter.grad.abs() > 1e-9)
            )  # Adam's steps and its epsilon
    _, memory = model.read(torch.tensor([[1, 2, 3, 0]]), model.blank(1))
    assert max(kept.abs().max().item() for layer in memory for kept in layer) == 0


def test_windows_one_after_the_other_are_read_as_one():
    model = _model().train()
    assert isinstance(model, Carries) and isinstance(model, Initialises)
    x = torch.randint(5, (3, 25), generator=_generator())
    whole = model.loss(Batch(x), generator=_generator())["loss"]
    assert "carried" not in model.state_dict()
    for attempt in range(2):
        model.restart()
        parts = [model.loss(Batch(x[:, at : at + 9]), generator=_generator())["loss"] for at in (0, 8, 16)]
        assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), abs=1e-12), attempt
    first = model.loss(Batch(x[:, :9]), generator=_generator())["loss"]
    assert first.item() != pytest.approx(parts[0].item(), abs=1e-6), "goes on from the window before"


def test_the_loss_is_the_mean_over_the_tokens():
    model, document = _model(), torch.tensor([[1, 2, 3, 4, 2, 0]])
    terms = model.loss(Batch(torch.cat([torch.zeros(1, 1).long(), document], 1)), generator=_generator())
    nats = -model.log_prob(Batch(document), generator=_generator()).item() / 6
    assert terms["loss"].item() == pytest.approx(nats, abs=1e-9)
    assert terms["bits_per_char"].item() == pytest.approx(nats / math.log(2), abs=1e-9)


def test_dropout_is_of_training_alone_and_from_the_generator():
    model, x = _model(dropout=0.5), torch.randint(5, (3, 9), generator=_generator())

    def loss(seed: int) -> float:
        model.restart()
        return model.loss(Batch(x), generator=_generator(seed))["loss"].item()

    still = loss(0)
    assert loss(1) == still
    model.train()
    assert loss(0) == loss(0) != loss(1) != still


def test_samples_come_from_log_prob():
    """Among 4,000 draws of up to three tokens each document is as frequent as its probability says: chi-squared."""
    spec = DataSpec((3,), 0, (), "ab")
    model = _model(spec)
    found = model.sample(4000, generator=_generator())
    rows, counts = found.unique(dim=0, return_counts=True)
    expected = 4000 * model.log_prob(Batch(rows), generator=_generator()).exp()
    assert expected.sum().item() == pytest.approx(4000, rel=0.01)
    assert len(rows) > 8
    assert ((counts - expected).square() / expected).sum().item() < 2.5 * len(rows)


def test_greedy_samples_are_the_likeliest_step_by_step():
    model, x = _model(), [0, 3, 1]
    for _ in range(12):
        x.append(_by_hand(model, x)[-1].argmax().item())
    expected = TEXT.text(x[1:])
    found = model.sample(1, generator=_generator(), temperature=0.0, prompt="ca", length=14)
    assert TEXT.text(found[0].tolist()) == expected


def test_an_interrupted_training_goes_on_with_what_it_remembered(tmp_path):
    """Byte for byte, in the midst of an epoch, with dropout and averaged weights."""
    tokens = _documents(40, 30).flatten().numpy().astype("uint8")
    config = Train(steps=20, batch_size=4, learning_rate=1e-2, ema=0.9)

    class Stopped(Exception):
        pass

    def stop(row: dict[str, float], speed: dict[str, float]) -> None:
        if row["step"] == 12:
            raise Stopped

    def fit(**options):
        model = _model(dtype=torch.float32, dropout=0.2)
        known = {"steps": 20, "seed": 3, "device": torch.device("cpu"), "log_every": 2}
        return train(model, tokens, tokens[:1], config, **known, **options)

    checkpoint, whole = tmp_path / "c.safetensors", fit()
    with pytest.raises(Stopped):
        fit(checkpoint=checkpoint, checkpoint_every=0, on_log=stop)
    seen: list[float] = []
    resumed = fit(checkpoint=checkpoint, on_log=lambda row, speed: seen.append(row["step"]))
    assert seen[0] == 12 and resumed.history == whole.history
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in whole.model.state_dict().items())


def test_data_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="for text, not for data of shape"):
        LSTM(DataSpec((1, 8, 8)))
