"""Stage train: one model, from processed data to models/<model>/."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from genus import config
from genus.errors import UserError
from genus.files import read_json, read_tensors, replacing, sha256, write_json
from genus.stages.records import failure_recorded

CHECKPOINTS = Path(".genus/checkpoints")  # outside DVC's outs, which it deletes before a stage runs again
TRANSLATED = 10  # real images that a model which translates is shown with, of each domain
GRIDS = 5  # grids of samples during a training, for the slider in MLflow


def run(name: str) -> None:
    """Trains ``name`` and writes weights.safetensors, model.json, history.csv, samples.png and its timing.

    Raises UserError where the model's family does not take data of this kind.
    Started by torchrun, or with GENUS_TORCHRUN set, in several processes, of which the first one alone writes.
    """
    params = config.load()
    chosen = params.model(name)

    from genus import parallel

    if parallel.wanted():
        parallel.launch(["train", name])

    import torch
    from safetensors.torch import save_file

    from genus import progress, tracking
    from genus.contract import Family, Samples, Translates, build, family_class, load_model, parameter_count
    from genus.data.loaders import open_dataset
    from genus.pictures import grid, page
    from genus.sampling import draw
    from genus.training import NonFiniteLoss, pick_device, set_up, train

    knobs = chosen.evaluate.knobs
    group, device = parallel.join(pick_device(params.device))
    set_up(params.threads, params.seed)
    data = open_dataset(chosen.dataset)
    if data.spec.kind not in (kinds := family_class(chosen.family).kinds):
        takes = f"family '{chosen.family}' takes {' and '.join(kinds)} data"
        raise UserError(f"models.{name}: {takes}, and data set '{chosen.dataset}' is of kind {data.spec.kind}")
    parent, described = None, {}
    if chosen.parent != config.NONE:
        folder = Path("models") / chosen.parent
        known = read_json(folder / "model.json")
        parent = load_model(known, read_tensors(folder / "weights.safetensors"))
        described = {key: known[key] for key in ("name", "family", "params", "parent") if key in known}
        described = {"parent": described | {"sha256": sha256(folder / "weights.safetensors")}}
        torch.manual_seed(params.seed)  # what building the parent has drawn is not the child's affair
    model = build(chosen.family, data.spec, chosen.params, parent)
    steps = max(1, round(chosen.train.steps * params.budget))
    about: dict[str, Any] = {
        "name": name,
        "family": chosen.family,
        "dataset": chosen.dataset,
        "spec": data.spec.to_json(),
        "params": chosen.params,
        "paper": model.paper,
        "parameters": parameter_count(model),
        "steps": steps,
        "seed": params.seed,
        "budget": params.budget,
        "train": chosen.train.model_dump(mode="json"),
        "data_sha256": data.description["sha256"],
        **described,
    }
    processes = {"processes": group.size} if group.size > 1 else {}  # sums come out in another order then
    key = about["key"] = _key(about | {"threads": params.threads, "device": device.type} | processes)
    fit = partial(
        train,
        model,
        data.split("train"),
        data.labels("train"),
        chosen.train,
        steps=steps,
        seed=params.seed,
        device=device,
        processes=group,
        checkpoint=CHECKPOINTS / name / f"{key}.safetensors",
        checkpoint_every=float(os.environ.get("GENUS_CHECKPOINT_SECONDS", "20")),  # bytes do not depend on it
        samples_at=frozenset(round(steps * k / GRIDS) for k in range(1, GRIDS)),
    )
    if group.rank:
        fit()
        group.leave()
        return

    with tracking.training_run(
        dataset=chosen.dataset,
        model=name,
        params={k: about[k] for k in ("family", "params", "train", "steps", "seed", "budget", "parameters")}
        | {"threads": params.threads, "device": device.type}
        | processes,
        tags={"genus.key": key, "genus.paper": model.paper},
        description=data.description,
    ) as run:

        def picture(model: Family, n: int, quiet: bool = False) -> np.ndarray:
            """``n`` samples; of a model that draws none but translates, real training images beside theirs."""
            if isinstance(model, Translates) and not isinstance(model, Samples):
                from genus.evaluation.translation import strips

                rows = strips(model, data, "train", columns=TRANSLATED, seed=params.seed, device=device)
                return grid(rows, levels=data.spec.levels, columns=TRANSLATED)
            drawn = draw(model, n, seed=params.seed, device=device, quiet=quiet, knobs=knobs)
            if data.spec.kind == "text":
                return page([data.spec.text(tokens) for tokens in drawn.tolist()])
            return grid(drawn, levels=data.spec.levels)

        def on_log(row: dict[str, float], speed: dict[str, float]) -> None:
            run.log(row | {figure: value for figure, value in speed.items() if figure.endswith("_per_s")})
            progress.report(int(row["step"]), steps, unit="step", loss=_headline(row), **speed)

        def on_samples(model: Family, step: int) -> None:
            run.image(picture(model, 16, quiet=True), step)

        with failure_recorded(name, chosen, "train", NonFiniteLoss, FloatingPointError):
            seen = isinstance(model, Samples | Translates)
            result = fit(on_log=on_log, on_samples=on_samples if seen else None)
        group.leave()
        if result.timing["train_steps"] < steps:  # it was resumed
            run.complete(result.history)
        result.model.cpu()
        folder = Path("models") / name
        with replacing(folder / "weights.safetensors") as temporary:
            save_file({key: value.contiguous() for key, value in result.model.state_dict().items()}, temporary)
        write_json(folder / "model.json", about)
        _write_history(folder / "history.csv", result.history)
        result.model.to(device)
        if seen:
            shown = picture(result.model, 16 if data.spec.kind == "text" else 64)
            run.image(shown, steps)
            _write_picture(folder / "samples.png", shown)
        write_json(Path("reports/timing/train") / f"{name}.json", result.timing)
        run.finished(folder)
    shutil.rmtree(CHECKPOINTS / name, ignore_errors=True)  # those of other configurations as well: they are history


def _headline(row: dict[str, float]) -> float:
    """The figure for the one live line: the loss, or the first group's where each group has its own."""
    return row.get("loss", next((value for name, value in row.items() if name.endswith("loss")), float("nan")))


def _key(about: dict[str, Any]) -> str:
    """What a checkpoint belongs to: configuration, data and the package's code."""
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    family = package / "families" / f"{about['family']}.py"
    trainer = [package / name for name in ("training.py", "parallel.py", "contract.py")]
    shared = [*family.parent.glob("_*.py"), *(package / "nn").glob("*.py")]  # private bases, and blocks for all
    ancestor = about
    while ancestor := ancestor.get("parent") or {}:
        shared.append(package / "families" / f"{ancestor['family']}.py")
    for path in [*trainer, family, *sorted(shared)]:
        code.update(path.read_bytes())
    return hashlib.sha256((json.dumps(about, sort_keys=True) + code.hexdigest()).encode()).hexdigest()[:16]


def _write_history(path: Path, history: list[dict[str, float]]) -> None:
    import pandas

    with replacing(path) as temporary:
        frame = pandas.DataFrame(history).astype({"step": int})
        frame.to_csv(temporary, index=False, float_format="%.8g", lineterminator="\n")


def _write_picture(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
