"""Genus: which type of generative model suits your data? Measured, through one reproducible pipeline."""

__version__ = "0.1.0"
