"""Planar flow: Variational Inference with Normalizing Flows (Rezende & Mohamed 2015, https://arxiv.org/abs/1505.05770).

Layers y = z + u tanh(w·z + b), each of which stretches or squeezes space across one plane (section 4.1). The paper
bends a posterior with them, which genus.families.vae.vae does with ``posterior: planar``. Here they are a model of
their own, trained by maximum likelihood: from the data to a standard normal, so that the density needs no inverse;
sampling solves one equation a layer (genus.nn.planar).
"""

from __future__ import annotations

from typing import ClassVar

from genus.data.spec import DataSpec
from genus.families.flows._flow import Bend, BendingFlow
from genus.nn import planar


class PlanarFlow(BendingFlow):
    """``layers``: how many planes. For vectors [D, 1, 1] of few numbers: a layer is one bend, whatever D is.

    Raises ValueError for other data.
    """

    paper = "Rezende & Mohamed 2015, arXiv:1505.05770"
    bend: ClassVar[Bend] = planar
    speed = 10.0

    def __init__(self, spec: DataSpec, *, layers: int = 32):
        super().__init__(spec, planar.start(layers, spec.dims))


Model = PlanarFlow
