"""What a family demands of its networks, found out by trying: no family is asked what it believes of itself.

Most of it happens on small models, of images as small as the family takes them, whose pixels are random bits: no
density can say more of them than that every image has one chance in 2^D. Models of text are given two symbols and the
end of a document, each token with the same chance.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from genus.contract import (
    Batch,
    Carries,
    Decodes,
    Encodes,
    Family,
    Initialises,
    Samples,
    Scores,
    Translates,
    build,
    family_class,
)
from genus.data.spec import DataSpec

Parent = Mapping[str, Any] | None  # the description of what a model learns from, as contract.build takes it

SIDES = (4, 8, 12, 16, 32, 64)  # of the small images, the first that the family takes
CLASSES = ("one", "other")  # for models that are told labels
STEPS, BATCH, RATE = 60, 64, 1e-2  # of the trainings with an arbitrary module inside
FRESH = 2000  # images of random bits by which a density is tried
WINDOWS, CONTEXT = 16, 24  # of text, in a batch, and tokens of each at most
DOCUMENT = 24  # tokens, at most, of the documents of random tokens
TOLERANCE = 0.05  # by which probabilities may seem to sum to more than 1, besides five standard errors
EXACT = 1e-3  # largest error of what is called an inverse or a Jacobian


class Arbitrary(nn.Module):
    """Any module: relu(a x + b + c mean(x)) + d, the mean over places; of a sequence [B, T, C] the next place's x, in
    which one of so many would be lost. Every place sees others, what is negative is lost for good, and there is no
    inverse.

    It stands in for ``was`` in all but that: what else is asked of it, ``was`` answers. ``inverse`` is the best there
    is, of what was not lost. ``log_det``: the dimensions of the log-determinant beside ``was``'s result, where there
    is one; here it is 0.
    """

    def __init__(self, was: nn.Module, log_det: int | None):
        super().__init__()
        self.__dict__["was"] = was  # not as a submodule: its parameters are gone
        self.scale, self.shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))
        self.across, self.offset = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))
        self.log_det = log_det

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        others = x.roll(-1, 1) if x.ndim == 3 else x.mean(tuple(range(min(2, x.ndim - 1), x.ndim)), keepdim=True)
        y = torch.relu(self.scale * x + self.shift + self.across * others) + self.offset
        return y if self.log_det is None else (y, y.new_zeros(y.shape if self.log_det == y.ndim else len(y)))

    def inverse(self, y: Tensor, *_: Any, **__: Any) -> Tensor:
        return (y - self.offset - self.shift) / self.scale

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["was"], name)


def free_places(
    family: str, params: dict[str, Any], parent: Parent = None, *, seed: int, classes: tuple[str, ...] = ()
) -> dict[str, Any]:
    """In what share of a model's inner places an arbitrary module may stand.

    Each kind of submodule that keeps its input's shape is replaced by ``Arbitrary``, one at a time, and the family's
    contract is tried again: it trains, its samples are finite and come from their generator, its inverse inverts, its
    density is one. ``places`` says for each what broke, "" where all held. How well it learns is not asked.
    ``classes``: those of the data, which a family may ask for by name.
    """
    return free_places_of(_small(family, params, parent, seed=seed, classes=classes), seed=seed)


def free_places_of(model: Family, *, seed: int) -> dict[str, Any]:
    """``free_places`` of a model of small images of random bits; the model stays as it is."""
    intact = _broken(copy.deepcopy(model), seed, inverts=_inverts(model, seed))
    inverts = not intact and _inverts(model, seed)
    places = []
    for where, log_det in [] if intact else _places(copy.deepcopy(model), seed):
        changed = copy.deepcopy(model)
        was = changed.get_submodule(where)
        parent, _, name = where.rpartition(".")
        setattr(changed.get_submodule(parent), name, Arbitrary(was, log_det))
        try:
            why = _broken(changed, seed, inverts=inverts)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as failure:
            why = " ".join(str(failure).split())[:120]  # it asks for what a module need not have
        places.append({"module": type(was).__name__, "where": where, "broken": why})
    free = sum(not place["broken"] for place in places)
    return {
        "value": free / len(places) if places else None,
        "n": len(places),
        "text": f"intact, it fails: {intact}" if intact else f"{free} of {len(places)} kinds",
        "places": places,
    }


def jacobian(family: str, params: dict[str, Any], parent: Parent = None, *, seed: int) -> dict[str, Any] | None:
    """Whether the density is a base density times a Jacobian determinant, checked against autograd in float64.

    ``value`` is the largest error, relative where it is of more than one nat, of log_prob against
    log N(encode(x)) + log |det d encode / dx|, for continuous data of two dimensions. None for a family that has no
    code of the data's size, or no such density.
    """
    spec = DataSpec((2, 1, 1), levels=0)
    try:
        model = _built(family, params, parent, spec, seed)
    except ValueError:  # continuous data is nothing for it
        return None
    return jacobian_of(model, seed=seed)


def jacobian_of(model: Family, *, seed: int) -> dict[str, Any] | None:
    """``jacobian`` of a model of two continuous numbers [2, 1, 1], whose parameters it moves."""
    if not (isinstance(model, Scores) and isinstance(model, Encodes) and isinstance(model, Decodes)):
        return None
    dims = model.spec.dims
    if model.latent != dims:
        return None
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Away from the identity that it starts as, by as much whatever a layer's width: one that turns quickly is soon
        # no function of a double, and autograd's answer is lost in rounding as well.
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            moved = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 / math.sqrt(fan_in) * moved)
    errors = []
    for _ in range(8):
        x = torch.randn((1, 2, 1, 1), generator=generator, dtype=torch.float64)
        with torch.no_grad():
            code = model.encode(x)
            base = -0.5 * (code.square().sum() + dims * math.log(2 * math.pi))
            told = model.log_prob(Batch(x), generator=generator)
        with warnings.catch_warnings():  # a look at the range of x is no step of what is differentiated
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
            slopes = torch.autograd.functional.jacobian(model.encode, x).reshape(dims, dims)
        by_autograd = base + torch.linalg.slogdet(slopes).logabsdet
        errors.append(float((told - by_autograd).abs() / by_autograd.abs().clamp(min=1)))
    error = max(errors)
    return {"value": error, "n": len(errors), "text": "computed" if error < EXACT else "not computed"}


def networks(
    family: str, params: dict[str, Any], parent: Parent = None, *, seed: int, classes: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Groups of parameters that are trained against each other, each with an optimiser of its own."""
    groups = _small(family, params, parent, seed=seed, classes=classes).groups()
    return {"value": len(groups), "n": 1, "text": ", ".join(groups) if len(groups) > 1 else "one objective"}


def trained_share(
    family: str,
    params: dict[str, Any],
    spec: DataSpec,
    parent: Parent = None,
    *,
    seed: int,
    knobs: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The share of the trained parameters that sampling uses; None for a family that does not sample.

    Each tensor of a small model is poisoned with NaN, one at a time: it is used where one sample then changes, is not
    finite or fails. Counts are of the real model, whose tensors have the same names. Below 1, something is trained
    only to be thrown away: a critic, an encoder.
    """
    real = {name: p.numel() for name, p in trained(_built(family, params, parent, spec, seed, start=False))}
    model = _small(family, params, parent, seed=seed, spec=spec, names=set(real))
    if not isinstance(model, Samples):
        return None
    used = used_by_sampling(model, seed=seed, knobs=knobs)
    idle = [name for name in used if not used[name]]
    return {
        "value": sum(real[name] for name in used if used[name]) / sum(real.values()),
        "n": len(used),
        "text": "all" if not idle else "not " + ", ".join(dict.fromkeys(name.split(".")[0] for name in idle)),
    }


def used_by_sampling(model: Any, *, seed: int, knobs: Mapping[str, Any] | None = None) -> dict[str, bool]:
    """For each trained parameter by name whether a sample depends on it; they are as before afterwards."""
    model = model.eval()

    def sample() -> Tensor:
        return model.sample(1, generator=torch.Generator().manual_seed(seed), **(knobs or {}))

    found = {}
    with torch.no_grad():
        usual = sample()
        for name, parameter in trained(model):
            kept = parameter.detach().clone()
            parameter.fill_(math.nan)
            try:
                found[name] = not torch.equal(sample(), usual)  # NaN is not equal to itself
            except (RuntimeError, ValueError):  # some operations refuse NaN: they have seen it
                found[name] = True
            parameter.copy_(kept)
    return found


def noise_dims(model: Any, *, seed: int, knobs: Mapping[str, Any]) -> int:
    """Random numbers drawn for one sample of a built model: what operations that are given a generator return."""
    with _Drawn() as drawn:
        sampled(model, seed, knobs)
    return drawn.count


def evaluations(model: Any, *, seed: int, knobs: Mapping[str, Any]) -> int:
    """Network evaluations of one sample: the most forward calls of any module with parameters of its own.

    At least 1: an inverse pass that goes around ``forward`` is one evaluation.
    """
    calls: Counter[nn.Module] = Counter()

    def count(module: nn.Module, *_: Any) -> None:
        calls[module] += 1

    own = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_pre_hook(count) for module in own]
    try:
        sampled(model, seed, knobs)
    finally:
        for handle in handles:
            handle.remove()
    return max(1, *calls.values()) if calls else 1


class _Drawn(TorchDispatchMode):
    """Counts the numbers that operations with a generator return."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(value, Generator) for value in (*args, *(kwargs or {}).values())):
            self.count += result.numel()
        return result


def sampled(model: Any, seed: int, knobs: Mapping[str, Any]) -> Tensor:
    """One sample of a built model, on its device."""
    tensor = next(iter((*model.parameters(), *model.buffers(), torch.empty(0))))
    with torch.no_grad():
        return model.sample(1, generator=torch.Generator(tensor.device).manual_seed(seed), **knobs)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters by name, but those of a parent."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _small(
    family: str,
    params: dict[str, Any],
    parent: Parent,
    *,
    seed: int,
    spec: DataSpec | None = None,
    names: set[str] | None = None,
    classes: tuple[str, ...] = (),
) -> Family:
    """The family on the smallest images that it takes: of random bits, or with the channels and levels of ``spec``. A
    family for text alone on short documents of two symbols, or with the alphabet of ``spec``; one for vectors alone, or
    where ``spec`` is of vectors, on two numbers.

    With ``names``, the smallest that has parameters of these names. Raises ValueError where there is none.
    """
    channels, depth = (spec.shape[0], spec.levels) if spec else (1, 2)
    classes = (spec.classes if spec else classes) or CLASSES
    refused = ""
    kinds = family_class(family).kinds
    if spec.alphabet if spec else kinds == ("text",):
        alphabet = spec.alphabet if spec else "01"
        return _built(family, params, parent, DataSpec((DOCUMENT,), levels=0, alphabet=alphabet), seed)
    if spec.kind == "vector" if spec else "image" not in kinds:
        return _built(family, params, parent, DataSpec((2, 1, 1), spec.levels if spec else 16, classes), seed)
    for side in SIDES:
        try:
            model = _built(family, params, parent, DataSpec((channels, side, side), depth, classes), seed)
        except ValueError as error:
            refused = str(error)
            continue
        if names is None or names == {name for name, _ in trained(model)}:
            return model
        refused = "its parameters have other names on small images"
    raise ValueError(f"{family} cannot be built small: {refused}")


def _built(
    family: str, params: dict[str, Any], parent: Parent, spec: DataSpec, seed: int, *, start: bool = True
) -> Family:
    torch.manual_seed(seed)
    model = build(family, spec, params, parent)
    if start and isinstance(model, Initialises):
        with torch.no_grad():
            model.initialise(_batch(model, seed), generator=torch.Generator().manual_seed(seed))
    return model


def _batch(model: Family, seed: int) -> Batch:
    """Something to learn from: examples, or windows of a text."""
    if not model.spec.alphabet:
        return _examples(model.spec, seed)
    if isinstance(model, Carries):
        model.restart()
    context: int = model.context  # type: ignore[assignment]  # who takes text says how much at a time
    shape, generator = (WINDOWS, min(context, CONTEXT) + 1), torch.Generator().manual_seed(seed)
    return Batch(torch.randint(0, model.spec.vocabulary, shape, generator=generator))


def _examples(spec: DataSpec, seed: int, n: int = BATCH) -> Batch:
    """Images of random bits, vectors of random numbers, or documents of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    if spec.alphabet:
        x = torch.randint(0, spec.vocabulary, (n, DOCUMENT), generator=generator)
        return Batch(torch.where((x == 0).cumsum(1) > 0, 0, x))
    if not spec.levels:
        return Batch(torch.randn((n, *spec.shape), generator=generator))
    stored = torch.randint(0, spec.levels, (n, *spec.shape), generator=generator, dtype=torch.uint8)
    return Batch(spec.to_float(stored), torch.randint(0, max(1, len(spec.classes)), (n,), generator=generator))


def _places(model: Family, seed: int) -> list[tuple[str, int | None]]:
    """Names of where something may be put, and the dimensions of the log-determinant that comes with its result.

    One place a kind: the first of every class of module that was seen to keep the shape of its input.
    """
    found: dict[type, tuple[str, int | None]] = {}
    frozen = set(model.parent.modules()) if model.inherits else set()
    names = {module: name for name, module in model.named_modules() if name and module not in frozen}

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        result, beside = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
        if not (inputs and isinstance(inputs[0], Tensor) and isinstance(result, Tensor)):
            return
        if not (beside is None or isinstance(beside, Tensor)):  # a memory, say: what stands here is asked for more
            return
        if result.ndim > 1 and inputs[0].shape == result.shape:
            found.setdefault(type(module), (names[module], None if beside is None else beside.ndim))

    handles = [module.register_forward_hook(hook) for module in names]
    for _ in model.updates(_batch(model, seed), generator=torch.Generator().manual_seed(seed)):
        pass
    for handle in handles:
        handle.remove()
    return list(found.values())


def _inverts(model: Any, seed: int) -> bool:
    """Whether every example can be had back from its code, which is as large as it is."""
    if not (isinstance(model, Encodes) and isinstance(model, Decodes)) or model.latent != model.spec.dims:  # type: ignore[attr-defined]
        return False
    return _inverse_error(model, seed) < EXACT


def _inverse_error(model: Any, seed: int) -> float:
    """In the units of DataSpec, where neighbouring levels of random bits are 2 apart. NaN counts as infinite."""
    was = model.training
    x = _examples(model.spec, seed + STEPS, 500).x
    with torch.no_grad():
        error = (model.eval().decode(model.encode(x)) - x).abs().max().item()
    model.train(was)
    return error if math.isfinite(error) else math.inf


def _broken(model: Any, seed: int, *, inverts: bool) -> str:
    """What of the contract a model breaks after a short training; empty where all holds."""
    generator = torch.Generator().manual_seed(seed)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimisers = {name: torch.optim.Adam(parameters, RATE) for name, parameters in model.groups().items()}
    model.train()
    for step in range(STEPS):
        for group, terms in model.updates(_batch(model, seed + step), generator=generator):
            if not terms["loss"].isfinite():
                # What falls without bound on random bits is no likelihood; anything else is a training that failed.
                return f"the loss is {terms['loss'].item()} at step {step + 1}"
            optimisers[group].zero_grad()
            terms["loss"].backward(inputs=model.groups()[group])
            torch.nn.utils.clip_grad_norm_(model.groups()[group], 10.0)
            optimisers[group].step()
    if all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters()):
        return "it does not learn"
    model.eval()
    checks: list[Callable[[Any, int], str]] = [_bad_samples, _bad_translations, _bad_density]
    for check in checks:
        if why := check(model, seed):
            return why
    if inverts and (error := _inverse_error(model, seed)) >= EXACT:
        return f"its inverse is off by {error:.2g} of the 2 between black and white"
    return ""


@torch.no_grad()
def _bad_samples(model: Any, seed: int) -> str:
    if not isinstance(model, Samples):
        return ""
    first, again = (model.sample(4, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    spec = model.spec  # type: ignore[attr-defined]
    right = first.shape[0] == 4 and first.shape[1] <= spec.shape[0] if spec.alphabet else first.shape[1:] == spec.shape
    if not right:
        return f"its samples have shape {tuple(first.shape)}"
    if not first.isfinite().all():
        return "its samples are not finite"
    return "" if torch.equal(first, again) else "its samples do not follow from their generator"


@torch.no_grad()
def _bad_translations(model: Any, seed: int) -> str:
    if not isinstance(model, Translates):
        return ""
    x = _examples(model.spec, seed, 4).x  # type: ignore[attr-defined]
    for to in model.domains:
        first, again = (model.translate(x, to, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
        if first.shape != x.shape:
            return f"its translations have shape {tuple(first.shape)}"
        if not first.isfinite().all():
            return "its translations are not finite"
        if not torch.equal(first, again):
            return "its translations do not follow from their generator"
    return ""


@torch.no_grad()
def _bad_density(model: Any, seed: int) -> str:
    """Probabilities of all images, or documents, sum to 1, those of a lower bound to less; more is no density.

    The sum is estimated from random examples, unbiased: the mean of their probabilities over the chances they were
    drawn with. After a training on such examples it is the sum that a cheat has made as large as it could, while a
    density that has merely learned badly still has a sum of 1.
    """
    if not isinstance(model, Scores):
        return ""
    spec = model.spec  # type: ignore[attr-defined]
    fresh = _examples(spec, seed + STEPS + 1, FRESH)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.full((FRESH,), spec.dims * math.log(max(spec.levels, 1)), dtype=torch.float64)
    ended = torch.ones(FRESH, dtype=torch.bool)
    if spec.alphabet:
        ended = fresh.x[:, -1] == 0  # the others are no documents, and add nothing to the sum
        drawn = ((fresh.x > 0).sum(1) + 1) * math.log(spec.vocabulary)
    log_shares = model.log_prob(fresh, generator=generator).double() + drawn
    log_shares = log_shares.where(ended, -math.inf)
    if log_shares.isnan().any():
        return "its density is no number"
    log_sum = float(torch.logsumexp(log_shares, 0)) - math.log(FRESH)
    shares = (log_shares - log_shares.max()).exp()
    error = float(shares.std() / shares.mean()) / math.sqrt(FRESH)  # relative
    if log_sum > math.log(1 + TOLERANCE + 5 * error):
        told = f"{math.exp(log_sum):.3g}" if log_sum < 30 else f"e^{log_sum:.0f}"
        return f"its density is none: all probabilities sum to {told}"
    return ""
