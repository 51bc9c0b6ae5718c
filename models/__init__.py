"""Models and calibration sets in.

The names below are loaded on first use, so that ``bitquota.models.pt2.vetting`` can be imported
without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitquota.models.load import load_model
    from bitquota.models.loaded import LoadedModel
    from bitquota.models.samples import check_calibration, load_calibration

_HOME = {
    "LoadedModel": "loaded",
    "load_model": "load",
    "load_calibration": "samples",
    "check_calibration": "samples",
}

__all__ = ["LoadedModel", "check_calibration", "load_calibration", "load_model"]


def __getattr__(name: str) -> object:
    """Import the module that defines ``name``."""
    if name not in _HOME:
        msg = f"module '{__name__}' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
