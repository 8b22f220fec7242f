"""The gate, rule by rule, and then for real: trials in processes of their own on real digits."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from genus import config, tracking
from genus.cli import app
from genus.errors import UserError
from genus.registry import champions, gate
from genus.registry.entries import ask
from genus.registry.gate import Quality, Trial, decide
from genus.stages import register, trial
from tests.registry.workspace import MODEL, passing, workspace, write_figures, write_model, write_params

__all__ = ["passing", "workspace"]  # fixtures

RANDOM = np.random.default_rng(0)
EXAMPLES = RANDOM.normal(3.5, 0.5, 500)  # bits/dim of each: unlike ones, as images are
NOISE = RANDOM.normal(0, 1, 100)


def quality(frechet: float = 40.0, **changes: float) -> dict[int, Quality]:
    """At two steps, so that the larger shared one has to be chosen."""
    whole: dict[str, Any] = {"coverage": 0.5, "coverage_half": 0.03, "copied": 0.0, "copied_half": 0.05} | changes
    return {n: Quality(frechet + far, tuple(frechet + far + NOISE), **whole) for n, far in ((100, 30.0), (500, 0.0))}


def scored(change: float = 0.0, noise: float = 0.0, **more: Any) -> Trial:
    bits = EXAMPLES + change + noise * np.random.default_rng(1).normal(size=len(EXAMPLES))
    return Trial(**({"kind": "exact", "bits": tuple(bits), "quality": quality(), "sample_ms": 2.0} | more))


CHAMPION = scored()
SAMPLER = Trial(quality=quality(), sample_ms=2.0)


@pytest.mark.parametrize(
    ("challenger", "champion", "rule", "why"),
    [
        (scored(-0.01), CHAMPION, "better", r"bits_per_dim \(exact\) 3.\d+ against 3.\d+: -0.01 \("),
        (CHAMPION, CHAMPION, "not better", "does not beat version 1 by more than chance"),
        (scored(0.01), CHAMPION, "not better", "does not beat"),
        (scored(-0.001, noise=0.1), CHAMPION, "not better", "does not beat"),  # chance could have done it
        (scored(-0.02, noise=0.1), CHAMPION, "better", "beats version 1"),
        # Other kinds of likelihood are other quantities: the samples decide.
        (scored(-1.0, kind="elbo"), CHAMPION, "not better", "frechet_distance 40 against 40"),
        (scored(+1.0, kind="elbo", quality=quality(30.0)), CHAMPION, "better", "frechet_distance 30 against 40: -10"),
        (Trial(quality=quality(39.0), sample_ms=2.0), SAMPLER, "better", "frechet_distance 39 against 40"),
        (SAMPLER, SAMPLER, "not better", "frechet_distance"),
        (Trial(), SAMPLER, "not better", "shares no figure with version 1"),
        (scored(-0.1, bits=tuple(EXAMPLES[:100] - 0.1)), CHAMPION, "better", "against"),  # paired over the first 100
        # Guards.
        (scored(-0.1, quality=quality(coverage=0.40)), CHAMPION, "guard", "coverage 0.4 against 0.5.*not surely below"),
        (scored(-0.1, quality=quality(coverage=0.42)), CHAMPION, "better", "beats"),  # within tolerance and interval
        (scored(-0.1, quality=quality(copied=0.12)), CHAMPION, "guard", "copied 0.12 against 0"),
        (scored(-0.1, quality=quality(copied=0.08)), CHAMPION, "better", "beats"),
        (scored(-0.1), scored(quality=quality(copied=-1.4)), "better", "beats"),  # below 0 nothing is copied
        (scored(-0.1, sample_ms=3.2), CHAMPION, "guard", "sample_ms 3.2 against 2.*at most 3.1 ms"),
        (scored(-0.1, sample_ms=3.0), CHAMPION, "better", "beats"),
        (scored(+0.1, sample_ms=9.0), CHAMPION, "not better", "does not beat"),
        # What can't be measured.
        (Trial(fault="its weights 'a' are not all finite"), CHAMPION, "broken", "does not work: its weights"),
        (scored(-0.1, unfit="other data"), CHAMPION, "unfit", "can't be measured: other data"),
        (CHAMPION, Trial(unfit="a model of 8 x 8"), "data", "version 1 can't be measured on the data as they are"),
        (CHAMPION, Trial(fault="gone"), "lost champion", "version 1 does not work any more: gone"),
        (Trial(fault="bad"), Trial(fault="gone"), "broken", "does not work: bad"),
    ],
)
def test_decision(challenger: Trial, champion: Trial, rule: str, why: str) -> None:
    import re

    decision = decide(challenger, champion, "1")
    assert (decision.rule, decision.promoted) == (rule, rule in ("better", "data", "lost champion"))
    assert re.search(why, decision.reason), decision.reason
    assert decision.works is (not challenger.fault)
    tags, told = decision.tags(), decision.markdown()
    assert tags["genus.decision"] == decision.reason and tags["genus.metrics"] == str(gate.METRICS)
    assert decision.reason in told and all(f"| {row.name} |" in told for row in decision.rows)
    assert all(f"genus.gate.{row.name.split()[0]}" in tags for row in decision.rows)
    assert decide(challenger, champion, "1") == decision  # and nothing else decides


def test_without_a_champion_to_work_is_enough() -> None:
    assert decide(Trial(), None, None) == gate.Decision(True, "first", "it is the first version, and it works")
    lost = decide(Trial(), None, "2", "the champion, version 2, is gone")
    assert (lost.promoted, lost.rule) == (True, "lost champion")
    assert not decide(Trial(fault="bad"), None, None).promoted
    assert gate.forced(Trial(), "2", "we want it").promoted and not gate.forced(Trial(fault="bad"), "2", "x").promoted


def test_figures_of_the_most_samples_that_both_have_are_compared() -> None:
    slow = Trial(quality={100: quality(20.0)[100]}, sample_ms=2.0)
    primary = decide(slow, SAMPLER, "1").rows[0]
    assert (primary.n, primary.champion, primary.challenger) == (100, 70.0, 50.0)


# ---- the registry, with the trials left out


def fresh(seed: int) -> str:
    """Other content in models/<MODEL>/, registered; its version."""
    write_model(seed=seed)
    register.run("smoke")
    client = tracking.client()
    return max((str(v.version) for v in client.search_model_versions(f"name = '{MODEL}'")), key=int)


@pytest.fixture
def three(workspace: Path, passing: list[Any]) -> list[Any]:
    """Versions 1, 2 and 3, each champion for a while; the trials there were, and those that next ones are to find."""
    write_params(MODEL)
    write_figures(bits_per_dim=3.5)
    for folder, name, key in (("processed", "dataset", "sha256"), ("judge", "judge", "data_sha256")):
        path = Path("data") / folder / "digits" / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({key: "d" * 64}))
    for seed, bits in enumerate((0.0, -0.1, -0.2)):
        passing[:] = [scored(bits), scored(bits + 0.1)]
        assert fresh(seed) == str(seed + 1)
    return passing


def aliases() -> dict[str, str]:
    entry = ask(tracking.client(), MODEL)
    assert entry is not None
    return entry.aliases


def test_rollback_goes_back_along_the_chain_and_no_run_undoes_it(
    three: list[Any], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = workspace / "told.json"
    monkeypatch.setenv("GENUS_NOTIFY", f"tee {told}")
    assert aliases() == {"champion": "3"}
    with pytest.raises(UserError, match="needs a reason"):
        champions.rollback(MODEL, " ")
    assert champions.rollback(MODEL, "washed out") == ("3", "2")
    register.run("smoke")  # the files still say 3
    assert aliases() == {"champion": "2"}
    assert champions.rollback(MODEL, "as well") == ("2", "1")
    with pytest.raises(UserError, match="no champion before version 1"):
        champions.rollback(MODEL, "and on")
    with pytest.raises(UserError, match=r"version 3 was rolled back \(washed out\): give --version 3 and --reason"):
        champions.promote(MODEL, "3")
    three[:] = [scored(-0.2), scored(0.0)]
    number, decision = champions.promote(MODEL, "3", "they were looked at again")
    assert (number, decision.rule, aliases()) == ("3", "better", {"champion": "3"})
    assert json.loads(told.read_text())["event"] == "promotion"
    past = {line.number: line for line in champions.history(MODEL)}
    assert list(past) == ["3", "2", "1"]
    assert past["3"].aliases == ("champion",) and past["3"].replaces == "1" and not past["3"].rolled_back
    assert past["2"].rolled_back == "as well" and past["1"].decision == "it is the first version, and it works"
    assert past["1"].figure == "bits_per_dim (elbo) 3.5000"
    assert champions.rollback(MODEL, "no") == ("3", "1")


def test_by_hand(three: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    three[:] = [scored(+0.1), scored()]
    fresh(3)
    assert aliases() == {"champion": "3", "challenger": "4"}
    with pytest.raises(UserError, match="--force needs a reason"):
        champions.promote(MODEL, force=True)
    with pytest.raises(UserError, match=f"{MODEL} has no version 9: there is 1, 2, 3, 4"):
        champions.promote(MODEL, "9")
    with pytest.raises(UserError, match="version 3 is champion already"):
        champions.promote(MODEL, "3")
    with pytest.raises(UserError, match=f"no model 'digits-vea' .*did you mean '{MODEL}'"):
        champions.history("digits-vea")
    assert app(["promote", MODEL], standalone_mode=False) == 1
    said = capsys.readouterr().out
    assert "version 4 is not champion: it does not beat version 3" in said and "decided already" in said
    assert app(["promote", MODEL, "--version", "1"], standalone_mode=False) == 1  # never judged against version 3
    said = capsys.readouterr().out
    assert "below 0" in said and "version 1 is not champion: it does not beat version 3" in said
    assert app(["promote", MODEL, "--force", "--reason", "for the demo"], standalone_mode=False) == 0
    assert aliases() == {"champion": "4"}
    assert app(["history", MODEL], standalone_mode=False) in (0, None)
    assert "promoted by hand" in capsys.readouterr().out
    three[:] = [Trial(fault="bad"), Trial(fault="bad")]
    decision = champions.promote(MODEL, "1", "x", force=True)[1]
    assert (decision.promoted, decision.rule) == (False, "broken")


def test_a_lost_champion_is_replaced_by_what_works(three: list[Any]) -> None:
    client = tracking.client()
    client.delete_model_version(MODEL, "3")
    assert fresh(4) == "4"
    assert aliases() == {"champion": "4"}
    assert client.get_model_version(MODEL, "4").tags["genus.rule"] == "lost champion"
    stored = client.get_model_version(MODEL, "4").source.removeprefix("models:/")
    (weights,) = Path("mlflow").rglob(f"{stored}/**/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    three[:] = [scored(+0.1), scored()]  # worse, were there anything to be compared with
    assert fresh(5) == "5"
    version = client.get_model_version(MODEL, "5")
    assert version.tags["genus.rule"] == "lost champion" and "weights.safetensors is not the one" in version.description


def test_a_champion_of_a_newer_genus_is_not_lost(three: list[Any]) -> None:
    client = tracking.client()
    client.set_model_version_tag(MODEL, "3", "genus.format", "2")
    fresh(3)
    assert aliases() == {"champion": "3", "challenger": "4"}
    assert "made by a newer Genus" in client.get_model_version(MODEL, "4").tags["genus.decision"]


def test_changed_data_are_decided_anew(three: list[Any]) -> None:
    three[:] = [scored(+0.1), scored()]
    fresh(3)
    three[:] = []  # a second run asks for no trial
    register.run("smoke")
    assert aliases() == {"champion": "3", "challenger": "4"}
    for name, key in (("processed/digits/dataset", "sha256"), ("judge/digits/judge", "data_sha256")):
        (Path("data") / f"{name}.json").write_text(json.dumps({key: "e" * 64}))
    three[:] = [scored(-0.1), scored()]
    register.run("smoke")
    assert aliases() == {"champion": "4"}


def test_a_trial_that_is_lost_is_made_again(three: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(packages: Any, dataset: str = "") -> list[Trial]:
        raise gate.NotTried("its trial did not end within 300 s")

    with monkeypatch.context() as patch:
        patch.setattr(gate, "trials", lost)
        fresh(3)
    version = tracking.client().get_model_version(MODEL, "4")
    assert version.tags["genus.rule"] == "not tried" and aliases() == {"champion": "3", "challenger": "4"}
    three[:] = [scored(-0.1), scored()]
    register.run("smoke")
    assert aliases() == {"champion": "4"}


def test_without_data_it_stays_challenger(three: list[Any]) -> None:
    (Path("data/judge/digits/judge.json")).unlink()
    fresh(3)
    version = tracking.client().get_model_version(MODEL, "4")
    assert version.tags["genus.rule"] == "no data" and version.tags["genus.works"] == "yes"
    assert aliases() == {"champion": "3", "challenger": "4"}


# ---- for real


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ as the stages leave it: the digits and a judge."""
    from genus.data.ingestion import ingest
    from genus.data.loaders import open_dataset
    from genus.evaluation.judge import train_judge
    from genus.evaluation.reference import make_reference

    root = tmp_path_factory.mktemp("real") / "data"
    ingest("digits", config.Dataset(source="digits", validation=0.2), 0, root)
    data = open_dataset("digits", root / "processed")
    torch.manual_seed(0)
    judge = train_judge(
        data.spec,
        data.split("train"),
        data.labels("train"),
        steps=100,
        batch_size=64,
        learning_rate=4e-3,
        device=torch.device("cpu"),
    )
    make_reference(judge, data, root / "judge/digits", seed=0)
    return root


def trained(steps: int) -> None:
    """models/<MODEL>/ with real weights."""
    from genus.contract import Batch, build
    from genus.data.loaders import open_dataset
    from tests.registry.workspace import FAMILY, small_params

    folder, data = write_model(), open_dataset("digits")
    torch.manual_seed(0)
    model = build(FAMILY, data.spec, small_params(FAMILY))
    optimiser, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0)
    images = torch.from_numpy(np.array(data.split("train")))
    for _ in range(steps):
        x = data.spec.to_float(images[torch.randint(len(images), (64,), generator=generator)])
        optimiser.zero_grad()
        model.loss(Batch(x), generator=generator)["loss"].backward()
        optimiser.step()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "weights.safetensors")
    about = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(about | {"spec": data.spec.to_json(), "steps": steps}))


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute where nothing else runs
def test_the_whole_gate_with_nothing_left_out(workspace: Path, real: Path) -> None:
    (workspace / "data").symlink_to(real)
    write_params(MODEL)
    write_figures(bits_per_dim=3.5)
    client = tracking.client()
    for steps, champion, rule in ((40, "1", "first"), (300, "2", "better"), (41, "2", "not better")):
        trained(steps)
        register.run("smoke")
        number = max(champions.history(MODEL), key=lambda past: int(past.number)).number
        version = client.get_model_version(MODEL, number)
        assert version.tags["genus.rule"] == rule, version.tags["genus.decision"]
        assert aliases()["champion"] == champion
    assert aliases() == {"champion": "2", "challenger": "3"}
    told = client.get_model_version(MODEL, "2").description
    for figure in ("bits_per_dim (elbo)", "coverage", "copied", "sample_ms"):
        assert f"| {figure} |" in told


def test_what_does_not_work_is_found_in_a_trial(workspace: Path) -> None:
    from genus.registry import package

    folder = write_model()
    package(folder, "good")
    weights = load_file(folder / "weights.safetensors")
    name = next(name for name in weights if name.endswith("weight"))
    weights[name][0] = float("nan")
    save_file(weights, folder / "weights.safetensors")
    package(folder, "bad")
    package(folder, "unsound")
    (code,) = Path("unsound/artifacts/code").glob("genus_*/families/vae/vae.py")
    code.write_text(code.read_text() + "\nraise SystemError('no')\n")
    good, bad, unsound = gate.trials([Path("good"), Path("bad"), Path("unsound")])
    assert (good.fault, bad.fault, unsound.fault) == ("", f"its weights '{name}' are not all finite", "no")
    with pytest.raises(gate.NotTried, match="data/processed/digits"):
        gate.trials([Path("good")], "digits")


def test_a_trial_is_the_same_twice_but_for_its_time(
    workspace: Path, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genus.registry import package

    (workspace / "data").symlink_to(real)
    trained(20)
    package(Path("models") / MODEL, "package")
    one = Trial.of(trial.trial(Path("package"), "digits"))
    assert not one.fault and not one.unfit and one.kind == "elbo" and max(one.quality) == trial.LADDER[-1]
    clock = itertools.count(step=60.0)  # a machine that is as busy as can be
    monkeypatch.setattr(trial.time, "process_time", lambda: next(clock))
    two = Trial.of(trial.trial(Path("package"), "digits"))
    assert two.sample_ms == 60e3 / trial.TIMED
    assert replace(one, sample_ms=0) == replace(two, sample_ms=0)


def test_the_more_a_sample_takes_the_fewer_are_drawn() -> None:
    def affordable(repeats: int) -> int:
        x = torch.zeros(trial.COUNTED, 1000)
        return trial._affordable(lambda: [x @ x.T for _ in range(repeats)], 2e-3)

    assert [affordable(repeats) for repeats in (1, 10, 200)] == [2000, 250, 100]
