"""What a run has to do, from names and from what DVC says has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from genus import config
from genus.errors import UserError
from pipelines import plan
from pipelines.train import Slots

DIAMOND = plan.Plan(
    upstream={"ingest@d": [], "judge@d": ["ingest@d"], "train@m": ["ingest@d"], "evaluate@m": ["judge@d", "train@m"]},
    changed=frozenset({"judge@d"}),
    models=["m"],
    collections=[],
)


def test_only_changed_stages_and_what_follows_them_wait() -> None:
    assert DIAMOND.waiting() == ["judge@d", "evaluate@m"]
    assert DIAMOND.waiting({"train@m"}) == ["judge@d", "train@m", "evaluate@m"]
    assert DIAMOND.lost({"ingest@d"}) == ["judge@d", "train@m", "evaluate@m"]
    assert DIAMOND.lost({"train@m"}) == ["evaluate@m"]


def test_the_scorecard_goes_on_as_long_as_one_model_is_measured() -> None:
    models = {f"evaluate@{name}": [] for name in "ab"} | {f"probe@{name}": [] for name in "ab"}
    both = plan.Plan(
        models | {"scorecard@c": list(models), "register@c": ["scorecard@c"]}, frozenset(), ["a", "b"], ["c"]
    )
    assert both.lost({"evaluate@a"}) == both.lost({"probe@a", "probe@b"}) == []
    assert both.lost({"evaluate@a", "evaluate@b"}) == ["scorecard@c", "register@c"]
    assert both.lost({"scorecard@c"}) == ["register@c"]


def test_longest_way_is_most_urgent() -> None:
    urgency = DIAMOND.urgency({"ingest@d": 1, "judge@d": 5, "train@m": 9, "evaluate@m": 2})
    assert urgency == {"ingest@d": 12, "judge@d": 7, "train@m": 11, "evaluate@m": 2}


def test_plan_of_a_collection_ends_in_its_registration(toy: Path) -> None:
    params = config.load()
    made = plan.make(params, collection="smoke")
    assert made.stages[-1] == "register@smoke" and len(made.stages) == 12 and made.collections == ["smoke"]
    assert set(made.changed) == set(made.stages) and made.models == ["digits-glow", "digits-vae"]
    assert len(plan.make(params, collection="all").stages) == 19
    assert all(made.stages.index(up) < made.stages.index(s) for s in made.stages for up in made.upstream[s])


@pytest.mark.parametrize(
    ("models", "datasets", "collection", "found"),
    [
        (["digits-glow"], [], "tour", ["digits-glow"]),
        (["vae"], [], "tour", ["fashion-mnist-vae"]),  # the collection's own is meant
        (["vae"], [], "smoke", ["digits-vae"]),
        (["glow"], [], "tour", ["digits-glow"]),  # there is only one
        (["vae", "glow", "vae"], ["digits"], "tour", ["digits-vae", "digits-glow"]),
    ],
)
def test_short_names(toy: Path, models: list[str], datasets: list[str], collection: str, found: list[str]) -> None:
    assert plan.model_names(config.load(), models, datasets, collection) == found


@pytest.mark.parametrize(
    ("models", "datasets", "collection", "line"),
    [
        (["glwo"], [], "tour", "unknown model 'glwo': did you mean 'glow'?"),
        (["vae"], [], "all", "model 'vae' could be digits-vae or fashion-mnist-vae: give the full name"),
        (["glow"], ["fashion-mnist"], "tour", "unknown model 'glow'"),
        ([], ["digit"], "tour", "unknown data set 'digit': did you mean 'digits'?"),
        ([], [], "tuor", "unknown collection 'tuor': did you mean 'tour'?"),
    ],
)
def test_wrong_names(toy: Path, models: list[str], datasets: list[str], collection: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        plan.make(config.load(), models=models, datasets=datasets, collection=collection)
    assert str(caught.value).startswith(line)


def test_data_set_without_models_is_brought_as_far_as_it_goes(toy: Path) -> None:
    params = toy / "params.yaml"
    params.write_text(
        params.read_text().replace(
            "models:",
            "  new: {source: digits, options: {}, validation: 0.1, "
            "max_broken: 0.01, checks: {}, judge: {steps: 5}}\nmodels:",
            1,
        )
    )
    assert plan.make(config.load(), datasets=["new"]).stages == ["ingest@new", "validate@new", "judge@new"]


def test_key_that_dvc_needs_is_named_before_anything_starts(toy: Path) -> None:
    params = toy / "params.yaml"
    params.write_text(params.read_text().replace("tour\n    parent: none\n    params: {}", "tour\n    parent: none"))
    with pytest.raises(UserError, match=r"params.yaml: models.fashion-mnist-vae.params is missing and (train|probe)@"):
        plan.make(config.load())


def test_parent_that_dvc_needs_is_named(toy: Path) -> None:
    params = toy / "params.yaml"
    params.write_text(params.read_text().replace("collection: tour\n    parent: none", "collection: tour"))
    line = "params.yaml: models.fashion-mnist-vae.parent is missing and .* write it down, none where there is none"
    with pytest.raises(UserError, match=line):
        plan.make(config.load())


def test_parents_order_the_run(toy: Path) -> None:
    params = toy / "params.yaml"
    params.write_text(params.read_text().replace("parent: none", "parent: digits-vae", 1))
    made = plan.make(config.load(), models=["digits-glow"])
    assert "train@digits-vae" in made.upstream["train@digits-glow"] and made.models == ["digits-glow"]
    assert "evaluate@digits-vae" not in made.stages


def test_broken_graph_is_one_line(toy: Path) -> None:
    (toy / "dvc.yaml").write_text((toy / "dvc.yaml").read_text().replace("${item.family}", "${item.famly}"))
    with pytest.raises(UserError, match=r"dvc.yaml: .*famly") as caught:
        plan.make(config.load())
    assert "\n" not in str(caught.value)


def test_places_on_cpu_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    slots = Slots(threads=2, device="auto", jobs=1)
    first = slots.take("train@a")
    assert first and first.environment == {
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "OPENBLAS_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    assert slots.take("train@b") is None  # jobs: one at a time
    slots.free(first)
    slots = Slots(threads=2, device="auto", jobs=8)
    gpus = [slots.take(stage) for stage in ("train@a", "judge@b", "evaluate@c")]
    assert sorted(slot.gpu for slot in gpus if slot and slot.gpu) == ["0", "3"] and gpus[2] is None
    assert slots.take("ingest@d") is not None  # needs no GPU
    slots = Slots(threads=2, device="cpu", jobs=3)
    taken = [slots.take("train@a") for _ in range(4)]
    assert [slot is not None for slot in taken] == [True, True, True, False]
    assert all(slot.gpu is None for slot in taken if slot)
