"""VAE: the KL against Monte Carlo, the bounds' order, and a likelihood that its code really decodes to."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.vae._networks import kl_by_dimension
from genus.families.vae.vae import VAE

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
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0))
    assert torch.allclose(kl_by_dimension(mean, log_std), expected, rtol=0, atol=1e-12)
    assert kl_by_dimension(torch.zeros(1, 6), torch.zeros(1, 6)).sum().item() == 0


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
            (model.log_likelihood(one.expand(len(grid), -1, -1, -1), grid[:, None]) + log_prior + width).logsumexp(0)
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


# --- posteriors bent by a flow

BENT = pytest.mark.parametrize("posterior", ["planar", "radial"])


def _bent(posterior: str, **params) -> VAE:
    """A posterior far from normal: the flow's head away from where it starts."""
    model = _model(posterior=posterior, flow_layers=4, **params)
    with torch.no_grad():
        model.flow.bias.add_(torch.randn(model.flow.bias.shape, generator=_generator(9), dtype=torch.float64))
    return model


@BENT
def test_all_else_starts_the_same_with_and_without_a_flow(posterior: str) -> None:
    plain, bent = _model().state_dict(), _model(posterior=posterior).state_dict()
    assert all(torch.equal(plain[name], bent[name]) for name in plain)
    assert set(bent) - set(plain) == {"flow.weight", "flow.bias"}


@BENT
@torch.no_grad()
def test_a_bent_posterior_s_elbo_is_its_mean_log_importance_weight(posterior: str) -> None:
    model, n = _bent(posterior), 5_000
    batch = Batch(_images(SPEC, 1).expand(n, -1, -1, -1))
    elbo = model.log_prob(batch, generator=_generator(3))
    weights = iwae(model, batch, 1, generator=_generator(4))
    error = math.sqrt((elbo.var().item() + weights.var().item()) / n)
    assert abs(elbo.mean().item() - weights.mean().item()) < 5 * error
    assert abs(elbo.mean() - _model().log_prob(batch, generator=_generator(3)).mean()) > 5 * error


@BENT
@torch.no_grad()
def test_a_bent_posterior_s_weights_average_to_the_likelihood(posterior: str) -> None:
    """By quadrature over the only latent: a wrong log-determinant would put them off."""
    model = _bent(posterior, latent=1)
    x = _images(SPEC, 2)
    grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
    log_prior = Normal(0.0, 1.0).log_prob(grid) + math.log((grid[1] - grid[0]).item())
    each = [model.log_likelihood(one.expand(len(grid), -1, -1, -1), grid[:, None]) for one in x]
    exact = torch.stack([(log_px + log_prior).logsumexp(0) for log_px in each])
    assert torch.allclose(iwae(model, Batch(x), 2_000, generator=_generator()), exact, rtol=0, atol=0.1)


@BENT
def test_a_flow_brings_the_bound_nearer_at_an_equal_decoder(posterior: str) -> None:
    """The encoder alone is trained, on eight images; the decoder is random and turns quickly."""
    bounds = {}
    for kind in ("diagonal", posterior):
        torch.manual_seed(0)
        model = VAE(SPEC, latent=2, channels=4, hidden=16, posterior=kind, flow_layers=8)
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                parameter.mul_(2.5)
        model.decoder.requires_grad_(False)
        batch = Batch(_images(SPEC, 8).float().repeat(16, 1, 1, 1))
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        generator = _generator(7)
        for _ in range(150):
            optimiser.zero_grad()
            model.loss(batch, generator=generator)["loss"].backward()
            optimiser.step()
        with torch.no_grad():
            draws = [model.log_prob(batch, generator=generator).mean() for _ in range(40)]
        bounds[kind] = torch.stack(draws)
    gain = bounds[posterior].mean() - bounds["diagonal"].mean()
    error = math.sqrt(sum(draws.var().item() / len(draws) for draws in bounds.values()))
    assert gain > 3 * error, (gain, error)


def test_an_unknown_posterior_is_named() -> None:
    with pytest.raises(ValueError, match="posterior must be diagonal, planar or radial, not normal"):
        VAE(SPEC, posterior="normal")
