"""What a family demands of its networks, found out by trying: no family is asked what it believes of itself.

Everything happens on small models of 4 × 4 random bits, which no density can code in less than one bit a pixel.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from genus.contract import Batch, Decodes, Encodes, Family, Initialises, Samples, Scores, build
from genus.data.spec import DataSpec

SPEC = DataSpec((1, 4, 4), levels=2)
STEPS, BATCH, RATE = 60, 64, 1e-2
TOLERANCE = 0.02  # bits/dim that a density may seem to gain on random bits: the noise of 2,000 images is a tenth of it
EXACT = 1e-3  # largest error of what is called an inverse or a Jacobian


class Arbitrary(nn.Module):
    """Any module: relu(a x + b + c mean(x)) + d, the mean over places. Every place sees all others, what is negative is
    lost for good, and there is no inverse. ``log_det`` are the dimensions of the log-determinant that stands beside its result, where one does."""

    def __init__(self, log_det: int | None):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))
        self.across, self.offset = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))
        self.log_det = log_det

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        mean = x.mean(tuple(range(min(2, x.ndim - 1), x.ndim)), keepdim=True)
        y = torch.relu(self.scale * x + self.shift + self.across * mean) + self.offset
        return y if self.log_det is None else (y, y.new_zeros(y.shape if self.log_det == y.ndim else len(y)))


def free_places(family: str, params: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """In what share of a model's inner places an arbitrary module may stand.

    Each kind of submodule that keeps its input's shape is replaced by ``Arbitrary``, one at a time, and the family's
    contract is tried again: it trains, its samples are finite, its inverse inverts, its density is one.
    ``places`` says for each what held, or what broke.
    """
    model = _built(family, params, SPEC, seed)
    intact = _broken(copy.deepcopy(model), seed)
    places = []
    for where, log_det in _places(model, seed):
        changed = copy.deepcopy(model)
        original = type(changed.get_submodule(where)).__name__
        parent, _, name = where.rpartition(".")
        setattr(changed.get_submodule(parent), name, Arbitrary(log_det))
        try:
            why = _broken(changed, seed)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as failure:
            # It asks for what a module need not have: an inverse, a matrix.
            why = " ".join(str(failure).split())[:120]
        places.append({"module": original, "where": where, "broken": why})
    free = sum(not place["broken"] for place in places)
    return {
        "value": free / len(places) if places and not intact else None,
        "n": len(places),
        "text": f"{free} of {len(places)} kinds" if not intact else f"intact, it fails: {intact}",
        "places": places,
    }


def jacobian(family: str, params: dict[str, Any], *, seed: int) -> dict[str, Any] | None:
    """Whether the density is a base density times a Jacobian determinant, checked against autograd in float64.

    ``value`` is the largest error of log_prob against log N(encode(x)) + log |det d encode / dx| for continuous data
    of two dimensions; None for a family that has no code of the data's size, or no such density.
    """
    flat = DataSpec((2, 1, 1), levels=0)
    try:
        model = _built(family, params, flat, seed)
    except ValueError:  # continuous data is nothing for it
        return None
    if not (isinstance(model, Scores) and isinstance(model, Encodes) and isinstance(model, Decodes)):
        return None
    if model.latent != flat.dims:
        return None
    model = model.double().eval()  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the identity that it starts as
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    errors = []
    for _ in range(8):
        x = torch.randn((1, 2, 1, 1), generator=generator, dtype=torch.float64)
        with torch.no_grad():
            code = model.encode(x)
            base = -0.5 * (code.square().sum() + flat.dims * math.log(2 * math.pi))
            told = model.log_prob(Batch(x), generator=generator)
        slopes = torch.autograd.functional.jacobian(model.encode, x).reshape(flat.dims, flat.dims)
        errors.append(abs(float(told - base - torch.linalg.slogdet(slopes).logabsdet)))
    error = max(errors)
    return {"value": error, "n": len(errors), "text": "computed" if error < EXACT else "not computed"}


def networks(family: str, params: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """Groups of parameters that are trained against each other, each with an optimiser of its own."""
    groups = _built(family, params, SPEC, seed).groups()
    return {"value": len(groups), "n": 1, "text": ", ".join(groups) if len(groups) > 1 else "1"}


def _built(family: str, params: dict[str, Any], spec: DataSpec, seed: int) -> Family:
    torch.manual_seed(seed)
    model = build(family, spec, params)
    if isinstance(model, Initialises):
        with torch.no_grad():
            model.initialise(_batch(seed, spec=spec), generator=torch.Generator().manual_seed(seed))
    return model


def _batch(seed: int, n: int = BATCH, spec: DataSpec = SPEC) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    if not spec.levels:
        return Batch(torch.randn((n, *spec.shape), generator=generator))
    stored = torch.randint(0, spec.levels, (n, *spec.shape), generator=generator, dtype=torch.uint8)
    return Batch(spec.to_float(stored), torch.zeros(n, dtype=torch.int64))


def _places(model: Family, seed: int) -> list[tuple[str, int | None]]:
    """Names of where something may be put, and the dimensions of the log-determinant that comes with its result.

    One place a kind: the first of every class of module that was seen to keep the shape of its input.
    """
    found: dict[str, tuple[str, int | None]] = {}
    names = {module: name for name, module in model.named_modules() if name}

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        result, beside = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
        if inputs and isinstance(inputs[0], Tensor) and isinstance(result, Tensor) and result.ndim > 1:
            if inputs[0].shape == result.shape:
                found.setdefault(type(module).__name__, (names[module], None if beside is None else beside.ndim))

    handles = [module.register_forward_hook(hook) for module in names]
    for _ in model.updates(_batch(seed), generator=torch.Generator().manual_seed(seed)):
        pass
    for handle in handles:
        handle.remove()
    return list(found.values())


def _broken(model: Family, seed: int) -> str:
    """What of the contract a model breaks after a short training; empty where all holds."""
    generator = torch.Generator().manual_seed(seed)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimisers = {name: torch.optim.Adam(parameters, RATE) for name, parameters in model.groups().items()}
    model.train()
    for step in range(STEPS):
        for group, terms in model.updates(_batch(seed + step), generator=generator):
            if not terms["loss"].isfinite():
                return f"the loss is {terms['loss'].item()} at step {step + 1}"
            optimisers[group].zero_grad()
            terms["loss"].backward(inputs=model.groups()[group])
            optimisers[group].step()
    if all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters()):
        return "it does not learn"
    model.eval()
    with torch.inference_mode():
        if isinstance(model, Samples) and not model.sample(8, generator=generator).isfinite().all():
            return "its samples are not finite"
        fresh = _batch(seed + STEPS, 2000)
        if isinstance(model, Encodes) and isinstance(model, Decodes) and model.latent == SPEC.dims:
            error = (model.decode(model.encode(fresh.x)) - fresh.x).abs().max().item()
            if not error < EXACT:
                return f"its inverse is off by {error:.2g}"
        if isinstance(model, Scores):
            nats = model.log_prob(fresh, generator=generator).double().mean().item()
            bits = -nats / (SPEC.dims * math.log(2))
            if not bits > 1 - TOLERANCE:
                return f"its density is none: {bits:.2f} bits/dim for random bits, which need 1"
    return ""
