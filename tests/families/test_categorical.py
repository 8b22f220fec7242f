"""Categorical: the optimum by counting, the way there by gradients, and what cross-entropy has to do with KL."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from genus.config import Train
from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.autoregressive.categorical import Categorical
from genus.training import train

IMAGES = DataSpec((1, 3, 4), 5)
VECTORS = DataSpec((2, 1, 1), 17)
TEXT = DataSpec((12,), 0, alphabet="abc")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(spec: DataSpec, **params) -> Categorical:
    model = Categorical(spec, **params).double().eval()
    with torch.no_grad():
        model.weights.copy_(0.1 * torch.randn(model.weights.shape, generator=seeded(0)))
    return model


def uneven(spec: DataSpec, n: int, seed: int = 1) -> Tensor:
    """Levels of unequal frequency, other ones in other places; some never."""
    shares = torch.distributions.Dirichlet(torch.full((spec.levels,), 0.5))
    torch.manual_seed(seed)
    return torch.multinomial(shares.sample((spec.dims,)), n, replacement=True).T.reshape(n, *spec.shape)


def kl(q: Tensor, p_log: Tensor) -> Tensor:
    """KL(q‖p) in nats, summed over places."""
    return (torch.special.xlogy(q, q) - q * p_log).sum()


def by_counting(stored: Tensor, levels: int, added: float) -> Tensor:
    """Probabilities [places, levels], counted by loops, ``added`` to each count."""
    counts = torch.full((stored[0].numel(), levels), added, dtype=torch.float64)
    for example in stored.flatten(1).tolist():
        for place, level in enumerate(example):
            counts[place, level] += 1
    return counts / counts.sum(1, keepdim=True)


@pytest.mark.parametrize("spec", [IMAGES, VECTORS], ids=["image", "vector"])
@pytest.mark.parametrize("added", [0.5, 1.0], ids=["Krichevsky-Trofimov", "Laplace"])
def test_the_optimum_is_counting(spec: DataSpec, added: float) -> None:
    stored = uneven(spec, 40)
    model = random(spec, smoothing=added / 40)
    found = model.optimum(spec.to_float(stored)).exp()
    assert (found - by_counting(stored, spec.levels, added)).abs().max() < 1e-12


def test_cross_entropy_is_entropy_and_kl() -> None:
    """Without smoothing the loss exceeds the data's entropy by KL(data‖model): by 0 at the optimum, more elsewhere."""
    x = IMAGES.to_float(uneven(IMAGES, 200))
    model = random(IMAGES, smoothing=0.0)
    q = by_counting(IMAGES.to_levels(x), 5, 0.0)
    entropy = -torch.special.xlogy(q, q).sum()
    terms = model.loss(Batch(x), generator=seeded(0))
    divergence = kl(q, model.log_probabilities())
    assert divergence > 0.1
    assert abs(terms["loss"] - entropy - divergence) < 1e-9
    assert abs(terms["bits_per_dim"] * IMAGES.dims * math.log(2) - terms["loss"]) < 1e-9
    assert abs(terms["loss"] + model.log_prob(Batch(x), generator=seeded(0)).mean()) < 1e-9
    assert abs(kl(q, model.optimum(x).clamp(min=-1e9))) < 1e-9


def test_the_gradient_is_the_difference_of_probabilities() -> None:
    """d loss / d logit = (1 + K smoothing) p - (q + smoothing), which is 0 at the optimum and nowhere else."""
    x = IMAGES.to_float(uneven(IMAGES, 30))
    model = random(IMAGES, smoothing=0.02)
    (gradient,) = torch.autograd.grad(model.loss(Batch(x), generator=seeded(0))["loss"], model.weights)
    by_hand = 1.1 * model.log_probabilities().exp() - (by_counting(IMAGES.to_levels(x), 5, 0.0) + 0.02)
    assert (gradient / 10 - by_hand).abs().max() < 1e-12
    with torch.no_grad():
        model.weights.copy_(model.optimum(x) / 10)
    (gradient,) = torch.autograd.grad(model.loss(Batch(x), generator=seeded(0))["loss"], model.weights)
    assert gradient.abs().max() < 1e-12


def test_training_gets_to_the_optimum() -> None:
    """The trainer, on batches of an eighth of the data: within 0.002 nats a place of counting all of it."""
    spec = DataSpec((1, 4, 4), 9)
    stored = uneven(spec, 2000).byte()
    model = Categorical(spec, smoothing=1 / 4000)
    config = Train(steps=400, batch_size=250, learning_rate=0.01, betas=(0.9, 0.99))
    labels = np.zeros(2000, np.int64)
    trained = train(model, stored.numpy(), labels, config, steps=400, seed=0, device=torch.device("cpu")).model
    optimum = by_counting(stored, 9, 0.5)
    assert isinstance(trained, Categorical)
    divergence = kl(optimum, trained.log_probabilities().double())
    assert 0 <= divergence / spec.dims < 0.002
    assert kl(optimum, Categorical(spec).log_probabilities().double()) / spec.dims > 0.3


def test_training_on_text_gets_to_the_optimum() -> None:
    """Windows of 16 tokens; every token counts the same, the first of a window apart."""
    tokens = torch.multinomial(torch.tensor([0.1, 0.6, 0.3, 0.0]), 4000, replacement=True, generator=seeded(4))
    model = Categorical(TEXT, smoothing=1 / 8000, context=16)
    config = Train(steps=300, batch_size=32, learning_rate=0.01, betas=(0.9, 0.99))
    stored, labels = tokens.to(torch.uint8).numpy(), np.zeros(1, np.int64)
    trained = train(model, stored, labels, config, steps=300, seed=0, device=torch.device("cpu")).model
    optimum = by_counting(tokens.view(-1, 1), 4, 0.5)
    assert isinstance(trained, Categorical)
    assert 0 <= kl(optimum, trained.log_probabilities().double()) < 0.002


def test_probabilities_of_everything_sum_to_one() -> None:
    spec = DataSpec((1, 2, 2), 3)
    images = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 1, 2, 2)
    log_p = random(spec).log_prob(Batch(spec.to_float(images).double()), generator=seeded(0))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_probabilities_of_all_documents_sum_to_one() -> None:
    """Those of up to two symbols, and the chance that a third one follows."""
    model = random(TEXT)
    documents = [d for length in range(3) for d in itertools.product((1, 2, 3), repeat=length)]
    x = torch.tensor([[*d, 0, 0, 0][:3] for d in documents])
    end = model.log_probabilities()[0, 0].exp()
    total = model.log_prob(Batch(x), generator=seeded(0)).exp().sum() + (1 - end) ** 3
    assert total.item() == pytest.approx(1, abs=1e-12)


def test_a_document_counts_up_to_its_first_end() -> None:
    model, log_p = random(TEXT), random(TEXT).log_probabilities()[0]
    x = torch.tensor([[2, 1, 0, 0], [3, 3, 3, 0], [0, 0, 0, 0], [1, 0, 2, 2]])
    by_hand = [log_p[[2, 1, 0]].sum(), log_p[[3, 3, 3, 0]].sum(), log_p[0], log_p[[1, 0]].sum()]
    assert torch.allclose(model.log_prob(Batch(x), generator=seeded(0)), torch.stack(by_hand), rtol=0, atol=1e-12)


def test_the_first_token_of_a_window_is_not_predicted() -> None:
    model, log_p = random(TEXT, smoothing=0.0), random(TEXT).log_probabilities()[0]
    windows = torch.tensor([[3, 1, 2], [0, 2, 0]])
    terms = model.loss(Batch(windows), generator=seeded(0))
    assert abs(terms["loss"] + log_p[[1, 2, 2, 0]].mean()) < 1e-12
    assert abs(terms["bits_per_char"] * math.log(2) - terms["loss"]) < 1e-12


@pytest.mark.parametrize("spec", [IMAGES, VECTORS], ids=["image", "vector"])
def test_samples_have_the_probabilities_of_the_model(spec: DataSpec) -> None:
    """20,000 draws: no frequency is five standard errors off."""
    model = random(spec)
    drawn = model.sample(20_000, generator=seeded(2))
    assert drawn.shape == (20_000, *spec.shape)
    p = model.log_probabilities().detach().exp()
    assert ((model.frequencies(drawn) - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt()).all()


def test_sampled_documents_end() -> None:
    model = random(TEXT)
    drawn = model.sample(5000, generator=seeded(3))
    assert drawn.shape == (5000, 12) and drawn.dtype == torch.int64
    ended = (drawn == 0).cumsum(1) > 0
    assert (drawn[ended] == 0).all()
    end = model.log_probabilities()[0, 0].exp().item()
    lengths = (~ended).sum(1).double()  # geometric, cut at 12
    expected = sum((1 - end) ** k for k in range(1, 13))
    assert abs(lengths.mean().item() - expected) < 5 * lengths.std().item() / math.sqrt(5000)
    assert model.sample(2, generator=seeded(3), length=7).shape == (2, 7)


def test_continuous_data_is_refused() -> None:
    with pytest.raises(ValueError, match="continuous"):
        Categorical(DataSpec((2, 1, 1), levels=0))
