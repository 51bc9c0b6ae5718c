"""Bitquota: certified mixed-precision bit allocation for neural networks.

Design: docs/design/environment.md
"""

__version__ = "0.1.0"
