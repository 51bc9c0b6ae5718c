"""Samples and plans that the tests of exports share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitquota.models.calibration import CalibrationSet
from format_networks import plan_with

if TYPE_CHECKING:
    from bitquota.plan import Plan

RANDOM = torch.Generator().manual_seed(3)
IMAGES = CalibrationSet(inputs=(torch.randn(6, 3, 8, 8, generator=RANDOM),))
TOKENS = CalibrationSet(
    inputs=(torch.randint(0, 32, (6, 9), generator=torch.Generator().manual_seed(3)),)
)


def target_plan(model, samples, target: str, seed: int, bits=None) -> Plan:
    """A plan of random legal formats."""
    return plan_with(model, samples.inputs, target=target, seed=seed, bits=bits)
