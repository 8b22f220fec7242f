"""VAE: the KL against Monte Carlo, the bounds' order, and a likelihood that its code really decodes to."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.vae.vae import VAE, kl_to_prior

SPEC = DataSpec((1, 4, 4), 17)


def _generator(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model(spec: DataSpec = SPEC, **params) -> VAE:
    torch.manual_seed(0)
    return VAE(spec, **({"latent": 4, "channels": 4, "hidden": 16} | params)).double().eval()


def iwae(model: VAE, batch: Batch, k: int, *, generator: torch.Generator) -> torch.Tensor:
    """The importance-weighted bound from ``k`` draws: [B] nats."""
    return model.log_weights(batch, k, generator=generator).logsumexp(0) - math.log(k)


def _images(spec: DataSpec, n: int) -> torch.Tensor:
    return spec.to_float(torch.randint(spec.levels, (n, *spec.shape), generator=_generator(1))).double()


def test_the_kl_is_that_of_normals():
    mean, log_std = torch.randn(2, 50, 6, generator=_generator(), dtype=torch.float64)
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(kl_to_prior(mean, log_std), expected, rtol=0, atol=1e-12)
    assert kl_to_prior(torch.zeros(1, 6), torch.zeros(1, 6)).item() == 0


@torch.no_grad()
def test_the_elbo_is_the_mean_log_importance_weight():
    """log_prob (closed-form KL) and iwae with k = 1 (log-densities) estimate one number: within 5 standard errors."""
    model, n = _model(), 5_000
    batch = Batch(_images(SPEC, 1).expand(n, -1, -1, -1))
    elbo = model.log_prob(batch, generator=_generator(3))
    weights = iwae(model, batch, 1, generator=_generator(4))
    error = math.sqrt((elbo.var().item() + weights.var().item()) / n)
    assert elbo.std() > 0
    assert abs(elbo.mean().item() - weights.mean().item()) < 5 * error


@torch.no_grad()
def test_more_importance_samples_tighten_the_bound():
    """Burda et al. 2015, theorem 1: ELBO <= L_k <= L_k' in expectation, by many standard errors here."""
    model, n = _model(), 1_000
    for parameter in model.encoder.parameters():
        parameter.mul_(2.0)  # a posterior far from the true one leaves a gap to close
    batch = Batch(_images(SPEC, 1).expand(n, -1, -1, -1))
    bounds = [model.log_prob(batch, generator=_generator(5))]
    bounds += [iwae(model, batch, k, generator=_generator(5 + k)) for k in (2, 8, 32)]
    for looser, tighter in itertools.pairwise(bounds):
        error = math.sqrt((looser.var().item() + tighter.var().item()) / n)
        assert tighter.mean() - looser.mean() > 3 * error


@torch.no_grad()
def test_the_importance_weighted_bound_reaches_the_likelihood_of_a_one_dimensional_code():
    """log p(x) by quadrature over the only latent; 1,000 samples come within 0.05 nats, 5 errors."""
    model = _model(latent=1)
    x = _images(SPEC, 3)
    grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
    log_prior = Normal(0.0, 1.0).log_prob(grid)
    width = math.log((grid[1] - grid[0]).item())
    exact = torch.stack(
        [
            (model._log_likelihood(one.expand(len(grid), -1, -1, -1), grid[:, None]) + log_prior + width).logsumexp(0)
            for one in x
        ]
    )
    found = iwae(model, Batch(x), 1_000, generator=_generator())
    assert torch.allclose(found, exact, rtol=0, atol=0.05)
    elbo = torch.stack([model.log_prob(Batch(x), generator=_generator(k)) for k in range(100)]).mean(0)
    assert (elbo < exact).all()


def test_the_loss_is_the_mean_of_the_negative_elbo():
    model = _model()
    batch = Batch(_images(SPEC, 5))
    terms = model.loss(batch, generator=_generator())
    elbo = model.log_prob(batch, generator=_generator())
    assert terms["loss"].item() == pytest.approx(-elbo.mean().item(), abs=1e-9)
    assert terms["bits_per_dim"].item() == pytest.approx(terms["loss"].item() / (16 * math.log(2)), abs=1e-9)
    assert terms["kl"].item() > 0


def test_free_bits_charge_only_what_lies_above_them():
    batch = Batch(_images(SPEC, 5))
    plain, free = (_model(free_bits=nats).loss(batch, generator=_generator()) for nats in (0.0, 0.5))
    mean, log_std, _ = _model().posterior(batch.x)
    kl = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).mean(0)
    assert (kl < 0.5).any()
    charged = kl.clamp(min=0.5).sum() - kl.sum()
    assert (free["loss"] - plain["loss"]).item() == pytest.approx(charged.item(), abs=1e-9)
    assert free["bits_per_dim"].item() == plain["bits_per_dim"].item()  # what is reported stays the bound itself


def test_every_parameter_gets_a_gradient():
    model = _model()
    model.loss(Batch(_images(SPEC, 8)), generator=_generator())["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@torch.no_grad()
@pytest.mark.parametrize("spec", [SPEC, DataSpec((3, 12, 8), 256)], ids=["digits", "colour"])
def test_codes_and_samples(spec):
    """Shapes; temperature 0 is the decoded draw from the prior; temperature 1 draws levels."""
    model = _model(spec)
    code = model.encode(_images(spec, 2))
    assert code.shape == (2, 4) and model.decode(code).shape == (2, *spec.shape)
    shown = model.sample(3, generator=_generator())
    z = torch.randn(3, 4, generator=_generator(), dtype=torch.float64)
    assert torch.equal(shown, model.decode(z))
    drawn = model.sample(3, generator=_generator(), temperature=1.0)
    assert torch.allclose(spec.to_float(spec.to_levels(drawn)).double(), drawn, rtol=0, atol=1e-6)
    assert not torch.equal(spec.to_stored(drawn), spec.to_stored(shown))


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="6x8 image: height and width must be multiples of 4"):
        VAE(DataSpec((1, 6, 8)))
