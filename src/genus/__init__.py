"""Genus: which type of generative model suits your data? Measured, through one reproducible pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genus.registry.runtime import Runtime

__version__ = "0.1.0"


def load(reference: str) -> Runtime:
    """The registered model that ``reference`` names (name, name@alias or name/3), verified and ready to be used.

    ``load("fashion-mnist-glow@champion").sample(range(16))`` are sixteen images, uint8 [16, 1, 28, 28].
    Raises genus.errors.UserError where there is no such version, or its files are not the ones that were registered.
    """
    from genus.registry import runtime
    from genus.registry.pull import open_package

    return runtime.load(open_package(reference))
