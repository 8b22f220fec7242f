"""``params.yaml``, read and checked: an unknown key, a wrong type or a name that does not exist is one clear line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from genus.errors import UserError, nearest
from genus.files import read_yaml

Scalar = str | int | float | bool
NONE = "none"  # the parent of a model that has none


def fixed_threads(threads: int) -> dict[str, str]:
    """The variables by which numerical libraries learn how many threads they may use."""
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


class Section(BaseModel):
    """A section of params.yaml: refuses keys and types that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Backbone(Section):
    """A pretrained torchvision classifier as one more set of features: a local file, known by its hash."""

    model: str  # as torchvision.models names it: resnet18, inception_v3 …
    weights: str  # a safetensors file of its state dictionary
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Judge(Section):
    """The classifier whose features the sample metrics use."""

    steps: int = Field(1800, gt=0)
    batch_size: int = Field(64, gt=0)
    learning_rate: float = Field(4e-3, gt=0)
    backbone: Backbone | None = None  # features of a pretrained network beside the judge's own


class Dataset(Section):
    """Where a data set comes from and what must hold of it."""

    source: str  # a file of genus/data/sources
    options: dict[str, Any] = {}  # keyword arguments of that source
    validation: float = Field(0.1, gt=0, lt=1)  # share of train carved out for validation
    max_broken: float = Field(0.01, ge=0, le=1)  # share of unreadable examples that is still accepted
    checks: dict[str, Scalar] = {}  # arguments of the validation suite
    judge: Judge = Judge()


class Train(Section):
    """How a model is trained. ``steps`` is multiplied by the global ``budget``."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float | dict[str, float] = 1e-3  # one for all groups, or one a group
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False)  # YAML has lists, no tuples
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.02, ge=0)  # steps with a rising learning rate; below 1: as a share of all
    final_lr: float = Field(0.02, ge=0, le=1)  # the cosine's end, as a share of the learning rate
    clip: float = Field(0.0, ge=0)  # largest gradient norm of a group; 0: no clipping
    ema: float = Field(0.0, ge=0, lt=1)  # decay of the averaged weights, which are the ones kept; 0: none
    flip: bool = False  # mirror images left to right at random


class Evaluate(Section):
    """What the evaluator may spend on a model."""

    samples: int = Field(10_000, ge=2)  # drawn for the sample metrics; a slow sampler takes fewer
    likelihoods: int = Field(10_000, ge=2)  # test examples scored; of this and the next the default is at most so many
    batch_size: int = Field(100, gt=0)
    knobs: dict[str, Scalar] = {}  # keyword arguments of the family's sample()
    curve: dict[str, list[Scalar]] = {}  # a knob and the values at which quality and time are measured as well
    weighed: int = Field(500, ge=2)  # test examples whose importance-weighted bound is taken,
    weights: int = Field(64, ge=2)  # from so many draws of the code each
    flowed: int = Field(128, ge=2)  # test examples whose likelihood is taken along the probability flow


class Probe(Section):
    """The short trainings by which stability and capacity are measured: about a minute of one thread a model."""

    size: int = Field(12, ge=4)  # side in pixels that the images are shrunk to
    steps: int = Field(110, ge=20)
    seeds: int = Field(5, ge=2)
    learning_rates: list[float] = [0.1, 0.3, 3.0, 10.0]  # multipliers; 1 is among the seeds
    widths: list[float] = [0.5, 2.0]  # multipliers; 1 is among the seeds
    batch: float = Field(0.125, gt=0)  # multiplier of the small-batch jobs; 1: none
    outliers: float = Field(0.001, ge=0, lt=1)  # share of planted noise images; 0: none
    sizes: list[int] = [8, 20]  # sides of the resolution jobs
    samples: int = Field(700, ge=100)  # drawn from every job
    knobs: dict[str, Scalar] = {}  # of sample(), over those of evaluate
    vary: dict[str, list[Scalar]] = {}  # parameters of the family, each with the values to try
    two_d: list[str] = ["rings", "checkerboard"]  # sets of known density that the family is fitted to


class Model(Section):
    """One model: a family, its parameters and the data it learns. Its name is its registry name."""

    family: str  # a file of genus/families, as folder/file
    dataset: str
    collection: str  # the named collection it is part of; `all` is every model
    parent: str = NONE  # the model that it learns from, where its family does
    params: dict[str, Any] = {}  # keyword arguments of the family
    train: Train
    evaluate: Evaluate = Evaluate()
    probe: Probe = Probe()


class Collection(Section):
    """A named set of models with a scorecard of its own."""

    about: str
    records: str  # the folders of records, probes and pictures that its scorecard reads
    probes: str
    pictures: str
    report: str  # the scorecard's file name under reports/, without extension


class Params(Section):
    """All of params.yaml."""

    seed: int = Field(0, ge=0)
    budget: float = Field(1, gt=0)
    threads: int = Field(1, gt=0)
    device: Literal["auto", "cpu", "cuda"] | str = "auto"
    collections: dict[str, Collection]
    datasets: dict[str, Dataset]
    models: dict[str, Model]

    def model(self, name: str) -> Model:
        if name not in self.models:
            raise UserError(f"unknown model '{name}': {nearest(name, self.models)}")
        return self.models[name]

    def described(self, name: str) -> dict[str, Any] | None:
        """A model's family, parameters and parent, the same of that one; None where ``name`` is that of no parent."""
        if name == NONE:
            return None
        model = self.model(name)
        return {"family": model.family, "params": model.params, "parent": self.described(model.parent)}

    def dataset(self, name: str) -> Dataset:
        if name not in self.datasets:
            raise UserError(f"unknown data set '{name}': {nearest(name, self.datasets)}")
        return self.datasets[name]

    def collection(self, name: str) -> list[str]:
        """Names of the models in a collection; ``all`` is every model."""
        if name not in self.collections:
            raise UserError(f"unknown collection '{name}': {nearest(name, self.collections)}")
        return [key for key, model in self.models.items() if name in ("all", model.collection)]


def load(path: str | os.PathLike[str] = "params.yaml") -> Params:
    """Reads and checks params.yaml. Raises UserError naming the key and what would be right."""
    raw = read_yaml(path, "run genus in the project's folder")
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error, raw)}") from error
    for name, model in params.models.items():
        if model.dataset not in params.datasets:
            hint = nearest(model.dataset, params.datasets)
            raise UserError(f"{path}: models.{name}.dataset: {model.dataset}: {hint}")
        if not name.startswith(f"{model.dataset}-"):
            raise UserError(f"{path}: models.{name}: a model's name must start with its data set: {model.dataset}-…")
        _check_parent(params, name, path)
        if model.collection not in params.collections:
            hint = nearest(model.collection, params.collections)
            raise UserError(f"{path}: models.{name}.collection: {model.collection}: {hint}")
    return params


def _check_parent(params: Params, name: str, path: str | os.PathLike[str]) -> None:
    """Raises UserError where a model's parent is none, learns other data, or is in the end the model itself."""
    line, parent = [name], params.models[name].parent
    while parent != NONE:
        where = f"{path}: models.{line[-1]}.parent: {parent}"
        if parent not in params.models:
            raise UserError(f"{where}: {nearest(parent, [*params.models, NONE])}")
        if params.models[parent].dataset != params.models[name].dataset:
            raise UserError(f"{where} learns data set '{params.models[parent].dataset}': a parent must learn the same")
        if parent in line:
            raise UserError(f"{where}: a model cannot be its own parent")
        line.append(parent)
        parent = params.models[parent].parent


def section_at(kind: type[Section], location: Sequence[str]) -> type[Section]:
    """The section that holds the last key of a location, so that one knows which keys would be right there."""
    section: Any = kind
    for part in location[:-1]:
        if isinstance(section, type) and issubclass(section, Section):
            section = section.model_fields[part].annotation
        else:  # the values of a dict or a list
            section = section.__args__[-1]
    return section


def _explain(error: ValidationError, raw: Any) -> str:
    """The first thing wrong, as `key.path: what is wrong`; a misspelt key before the one that is missing for it."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    where = ".".join(location)
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key: {nearest(location[-1], section_at(Params, location).model_fields)}"
    return f"{where}: {first['msg']}" + (f", not {first['input']!r}" if first["type"] != "missing" else "")
