"""What people type: ``genus …``. Imports nothing heavy before a command needs it: help must come at once."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from genus import forkserver
from genus.errors import UserError
from genus.quiet import quieten

# What every wrong command line raises; typer has no public name for it.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="Which type of generative model suits your data? Trains every family of generative model on the same data, "
    "measures them and keeps the best in a registry. Everything a result depends on stands in params.yaml; "
    "`genus run` brings the results up to date.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]


@app.command()
def run(
    models: Annotated[
        str, typer.Option(help="Only these models, comma-separated. `glow` is short for `<dataset>-glow`.")
    ] = "",
    datasets: Annotated[str, typer.Option(help="Only the models of these data sets, comma-separated.")] = "",
    collection: Annotated[str, typer.Option(help="The collection of params.yaml to build and register.")] = "tour",
    all_: Annotated[bool, typer.Option("--all", help="Every model: short for `--collection all`.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Stages side by side. [default: cores // threads of params.yaml]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Rerun the selected stages even if nothing changed.")] = False,
) -> None:
    """Bring a collection up to date: data, training, evaluation, scorecard, registry.

    Only what changed is run, independent stages side by side. Ctrl-C ends everything; the same command goes on from
    the last checkpoints. Logs: logs/<stage>.log. Exit status: 0, 2 for what you can mend, else 1.

    Examples: `genus run`, `genus run --models glow,vae`, `genus run --datasets digits`, `genus run --all --jobs 8`.
    """
    if all_ and collection != "tour":
        raise UserError(f"--all and --collection {collection} contradict each other: give one")
    pipeline = _pipelines("run")
    status = pipeline.run("all" if all_ else collection, _split(models), _split(datasets), jobs=jobs, force=force)
    raise typer.Exit(status)


@app.command("models")
def models_() -> None:
    """Show the families (paper, what each can do) and the models of params.yaml."""
    from rich.console import Console
    from rich.table import Table

    from genus import config, contract
    from genus.data.spec import DataSpec

    console = Console(highlight=False)
    families = Table(title="families", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for heading in ("family", "paper", "can"):
        families.add_column(heading, overflow="fold")
    for name in contract.family_names():
        # Asked of a model, not of its class: the size of a code, say, is only known once it is built.
        built = contract.build(name, DataSpec((1, 32, 32)), {})
        can = [label for label, needs in contract.CAPABILITIES.items() if isinstance(built, needs)]
        density = getattr(built, "density", "")
        families.add_row(name, built.paper, ", ".join(can) + (f" (density: {density})" if density else ""))
    console.print(families)

    models = Table(title="\nmodels of params.yaml", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for heading in ("model", "family", "data set", "collection", "steps"):
        models.add_column(heading, overflow="fold")
    for name, model in config.load().models.items():
        models.add_row(name, model.family, model.dataset, model.collection, f"{model.train.steps:,}")
    console.print(models)


@app.command()
def ingest(name: Name) -> None:
    """Stage: fetch and verify data set NAME and write data/processed/NAME."""
    _stage("ingest", name)


@app.command()
def validate(name: Name) -> None:
    """Stage: check what must hold of data set NAME; a critical failure stops here."""
    _stage("validate", name)


@app.command()
def judge(name: Name) -> None:
    """Stage: train the classifier whose features measure samples of data set NAME."""
    _stage("judge", name)


@app.command()
def controls(name: Name) -> None:
    """Stage: score known coders and known sample sets on data set NAME, for the report to rank."""
    _stage("controls", name)


@app.command()
def train(name: Name) -> None:
    """Stage: train model NAME, or go on from its checkpoint, and write models/NAME."""
    _stage("train", name)


@app.command()
def evaluate(name: Name) -> None:
    """Stage: measure model NAME on the test split and write reports/metrics/NAME.json."""
    _stage("evaluate", name)


@app.command()
def probe(name: Name) -> None:
    """Stage: measure the stability, capacity and constraints of model NAME in many short trainings."""
    _stage("probe", name)


@app.command()
def scorecard(collection: Annotated[str, typer.Argument()] = "tour") -> None:
    """Stage: compare the models of a collection and write reports/scorecard*.html."""
    _stage("scorecard", collection)


@app.command()
def register(collection: Annotated[str, typer.Argument()] = "tour") -> None:
    """Stage: make the registry say what the files of a collection's models say."""
    _stage("register", collection)


@app.command()
def report(collection: Annotated[str, typer.Argument()] = "tour") -> None:
    """Open the page that compares the models of a collection."""
    from genus import config

    params = config.load()
    params.collection(collection)
    page = Path("reports") / f"{params.collections[collection].report}.html"
    if not page.exists():
        raise UserError(f"{page}: no such file; `genus run --collection {collection}` makes it")
    import webbrowser

    print(page)
    if not webbrowser.open(page.absolute().as_uri()):
        print("no browser was found: open the file by hand", file=sys.stderr)


@app.command()
def reproduced() -> None:
    """Compare every artifact's hash with the committed dvc.lock; exit status 1 where one differs."""
    compared = _pipelines("outcome").reproduced()
    print(compared)
    raise typer.Exit(1 if compared.different else 0)


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000) -> None:
    """Open MLflow's pages for runs, sample grids and the registry on localhost."""
    from genus import tracking

    tracking.serve(port)


@app.command("gpu-check")
def gpu_check() -> None:
    """Train each family some hundred steps on the GPU in bf16 and compare with float32 on the CPU."""
    importlib.import_module("genus.gpu_check").run()


def _stage(stage: str, name: str) -> None:
    """Runs genus.stages.<stage>; leaves the seconds of its own work where the flow asks for them."""
    status = forkserver.hand_over([stage, name])
    if status is not None:
        raise typer.Exit(status)
    from genus import config

    # Libraries read them when they are imported; with other numbers of threads sums come out in another order.
    os.environ |= config.fixed_threads(config.load().threads)
    module = importlib.import_module(f"genus.stages.{stage}")
    with _Imports() as imports:
        started = time.monotonic()
        module.run(name)
        seconds = time.monotonic() - started
    target = os.environ.get("GENUS_WORK")
    if target:
        from genus.files import write_json

        write_json(target, {"seconds": seconds - imports.seconds, "imports": imports.seconds})


class _Imports:
    """Measures the seconds that imports take within the block: they are no stage's own work."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> _Imports:
        import builtins

        self._original, depth = builtins.__import__, 0

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            begun = time.monotonic()
            try:
                return self._original(*args, **kwargs)
            finally:
                depth -= 1
                if not depth:
                    self.seconds += time.monotonic() - begun

        builtins.__import__ = timed
        return self

    def __exit__(self, *_: object) -> None:
        import builtins

        builtins.__import__ = self._original


def _pipelines(module: str) -> Any:
    """A module of pipelines/, which stands beside params.yaml and is not installed with the package."""
    here = Path(__file__).resolve().parents[2]
    for folder in (Path.cwd(), here):
        if (folder / "pipelines" / "run.py").exists():
            sys.path.insert(0, str(folder))
            return importlib.import_module(f"pipelines.{module}")
    raise UserError("pipelines/run.py: no such file; run genus in the project's folder")


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def main() -> None:
    """The only place that turns exceptions into one line and an exit status."""
    quieten()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(app(standalone_mode=False))
    except UserError as error:
        _say(f"error: {error}", 2)
    except UsageError as error:
        _say(f"error: {error.format_message().rstrip('.')}; see `genus --help`", 2)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        _say("stopped", 130)
    except FloatingPointError as error:
        _say(f"not a finite number: {error}", 1)
    except RuntimeError as error:
        training = sys.modules.get("genus.training")  # importing torch just to ask would take seconds
        if training is None or not isinstance(error, training.NonFiniteLoss):
            raise
        _say(f"the loss is no longer a number: {error}", 1)


def _terminated(number: int, frame: object) -> None:
    """SIGTERM as an exception, so that ``finally`` runs and no temporary file stays behind."""
    sys.exit(128 + number)


def _say(line: str, status: int) -> None:
    print(f"genus: {' '.join(line.split())}", file=sys.stderr, flush=True)
    sys.exit(status)
