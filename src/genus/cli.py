"""What people type: ``genus …``. Imports nothing heavy before a command needs it: help must come at once."""

from __future__ import annotations

import contextlib
import errno
import importlib
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from genus import forkserver
from genus.errors import TransientError, UserError
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
    budget: Annotated[
        float | None, typer.Option(help="Write this budget into params.yaml first: it multiplies every model's steps.")
    ] = None,
    if_busy: Annotated[
        Literal["fail", "wait", "skip"], typer.Option(help="What to do while another run goes on in this folder.")
    ] = "fail",
    runner: Annotated[
        str,
        typer.Option(help="Where stages run: thread, dask, or dask:tcp://HOST:PORT. [default: GENUS_RUNNER or thread]"),
    ] = "",
) -> None:
    """Bring a collection up to date: data, training, evaluation, scorecard, registry.

    Only what changed is run, independent stages side by side. Ctrl-C ends everything; the same command goes on from
    the last checkpoints. Logs: logs/<stage>.log. Exit status: 0, 2 for what you can mend, else 1.

    Examples: `genus run`, `genus run --models glow,vae`, `genus run --datasets digits`, `genus run --all --jobs 8`.
    """
    if all_ and collection != "tour":
        raise UserError(f"--all and --collection {collection} contradict each other: give one")
    if runner:
        os.environ["GENUS_RUNNER"] = runner
    _pipelines("runner").wanted()  # said before anything is started
    pipeline = _pipelines("run")
    what = ("all" if all_ else collection, _split(models), _split(datasets))
    raise typer.Exit(pipeline.run(*what, jobs=jobs, force=force, budget=budget, if_busy=if_busy))


@app.command("models")
def models_() -> None:
    """Show the families (paper, what each can do) and the models of params.yaml."""
    from rich.console import Console
    from rich.table import Table

    from genus import config, contract
    from genus.data.spec import DataSpec

    console = Console(highlight=False)
    specs = {
        "image": DataSpec((1, 32, 32), classes=("0", "1")),  # some are of two classes
        "vector": DataSpec((2, 1, 1)),
        "text": DataSpec((64,), 0, (), "abc"),
    }
    families = Table(title="families", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for heading in ("family", "paper", "can"):
        families.add_column(heading, overflow="fold")
    for name in contract.family_names():
        # Asked of a model, not of its class: the size of a code, say, is only known once it is built.
        built = contract.example(name, specs[contract.family_class(name).kinds[0]], {})
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
    """Stage: train the classifier, or for text fit the n-gram model, that measures samples of data set NAME."""
    _stage("judge", name)


@app.command()
def controls(name: Name) -> None:
    """Stage: score known coders and known sample sets on data set NAME, for the report to rank."""
    _stage("controls", name)


@app.command()
def train(name: Name) -> None:
    """Stage: train model NAME, or go on from its checkpoint, and write models/NAME.

    GENUS_TORCHRUN="--nproc-per-node 2" trains in two processes, on as many GPUs where there are some. Options are
    torchrun's: on each of two hosts "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400".
    """
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
    """Serve MLflow's pages for runs, sample grids and the registry on localhost, until Ctrl-C, and print where."""
    from genus import config, tracking

    models = config.load().collection("tour") if Path("params.yaml").exists() else ()
    tracking.serve(port, models)


@app.command()
def schedule(
    cron: Annotated[
        str, typer.Option(help="When the nightly run starts: minute, hour, day, month, weekday.")
    ] = "0 3 * * *",
    timezone: Annotated[str, typer.Option(help="Of --cron, as Europe/Zurich.")] = "UTC",
    poll: Annotated[float, typer.Option(min=1, help="Seconds between looks at the raw data.")] = 600,
    collection: Annotated[str, typer.Option(help="The collection of params.yaml that the runs build.")] = "tour",
    port: Annotated[int, typer.Option(help="Of Prefect's pages on 127.0.0.1, if no PREFECT_API_URL is set.")] = 4200,
) -> None:
    """Run a collection every night, when raw data has changed, and from Prefect's pages, until Ctrl-C.

    Example: `genus schedule --cron "0 3 * * *" --timezone Europe/Zurich`.
    """
    _pipelines("schedule").run(cron, poll, collection, timezone, port)


Reference = Annotated[
    str,
    typer.Argument(metavar="NAME[@ALIAS]", show_default=False, help="A registered model; NAME/3 is its version 3."),
]


@app.command()
def pull(
    name: Reference,
    to: Annotated[Path, typer.Option(help="The folder that becomes the package.", show_default=False)],
) -> None:
    """Put a registered model's package into a folder, every file verified by its SHA-256.

    Example: `genus pull fashion-mnist-glow@champion --to glow`.
    """
    from genus.registry.pull import pull

    print(pull(name, to))


@app.command()
def sample(
    name: Reference,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Images: a grid as .png, or the stored values as .npy. Text: .txt or .json, else it is printed.",
            show_default=False,
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("-n", min=1, help="How many. [default: 64 images, 5 texts]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first; the next has the next.")] = 0,
    label: Annotated[int | None, typer.Option(help="What to draw, of a model with labels.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What a model of text begins with.", show_default=False)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the sampler, as temperature.")
    ] = None,
) -> None:
    """Draw from a registered model. A seed gives the same sample, however many are asked for.

    Examples: `genus sample fashion-mnist-glow -n 64 --seed 0 --out grid.png --set temperature=0.8`,
    `genus sample kjv-lstm -n 3 --prompt "In the beginning"`.
    """
    if out is not None and out.suffix not in (".png", ".npy", ".txt", ".json"):
        raise UserError(f"--out {out}: ends in neither .png nor .npy, nor in .txt or .json for text")
    knobs = dict(_setting(text) for text in set_ or []) | ({} if prompt is None else {"prompt": prompt})

    import genus

    with _one_line():
        model = genus.load(name)
        writes = getattr(model, "text", False)  # packages of an older Genus do not say
        if writes:
            if out is not None and out.suffix not in (".txt", ".json"):
                raise UserError(f"--out {out}: {model.name} writes text: .txt or .json")
        elif out is None or out.suffix not in (".png", ".npy"):
            given = "is missing" if out is None else f"{out}"
            raise UserError(f"--out {given}: {model.name} draws no text: write .png or .npy")
        elif out.suffix == ".png" and (not model.spec.levels or model.spec.shape[0] == 2):
            raise UserError(f"--out {out}: {model.name} draws no pictures: write .npy")
        seeds = range(seed, seed + (n or (5 if writes else 64)))
        samples = model.sample(seeds, None if label is None else [label] * len(seeds), **knobs)
    if writes:
        _write_texts(out, samples.tolist())
    else:
        assert out is not None
        _write_images(out, samples, model.spec.levels)
    if out is not None:
        print(out)


def _write_images(out: Path, samples: Any, levels: int) -> None:
    import numpy as np

    from genus.files import replacing

    with replacing(out) as temporary:
        if out.suffix == ".npy":
            np.save(temporary, samples)
        else:
            from PIL import Image

            from genus.pictures import grid

            Image.fromarray(grid(samples, levels=levels)).save(temporary)


def _write_texts(out: Path | None, texts: list[str]) -> None:
    """Documents with an empty line between them, or as a list in JSON; printed where no file is named."""
    from genus.files import write_json, write_text

    if out is not None and out.suffix == ".json":
        write_json(out, texts)
        return
    text = "\n\n".join(texts) + "\n"
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)


@app.command()
def score(
    name: Reference,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            show_default=False,
            help="DATASET:SPLIT of this project; or an .npy file, for text a .txt, .jsonl or .parquet file.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="A .parquet file, one row an example.", show_default=False)],
    seed: Annotated[int, typer.Option(min=0, help="Of the noise, where the likelihood is an estimate.")] = 0,
) -> None:
    """Write how probable a registered model finds each example: index, nats, bits_per_dim, and their kind.

    An .npy file holds stored values [N, channels, height, width], uint8 for images. A model of text scores documents,
    in bits_per_char: the lines of a .txt file, the strings (or the `text` of the objects) of a .jsonl file, or the
    column `text` of a .parquet file.

    Examples: `genus score fashion-mnist-glow fashion-mnist:test --out glow.parquet`,
    `genus score kjv-lstm verses.txt --out verses.parquet`.
    """
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: does not end in .parquet")
    examples = _examples(data)

    import genus
    from genus import progress
    from genus.files import replacing

    with _one_line(data):
        model = genus.load(name)
        reads = getattr(model, "text", False)
        if reads != isinstance(examples, list):
            other = "documents" if reads else "stored values, not text"
            raise ValueError(f"{model.name} scores {other}")
        nats = model.log_prob(examples, seed, lambda done, total: progress.report(done, total, unit="example"))

    import pandas as pd

    columns: dict[str, Any] = {"index": range(len(nats)), "nats": nats}
    if reads:
        unit, bits = "bits/char", model.bits_per_char(nats, examples)
        columns |= {"characters": [len(text) + 1 for text in examples], "bits_per_char": bits}
        mean = float((bits * columns["characters"]).sum() / sum(columns["characters"]))
    else:
        unit, bits = "bits/dim", model.bits_per_dim(nats)
        columns["bits_per_dim"], mean = bits, bits.mean()
    with replacing(out) as temporary:
        pd.DataFrame(columns | {"kind": model.kind}).to_parquet(temporary, index=False)
    print(f"{out}: {len(nats):,} examples, on average {mean:.4f} {unit} ({model.kind})")


@app.command()
def promote(
    name: Name,
    version: Annotated[str, typer.Option(help="A version's number. [default: the challenger]")] = "",
    reason: Annotated[str, typer.Option(help="Kept with the version.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Ask only that it works, not that it is better.")] = False,
) -> None:
    """Put a challenger through the gate and make it champion if it passes; exit status 1 where it does not.

    It must work, beat the champion on the validation split by more than chance, and not pay for that with coverage,
    copied training images or sampling time. --force needs a reason, and so does a version that was rolled back.

    Example: `genus promote fashion-mnist-glow --version 3`.
    """
    from rich.console import Console
    from rich.table import Table

    from genus.registry import champions, gate

    number, decision = champions.promote(name, version, reason, force=force)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    if decision.rows:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in gate.HEADINGS:
            table.add_column(heading, overflow="fold")
        for row in decision.rows:
            table.add_row(*row.cells())
        console.print(table)
    standing = "is champion" if decision.promoted else "is not champion"
    console.print(f"{name}: version {number} {standing}: {decision.reason}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if decision.promoted else 1)


@app.command()
def rollback(
    name: Name, reason: Annotated[str, typer.Option(help="Kept with the version rolled back.", show_default=False)]
) -> None:
    """Make the champion before this one champion again. No run promotes the one rolled back by itself.

    Example: `genus rollback fashion-mnist-glow --reason "the samples look washed out"`.
    """
    from genus.registry import champions

    gone, back = champions.rollback(name, reason)
    print(f"{name}: version {back} is champion again instead of version {gone}")


@app.command()
def history(name: Name) -> None:
    """Show all versions of a model: when, which was champion, what was decided of each and why."""
    from rich.console import Console
    from rich.table import Table

    from genus.registry import champions

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("version", "made", "aliases", "figure", "replaced", "decision", "rolled back"):
        table.add_column(heading, overflow="fold")
    for past in champions.history(name):
        made = f"{past.made:%Y-%m-%d %H:%M}"
        cells = (
            past.number,
            made,
            ", ".join(past.aliases),
            past.figure,
            past.replaces,
            past.decision,
            past.rolled_back,
        )
        table.add_row(*cells)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 150).print(table)


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


def _setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE as the key and a number, truth value or text."""
    import json

    key, separator, value = text.partition("=")
    if not (key and separator):
        raise UserError(f"--set {text}: write KEY=VALUE, as temperature=0.8")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _examples(data: str) -> Any:
    """What DATA of `genus score` means: an array, memory-mapped, or a list of documents."""
    import numpy as np

    if data.endswith(".npy"):
        try:
            return np.load(data, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise UserError(f"{data}: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(f"{data}: no .npy file: {error}") from error
    if data.endswith((".txt", ".jsonl", ".parquet")):
        return _documents(data)
    from genus.data.loaders import SPLITS, open_dataset

    dataset, _, split = data.partition(":")
    if split not in SPLITS:
        right = "neither a .npy file nor DATASET:SPLIT, nor documents in a .txt, .jsonl or .parquet file"
        raise UserError(f"{data}: {right}; the splits are {', '.join(SPLITS)}")
    found = open_dataset(dataset)
    if found.spec.kind == "text":
        tokens, offsets = np.asarray(found.split(split)), np.asarray(found.offsets(split))
        return [found.spec.text(tokens[a:b].tolist()) for a, b in itertools.pairwise(offsets)]
    return found.split(split)


def _documents(path: str) -> list[str]:
    """The documents of a file: lines of .txt, strings or `text` of .jsonl, the column `text` of .parquet."""
    import json

    try:
        if path.endswith(".parquet"):
            from pyarrow import ArrowException, parquet

            try:
                return parquet.read_table(path, columns=["text"])["text"].to_pylist()
            except (ArrowException, KeyError) as error:
                raise UserError(
                    f"{path}: no Parquet file with a column 'text': {' '.join(str(error).split())}"
                ) from error
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if path.endswith(".txt"):
        found = lines
    else:
        try:
            values = [json.loads(line) for line in lines]
            found = [value["text"] if isinstance(value, dict) else value for value in values]
        except (json.JSONDecodeError, KeyError) as error:
            raise UserError(
                f"{path}: right would be a JSON string, or an object with 'text', a line: {error}"
            ) from error
    if not found:
        raise UserError(f"{path}: no documents in it")
    return found


@contextlib.contextmanager
def _one_line(what: str = "") -> Iterator[None]:
    """What a packaged model refuses, and why, as this program says it."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{what}: {error}" if what else str(error)) from error


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
        status = app(standalone_mode=False)
        if status == 130:  # what typer makes of a Ctrl-C
            raise KeyboardInterrupt
        sys.exit(status)
    except UserError as error:
        _say(f"error: {error}", TransientError.STATUS if isinstance(error, TransientError) else 2)
    except UsageError as error:
        _say(f"error: {error.format_message().rstrip('.')}; see `genus --help`", 2)  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS):
            raise
        _say(f"error: {error.filename or Path.cwd()}: cannot be written: {error.strerror}", 2)
    except (KeyboardInterrupt, typer.Abort):
        _say("stopped", 130)
    except FloatingPointError as error:
        _say(f"not a finite number: {error}", 1)
    except RuntimeError as error:
        # Importing torch just to ask would take seconds.
        training, parallel = (sys.modules.get(f"genus.{name}") for name in ("training", "parallel"))
        if training and isinstance(error, training.NonFiniteLoss):
            _say(f"the loss is no longer a number: {error}", 1)
        if parallel and isinstance(error, parallel.PeerLost):
            _say(str(error), 1)
        raise


def _terminated(number: int, frame: object) -> None:
    """SIGTERM as an exception, so that ``finally`` runs and no temporary file stays behind."""
    sys.exit(128 + number)


def _say(line: str, status: int) -> None:
    line = re.sub(r"(://[^/\s:@]*):[^/\s@]+@", r"\1:…@", " ".join(line.split()))  # a store's address, less its password
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # every ``finally`` has run
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(30)  # what stops all processes of a training the first one says, and torchrun ends the others
    print(f"genus: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":  # how torchrun starts it
    main()
