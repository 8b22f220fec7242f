"""What a family of generative models is to the rest of Genus.

A family is an ``nn.Module`` that says what to minimise. What else it can do, it says by *having* the method:
the capabilities below are protocols, never base methods, so nobody raises NotImplementedError from ``sample``.
One trainer, one evaluator and one packager serve every family through this file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

from torch import Generator, Tensor, nn

from genus import families
from genus.data.spec import DataSpec
from genus.errors import UserError, nearest

Terms = dict[str, Tensor]  # scalars: "loss" is differentiated, all are logged


class Batch(NamedTuple):
    """Some examples. ``x``: [B, *shape] floats in the units of DataSpec, or int64 tokens [B, T].

    For text, ``log_prob`` is given documents, each up to its end (DataSpec); ``loss`` and ``updates`` are given windows
    of ``context`` + 1 tokens that run over the ends of documents: each but the first is to be predicted. A model that
    is ``Whole`` gets documents there too.
    """

    x: Tensor
    cond: Tensor | None = None  # label [B], source image, or the other unpaired domain


class Family(nn.Module):
    """Base of every model: ``Model(spec, **params)``. Holds no device, logging, file or hook code.

    All randomness comes from the generator that each method is given.
    """

    paper: ClassVar[str] = ""  # "Author & Author year, arXiv number"
    widths: ClassVar[tuple[str, ...]] = ()  # the parameters that scale its capacity
    kinds: ClassVar[tuple[str, ...]] = ("image", "vector")  # of data that it takes, as DataSpec.kind names them
    # What its parent must be able to do, a protocol below, where it learns from another model: that one is given to
    # __init__ as ``parent``, frozen, and becomes part of it (self.parent), so that its package needs no other.
    inherits: ClassVar[type | None] = None
    parent: Any  # only then

    def __init__(self, spec: DataSpec):
        super().__init__()
        self.spec = spec

    def train(self, mode: bool = True) -> Self:
        """As of every module; a parent stays as it is when it draws."""
        super().train(mode)
        if self.inherits:
            self.parent.eval()
        return self

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        """Batch mean, nats per example unless the class says otherwise (text: nats per token)."""
        raise TypeError(f"{type(self).__module__} defines neither loss nor updates")

    def updates(self, batch: Batch, *, generator: Generator) -> Iterable[tuple[str, Terms]]:
        """The paper's algorithm box: each yield asks for one optimiser step of one parameter group.

        What stands after a ``yield`` runs after that step.
        """
        yield "model", self.loss(batch, generator=generator)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by group, each with its own optimiser. Every one that is trained is in exactly one group."""
        return {"model": [parameter for parameter in self.parameters() if parameter.requires_grad]}


@runtime_checkable
class Samples(Protocol):
    """Can draw new examples."""

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, **knobs: Any) -> Tensor:
        """[n, *shape] in the units of DataSpec."""
        ...


@runtime_checkable
class Scores(Protocol):
    """Can say how probable an example is. ``density`` is the figure's kind: exact, dequantised, elbo, ode …"""

    density: str

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        """[B] nats of the data as stored: for 8-bit images the log-probability of those bytes."""
        ...


@runtime_checkable
class Encodes(Protocol):
    """Has a code for every example."""

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, code: Tensor) -> Tensor: ...


@runtime_checkable
class Decodes(Protocol):
    """Draws by decoding a standard normal code of ``latent`` numbers."""

    latent: int

    def decode(self, code: Tensor) -> Tensor:
        """[B, latent] to [B, *shape] in the units of DataSpec."""
        ...


@runtime_checkable
class Weighs(Protocol):
    """Gives importance weights, from which tighter bounds of the likelihood are made."""

    def log_weights(self, batch: Batch, k: int, *, generator: Generator) -> Tensor:
        """[k, B]: log p(x, z) / q(z | x) in nats for k draws of z; the log of their mean is a bound that k tightens."""
        ...


@runtime_checkable
class Informs(Protocol):
    """Has a posterior over codes, and knows what it says beyond the prior."""

    def rate(self, batch: Batch, *, generator: Generator) -> Tensor:
        """[B] nats: KL(q(z|x) || p(z)), or an estimate of it."""
        ...


@runtime_checkable
class Infers(Protocol):
    """Draws codes of an example from a posterior, and says how probable the example is given one."""

    latent: int

    def infer(self, x: Tensor, *, generator: Generator) -> tuple[Tensor, Tensor]:
        """A code [B, latent] drawn from q(z|x), and log q(z|x) of it, [B] nats."""
        ...

    def log_likelihood(self, x: Tensor, code: Tensor) -> Tensor:
        """[B] nats: log p(x|z) of the data as stored."""
        ...

    def show(self, code: Tensor, *, generator: Generator, temperature: float = 0.0) -> Tensor:
        """[B, *shape] in the units of DataSpec: the expected example, or at ``temperature`` 1 one from p(x|z)."""
        ...


@runtime_checkable
class Denoises(Protocol):
    """Knows the posterior mean under Gaussian noise, and with it the score at every noise level."""

    sigmas: list[float]  # the noise levels it was trained for, falling

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[clean | x] for ``x`` [B, *shape] with noise of standard deviation ``sigma`` [B]."""
        ...


@runtime_checkable
class Quantises(Protocol):
    """Has a code of tokens for every example: grids of them, the coarsest first."""

    grids: list[tuple[int, int]]  # rows and columns of each
    entries: int  # tokens are 0 … entries - 1

    def quantise(self, x: Tensor) -> list[Tensor]:
        """[B, *shape] in the units of DataSpec to int64 [B, rows, columns] a grid."""
        ...

    def dequantise(self, tokens: list[Tensor]) -> Tensor:
        """Tokens int64 [B, rows, columns] a grid to [B, *shape] in the units of DataSpec."""
        ...


@runtime_checkable
class Walks(Protocol):
    """Samples step by step, and can show the way."""

    def trajectory(self, n: int, *, frames: int, generator: Generator) -> Tensor:
        """[frames, n, *shape]: the same ``n`` samples from the first state to the finished one."""
        ...


@runtime_checkable
class Conditional(Protocol):
    """Samples what it is asked for: ``cond`` of sample() is one of ``labels`` labels, int64 [n]."""

    labels: int

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, **knobs: Any) -> Tensor: ...


@runtime_checkable
class Translates(Protocol):
    """Makes an example of one class into one of another, both ways. It may draw nothing of its own."""

    domains: tuple[int, int]  # the labels of the two classes

    def translate(self, x: Tensor, to: int, *, generator: Generator) -> Tensor:
        """[B, *shape] of the one domain to [B, *shape] of the domain ``to``, both in the units of DataSpec."""
        ...


@runtime_checkable
class Initialises(Protocol):
    """Sets itself up from a first batch (actnorm): the trainer calls it once, before the first step."""

    def initialise(self, batch: Batch, *, generator: Generator) -> None: ...


@runtime_checkable
class Reads(Protocol):
    """Learns text, from windows of ``context`` tokens (and the one before each)."""

    context: int


@runtime_checkable
class Whole(Protocol):
    """Learns text a document at a time: of more than ``context`` tokens its first ones, without an end."""

    context: int
    whole: bool  # by which it is told from one that Reads


@runtime_checkable
class Carries(Protocol):
    """Learns text in order: row b of each batch goes on where row b of the batch before ended.

    What it carries from one to the next is in buffers that are not persistent: the trainer keeps them in checkpoints,
    packages do without.
    """

    context: int

    def restart(self) -> None:
        """Forgets what it carries: the next batch goes on from none."""
        ...


CAPABILITIES: dict[str, type] = {
    "samples": Samples,
    "scores": Scores,
    "encodes": Encodes,
    "decodes": Decodes,
    "weighs": Weighs,
    "informs": Informs,
    "infers": Infers,
    "denoises": Denoises,
    "quantises": Quantises,
    "walks": Walks,
    "conditional": Conditional,
    "translates": Translates,
}


def family_names() -> list[str]:
    """Every family there is, as ``params.yaml`` names them: ``flows/glow``."""
    root = families.__path__[0]
    folders = [module.name for module in pkgutil.iter_modules([root]) if module.ispkg]
    return sorted(
        f"{folder}/{module.name}"
        for folder in folders
        for module in pkgutil.iter_modules([f"{root}/{folder}"])
        if not module.name.startswith("_")
    )


def family_class(family: str) -> type[Family]:
    """The class behind a family's name. Raises UserError with the nearest name where there is none."""
    if family not in family_names():
        raise UserError(f"unknown family '{family}': {nearest(family, family_names())}")
    return importlib.import_module(f"genus.families.{family.replace('/', '.')}").Model


def check_params(family: str, params: dict[str, Any], has_parent: bool | None = None) -> None:
    """Raises UserError, naming the nearest right one, for a parameter that the family does not have.

    And where it has a parent but learns from no other model, or has none but does; with None that is not asked.
    """
    inherits = family_class(family).inherits
    if has_parent and inherits is None:
        raise UserError(f"family '{family}' learns from no other model: it takes no parent")
    if has_parent is False and inherits is not None:
        raise UserError(f"family '{family}' learns from another model: it needs a parent that {_does(inherits)}")
    known = set(inspect.signature(family_class(family).__init__).parameters) - {"self", "spec", "parent"}
    for name in params:
        if name not in known:
            raise UserError(f"family '{family}' has no parameter '{name}': {nearest(name, known)}")


def build(
    family: str, spec: DataSpec, params: dict[str, Any], parent: Family | Mapping[str, Any] | None = None
) -> Family:
    """A new model, weights drawn from torch's global generator (seed it first).

    ``parent`` is the model that it learns from, which is frozen, or a description of one: its ``family``, its
    ``params`` and its own ``parent``, whose weights are then drawn as well.

    Raises UserError for a parameter that the family does not have, and for a parent that it cannot learn from.
    """
    check_params(family, params, parent is not None)
    if parent is None:
        return family_class(family)(spec, **params)
    if isinstance(parent, Mapping):
        parent = build(parent["family"], spec, parent["params"], parent.get("parent"))
    inherits = family_class(family).inherits
    if inherits and not isinstance(parent, inherits):
        raise UserError(f"family '{family}' needs a parent that {_does(inherits)}: {type(parent).__name__} does not")
    frozen: dict[str, Any] = {"parent": parent.eval().requires_grad_(False)}
    return family_class(family)(spec, **frozen, **params)


def example(family: str, spec: DataSpec, params: dict[str, Any]) -> Family:
    """A model that is as good as any to look at: where it learns from another, from the first family that will do."""
    inherits = family_class(family).inherits
    if inherits is None:
        return build(family, spec, params)
    alone = (name for name in family_names() if family_class(name).inherits is None)
    parents = (build(name, spec, {}) for name in alone if spec.kind in family_class(name).kinds)
    return build(family, spec, params, next(parent for parent in parents if isinstance(parent, inherits)))


def _does(needs: type) -> str:
    """What a capability is called."""
    return next(label for label, protocol in CAPABILITIES.items() if protocol is needs)


def load_model(about: Mapping[str, Any], weights: dict[str, Tensor]) -> Family:
    """A trained model from its model.json and tensors, in evaluation mode.

    Raises UserError where a key is missing, or the weights are not of the model that is described.
    """
    name = about.get("name", "a model")
    if missing := [key for key in ("family", "spec", "params") if key not in about]:
        raise UserError(f"{name}: its description has no '{missing[0]}': train it anew")
    model = build(about["family"], DataSpec.from_json(about["spec"]), about["params"], about.get("parent"))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # torch's way to say that names or shapes differ
        raise UserError(f"{name}: its weights are not of the model that is described: train it anew") from error
    return model.eval()


def parameter_count(model: nn.Module) -> int:
    """Numbers that training may change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
