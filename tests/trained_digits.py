"""The demonstration's network, trained for a few epochs: real weights for tests of whole chains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.cli.demo import digits, export, train_digits
from bitquota.models.calibration import CalibrationSet
from bitquota.models.identity import model_fingerprint
from bitquota.models.loaded import LoadedModel

if TYPE_CHECKING:
    from pathlib import Path

EPOCHS = 4
N_TEST = 300


@dataclass(frozen=True)
class Trained:
    """The network and its data, split once."""

    model: LoadedModel
    fit: CalibrationSet
    test: CalibrationSet


@cache
def trained() -> Trained:
    """Return the network and its data, trained once per process."""
    x, y = digits(0)
    module = train_digits(x[N_TEST:], y[N_TEST:], epochs=EPOCHS)
    model = LoadedModel(
        module=module,
        digest=model_fingerprint(module),
        source="digits",
        architecture="DigitsNet",
    )
    whole = torch.from_numpy(x), torch.from_numpy(y)
    fit = CalibrationSet(inputs=(whole[0][N_TEST:],), labels=whole[1][N_TEST:])
    test = CalibrationSet(inputs=(whole[0][:N_TEST],), labels=whole[1][:N_TEST])
    return Trained(model=model, fit=fit, test=test)


def model() -> torch.nn.Module:
    """Return the module; a factory for the command line."""
    return trained().model.module


def calibration() -> tuple[torch.Tensor, torch.Tensor]:
    """Return samples and labels; a factory for the command line."""
    fit = trained().fit
    assert fit.labels is not None
    return fit.inputs[0], fit.labels


def files(folder: Path) -> tuple[Path, Path]:
    """Write the network as .pt2 and its samples as .npz."""
    known = trained()
    model_file, calibration_file = folder / "digits.pt2", folder / "calibration.npz"
    export(known.model.module, known.fit.inputs[0][:2], model_file)
    x, y = calibration()
    np.savez(calibration_file, x=x.numpy(), y=y.numpy())
    return model_file, calibration_file
