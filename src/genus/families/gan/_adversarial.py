"""What adversarial families share, whatever their game: two networks, codes, labels, drawing and the slope of a critic.

The networks are those of Radford et al. 2015, "Unsupervised Representation Learning with Deep Convolutional GANs"
(https://arxiv.org/abs/1511.06434), the same for every loss, so that the losses are what is compared. Classes are asked
for as in Mirza & Osindero 2014 (https://arxiv.org/abs/1411.1784) in the generator, and by the projection of Miyato &
Koyama 2018 (https://arxiv.org/abs/1802.05637) in the critic.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from genus.contract import Batch, Family
from genus.data.spec import DataSpec


class Adversarial(Family):
    """A generator and a critic (Goodfellow's discriminator), trained in turns by the heir's ``updates``. No density.

    The heir sets ``generator``, [B, latent] to [B, *shape], and ``critic``, a Sequential that ends in a Linear and
    gives [B, 1]. With ``conditional`` a code ends in one number a class, the largest of which names the class: of a
    standard normal code it names each with the same chance.
    Raises ValueError for ``conditional`` where the data has no classes.
    """

    generator: nn.Sequential
    critic: nn.Sequential

    def __init__(self, spec: DataSpec, *, latent: int, conditional: bool):
        super().__init__(spec)
        if conditional and len(spec.classes) < 2:
            raise ValueError("conditional: the data has no classes to ask for")
        if conditional:
            self.labels = len(spec.classes)  # only then: contract.Conditional
        # More numbers than the data has would be of no use to a generator of vectors.
        self.noise = min(latent, spec.dims) if spec.flat else latent
        self.latent = self.noise + (len(spec.classes) if conditional else 0)
        self.label_vectors: nn.Embedding | None = None

    def groups(self) -> dict[str, list[nn.Parameter]]:
        told = self.label_vectors.parameters() if self.label_vectors is not None else ()
        return {"critic": [*self.critic.parameters(), *told], "generator": list(self.generator.parameters())}

    def sample(self, n: int, *, generator: Generator, cond: Tensor | None = None, truncation: float = 1.0) -> Tensor:
        """[n, *shape] in [-1, 1], in one pass; of the classes ``cond`` int64 [n] where the model is conditional.

        ``truncation`` scales the codes: below 1 samples are more typical and vary less, as where far codes are drawn
        anew (Brock et al. 2018, arXiv:1809.11096, section 3.1).
        """
        code = truncation * self._normal(n, generator)
        return self.decode(code if self.latent == self.noise else self._ask(code, cond))

    def decode(self, code: Tensor) -> Tensor:
        """[B, *shape] of codes [B, latent]."""
        return self.generator(code if self.latent == self.noise else self._ask(code, None)).clamp(-1, 1)

    def codes(self, batch: Batch, generator: Generator) -> Tensor:
        """A code for each example, [B, latent]; where the model is conditional, of that example's class."""
        code = self._normal(len(batch.x), generator)
        return code if self.latent == self.noise else self._ask(code, batch.cond)

    def score(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """What the critic gives, [B, 1]: the logit of being real, or how real on a scale of its own.

        Where the model is conditional, with the projection of the features on the class's vector (their eq. 4). In the
        parameters' precision: the losses take differences of scores.
        """
        dtype = next(self.parameters()).dtype
        if self.label_vectors is None:
            return self.critic(x).to(dtype)
        features = self.critic[:-1](x)
        return (self.critic[-1](features) + (self.label_vectors(cond) * features).sum(1, keepdim=True)).to(dtype)

    def _watch_labels(self) -> None:
        """Gives the critic a vector for each class, of as many numbers as its last layer takes. Zero at the start."""
        if self.latent > self.noise:
            self.label_vectors = nn.Embedding(self.labels, self.critic[-1].in_features)  # type: ignore[arg-type]
            nn.init.zeros_(self.label_vectors.weight)

    def _normal(self, n: int, generator: Generator) -> Tensor:
        like = next(self.parameters())
        return torch.randn(n, self.latent, generator=generator, device=like.device, dtype=like.dtype)

    def _ask(self, code: Tensor, cond: Tensor | None) -> Tensor:
        """The code with its last numbers one-hot: at the classes given, else at those that it names."""
        noise, named = code.split([self.noise, self.labels], 1)
        cond = named.argmax(1) if cond is None else cond
        return torch.cat([noise, functional.one_hot(cond, self.labels).to(code.dtype)], 1)


class DCGAN(Adversarial):
    """The networks of Radford et al., section 3: strided convolutions, no pooling, one linear layer at each end.

    ``latent``: size of z. ``width`` and ``critic_width``: channels at half resolution; twice as many at a quarter.
    ``norm`` of the critic: "batch", as the paper has it: without it the first epoch is lost. "layer", of each example
    by itself, is for losses that speak of the critic's gradient at one example. "none" leaves it out.
    ``offset``: whether the critic's score has a bias, which a loss of differences of scores cannot see.
    Vectors [D, 1, 1] get dense networks behind a layer of sines, and z has at most D numbers.
    Raises ValueError for sizes that are no multiples of 4, and for an unknown norm.
    """

    paper = "Radford et al. 2015, arXiv 1511.06434"
    widths = ("width", "critic_width")

    def __init__(
        self,
        spec: DataSpec,
        *,
        latent: int,
        width: int,
        critic_width: int,
        conditional: bool,
        norm: str = "batch",
        offset: bool = True,
    ):
        super().__init__(spec, latent=latent, conditional=conditional)
        channels, high, across = spec.shape
        if not spec.flat and (high % 4 or across % 4):
            raise ValueError(f"DCGAN halves the image twice: height and width must be multiples of 4, not {spec.shape}")
        if spec.flat:
            self.generator, self.critic = dense(self.latent, spec, 4 * width, 8 * critic_width, offset=offset)
            self._watch_labels()
            return
        low = (high // 4, across // 4)
        self.generator = nn.Sequential(
            nn.Linear(self.latent, 2 * width * low[0] * low[1], bias=False),
            nn.Unflatten(1, (2 * width, *low)),  # [B, 2w, H/4, W/4]
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),  # [B, w, H/2, W/2]
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, 2, 1),  # [B, C, H, W]
            nn.Tanh(),
        )
        normed, w = norm != "none", critic_width
        self.critic = nn.Sequential(
            nn.Conv2d(channels, w, 4, 2, 1),  # [B, w, H/2, W/2]
            nn.LeakyReLU(0.2),
            nn.Conv2d(w, 2 * w, 4, 2, 1, bias=not normed),  # [B, 2w, H/4, W/4]
            *normalised(norm, 2 * w),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 4 * w, 3, 2, 1, bias=not normed),  # [B, 4w, H/8, W/8]
            *normalised(norm, 4 * w),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(4 * w * -(-low[0] // 2) * -(-low[1] // 2), 1, bias=offset),
        )
        self._watch_labels()
        self.to(memory_format=torch.channels_last)


class Sines(nn.Module):
    """sin(W x + b), [B, inputs] to [B, outputs]: W starts normal, 5 radians a unit; b anywhere on the circle.

    Sitzmann et al. 2020, arXiv:2006.09661. From a few numbers, networks of ReLUs alone are slow to learn sharp edges.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(5 * torch.randn(outputs, inputs))
        self.phase = nn.Parameter(math.pi * (2 * torch.rand(outputs) - 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(functional.linear(x, self.weight, self.phase))


def dense(
    latent: int, spec: DataSpec, hidden: int, critic_hidden: int, *, offset: bool
) -> tuple[nn.Sequential, nn.Sequential]:
    """Generator and critic of vectors, two hidden layers each, the first one of sines; nothing is normalised."""
    generator = nn.Sequential(
        *perceptron(latent, hidden, nn.ReLU()),
        nn.Linear(hidden, spec.dims),
        nn.Tanh(),
        nn.Unflatten(1, spec.shape),
    )
    inputs = [nn.Flatten(), *perceptron(spec.dims, critic_hidden, nn.LeakyReLU(0.2))]
    return generator, nn.Sequential(*inputs, nn.Linear(critic_hidden, 1, bias=offset))


def perceptron(inputs: int, hidden: int, activation: nn.Module) -> list[nn.Module]:
    """Two hidden layers, the first one of sines."""
    return [Sines(inputs, hidden), nn.Linear(hidden, hidden), activation]


def normalised(norm: str, channels: int) -> list[nn.Module]:
    """The layer, or none, that normalises [B, channels, H, W]."""
    if norm not in ("batch", "layer", "none"):
        raise ValueError(f"norm: right would be batch, layer or none, not '{norm}'")
    if norm == "none":
        return []
    return [nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(1, channels)]


def slopes(score: Tensor, x: Tensor) -> Tensor:
    """The gradient of each example's score with respect to that example, [B, D], differentiable itself.

    Only so where an example's score depends on no other example: batch norm mixes them.
    """
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return slope.flatten(1)


def deal(n: int, *parts: Tensor | None) -> list[list[Any]]:
    """The rows of a batch's tensors as ``n`` minibatches, row i to minibatch i mod n: shares of a batch deal alike.

    Fewer where they would be of fewer than four examples, too few for a batch norm.
    """
    n = max(1, min(n, next(len(part) for part in parts if part is not None) // 4))
    return [[None if part is None else part[k::n] for part in parts] for k in range(n)]
