"""What the constraints find on toy families whose answers are known, and on the real ones that are quick."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from genus.contract import Batch, Family, Samples, build, family_class, family_names
from genus.data.spec import DataSpec
from genus.evaluation import constraints
from genus.evaluation.constraints import (
    Arbitrary,
    evaluations,
    free_places_of,
    jacobian_of,
    noise_dims,
    used_by_sampling,
)
from tests.registry.workspace import SPECS, small

BITS = DataSpec((1, 4, 4), levels=2)
REAL = DataSpec((2, 1, 1), levels=0)


class Shift(nn.Module):
    """Half of the numbers shift the other half by what a network, any one, makes of them; then they are turned round.

    A determinant of 1 and an inverse, for whatever stands in ``network``.
    """

    def __init__(self, dims: int):
        super().__init__()
        self.network = nn.Linear(dims // 2, dims // 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = x.chunk(2, -1)
        return torch.cat([changed + self.network(kept), kept], -1), x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        changed, kept = y.chunk(2, -1)
        return torch.cat([kept, changed - self.network(kept)], -1)


class Stretch(nn.Module):
    """Every number times its own factor; ``honest``: with the log-determinant that this has, else with none."""

    def __init__(self, dims: int, honest: bool):
        super().__init__()
        self.log_scale, self.share = nn.Parameter(torch.zeros(dims)), float(honest)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), (self.share * self.log_scale.sum()).expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_scale).exp()


class Flow(Family):
    """A flow of two shifts and a stretch on dequantised bits, or on real numbers as they are."""

    density = "dequantised"

    def __init__(self, spec: DataSpec, *, honest: bool = True):
        super().__init__(spec)
        dims = self.latent = spec.dims
        self.layers = nn.ModuleList([Shift(dims), Stretch(dims, honest), Shift(dims)])

    def loss(self, batch: Batch, *, generator: Generator) -> dict[str, Tensor]:
        return {"loss": -self.log_prob(batch, generator=generator).mean()}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        y, log_det = batch.x, torch.zeros(len(batch.x))
        if self.spec.levels:  # uniform noise in cells of width 2, here centred on -1 and 1
            y = y + 2 * torch.rand(y.shape, generator=generator) - 1
            log_det = log_det + self.spec.dims * math.log(2)
        z, change = self.flow(y.flatten(1))
        return log_det + change - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)

    def flow(self, y: Tensor) -> tuple[Tensor, Tensor]:
        log_det = y.new_zeros(len(y))
        for layer in self.layers:
            y, change = layer(y)
            log_det = log_det + change
        return y, log_det

    def encode(self, x: Tensor) -> Tensor:
        return self.flow(x.flatten(1))[0]

    def decode(self, code: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            code = layer.inverse(code)
        return code.view(-1, *self.spec.shape)

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None) -> Tensor:
        return self.decode(torch.randn(n, self.latent, generator=generator))


class Free(Family):
    """A game's generator and a critic that sampling never asks; nothing in it is of any form."""

    latent = 3

    def __init__(self, spec: DataSpec = BITS, *, passes: int = 1):
        super().__init__(spec)
        self.enter, self.inner, self.leave = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, spec.dims)
        self.activation, self.critic, self.passes = nn.Tanh(), nn.Linear(spec.dims, 1), passes

    def groups(self) -> dict[str, list[nn.Parameter]]:
        critic = list(self.critic.parameters())
        return {"critic": critic, "generator": [p for p in self.parameters() if not any(p is one for one in critic)]}

    def updates(self, batch: Batch, *, generator: Generator) -> Any:
        fake = self.sample(len(batch.x), generator=generator)
        yield "critic", {"loss": self.critic(fake.detach().flatten(1)).mean() - self.critic(batch.x.flatten(1)).mean()}
        yield "generator", {"loss": -self.critic(fake.flatten(1)).mean()}

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, passes: int | None = None) -> Tensor:
        h = self.enter(torch.randn(n, 3, generator=generator))
        for _ in range(passes or self.passes):
            h = self.activation(self.inner(h))
            h = h + 0.1 * torch.empty_like(h).exponential_(generator=generator)
        return self.leave(h).view(n, *self.spec.shape)


def made(model: Family) -> Family:
    """The model with weights of one seed, whatever ran before."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def broken(model: Family) -> dict[str, str]:
    return {place["module"]: place["broken"] for place in free_places_of(model, seed=0)["places"]}


def test_in_a_flow_only_the_networks_inside_the_layers_are_free() -> None:
    model = made(Flow(BITS))
    before = copy.deepcopy(model.state_dict())
    found = free_places_of(model, seed=0)
    why = {place["module"]: place["broken"] for place in found["places"]}
    assert set(why) == {"Linear", "Shift", "Stretch"} and found["value"] == pytest.approx(1 / 3)
    assert why["Linear"] == "", "any function of one half may shift the other"
    assert why["Shift"].startswith("its density is none") and why["Stretch"].startswith("its density is none")
    assert found["text"] == "1 of 3 kinds" and found["n"] == 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "it is left alone"


def test_a_flow_with_a_wrong_log_determinant_fails_as_it_is() -> None:
    """What is missing of the determinant is won for nothing: probabilities sum to more than 1. No place is judged."""
    found = free_places_of(made(Flow(BITS, honest=False)), seed=0)
    assert found["value"] is None and found["places"] == []
    assert found["text"].startswith("intact, it fails: its density is none: all probabilities sum to")


def test_without_a_density_a_flow_is_still_held_to_its_inverse() -> None:
    class Silent(Flow):
        log_prob = None  # type: ignore[assignment]

        def loss(self, batch: Batch, *, generator: Generator) -> dict[str, Tensor]:
            return {"loss": (self.flow(batch.x.flatten(1))[0] - 0.3).square().mean()}

    class Untold(Silent):
        density = property()  # type: ignore[assignment]  # so that it does not look as if it scored

    why = broken(made(Untold(BITS)))
    assert why["Linear"] == "" and why["Shift"].startswith("its inverse is off by")


def test_a_density_that_has_learned_badly_is_a_density() -> None:
    """Far from the data, its probabilities of them sum to next to nothing: that breaks no contract."""

    class Stubborn(Flow):
        def loss(self, batch: Batch, *, generator: Generator) -> dict[str, Tensor]:
            return {"loss": (self.flow(batch.x.flatten(1))[0] - 3.0).square().mean()}

    assert free_places_of(made(Stubborn(BITS)), seed=0)["value"] is not None


def test_where_nothing_is_asked_of_a_network_every_place_is_free() -> None:
    found = free_places_of(made(Free()), seed=0)
    assert found["value"] == 1.0 and {place["module"] for place in found["places"]} == {"Linear", "Tanh"}


def test_a_loss_that_is_no_number_is_said() -> None:
    class Diverging(Free):
        def updates(self, batch: Batch, *, generator: Generator) -> Any:
            yield "generator", {"loss": self.sample(2, generator=generator).mean() * math.inf}

    assert free_places_of(made(Diverging()), seed=0)["text"].startswith("intact, it fails: the loss is")


def test_the_arbitrary_module_has_no_inverse_and_sees_everything() -> None:
    module = Arbitrary(nn.Identity(), None)
    low, lower = torch.full((1, 1, 2, 2), -1.0), torch.full((1, 1, 2, 2), -2.0)
    assert torch.equal(module(low), module(lower)), "two inputs, one output"
    x = torch.rand(1, 1, 2, 2)
    x.requires_grad_(True)
    (slopes,) = torch.autograd.grad(module(x)[0, 0, 0, 0], x)
    assert (slopes != 0).all()
    instead = Arbitrary(nn.Conv2d(3, 3, 1), 1)
    assert instead.out_channels == 3, "what else is asked of it, the module answers that it stands for"
    y, log_det = instead(torch.rand(5, 3, 2, 2))
    assert y.shape == (5, 3, 2, 2) and log_det.shape == (5,)
    assert len(list(instead.parameters())) == 4, "whose parameters are gone"


def test_the_jacobian_is_checked_against_autograd() -> None:
    right, wrong = jacobian_of(made(Flow(REAL)), seed=0), jacobian_of(made(Flow(REAL, honest=False)), seed=0)
    assert right is not None and right["value"] < 1e-6 and right["text"] == "computed"
    assert wrong is not None and wrong["value"] > 0.01 and wrong["text"] == "not computed"
    assert jacobian_of(made(Free(REAL)), seed=0) is None, "it has neither density nor code"


def test_random_numbers_of_a_sample_are_counted() -> None:
    """3 of the code, and 8 in every pass, drawn in place by another operation."""
    model = made(Free())
    assert noise_dims(model, seed=0, knobs={}) == 3 + 8
    assert noise_dims(model, seed=0, knobs={"passes": 4}) == 3 + 4 * 8
    assert noise_dims(made(Flow(BITS)), seed=0, knobs={}) == 16


def test_network_evaluations_of_a_sample_are_counted() -> None:
    model = made(Free())
    assert evaluations(model, seed=0, knobs={}) == 1
    assert evaluations(model, seed=0, knobs={"passes": 5}) == 5
    assert evaluations(made(Flow(BITS)), seed=0, knobs={}) == 1
    assert not model.inner._forward_pre_hooks, "no hook is left behind"  # type: ignore[union-attr]

    class Around(Free):  # never through forward
        def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, **knobs: Any) -> Tensor:
            return torch.randn(n, *self.spec.shape, generator=generator) + self.inner.weight.mean()

    assert evaluations(made(Around()), seed=0, knobs={}) == 1


def test_parameters_that_sampling_uses() -> None:
    model = made(Free())
    before = copy.deepcopy(model.state_dict())
    used = used_by_sampling(model, seed=0)
    assert {name for name, there in used.items() if not there} == {"critic.weight", "critic.bias"}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(used_by_sampling(made(Flow(BITS)), seed=0).values())


@pytest.mark.parametrize("family", family_names())
def test_the_share_of_a_real_model_is_counted_by_name(family: str) -> None:
    """The small model's names are the real one's; what is trained is used, or belongs to a critic or an encoder."""
    spec = SPECS[family_class(family).kinds[0]]
    what = small(family)
    found = constraints.trained_share(**what, spec=spec, seed=0)
    model = build(family, spec, what["params"], what["parent"])
    if not isinstance(model, Samples):
        assert found is None
        return
    trained = dict(constraints.trained(model))
    assert found is not None and found["n"] == len(trained)
    idle = ("critic", "encoder", "fine", "coarse", "to_top", "to_bottom")  # the last four are VQ-VAE-2's encoders
    count = sum(p.numel() for name, p in trained.items() if not name.startswith(idle))
    assert found["value"] == pytest.approx(count / sum(p.numel() for p in trained.values()))


def test_the_share_of_a_model_of_vectors() -> None:
    """Whose networks are not those of images: the small model is of vectors as well."""
    found = constraints.trained_share("gan/r1", {}, DataSpec((2, 1, 1), 48), seed=0)
    model = build("gan/r1", DataSpec((2, 1, 1), 48), {})
    kept = sum(p.numel() for name, p in model.named_parameters() if name.startswith("generator"))
    assert found is not None and found["value"] == pytest.approx(kept / sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize(
    ("family", "parent", "idle"),
    [
        ("vae/ex_post", {"family": "vae/vae", "params": {}}, "parent"),
        ("gan/r1", None, ("critic", "label_vectors")),
    ],
)
def test_the_share_of_a_model_that_is_told_labels(
    family: str, parent: dict[str, Any] | None, idle: str | tuple[str, ...]
) -> None:
    what = {"params": {"conditional": True}, "parent": parent}
    found = constraints.trained_share(family, **what, spec=SPECS["image"], seed=0)
    trained = dict(constraints.trained(build(family, SPECS["image"], what["params"], parent)))
    kept = sum(p.numel() for name, p in trained.items() if not name.startswith(idle))
    assert found is not None and found["value"] == pytest.approx(kept / sum(p.numel() for p in trained.values()))


# Which kinds of places refuse an arbitrary module: a flow's layers, and anything that would let a pixel see later ones.
# VAE, GAN and score model take one anywhere. (Score model and flow take longer: `genus probe` tries them.)
@pytest.mark.parametrize(
    ("family", "value", "why"),
    [("vae/vae", 1.0, ""), ("gan/gan", 1.0, ""), ("autoregressive/pixelcnn", 0.0, "its density is none")],
)
def test_places_of_real_families(family: str, value: float, why: str) -> None:
    found = constraints.free_places(**small(family), seed=0)
    assert found["value"] == value and found["places"]
    assert all(place["broken"].startswith(why) for place in found["places"])


def test_networks_that_play_against_each_other() -> None:
    assert constraints.networks("gan/gan", {}, seed=0) == {"value": 2, "n": 1, "text": "critic, generator"}
    assert constraints.networks("vae/vae", {}, seed=0)["value"] == 1


def test_jacobians_of_real_families() -> None:
    found = constraints.jacobian(**small("flows/glow"), seed=0)
    assert found is not None and found["value"] < 1e-6
    for family in ("vae/vae", "gan/gan", "autoregressive/pixelcnn"):
        assert constraints.jacobian(**small(family), seed=0) is None


def test_a_family_that_takes_no_small_image_says_why() -> None:
    with pytest.raises(ValueError, match=r"flows/glow cannot be built small: .*give fewer scales"):
        constraints.networks("flows/glow", {"steps": [1] * 9, "hidden": [8] * 9}, seed=0)
