"""Torch modules with layers of every kind and of odd shapes, whose outputs stand side by side."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from menu_graphs import CONVOLUTIONS, MATRICES, TABLES, TRANSPOSED, WIDTH


class Experts(nn.Module):
    """One matrix per expert; a sample goes to all of them."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return every expert's output."""
        return torch.stack([x @ matrix for matrix in self.down.transpose(1, 2)], 1)


class Tied(nn.Module):
    """An embedding whose table is the weight of the head too."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, columns)
        self.head = nn.Linear(columns, rows, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return scores of every row."""
        return self.head(self.table(ids))


class Attention(nn.MultiheadAttention):
    """Attention of a sequence to itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what each place sees."""
        return super().forward(x, x, x, need_weights=False)[0]


class LastState(nn.Module):
    """The last hidden state of a recurrent module."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        """Return it with the samples first."""
        return self.recurrent(x)[0][:, -1]


def _convolution(name: str, shape: tuple[int, ...], groups: int) -> nn.Module:
    first, second = shape[:2]
    turned = "Transpose" in name
    n_in, n_out = (first, second * groups) if turned else (second * groups, first)
    return getattr(nn, name)(n_in, n_out, shape[2:], groups=groups, bias=not turned)


def _parts() -> list[tuple[str, nn.Module, tuple[int, ...], int]]:
    """Name, module, shape of what it reads, and rows of a table (0 where it reads numbers)."""
    parts: list[tuple[str, nn.Module, tuple[int, ...], int]] = []
    for k, (rows, columns) in enumerate(MATRICES):
        parts.append((f"linear{k}", nn.Linear(columns, rows, bias=bool(k % 2)), (columns,), 0))
    for kinds, prefix in ((CONVOLUTIONS, "Conv"), (TRANSPOSED, "ConvTranspose")):
        for rank, cases in kinds.items():
            for k, (shape, groups, given) in enumerate(cases):
                module = _convolution(f"{prefix}{rank}d", shape, groups)
                parts.append((f"{prefix.lower()}{rank}d{k}", module, given, 0))
    parts += [(f"table{k}", nn.Embedding(*s), (3,), s[0]) for k, s in enumerate(TABLES)]
    parts += [(f"tied{k}", Tied(*s), (2,), s[0]) for k, s in enumerate(((5, 7), (6, 32)))]
    parts += [
        ("lstm", LastState(nn.LSTM(5, 3, batch_first=True)), (2, 5), 0),
        ("gru", LastState(nn.GRU(1, 2, batch_first=True, bidirectional=True)), (2, 1), 0),
        ("rnn", LastState(nn.RNN(3, 1, batch_first=True)), (2, 3), 0),
        ("attention", Attention(6, 2, batch_first=True), (3, 6), 0),
    ]
    return parts


def _experts() -> list[tuple[str, nn.Module, tuple[int, ...], int]]:
    return [
        (f"experts{k}", Experts(*shape), (shape[2],), 0)
        for k, shape in enumerate(((3, 5, 7), (2, 3, 32), (2, 7, 2)))
    ]


class SideBySide(nn.Module):
    """Every layer ``copies`` times.

    Args:
        copies: How often.
        experts: Whether there are experts, which ONNX has no operator for.
        at_most: Shapes of each kind of layer.

    Attributes:
        segments: Numbers of each layer's output, by its name, in order.
    """

    def __init__(self, copies: int, *, experts: bool = False, at_most: int = 10) -> None:
        super().__init__()
        self._given: dict[str, tuple[tuple[int, ...], int]] = {}
        for c in range(copies):
            for name, module, shape, rows in [*_parts(), *(_experts() if experts else [])]:
                if name[-1].isdigit() and int(name[-1]) >= at_most:
                    continue
                self.add_module(f"{name}_{c}", module)
                self._given[f"{name}_{c}"] = shape, rows
        with torch.no_grad():
            self.segments = {k: v.shape[1] for k, v in self._outputs(torch.zeros(1, WIDTH)).items()}

    def _outputs(self, x: Tensor) -> dict[str, Tensor]:
        made = {}
        for name, (shape, rows) in self._given.items():
            given = x[:, : math.prod(shape)].reshape(-1, *shape)
            if rows:
                given = given.long().abs() % rows
            made[name] = self.get_submodule(name)(given).flatten(1)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return all outputs, one row per sample."""
        return torch.cat(list(self._outputs(x).values()), 1)


def few() -> nn.Module:
    """Return a network that is traced quickly: every kind of layer once or twice."""
    torch.manual_seed(5)
    return SideBySide(1, at_most=2).eval()


def seven_of_each() -> nn.Module:
    """Return every layer seven times, experts too."""
    torch.manual_seed(5)
    return SideBySide(7, experts=True).eval()


def halves() -> nn.Module:
    """Return every layer once, in half precision."""
    torch.manual_seed(5)
    return SideBySide(1, experts=True).half().eval()


def brains() -> nn.Module:
    """Return every layer once, in bfloat16."""
    torch.manual_seed(5)
    return SideBySide(1, experts=True).bfloat16().eval()
