"""Models and calibration sets in, plans out.

The names below are loaded on first use, so that ``bitquota.formats.pt2_vetting`` can be imported
without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitquota.formats.calibration import check_calibration, load_calibration
    from bitquota.formats.models import LoadedModel, load_model

_HOME = {
    "LoadedModel": "models",
    "load_model": "models",
    "load_calibration": "calibration",
    "check_calibration": "calibration",
}

__all__ = ["LoadedModel", "check_calibration", "load_calibration", "load_model"]


def __getattr__(name: str) -> object:
    """Import the module that defines ``name``."""
    if name not in _HOME:
        msg = f"module '{__name__}' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
