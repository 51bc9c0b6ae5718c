"""Images with their channels last in memory, for models that run faster on them.

Design: docs/design/runners.md
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from bitquota.errors import InvalidCalibration
from bitquota.models.onnx.program import source_of
from bitquota.models.running import run_module

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitquota.models.calibration import CalibrationSet

ALIKE = 1e-4
"""How far outputs may differ, relative to their largest, for the order of sums."""


def takes_channels_last(module: nn.Module, few: CalibrationSet) -> bool:
    """Return whether a model on the CPU computes the same of images with their channels last.

    Convolutions of few channels take a third of the time then. A model that views activations as
    if channels came first fails, and is left alone, as are ONNX files, which have their own layout.

    Args:
        module: In eval mode.
        few: A few samples, on its device.

    Raises:
        InvalidCalibration: The model does not accept the samples.

    Cost: two passes over ``few``, if they are images of several channels.
    """
    images = [tensor for tensor in few.inputs if _is_image(tensor)]
    if source_of(module) is not None or not any(t.device.type == "cpu" for t in images):
        return False
    expected = run_module(module, few.inputs)
    try:
        found = run_module(module, channels_last(few).inputs)
    except InvalidCalibration:
        return False
    return bool((found - expected).abs().max() <= ALIKE * expected.abs().max())


def channels_last(samples: CalibrationSet) -> CalibrationSet:
    """Return the same samples; images among the inputs have their channels last in memory."""
    return replace(samples, inputs=tuple(map(laid_out, samples.inputs)))


def laid_out(tensor: Tensor) -> Tensor:
    """Return a batch of images with channels last in memory; any other tensor as it is."""
    return tensor.contiguous(memory_format=torch.channels_last) if _is_image(tensor) else tensor


def as_they_are(samples: CalibrationSet) -> CalibrationSet:
    """Return the samples."""
    return samples


def _is_image(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.is_floating_point()
