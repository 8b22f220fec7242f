"""The prior of tokens: the order of its dependencies, probabilities that sum to 1, and cached sampling."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from genus.config import Train
from genus.contract import Batch, Family, Scores, build
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.families.autoregressive import code_prior
from genus.families.autoregressive.code_prior import CodePrior, draw
from genus.training import train

SPEC = DataSpec((1, 4, 8), 17)


class Code(Family):
    """A code that nothing has learnt: tokens are the levels of averaged pixels, modulo the entries."""

    paper = "none 0"

    def __init__(self, grids: list[tuple[int, int]], entries: int):
        super().__init__(SPEC)
        self.grids, self.entries = grids, entries
        self.scale = torch.nn.Parameter(torch.ones(()))

    def quantise(self, x: Tensor) -> list[Tensor]:
        pooled = [torch.nn.functional.adaptive_avg_pool2d(x[:, 0], grid) for grid in self.grids]
        return [(8 * self.scale * (grid + 1)).round().long() % self.entries for grid in pooled]

    def dequantise(self, tokens: list[Tensor]) -> Tensor:
        finest = tokens[-1].to(self.scale.dtype).unsqueeze(1)
        return torch.nn.functional.interpolate(2 * finest / self.entries - 1, self.spec.shape[1:])


def prior(grids: list[tuple[int, int]], entries: int, **params) -> CodePrior:
    """A tiny model in float64, every weight random: zero and small initial values would hide dependencies."""
    torch.manual_seed(0)
    parent = Code(grids, entries).requires_grad_(False)
    model = CodePrior(SPEC, parent=parent, **({"channels": 8, "layers": 2, "heads": 2} | params)).double().eval()
    with torch.no_grad():
        for parameter in model.levels.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(model: CodePrior, n: int, seed: int = 1) -> list[Tensor]:
    draws = generator(seed)
    return [torch.randint(model.parent.entries, (n, *grid), generator=draws) for grid in model.grids]


def order(model: CodePrior) -> list[tuple[int, int, int]]:
    """Every token as (grid, row, column), in the order of the factorisation, from its definition alone."""
    rows, columns = model.grids[0]
    found = []
    for level, (height, width) in enumerate(model.grids):
        h, w = height // rows, width // columns
        for r, c, i, j in itertools.product(range(rows), range(columns), range(h), range(w)):
            found.append((level, h * r + i, w * c + j))
    return found


GRIDS = [[(2, 3), (4, 6)], [(1, 2), (2, 4), (4, 4)], [(3, 2)], [(2, 2), (2, 2)]]


@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_a_token_depends_on_exactly_the_earlier_ones(grids) -> None:
    """Each token is changed in turn: bit for bit the same logits up to its own, others for every later one."""
    model = prior(grids, 5)
    places = order(model)

    def logits(tokens: list[Tensor]) -> Tensor:
        """[tokens, B, entries] in the order of the factorisation."""
        return torch.cat([grid.permute(2, 0, 1, 3).flatten(0, 1) for grid in model.logits(tokens)])

    with torch.inference_mode():
        given = tokens(model, 16)  # several: a ReLU may block one example's path
        before = logits(given)
        assert len(before) == len(places)
        for index, (level, r, c) in enumerate(places):
            changed = [grid.clone() for grid in given]
            changed[level][:, r, c] = (changed[level][:, r, c] + 1) % 5
            differs = (logits(changed) - before).abs().amax((1, 2))
            assert (differs[: index + 1] < 1e-14).all()
            assert (differs[index + 1 :] > 1e-9).all()


def test_logits_reach_back_by_gradient() -> None:
    """The gradient of a place's logits in the embeddings of its grid: zero from its own on, and nowhere before."""
    model = prior([(2, 3), (4, 6)], 5)
    kept: list[Tensor] = []
    for index, level in enumerate(model.stack()):
        level.embedding.register_forward_hook(lambda _module, _inputs, embedded: kept.append(embedded))
        for place in range(6):
            logits = model.logits(tokens(model, 4))[index]
            (slope,) = torch.autograd.grad(logits[:, :, place].square().sum(), kept[-1])
            reached = slope.abs().amax((0, 2))
            assert (reached[place:] == 0).all() and (reached[:place] > 0).all()


@pytest.mark.parametrize("grids", [[(1, 2), (2, 4)], [(1, 1), (1, 2), (2, 4)]], ids=str)
def test_probabilities_of_all_tokens_sum_to_one(grids) -> None:
    model = prior(grids, 2)
    sizes = [math.prod(grid) for grid in grids]
    every = torch.tensor(list(itertools.product(range(2), repeat=sum(sizes))))
    parts = [part.view(-1, *grid) for part, grid in zip(every.split(sizes, 1), grids, strict=True)]
    with torch.inference_mode():
        nats = torch.stack(model.log_probs(parts))
    assert nats.sum(0).exp().sum().item() == pytest.approx(1, abs=1e-9)
    first = nats[0].exp()[:: 2 ** sum(sizes[1:])]  # of each setting of the coarsest grid, once
    assert first.sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_cached_sampling_is_teacher_forcing(grids, dtype, bound, monkeypatch) -> None:
    """The logits that each token was drawn from are those of the whole sample, seen at once."""
    model = prior(grids, 7).to(dtype)
    drawn_from: list[Tensor] = []

    def recording(logits: Tensor, *rest) -> Tensor:
        drawn_from.append(logits)
        return draw(logits, *rest)

    monkeypatch.setattr(code_prior, "draw", recording)
    found = model.sample_tokens(5, generator=generator())
    with torch.inference_mode():
        forced = [grid.permute(2, 0, 1, 3).flatten(0, 1) for grid in model.logits(found)]
    error = (torch.stack(drawn_from) - torch.cat(forced)).abs().max().item()
    assert error <= bound
    assert all(len(grid.unique()) > 1 for grid in found)


def test_images_are_decoded_from_the_tokens_that_were_drawn() -> None:
    model = prior([(2, 4), (4, 8)], 6)
    drawn = model.sample_tokens(3, generator=generator())
    x = model.sample(3, generator=generator())
    assert x.shape == (3, *SPEC.shape)
    assert torch.equal(x[:, 0], 2 * drawn[1].double() / 6 - 1)


def test_draws_follow_temperature_and_top_k() -> None:
    """Frequencies of 40,000 draws against softmax(logits / temperature), within five standard errors."""
    logits, n = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0]), 40_000
    for temperature, top_k, kept in ((1.0, 0, 5), (0.5, 0, 5), (1.0, 2, 2), (2.0, 3, 3), (1.0, 9, 5)):
        found = draw(logits.expand(n, -1), generator(3), temperature, top_k).bincount(minlength=5) / n
        best = logits.topk(kept).indices
        p = torch.zeros(5)
        p[best] = (logits[best] / temperature).softmax(0)
        assert ((found - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()
    assert (draw(logits.expand(50, -1), generator(), 1.0, 1) == 0).all()


def test_the_loss_is_minus_the_log_probability_of_the_tokens() -> None:
    model = prior([(2, 2), (4, 4)], 5)
    x = SPEC.to_float(torch.randint(17, (6, *SPEC.shape), generator=generator())).double()
    terms = model.loss(Batch(x), generator=generator())
    by_hand = -sum(nats for nats in model.log_probs(model.parent.quantise(x))).mean()
    assert terms["loss"].item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert (terms["nats_2x2"] + terms["nats_4x4"]).item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_it_learns_which_tokens_are_probable_and_leaves_its_parent_alone() -> None:
    """Two images alike but for one pixel block: at best ln 2 nats, of which a hundred steps leave little more."""
    torch.manual_seed(0)
    spec = DataSpec((1, 8, 8), 17)
    parent = build("vae/vqvae2", spec, {"width": 8, "code": 4, "entries": 8})
    images = torch.randint(17, (2, 1, 8, 8), generator=generator(), dtype=torch.uint8).repeat(8, 1, 1, 1)
    model = build("autoregressive/code_prior", spec, {"channels": 16, "layers": 1, "heads": 2}, parent)
    kept = {name: value.clone() for name, value in parent.state_dict().items()}
    config = Train(steps=100, batch_size=16, learning_rate=1e-2, betas=(0.9, 0.99))
    stored, labels = images.numpy(), torch.zeros(16).long().numpy()
    history = train(model, stored, labels, config, steps=100, seed=0, device=torch.device("cpu")).history
    assert history[0]["loss"] > 5 and history[-1]["loss"] < math.log(2) + 0.1
    assert all(torch.equal(value, kept[name]) for name, value in model.parent.state_dict().items())
    assert not isinstance(model, Scores), "of its images it knows no density"


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(ValueError, match="3x4 is no whole multiple of the coarsest, 2x2"):
        prior([(2, 2), (3, 4)], 5)
    with pytest.raises(ValueError, match="9 is none of 2"):
        prior([(2, 2)], 5, channels=9)
    with pytest.raises(UserError, match="needs a parent that quantises"):
        build("autoregressive/code_prior", DataSpec((1, 8, 8), 17), {})
    with pytest.raises(UserError, match="needs a parent that quantises"):
        build("autoregressive/code_prior", DataSpec((1, 8, 8), 17), {}, build("gan/gan", DataSpec((1, 8, 8), 17), {}))
