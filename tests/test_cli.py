"""What people type, as they type it: help at once, and one line with exit status 2 for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from genus import cli, contract

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def typed(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """``genus`` within this process: another one would import for seconds what is here already, for each mistake."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["genus", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        return subprocess.CompletedProcess(arguments, caught.value.code, *capsys.readouterr())

    return call


def test_help_imports_nothing_heavy(genus: Call) -> None:
    heavy = "{'torch', 'mlflow', 'prefect', 'dvc', 'great_expectations', 'pandas', 'numpy', 'pydantic', 'sklearn'}"
    code = f"import sys, genus.cli; print(sorted({heavy} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
    shown = genus("--help")
    assert shown.returncode == 0 and "scorecard" in shown.stdout and "gpu-check" in shown.stdout
    assert "glow" in genus("run", "--help").stdout


def test_models_shows_every_family(genus: Call) -> None:
    shown = genus("models")
    assert shown.returncode == 0, shown.stderr
    assert all(name.split("/")[0] in shown.stdout for name in contract.family_names()) and "samples" in shown.stdout
    said = " ".join(shown.stdout.split())
    assert "decodes" in said and "denoises" in said, "what only a built model has"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rnu"], "No such command 'rnu'. Did you mean 'run'?"),
        (["run", "--model", "x"], "No such option: --model"),
        (["run", "--jobs", "0"], "Invalid value for '--jobs'"),
        (["run", "--all", "--collection", "smoke"], "--all and --collection smoke contradict each other"),
        (["run", "--models", "nonesuch"], "unknown model 'nonesuch'"),
        (["run", "--datasets", "fashion-mnits"], "unknown data set 'fashion-mnits': did you mean 'fashion-mnist'?"),
        (["run", "--collection", "tuor"], "unknown collection 'tuor': did you mean 'tour'?"),
        (["ingest", "digit"], "unknown data set 'digit': did you mean 'digits'?"),
        (["train", "digits-glwo"], "unknown model 'digits-glwo'"),
        (["train"], "Missing argument 'NAME'"),
        (["report"], "reports/scorecard.html: no such file; `genus run --collection tour` makes it"),
        (["report", "tuor"], "unknown collection 'tuor': did you mean 'tour'?"),
        (["evaluate", "digits-vae"], "models/digits-vae/model.json: no such file"),
        (["probe", "digits-vae"], "data/processed/digits: no such data set"),
        (["controls", "digits"], "data/processed/digits: no such data set"),
    ],
)
def test_wrong_command_is_one_line_and_status_2(typed: Call, arguments: list[str], line: str) -> None:
    done = typed(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("genus: error: ") and line in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("right", "wrong", "line"),
    [
        (
            "    family: autoregressive/pixelcnn",
            "    famly: autoregressive/pixelcnn",
            "famly: unknown key: did you mean 'family'?",
        ),
        ("budget:", "bugdet:", "params.yaml: bugdet: unknown key: did you mean 'budget'?"),
        ("seed: 0", "seed: zero", "params.yaml: seed: "),
        ("seed: 0", "seed: [", "params.yaml: not YAML, line"),
    ],
)
def test_wrong_params_are_one_line_and_status_2(typed: Call, project: Path, right: str, wrong: str, line: str) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text().replace(right, wrong, 1))
    done = typed("run")
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("family", "params", "line"),
    [
        ("flows/glwo", "{}", "unknown family 'flows/glwo'"),
        ("vae/vae", "{widht: 3}", "family 'vae/vae' has no parameter 'widht'"),
    ],
)
def test_wrong_family_or_parameter_stops_before_anything_starts(
    typed: Call, project: Path, family: str, params: str, line: str
) -> None:
    head = (project / "params.yaml").read_text().partition("\nmodels:")[0]
    model = f"{{family: {family}, dataset: digits, collection: smoke, parent: none, params: {params}, evaluate: {{}}, "
    model += "train: {steps: 1, batch_size: 2}}"
    (project / "params.yaml").write_text(f"{head}\nmodels:\n  digits-mine: {model}\n")
    done = typed("run", "--models", "digits-mine")
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (project / "logs/ingest@digits.log").exists()


def test_outside_a_project(genus: Call, project: Path) -> None:
    """A process of its own, as a person starts it, and a mistake of typing in another."""
    wrong = genus("rnu")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "genus: error: No such command 'rnu'. Did you mean 'run'?; see `genus --help`\n"
    (project / "params.yaml").unlink()
    done = genus("run")
    assert done.returncode == 2 and "params.yaml: no such file; run genus in the project's folder" in done.stderr


def test_non_finite_loss_is_one_line_and_status_1(project: Path) -> None:
    code = (
        "import sys, types\nfrom genus import cli\nfrom genus.training import NonFiniteLoss\n"
        "stage = types.ModuleType('genus.stages.train')\n"
        "def run(name): raise NonFiniteLoss('step 7: loss is nan')\n"
        "stage.run = run\nsys.modules['genus.stages.train'] = stage\nsys.argv = ['genus', 'train', 'm']\ncli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "genus: the loss is no longer a number: step 7: loss is nan\n"


def test_stage_says_its_own_work_without_imports(project: Path) -> None:
    code = (
        "import sys, time, types\nfrom genus import cli\nstage = types.ModuleType('genus.stages.judge')\n"
        "def run(name):\n    time.sleep(0.2)\n    import slow\n"
        "stage.run = run\nsys.modules['genus.stages.judge'] = stage\nsys.argv = ['genus', 'judge', 'm']\ncli.main()\n"
    )
    (project / "slow.py").write_text("import time\ntime.sleep(0.5)\n")
    environment = os.environ | {"GENUS_WORK": "work.json", "PYTHONPATH": str(project)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    from genus.files import read_json

    work = read_json("work.json")
    assert 0.2 <= work["seconds"] < 0.5 <= work["imports"]
