"""The CIFAR ResNets and images of ``../shared/data`` (or ``BITQUOTA_DATA``) for benchmarks.

References:
    [He15] K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition",
    2015, arXiv 1512.03385, section 4.2.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


def data_folder() -> Path:
    """Return the folder of the shared data, whether or not it is there."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("BITQUOTA_DATA", default))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free (option A) shortcut [He15]."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.stride = stride
        self.pad = (n_out - n_in) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return f32[N, n_out, H / stride, W / stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.pad:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet of depth ``6n + 2`` with 16, 32 and 64 channels [He15]."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(
            *(BasicBlock(32 if k else 16, 32, 1 if k else 2) for k in range(n))
        )
        self.layer3 = nn.Sequential(
            *(BasicBlock(64 if k else 32, 64, 1 if k else 2) for k in range(n))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits f32[N, 10] of normalised images f32[N, 3, 32, 32]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def resnet_cifar(depth: int) -> CifarResNet:
    """Return an untrained ResNet of that depth (20, 32, 44, 56, …)."""
    return CifarResNet(depth)


def load_resnet(depth: int) -> CifarResNet:
    """Return the trained ResNet-20 or ResNet-56 in eval mode."""
    model = CifarResNet(depth)
    state = load_file(data_folder() / f"resnet{depth}.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if not name.endswith("num_batches_tracked")]:
        msg = f"resnet{depth}.safetensors must hold this network; {missing=}, {unexpected=}"
        raise ValueError(msg)
    return model.eval()


def images(name: str, n: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first ``n`` normalised images f32[n, 3, 32, 32] and labels i64[n].

    Args:
        name: ``calibration``, ``test`` or ``train_part``.
        n: How many; all by default.
    """
    with np.load(data_folder() / f"cifar10_{name}.npz", allow_pickle=False) as archive:
        x, y = archive["x"][:n], archive["y"][:n]
    pixels = torch.from_numpy(x).float().div_(255.0)
    normalised = (pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    return normalised.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y.astype(np.int64))


def resnet20() -> CifarResNet:
    """Return the trained ResNet-20; a factory for the command line."""
    return load_resnet(20)


def resnet56() -> CifarResNet:
    """Return the trained ResNet-56; a factory for the command line."""
    return load_resnet(56)


def calibration() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all 4,096 calibration images; a factory for the command line."""
    return images("calibration")


def test() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 10,000 test images; a factory for the command line."""
    return images("test")
