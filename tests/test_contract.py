"""What every family must hold, whatever its paper: each is built small, for data that it takes, and put to the test."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from genus.config import Train
from genus.contract import (
    CAPABILITIES,
    Batch,
    Encodes,
    Family,
    Initialises,
    Reads,
    Samples,
    Scores,
    build,
    check_params,
    family_class,
    family_names,
    load_model,
    parameter_count,
)
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.training import train
from tests.registry import workspace

SPECS = {
    "image": DataSpec((1, 8, 8), 17, tuple("0123456789")),
    "vector": DataSpec((2, 1, 1), 17),
    "text": DataSpec((24,), 0, (), "abcdefgh"),
}


def small(family: str) -> Family:
    """The family as the smoke models of params.yaml have it, small enough for a test, for the first kind it takes."""
    spec = next(spec for kind, spec in SPECS.items() if kind in family_class(family).kinds)
    described = workspace.small(family)
    torch.manual_seed(0)
    return build(family, spec, described["params"], described["parent"])


def examples(spec: DataSpec, n: int = 4, seed: int = 0) -> Batch:
    """What ``log_prob`` is given: documents of text are of every length."""
    draws = torch.Generator().manual_seed(seed)
    if spec.kind == "text":
        stored = torch.randint(1, spec.vocabulary, (n, *spec.shape), generator=draws)
        stored *= torch.arange(spec.dims) < torch.randint(spec.dims, (n, 1), generator=draws)
    else:
        stored = torch.randint(0, spec.levels, (n, *spec.shape), generator=draws, dtype=torch.uint8)
    return Batch(spec.to_float(stored), torch.arange(n) % max(1, len(spec.classes)))


def batch(model: Family, n: int = 4, seed: int = 0) -> Batch:
    """What ``loss`` is given: windows of text."""
    if model.spec.kind != "text":
        return examples(model.spec, n, seed)
    assert isinstance(model, Reads)
    draws = torch.Generator().manual_seed(seed)
    return Batch(torch.randint(model.spec.vocabulary, (n, model.context + 1), generator=draws))


def started(family: str) -> Family:
    model = small(family)
    if isinstance(model, Initialises):
        model.initialise(batch(model, 16), generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(params=family_names())
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_names_its_paper_and_a_capability(family: str) -> None:
    model = small(family)
    assert any(character.isdigit() for character in model.paper), "the paper is named with its year"
    assert any(isinstance(model, protocol) for protocol in CAPABILITIES.values())


def test_every_parameter_gets_a_gradient(family: str) -> None:
    model = started(family)
    seen: set[str] = set()
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    grouped = [parameter for group in model.groups().values() for parameter in group]
    assert len(grouped) == len({id(parameter) for parameter in grouped}) == len(names), "each is in exactly one group"
    for step in range(30):  # a zero-initialised last layer hides the layers before it, and some networks grow
        if step >= 4 and set(names.values()) == seen:
            break
        for group, terms in model.updates(batch(model, 8, step), generator=torch.Generator().manual_seed(step)):
            parameters = model.groups()[group]
            assert terms["loss"].ndim == 0 and terms["loss"].isfinite()
            for parameter in parameters:
                parameter.grad = None
            terms["loss"].backward(inputs=parameters)
            for parameter in parameters:
                assert parameter.grad is None or parameter.grad.isfinite().all()
                if parameter.grad is not None and parameter.grad.abs().sum() > 0:
                    seen.add(names[id(parameter)])
                if parameter.grad is not None:
                    parameter.data -= 1e-2 * parameter.grad.sign()
    assert set(names.values()) == seen


def test_same_seed_same_samples_in_range(family: str) -> None:
    model = started(family).eval()
    if not isinstance(model, Samples):
        pytest.skip("does not sample")
    with torch.inference_mode():
        first, again = (model.sample(3, generator=torch.Generator().manual_seed(7)) for _ in range(2))
        other = model.sample(3, generator=torch.Generator().manual_seed(8))
    spec = model.spec
    assert first.shape == (3, *spec.shape) and first.isfinite().all()
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert spec.to_stored(first).int().max() < (spec.levels or spec.vocabulary)


def test_log_prob_is_a_log_probability_of_the_stored_data(family: str) -> None:
    model = started(family).eval()
    if not isinstance(model, Scores):
        pytest.skip("gives no density")
    assert model.density
    with torch.inference_mode():
        nats = model.log_prob(examples(model.spec, 5), generator=torch.Generator().manual_seed(0))
    assert nats.shape == (5,) and nats.isfinite().all()
    assert (nats < 0).all(), "a probability of stored levels is below one"


def test_codes_decode_to_the_shape_of_the_data(family: str) -> None:
    model = started(family).eval()
    if not isinstance(model, Encodes):
        pytest.skip("has no code")
    with torch.inference_mode():
        assert model.decode(model.encode(examples(model.spec, 2).x)).shape == (2, *model.spec.shape)


def test_weights_survive_a_file_without_pickle(family: str) -> None:
    model, fresh = started(family).eval(), small(family).eval()
    stored = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    fresh.load_state_dict(load(io.BytesIO(stored).getvalue()))
    if isinstance(model, Samples) and isinstance(fresh, Samples):
        with torch.inference_mode():
            one, two = (m.sample(2, generator=torch.Generator().manual_seed(0)) for m in (model, fresh))
        assert torch.equal(one, two)


def test_draws_only_from_its_generator(family: str) -> None:
    model = started(family)
    before = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    for _ in model.updates(batch(model), generator=generator):
        pass
    if isinstance(model, Samples):
        with torch.inference_mode():
            model.sample(1, generator=generator)
    assert torch.equal(before, torch.random.get_rng_state())


def test_learns_a_tiny_data_set(family: str) -> None:
    """Thirty steps on sixteen examples: the likelihood of those, where there is one, must rise clearly."""
    model = small(family)
    data = examples(model.spec, 16)
    if model.spec.kind == "text":  # nothing but a, of any length
        data = Batch(data.x.clamp(max=1))
        stored = torch.cat([row[: row.count_nonzero() + 1] for row in data.x]).repeat(40).byte().numpy()
    else:
        stored = (model.spec.to_stored(data.x) // 8 * 8).numpy()  # three grey levels: something to learn
        data = Batch(model.spec.to_float(torch.from_numpy(stored)))
    config = Train(steps=30, batch_size=16, learning_rate=3e-3 if len(model.groups()) == 1 else 1e-3, clip=100.0)

    def nats(model: Family) -> float:
        with torch.inference_mode():
            return model.log_prob(data, generator=torch.Generator().manual_seed(0)).mean().item()  # type: ignore[operator]

    scores = isinstance(model, Scores)
    if isinstance(model, Initialises):
        windows = batch(model, 16) if model.spec.kind == "text" else data
        model.initialise(windows, generator=torch.Generator().manual_seed(0))
    before = nats(model.eval()) if scores else 0.0
    labels = (torch.arange(len(stored)) % max(1, len(model.spec.classes))).numpy()
    result = train(model, stored, labels, config, steps=30, seed=0, device=torch.device("cpu"))
    assert [row["step"] for row in result.history] == [25, 30]
    if scores:
        rise = 0.5 if model.spec.kind == "vector" else 5  # of two numbers there is less to learn,
        if model.inherits:  # and less still of the codes of a parent that has learnt nothing
            rise = 0
        assert nats(result.model) > before + rise


def test_misspelt_parameters_and_families_are_named(family: str) -> None:
    with pytest.raises(UserError, match="no parameter 'chanels'"):
        check_params(family, {"chanels": 3})
    with pytest.raises(UserError, match=f"did you mean '{family}'"):
        family_class(family + "x")


@pytest.mark.parametrize(
    ("family", "parent", "line"),
    [
        ("flows/glow", {"family": "vae/vae", "params": {}}, "family 'flows/glow' learns from no other model"),
        (
            "score/distilled",
            None,
            "learns from another model: it needs a parent that denoises",
        ),
        ("score/distilled", {"family": "vae/vae", "params": {}}, "needs a parent that denoises: VAE does not"),
        ("autoregressive/code_prior", {"family": "vae/vae", "params": {}}, "needs a parent that quantises"),
    ],
)
def test_a_parent_that_will_not_do_is_named(family: str, parent: dict[str, Any] | None, line: str) -> None:
    with pytest.raises(UserError, match=line):
        build(family, SPECS["image"], {}, parent)


def test_weights_of_another_model_are_named() -> None:
    model = build("score/edm", SPECS["image"], {"width": 8})
    about: dict[str, Any] = {"name": "a-model", "family": "score/edm", "spec": SPECS["image"].to_json()}
    with pytest.raises(UserError, match="a-model: its weights are not of the model that is described"):
        load_model(about | {"params": {"width": 16}}, model.state_dict())
    with pytest.raises(UserError, match="a-model: its description has no 'params'"):
        load_model(about, model.state_dict())


def test_a_parent_is_frozen_and_stays_as_it_draws() -> None:
    model = build("score/distilled", SPECS["image"], {}, {"family": "score/edm", "params": {"width": 8}}).train()
    parent = model.get_submodule("parent")
    assert model.training and not parent.training and not any(p.requires_grad for p in parent.parameters())
    assert parameter_count(model) == sum(p.numel() for p in model.get_submodule("student").parameters())
