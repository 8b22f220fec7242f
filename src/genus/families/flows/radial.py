"""Radial flow: Variational Inference with Normalizing Flows (Rezende & Mohamed 2015, https://arxiv.org/abs/1505.05770).

Layers y = z + β (z - c) / (α + |z - c|), each of which pushes space away from one centre or pulls it there (section
4.1). The paper bends a posterior with them, which genus.families.vae.vae does with ``posterior: radial``. Here they are
a model of their own, trained by maximum likelihood: from the data to a standard normal; sampling inverts each layer in
closed form (genus.nn.radial).
"""

from __future__ import annotations

from typing import ClassVar

from genus.data.spec import DataSpec
from genus.families.flows._flow import Bend, BendingFlow
from genus.nn import radial


class RadialFlow(BendingFlow):
    """``layers``: how many centres. For vectors [D, 1, 1] of few numbers: a layer is one ball, whatever D is.

    Raises ValueError for other data.
    """

    paper = "Rezende & Mohamed 2015, arXiv:1505.05770"
    bend: ClassVar[Bend] = radial
    speed = 30.0

    def __init__(self, spec: DataSpec, *, layers: int = 32):
        super().__init__(spec, radial.start(layers, spec.dims, reach=0.4))


Model = RadialFlow
