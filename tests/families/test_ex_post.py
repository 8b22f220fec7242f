"""A prior fitted to codes: a density that integrates to 1, draws that follow it, and the bounds of the whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from genus.config import Train
from genus.contract import Batch, Conditional, Decodes, Encodes, Family, Infers, Informs, Scores, Weighs, build
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.families.vae.ex_post import ExPost
from genus.families.vae.vae import VAE
from genus.training import train

SPEC = DataSpec((1, 4, 4), 17, tuple("ab"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int, seed: int = 1) -> Tensor:
    return SPEC.to_float(torch.randint(17, (n, *SPEC.shape), generator=generator(seed))).double()


def vae(latent: int = 2, **params) -> VAE:
    torch.manual_seed(0)
    return VAE(SPEC, latent=latent, channels=4, hidden=16, **params).double().eval().requires_grad_(False)


def prior(latent: int = 2, spread: float = 0.3, components: int = 3, conditional: bool = False) -> ExPost:
    """A tiny model in float64, away from where it starts: there only the biases speak."""
    model = ExPost(SPEC, parent=vae(latent), hidden=12, components=components, conditional=conditional).double().eval()
    with torch.no_grad():
        for parameter in model.made.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator(5), dtype=torch.float64))
        model.made.last[:, 2 * components :] *= 0.2  # no component so narrow that quadrature would miss it
    return model


def asked(label: int | None, n: int) -> Tensor | None:
    return None if label is None else torch.full((n,), label)


TOLD = pytest.mark.parametrize(("conditional", "label"), [(False, None), (True, None), (True, 1)])


@TOLD
@torch.no_grad()
def test_the_prior_is_a_density(conditional: bool, label: int | None) -> None:
    """Its integral over the plane, by the trapezium rule, which for smooth densities is exact to many digits."""
    model = prior(conditional=conditional)
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    nats = model.log_prior(torch.cartesian_prod(axis, axis), asked(label, 481**2))
    assert nats.exp().sum().item() * 0.05**2 == pytest.approx(1, abs=1e-6)
    flat = ExPost(SPEC, parent=vae(), hidden=12, components=3).double().log_prior(torch.cartesian_prod(axis, axis))
    assert (nats - flat).abs().max() > 0.5, "it is none that the biases alone give"


@torch.no_grad()
def test_a_number_depends_on_exactly_those_before_it() -> None:
    model, z = prior(4, spread=1.0), torch.randn(6, 4, generator=generator(), dtype=torch.float64)
    told = model.made(z)
    for index in range(4):
        other = z.clone()
        other[:, index] += 1
        differs = (model.made(other) - told).abs().amax((0, 2))
        assert (differs[: index + 1] == 0).all() and (differs[index + 1 :] > 1e-6).all()


@TOLD
@torch.no_grad()
def test_codes_are_drawn_from_the_prior(conditional: bool, label: int | None) -> None:
    """Shares of 20,000 draws in 6 x 6 cells against the density's, by quadrature: within five standard errors."""
    model, n, fine = prior(spread=0.6, conditional=conditional), 20_000, 40
    z = model.sample_codes(n, generator=generator(), cond=asked(label, n))
    edges = torch.linspace(-3, 3, 7, dtype=torch.float64)
    middle = torch.linspace(-3, 3, 6 * fine + 1, dtype=torch.float64)[:-1] + 0.5 / fine
    nats = model.log_prior(torch.cartesian_prod(middle, middle), asked(label, (6 * fine) ** 2))
    share = nats.view(6, fine, 6, fine).exp().sum((1, 3)) / fine**2
    cells = torch.bucketize(z.contiguous(), edges) - 1
    inside = ((cells >= 0) & (cells < 6)).all(1)
    found = torch.bincount(cells[inside] @ torch.tensor([6, 1]), minlength=36).view(6, 6) / n
    assert share.max() > 4 * share.mean(), "no flat density, which any draws would follow"
    assert ((found - share).abs() <= 5 * (share * (1 - share) / n).sqrt() + 1e-4).all()


@torch.no_grad()
def test_the_bound_is_that_of_the_whole() -> None:
    """log p(x) by quadrature over the one number of the code: weights average to it, and the bound is below it."""
    model, x = prior(1), images(3)
    grid = torch.linspace(-10, 10, 1001, dtype=torch.float64).unsqueeze(1)
    each = [model.parent.log_likelihood(one.expand(len(grid), -1, -1, -1), grid) for one in x]
    exact = torch.stack([(log_px + model.log_prior(grid)).logsumexp(0) for log_px in each]) + math.log(0.02)
    many = Batch(x.repeat_interleave(2_000, 0))
    weights = model.log_weights(many, 2, generator=generator()).unflatten(1, (3, -1)).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(weights.logsumexp(0) - math.log(4_000), exact, rtol=0, atol=0.05)
    bound = model.log_prob(many, generator=generator(1)).unflatten(0, (3, -1)).T
    assert (bound.mean(0) < exact).all()
    error = (bound.var(0) / len(bound) + weights.var(0) / len(weights)).sqrt()
    assert ((bound.mean(0) - weights.mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize("posterior", ["diagonal", "planar"])
@torch.no_grad()
def test_with_the_parent_s_own_prior_the_bound_is_the_parent_s(posterior: str) -> None:
    """One standard normal a number: the same weights, draw by draw. So q(z|x) is that which z was drawn from."""
    parent = vae(posterior=posterior, flow_layers=3)
    model = ExPost(SPEC, parent=parent, hidden=12, components=1).double()
    model.made.last_bias[..., 2] = 0
    batch = Batch(images(5), torch.zeros(5, dtype=torch.int64))
    ours, theirs = (one.log_weights(batch, 4, generator=generator()) for one in (model, parent))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    z, log_q = parent.infer(batch.x, generator=generator())
    if posterior == "diagonal":
        mean, log_std, _ = parent.posterior(batch.x)
        assert torch.allclose(log_q, Normal(mean, log_std.exp()).log_prob(z).sum(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("conditional", [False, True])
def test_the_loss_is_the_rate_and_only_the_prior_learns(conditional: bool) -> None:
    model, batch = prior(3, conditional=conditional), Batch(images(6), torch.arange(6) % 2)
    terms = model.loss(batch, generator=generator(2))
    assert terms["loss"].item() == pytest.approx(model.rate(batch, generator=generator(2)).mean().item(), abs=1e-12)
    z, log_q = model.parent.infer(batch.x, generator=generator(2))
    normal = Normal(0.0, 1.0).log_prob(z).sum(1)
    assert terms["normal_rate"].item() == pytest.approx((log_q - normal).mean().item(), abs=1e-12)
    terms["loss"].backward()
    for name, parameter in model.named_parameters():
        learns = parameter.grad is not None and parameter.grad.abs().sum().item() > 0
        assert learns == name.startswith("made."), name


@torch.no_grad()
def test_told_labels_it_is_one_prior_a_label() -> None:
    """By hand, of one component and no units that speak: a normal a label, and with none the mean of both.

    ``truncation`` scales the normals' deviations.
    """
    model = ExPost(SPEC, parent=vae(), hidden=12, components=1, conditional=True).double()
    means = torch.tensor([[-1.0, 2.0], [3.0, 0.5]], dtype=torch.float64)
    stds = torch.tensor([[0.5, 2.0], [1.0, 0.25]], dtype=torch.float64)
    model.made.last_bias.zero_()
    model.made.label_last[..., 1], model.made.label_last[..., 2] = means, stds.log()
    z, label = torch.randn(6, 2, generator=generator(), dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    each = torch.stack([Normal(means[k], stds[k]).log_prob(z).sum(1) for k in range(2)])
    torch.testing.assert_close(model.log_prior(z, label), each.gather(0, label[None])[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(model.log_prior(z), each.exp().mean(0).log(), rtol=0, atol=1e-12)
    normal = torch.randn(6, 2, generator=generator(4), dtype=torch.float64)
    for scale in (1.0, 0.5, 0.0):
        drawn = model.sample_codes(6, generator=generator(4), cond=label, truncation=scale)
        torch.testing.assert_close(drawn, means[label] + scale * stds[label] * normal, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_best_of_candidates_is_the_one_whose_label_is_most_probable() -> None:
    model, label = prior(conditional=True, spread=0.6), torch.arange(40) % 2

    def sure(z: Tensor) -> Tensor:
        return torch.stack([model.log_prior(z, asked(k, len(z))) for k in range(2)]).softmax(0)

    every = model.sample_codes(200, generator=generator(), cond=label.repeat(5)).unflatten(0, (5, 40))
    chosen = model.sample_codes(40, generator=generator(), cond=label, candidates=5)
    each = torch.stack([sure(z).gather(0, label[None])[0] for z in every])
    assert torch.allclose(sure(chosen).gather(0, label[None])[0], each.amax(0), rtol=0, atol=1e-12)
    assert (chosen == every).all(2).any(0).all(), "each is one of those drawn for it"
    assert len(each.argmax(0).unique()) == 5
    shown = model.sample(40, generator=generator(), cond=label, candidates=5)
    assert torch.equal(shown, model.decode(chosen))
    with pytest.raises(ValueError, match="candidates: the prior is told no labels to choose by; leave them out"):
        prior().sample(2, generator=generator(), candidates=5)


@torch.no_grad()
def test_without_its_label_an_example_has_the_mean_over_labels() -> None:
    model, x = prior(conditional=True), images(5)

    def weights(label: int | None) -> Tensor:
        return model.log_weights(Batch(x, asked(label, 5)), 3, generator=generator(3))

    each = torch.stack([weights(0), weights(1)])
    assert torch.allclose(weights(None), each.exp().mean(0).log(), rtol=0, atol=1e-9)
    assert (each[0] - each[1]).abs().min() > 1e-3
    bound = model.log_prob(Batch(x, asked(1, 5)), generator=generator(3))
    assert torch.equal(bound, each[1, 0])


def test_all_else_starts_the_same_with_and_without_labels() -> None:
    torch.manual_seed(1)
    plain = ExPost(SPEC, parent=vae(), hidden=12)
    torch.manual_seed(1)
    told = ExPost(SPEC, parent=vae(), hidden=12, conditional=True)
    starts = told.state_dict()
    assert all(torch.equal(starts[name], value) for name, value in plain.state_dict().items())
    assert set(starts) - set(plain.state_dict()) == {"made.label_first", "made.label_last"}
    assert isinstance(told, Conditional) and not isinstance(plain, Conditional)


class Rings(Family):
    """A parent whose codes are no standard normal ones: two numbers on one of two circles, by the example's level."""

    paper, latent = "none 0", 2

    def infer(self, x: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        angle = 2 * math.pi * torch.rand(len(x), generator=generator)
        radius = 0.6 + 1.2 * (x[:, 0, 0, 0] > 0) + 0.1 * torch.randn(len(x), generator=generator)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), x.new_zeros(len(x))

    def log_likelihood(self, x: Tensor, code: Tensor) -> Tensor:
        return x.new_zeros(len(x))

    def show(self, code: Tensor, *, generator: torch.Generator, temperature: float = 0.0) -> Tensor:
        return code[:, :1, None, None].expand(-1, 1, 4, 4) + temperature


def test_it_learns_where_codes_are() -> None:
    """Circles of radius 0.6 and 1.8: 200 steps put three quarters of the draws on them, where a normal has a third."""
    torch.manual_seed(0)
    model = build("vae/ex_post", SPEC, {"hidden": 64}, Rings(SPEC))
    config = Train(steps=200, batch_size=128, learning_rate=1e-2)
    stored = torch.randint(17, (1024, *SPEC.shape), generator=generator(), dtype=torch.uint8).numpy()
    labels = torch.zeros(1024).long().numpy()
    history = train(model, stored, labels, config, steps=200, seed=0, device=torch.device("cpu")).history
    assert history[-1]["loss"] < history[-1]["normal_rate"] - 0.4

    def near(z: Tensor) -> float:
        radius = z.norm(dim=1, keepdim=True)
        return ((radius - torch.tensor([0.6, 1.8])).abs().amin(1) < 0.25).float().mean().item()

    with torch.no_grad():
        drawn = model.sample_codes(4000, generator=generator())
        shown = model.sample(5, generator=generator(3), temperature=1.0)
        codes = model.sample_codes(5, generator=generator(3))
    assert near(torch.randn(4000, 2, generator=generator())) < 0.5 and near(drawn) > 0.75
    assert torch.equal(shown[:, 0, 0, 0], codes[:, 0] + 1), "what is shown is what was drawn"


def test_it_learns_where_the_codes_of_a_label_are() -> None:
    """A circle a label: three quarters of what is asked for is on it; of what is not, each has half."""
    torch.manual_seed(0)
    model = build("vae/ex_post", SPEC, {"hidden": 64, "conditional": True}, Rings(SPEC))
    config = Train(steps=100, batch_size=128, learning_rate=1e-2)
    stored = torch.randint(17, (1024, *SPEC.shape), generator=generator(), dtype=torch.uint8)
    labels = (stored[:, 0, 0, 0] > 8).long()
    train(model, stored.numpy(), labels.numpy(), config, steps=100, seed=0, device=torch.device("cpu"))
    label = torch.arange(2000) % 2
    with torch.no_grad():
        drawn, free = (model.sample_codes(2000, generator=generator(), cond=cond).norm(dim=1) for cond in (label, None))
        knobs = {"cond": label, "truncation": 0.5}
        shown = model.sample(2000, generator=generator(), **knobs)[:, 0, 0, 0]
        codes = model.sample_codes(2000, generator=generator(), **knobs)
    assert ((drawn - (0.6 + 1.2 * label)).abs() < 0.25).float().mean() > 0.75
    assert abs((free > 1.2).float().mean().item() - 0.5) < 0.06
    assert torch.equal(shown, codes[:, 0])


def test_what_it_can_do_and_what_cannot_work() -> None:
    model = prior()
    assert all(isinstance(model, can) for can in (Scores, Weighs, Informs, Encodes))
    assert not isinstance(model, Decodes), "what it decodes is no standard normal code"
    assert isinstance(model.parent, Infers)
    with pytest.raises(UserError, match="needs a parent that infers: VQVAE2 does not"):
        build("vae/ex_post", DataSpec((1, 8, 8), 17), {}, build("vae/vqvae2", DataSpec((1, 8, 8), 17), {}))
    bare = DataSpec((1, 4, 4), 17)
    with pytest.raises(ValueError, match="conditional: the data has no classes to ask for"):
        ExPost(bare, parent=vae(), conditional=True)
    with pytest.raises(ValueError, match=r"of examples \(1, 4, 4\), the data of \(1, 8, 8\)"):
        ExPost(DataSpec((1, 8, 8), 17), parent=vae())
    assert all(
        itertools.starmap(torch.equal, zip(model.encode(images(2)), model.parent.encode(images(2)), strict=True))
    )
