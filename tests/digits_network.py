"""A small convolutional network with batch norm, trained on scikit-learn's digits in seconds."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional

from bitquota.models.discovery import discover

N_TRAIN = 1000


class DigitsNet(nn.Module):
    """Four layers; batch norms stand apart from what they follow, and one shortcut crosses."""

    def __init__(self, first: int = 12, rest: int = 24) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(n) for n in (first, rest, rest)])
        self.conv1 = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(first, rest, 3, stride=2, padding=1, bias=False)
        self.conv3 = nn.Conv2d(rest, rest, 3, padding=1, bias=False)
        self.head = nn.Linear(rest, 10)

    def forward(self, x):
        x = functional.relu(self.norms[0](self.conv1(x)))
        x = functional.relu(self.norms[1](self.conv2(x)))
        x = functional.relu(x + self.norms[2](self.conv3(x)))
        return self.head(x.mean(dim=(2, 3)))


def digits():
    """Return shuffled images f32[1797, 1, 8, 8] (mean 0, deviation 1) and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(data.images).float()[:, None]
    x = (x - x.mean()) / x.std()
    return x[order], torch.from_numpy(data.target).long()[order]


@functools.cache
def _trained_state(seed, epochs, first, rest, n_train):
    torch.manual_seed(seed)
    model = DigitsNet(first, rest)
    x, y = digits()
    x, y = x[:n_train], y[:n_train]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    steps = epochs * (len(x) // 100)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for k in range(0, len(x) - 99, 100):
            rows = order[k : k + 100]
            loss = functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.state_dict()


def trained_digits_net(seed=0, epochs=12, *, first=12, rest=24, n_train=N_TRAIN):
    """Return a fresh copy of the trained network in eval mode (about 97 % on the rest)."""
    model = DigitsNet(first, rest)
    model.load_state_dict(_trained_state(seed, epochs, first, rest, n_train))
    return model.eval()


def accuracy(model, x, y):
    """Return the share of right answers."""
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).float().mean())


def inventory_of(model):
    """Return the layers of a network of such images."""
    return discover(model, (torch.zeros(1, 1, 8, 8),))
