"""Stage probe: many short trainings of one model, by which its properties are measured."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from genus import config
from genus.files import replacing, write_json


def run(name: str) -> None:
    """Probes ``name`` and writes reports/probes/<collection>/<name>/ and its seconds, which differ from run to run."""
    params = config.load()
    chosen = params.model(name)

    from dataclasses import asdict

    from PIL import Image

    from genus.contract import family_class
    from genus.data.loaders import open_dataset
    from genus.evaluation import constraints, two_d
    from genus.evaluation.probe import Prober, setting, summarise
    from genus.evaluation.reference import open_reference
    from genus.training import NonFiniteLoss, pick_device, set_up

    started = time.monotonic()
    device = pick_device(params.device)
    set_up(params.threads, params.seed)
    data = open_dataset(chosen.dataset)
    judge = None
    if data.spec.kind != "text":
        judge = open_reference(data, Path("data/judge") / chosen.dataset).judge.to(device)
    seconds: dict[str, float] = {}

    def prober_of(model: config.Model) -> Prober:
        parent = None if model.parent == config.NONE else prober_of(params.model(model.parent))
        return Prober(model, data, judge, seed=params.seed, device=device, parent=parent)

    prober = prober_of(chosen)
    prober.run()
    seconds["probe_jobs_seconds"] = time.monotonic() - started

    begun = time.monotonic()
    what: dict[str, Any] = (params.described(name) or {}) | {"seed": params.seed}
    asked = what | {"classes": data.spec.classes}
    knobs = chosen.evaluate.knobs | chosen.probe.knobs
    found: dict[str, Any] = {
        "setting": setting(chosen.probe, prober),
        **summarise(prober),
        "curve": prober.curve,
        "constraints": {
            "free_places": constraints.free_places(**asked),
            "jacobian": constraints.jacobian(**what),
            "networks": constraints.networks(**asked),
            "trained_share": constraints.trained_share(**what, spec=data.spec, knobs=knobs),
        },
        "jobs": [asdict(outcome) for outcome in prober.outcomes.values()],
        "two_d": {},
    }
    seconds["probe_constraints_seconds"] = time.monotonic() - begun

    with replacing(Path("reports/probes") / chosen.collection / name) as folder:
        folder.mkdir(parents=True)
        for shape in chosen.probe.two_d if "vector" in family_class(chosen.family).kinds else ():
            try:
                fitted = two_d.fit(chosen.family, {}, shape, seed=params.seed, device=device)
            except (NonFiniteLoss, ValueError) as failure:  # it diverged, or it does not take two numbers
                found["two_d"][shape] = {"kl": None, "failed": " ".join(str(failure).split())}
                continue
            found["two_d"][shape] = fitted.figures
            seconds |= {f"probe_two_d_{shape}_{part}": value for part, value in fitted.seconds.items()}
            for file, table in ((f"two_d-{shape}.png", fitted.table), (f"two_d-{shape}-truth.png", fitted.truth)):
                Image.fromarray(two_d.picture(table, fitted.scale)).save(folder / file, format="PNG")
        write_json(folder / "probe.json", found)
    seconds["probe_seconds"] = time.monotonic() - started
    timing: dict[str, Any] = seconds | {"probe_curve_seconds": prober.curve_seconds}
    write_json(Path("reports/timing/probe") / f"{name}.json", timing)
