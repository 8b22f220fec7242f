"""What draws from and scores with a packaged model. Stands alone: each package carries a copy of this file.

It needs torch, numpy and safetensors, and neither Genus nor MLflow. ``load`` runs the copy that lies in the package,
not this one, so what a package answers doesn't depend on which Genus, if any, is installed.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 100  # examples scored at once
TOKENS = 1 << 16  # of documents scored at once, what fills up the shorter ones included
REPLACEMENT = "\ufffd"  # what stands for symbols that are rare in the training text
_single = threading.Lock()  # OpenMP's number of threads is a thread's own, but MKL's is one for the whole process


def load(folder: str | Path) -> Runtime:
    """The model of a package, by the package's own code. ``folder`` holds MLmodel and artifacts/.

    Raises ValueError, in one line, where the folder is no such package.
    """
    artifacts = Path(folder) / "artifacts"
    path = artifacts / "code" / "runtime.py"
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{folder}: no package, or one made by an older Genus: it has no {path.name}") from error
    name = f"genus_runtime_{hashlib.sha256(source).hexdigest()[:12]}"
    with _uncached():
        return _module(name, path).Runtime(artifacts)


class Runtime:
    """A packaged model, ready to draw and to score, on the CPU.

    ``about`` is its model.json, ``model`` the family with its weights, in eval mode, ``spec`` the shape and units of
    the data, ``knobs`` what ``sample`` takes besides seeds and labels, with the defaults it was evaluated with.
    """

    def __init__(self, artifacts: str | Path):
        """``artifacts`` holds weights.safetensors, model.json, knobs.json and code/."""
        import torch
        from safetensors.torch import load_file

        artifacts = Path(artifacts)
        self.about: dict[str, Any] = json.loads((artifacts / "model.json").read_text(encoding="utf-8"))
        self.knobs: dict[str, Any] = json.loads((artifacts / "knobs.json").read_text(encoding="utf-8"))
        (root,) = (artifacts / "code").glob("genus_*/")
        with _uncached():
            _module(root.name, root / "__init__.py")
            self.spec = importlib.import_module(f"{root.name}.data.spec").DataSpec.from_json(self.about["spec"])
            self._batch = importlib.import_module(f"{root.name}.contract").Batch
            families = f"{root.name}.families"
            with torch.random.fork_rng(devices=[]):  # building draws weights that the stored ones replace
                self.model = _built(families, self.spec, self.about)
        self.model.load_state_dict(load_file(artifacts / "weights.safetensors"))
        self.model.eval()

    @property
    def name(self) -> str:
        return self.about["name"]

    @property
    def kind(self) -> str:
        """The kind of its likelihoods (exact, dequantised, elbo, ode); 'none' where it has none."""
        return getattr(self.model, "density", "none")

    @property
    def labels(self) -> int:
        """How many labels it can be asked for; 0 where it takes none."""
        return int(getattr(self.model, "labels", 0))

    @property
    def domains(self) -> tuple[str, ...]:
        """The two classes between which it translates; none where it does not."""
        return tuple(self.spec.classes[label] for label in getattr(self.model, "domains", ()))

    @property
    def text(self) -> bool:
        """Whether it draws and scores documents, not arrays of numbers."""
        return bool(getattr(self.spec, "alphabet", ""))

    def sample(self, seeds: Sequence[int], labels: Sequence[int] | None = None, **knobs: Any) -> np.ndarray:
        """The samples that belong to ``seeds``, as stored values: [rows, *shape], uint8 for images, else float32.

        Of text, documents: [rows] str objects, whose ``prompt`` may be one for all or a sequence with one for each. A
        seed, its label and the knobs make a sample, whatever else is asked for with it. Raises ValueError, in one line,
        for a knob or a label that the model does not take, and FloatingPointError for a sample that is not finite.
        """
        import torch

        if not hasattr(self.model, "sample"):
            raise ValueError(f"{self.name} cannot sample{': it can translate' if self.domains else ''}")
        seeds = [_whole(seed, "a seed") for seed in seeds]
        wanted = self._labels(labels, len(seeds))
        prompts = self._prompts(knobs.pop("prompt", None), len(seeds)) if self.text else None
        draw = partial(self.model.sample, 1, **self.check(knobs))
        rows = np.empty(len(seeds), object) if self.text else np.zeros((len(seeds), *self.spec.shape), self._dtype)
        with _one_thread():
            for row, seed in enumerate(seeds):  # one by one: sums, and so bytes, depend on the batch
                cond = None if wanted is None else torch.tensor([wanted[row]])
                more = {} if prompts is None else {"prompt": prompts[row]}
                x = draw(generator=torch.Generator().manual_seed(seed), cond=cond, **more)
                if not x.isfinite().all():
                    raise FloatingPointError(f"{self.name}: the sample of seed {seed} is not finite")
                rows[row] = self.spec.text(x[0].tolist()) if self.text else self.spec.to_stored(x.float())[0].numpy()
        return rows

    def translate(self, images: np.ndarray, **knobs: Any) -> np.ndarray:
        """Stored images [N, *shape] of the one class as stored images of the other, which ``to`` names.

        An image makes its translation, whatever else is translated with it. Raises ValueError, in one line, for what
        can't be translated, and FloatingPointError for a translation that is not finite.
        """
        import torch

        if not self.domains:
            raise ValueError(f"{self.name} cannot translate")
        to = self.check(knobs)["to"]
        if to not in self.domains:
            raise ValueError(f"{self.name} translates to '{self.domains[0]}' or '{self.domains[1]}', not to '{to}'")
        images = np.asarray(images)
        self._check_images(images, "translates")
        rows: np.ndarray = np.zeros(images.shape, self._dtype)
        with _one_thread():
            for row, image in enumerate(images):  # one by one: sums, and so bytes, depend on the batch
                x = self.spec.to_float(torch.from_numpy(np.array(image[None], self._dtype)))
                label, generator = self.spec.classes.index(to), torch.Generator().manual_seed(0)
                y = self.model.translate(x, label, generator=generator)
                if not y.isfinite().all():
                    raise FloatingPointError(f"{self.name}: the translation of image {row} is not finite")
                rows[row] = self.spec.to_stored(y.float())[0].numpy()
        return rows

    def check(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """All knobs, the ones not given at their defaults. Raises ValueError, in one line, for one that is wrong."""
        checked = dict(self.knobs)
        for name, value in knobs.items():
            if name not in self.knobs:
                raise ValueError(f"{self.name} has no parameter '{name}': {_nearest(name, self.knobs)}")
            checked[name] = _like(self.knobs[name], value, f"parameter '{name}' of {self.name}")
        return checked

    def log_prob(
        self,
        images: np.ndarray | Sequence[str],
        seed: int = 0,
        report: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Log-probability of stored examples [N, *shape], or of documents, a str each: [N] nats, of the kind that
        ``kind`` says.

        Where it is estimated from noise, ``seed`` draws the noise. ``report`` is called with how many of how many are
        done. Raises ValueError, in one line, for what can't be scored.
        """
        import torch

        if self.kind == "none":
            does = "sample" if hasattr(self.model, "sample") else "translate"
            raise ValueError(f"{self.name} has no likelihood: it can {does}, not score")
        if self.text:
            return self._of_documents(images, seed, report)  # type: ignore[arg-type]
        images = np.asarray(images)
        self._check_images(images)
        nats, generator = np.zeros(len(images), np.float64), torch.Generator().manual_seed(seed)
        for start in range(0, len(images), CHUNK):
            stored = torch.from_numpy(np.array(images[start : start + CHUNK], self._dtype))
            with _one_thread():
                x = self.spec.to_float(stored)
                nats[start : start + len(x)] = self.model.log_prob(self._batch(x), generator=generator).numpy()
            if report:
                report(start + len(x), len(images))
        return nats

    def _of_documents(
        self, documents: Sequence[str], seed: int, report: Callable[[int, int], None] | None
    ) -> np.ndarray:
        import torch

        rows = self.tokens(documents)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))  # alike in length: little is padding
        nats, generator, done = np.zeros(len(rows), np.float64), torch.Generator().manual_seed(seed), 0
        while done < len(rows):
            chosen = order[done : done + CHUNK]
            chosen = chosen[: max(1, TOKENS // len(rows[chosen[-1]]))]
            x = torch.zeros(len(chosen), len(rows[chosen[-1]]), dtype=torch.int64)
            for line, place in zip(x, chosen, strict=True):
                line[: len(rows[place])] = torch.tensor(rows[place])
            with _one_thread():
                nats[chosen] = self.model.log_prob(self._batch(x), generator=generator).numpy()
            done += len(chosen)
            if report:
                report(done, len(rows))
        return nats

    def tokens(self, documents: Sequence[str]) -> list[list[int]]:
        """The tokens of documents, each with its end.

        A symbol that is not in the alphabet is the replacement character where that one is; else raises ValueError, in
        one line.
        """
        if isinstance(documents, str):
            raise ValueError(f"{self.name} scores documents, a list of them: not one text")
        spec, rows = self.spec, []
        for number, text in enumerate(documents):
            if not isinstance(text, str):
                raise ValueError(f"{self.name} scores documents: number {number} is no text but {text!r}")
            if REPLACEMENT in spec.alphabet:
                text = "".join(symbol if symbol in spec.alphabet else REPLACEMENT for symbol in text)
            try:
                rows.append([*spec.tokens(text), 0])
            except ValueError as error:
                raise ValueError(f"document {number}: {error}") from error
        return rows

    def bits_per_char(self, nats: np.ndarray, documents: Sequence[str]) -> np.ndarray:
        """Nats of documents as the bits that one of their characters costs, each document's end being a character."""
        return -nats / (math.log(2) * np.array([len(text) + 1 for text in documents]))

    def bits_per_dim(self, nats: np.ndarray) -> np.ndarray:
        """Nats of examples as the bits that one of their numbers costs."""
        return -nats / (math.log(2) * self.spec.dims)

    @property
    def _dtype(self) -> type:
        return np.uint8 if self.spec.levels else np.float32

    def _labels(self, labels: Sequence[int] | None, rows: int) -> list[int] | None:
        count = self.labels
        if labels is None:
            if count:
                raise ValueError(f"{self.name} needs a label for each sample: 0 to {count - 1}")
            return None
        if not count:
            raise ValueError(f"{self.name} takes no label: it was trained without")
        if len(labels) != rows:
            raise ValueError(f"{len(labels)} labels for {rows} seeds: one each")
        whole = [_whole(label, "a label") for label in labels]
        for label in whole:
            if not 0 <= label < count:
                raise ValueError(f"{self.name} has no label {label}: 0 to {count - 1}")
        return whole

    def _prompts(self, given: str | Sequence[str] | None, rows: int) -> list[str] | None:
        """The beginning of each document; None where the model takes none, or none is given."""
        if given is None:
            return None
        prompts = [given] * rows if isinstance(given, str) else list(given)
        if len(prompts) != rows:
            raise ValueError(f"{len(prompts)} prompts for {rows} seeds: one each")
        return [self.check({"prompt": prompt})["prompt"] for prompt in prompts]

    def _check_images(self, images: np.ndarray, does: str = "scores") -> None:
        shape, levels = self.spec.shape, self.spec.levels
        expected = f"{np.dtype(self._dtype)} [N, {', '.join(map(str, shape))}]"
        if images.shape[1:] != shape or images.ndim != len(shape) + 1:
            raise ValueError(f"{self.name} {does} {expected}, not {images.dtype} {list(images.shape)}")
        if images.dtype.kind != ("u" if levels else "f") or (levels and images.dtype.itemsize > 1):
            raise ValueError(f"{self.name} {does} {expected}, not {images.dtype}")
        if levels and images.size and images.max() >= levels:
            raise ValueError(f"{self.name} knows levels 0 to {levels - 1}: there is a {images.max()}")
        if not levels and not np.isfinite(images).all():
            raise ValueError(f"{self.name} {does} finite numbers: there are others")


def _built(families: str, spec: Any, about: Mapping[str, Any]) -> Any:
    """A model by its description, around the model that it learned from, if any, whose weights are among its own."""
    family = importlib.import_module(f"{families}.{about['family'].replace('/', '.')}").Model
    parent = about.get("parent")
    more = {"parent": _built(families, spec, parent).requires_grad_(False)} if parent else {}
    return family(spec, **more, **about["params"])


def settable(model: Any, evaluated: Mapping[str, Any]) -> dict[str, Any]:
    """What a family's sample() takes by keyword, {name: default}; ``evaluated`` overrides the defaults.

    Of one that only translates: the name of the class ``to`` which it does.
    """
    sample = getattr(model, "sample", None)
    if sample is None and hasattr(model, "domains"):
        return {"to": model.spec.classes[model.domains[1]]}
    found = {} if sample is None else {name: p.default for name, p in inspect.signature(sample).parameters.items()}
    knobs = {}
    for name, default in sorted(found.items()):
        value = evaluated.get(name, default)
        if name not in ("n", "generator", "cond") and isinstance(value, bool | int | float | str):
            knobs[name] = float(value) if isinstance(default, float) else value
    return knobs


def _like(default: Any, value: Any, what: str) -> Any:
    """``value`` as a value of the default's type. Raises ValueError where it is of another."""
    value = value.item() if isinstance(value, np.generic) or getattr(value, "ndim", None) == 0 else value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[type(default)]
        raise ValueError(f"{what} is {kind}, as {default!r}: not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what} is a finite number: not {value!r}")
    return value


def _whole(value: Any, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{what} is a whole number: not {value!r}") from None


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"it takes {', '.join(known) or 'none'}"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums, and so bytes, depend on how many threads share them. And no gradients."""
    import torch

    with _single, torch.inference_mode():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Imports read the sources that were verified and no compiled file beside them, and leave none there."""
    before = sys.dont_write_bytecode, sys.pycache_prefix
    sys.dont_write_bytecode, sys.pycache_prefix = True, str(Path(__file__).with_name("no such folder"))
    try:
        yield
    finally:
        sys.dont_write_bytecode, sys.pycache_prefix = before


def _module(name: str, path: Path) -> types.ModuleType:
    """The module or package at ``path``, imported once a process under a name that holds the hash of its code."""
    if name not in sys.modules:
        folder = [str(path.parent)] if path.name == "__init__.py" else None
        spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
