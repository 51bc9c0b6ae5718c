"""Bitquota: certified mixed-precision bit allocation for neural networks."""

__version__ = "0.1.0"
