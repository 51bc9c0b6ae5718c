"""Small networks and factories that the formats tests load."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, export, save

if TYPE_CHECKING:
    from pathlib import Path


class TinyNet(nn.Module):
    """Convolution, batch norm, depthwise convolution, linear: 8x8 images to 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.depthwise(x)).mean((2, 3)))


def tiny_net(seed: int = 0) -> TinyNet:
    """Return a network whose batch norm has statistics that are not trivial."""
    torch.manual_seed(seed)
    net = TinyNet()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2.0)
    return net.eval()


def scripted() -> nn.Module:
    """Return a traced network, which must be refused."""
    with torch.no_grad():
        return torch.jit.trace(tiny_net(), torch.zeros(2, 3, 8, 8))


def not_a_module() -> int:
    """Return something else."""
    return 3


def fails() -> None:
    """Raise."""
    msg = "no such file"
    raise OSError(msg)


def samples() -> tuple[np.ndarray, np.ndarray]:
    """Return eight images and labels."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(8, 3, 8, 8)).astype(np.float32), np.arange(8)


class no_value:  # noqa: N801
    """A class with a factory as a static method."""

    @staticmethod
    def net() -> nn.Module:
        """Return the tiny net."""
        return tiny_net()


def write_pt2(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> Path:
    """Export with a dynamic batch."""
    dynamic = tuple({0: Dim.DYNAMIC} for _ in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        save(export(module, inputs, dynamic_shapes=dynamic), path)
    return path
