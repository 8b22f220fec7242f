"""Trained models as versioned packages that anybody can load, and which of the versions is the champion."""

from genus.registry.package import package
from genus.registry.versions import Figures, ensure, settled, status

__all__ = ["Figures", "ensure", "package", "settled", "status"]
