"""A trained network and its samples as factories for the command line; see the README."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from bitquota.cli.demo import N_TEST, digits, train_digits


@cache
def model() -> nn.Module:
    """Return a small residual network, trained on scikit-learn's digits in seconds."""
    x, y = digits()
    return train_digits(x[N_TEST:], y[N_TEST:], epochs=10)


def calibration() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training images and labels: what plans are measured on."""
    x, y = digits()
    return torch.from_numpy(x[N_TEST:]), torch.from_numpy(y[N_TEST:])


def test() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels that neither training nor planning has seen."""
    x, y = digits()
    return torch.from_numpy(x[:N_TEST]), torch.from_numpy(y[:N_TEST])
