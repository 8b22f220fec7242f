"""beta-VAE: its loss against the bound's parts, and a bound that beta does not touch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from genus.contract import Batch
from genus.data.spec import DataSpec
from genus.families.vae.beta_vae import BetaVAE
from genus.families.vae.vae import VAE
from genus.nn import logistic

SPEC = DataSpec((1, 4, 4), 17)
SMALL = {"latent": 3, "channels": 4, "hidden": 16}


def _generator(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model(spec: DataSpec = SPEC, **params) -> BetaVAE:
    torch.manual_seed(0)
    return BetaVAE(spec, **(SMALL | params)).double().eval()


def _images(spec: DataSpec = SPEC, n: int = 5) -> torch.Tensor:
    return spec.to_float(torch.randint(spec.levels, (n, *spec.shape), generator=_generator(1))).double()


@pytest.mark.parametrize("beta", [0.25, 1.0, 10.0])
def test_the_loss_is_beta_times_the_rate_and_the_distortion(beta: float) -> None:
    model, x = _model(beta=beta), _images()
    mean, log_std = model.posterior(x)
    rate = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum(1).mean()
    z = mean + log_std.exp() * torch.randn(mean.shape, generator=_generator(), dtype=mean.dtype)
    folded = torch.nn.functional.pixel_unshuffle(x, 2)
    distortion = -logistic.log_prob(model.likelihood(z), folded, 17).flatten(1).sum(1).mean()
    terms = model.loss(Batch(x), generator=_generator())
    assert terms["loss"].item() == pytest.approx((beta * rate + distortion).item(), abs=1e-9)
    assert terms["kl"].item() == pytest.approx(rate.item(), abs=1e-9)
    assert terms["bits_per_dim"].item() == pytest.approx((rate + distortion).item() / (16 * math.log(2)), abs=1e-9)
    found = model.rate(Batch(x), generator=_generator())
    assert found.shape == (5,) and found.mean().item() == pytest.approx(rate.item(), abs=1e-9)


@torch.no_grad()
def test_beta_is_of_training_alone_and_one_is_the_vae() -> None:
    """The same weights: log_prob is the VAE's for every beta, and so is the loss for beta = 1."""
    torch.manual_seed(0)
    plain, batch = VAE(SPEC, **SMALL).double().eval(), Batch(_images())
    for beta in (1.0, 7.0):
        model = _model(beta=beta)
        assert torch.equal(model.log_prob(batch, generator=_generator()), plain.log_prob(batch, generator=_generator()))
    one = _model(beta=1.0).loss(batch, generator=_generator())["loss"].item()
    assert one == pytest.approx(plain.loss(batch, generator=_generator())["loss"].item(), abs=1e-9)


def test_every_parameter_gets_a_gradient() -> None:
    model = _model()
    model.loss(Batch(_images()), generator=_generator())["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@torch.no_grad()
@pytest.mark.parametrize("spec", [SPEC, DataSpec((3, 12, 8), 256), DataSpec((2, 1, 1), 48)], ids=str)
def test_codes_and_samples(spec: DataSpec) -> None:
    model = _model(spec)
    code = model.encode(_images(spec, 2))
    assert code.shape == (2, model.latent) and model.decode(code).shape == (2, *spec.shape)
    z = torch.randn(3, model.latent, generator=_generator(), dtype=torch.float64)
    assert torch.equal(model.sample(3, generator=_generator()), model.decode(z))
    drawn = model.sample(3, generator=_generator(), temperature=1.0)
    assert torch.allclose(spec.to_float(spec.to_levels(drawn)).double(), drawn, rtol=0, atol=1e-6)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="6x8 image: height and width must be multiples of 4"):
        BetaVAE(DataSpec((1, 6, 8)))
    with pytest.raises(ValueError, match="beta must be above 0, not 0"):
        BetaVAE(SPEC, beta=0.0)
    with pytest.raises(ValueError, match="continuous data"):
        BetaVAE(DataSpec((2, 1, 1), 0))
