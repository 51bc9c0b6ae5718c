"""Columns rounded in machine code are those that torch rounds, on every grid of whole steps."""

import pytest
import torch

from bitquota.candidates.storage import Grid
from bitquota.quantizers import column_path
from bitquota.quantizers.column_path import path
from bitquota.quantizers.grid import MatrixGrid

ROWS, COLUMNS = 300, 150
"""More than the kernel keeps at hand, and more than one block."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def steps(*shape: int) -> torch.Tensor:
    return random(*shape, seed=1).abs() + 0.3


ENDS = 2.0 ** (torch.arange(ROWS)[:, None] % 4)

GRIDS = {
    "per row": MatrixGrid(grid=Grid.SYMMETRIC, bits=3, step=steps(ROWS, 1)),
    "per tensor": MatrixGrid(grid=Grid.SYMMETRIC, bits=2, step=steps(1, 1)),
    "in groups": MatrixGrid(grid=Grid.SYMMETRIC, bits=4, step=steps(ROWS, COLUMNS)),
    "signs": MatrixGrid(grid=Grid.SYMMETRIC, bits=1, step=steps(ROWS, 1)),
    "zero points": MatrixGrid(
        grid=Grid.ASYMMETRIC, bits=3, step=steps(ROWS, 1), zero=random(ROWS, 1).mul(2).round() + 3
    ),
    "offsets": MatrixGrid(
        grid=Grid.OFFSET, bits=3, step=steps(ROWS, COLUMNS), offset=random(ROWS, COLUMNS, seed=2)
    ),
    "one value": MatrixGrid(
        grid=Grid.OFFSET, bits=3, step=0 * steps(ROWS, 1), offset=random(ROWS, 1, seed=2)
    ),
    "widths of rows": MatrixGrid(
        grid=Grid.SYMMETRIC,
        bits=4,
        step=steps(ROWS, 1),
        ends=(-ENDS, ENDS),
    ),
}  # fmt: skip


@pytest.mark.parametrize("groups", [1, 3, ROWS])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_as_torch_rounds(name, kind, divided, groups, monkeypatch):
    order = random(groups, COLUMNS, seed=3).argsort(dim=1)
    columns = GRIDS[name].columns(order, kind)
    values = random(ROWS, COLUMNS).to(kind)
    feedback = 0.05 * random(groups, COLUMNS, COLUMNS).to(kind)
    divisor = steps(groups, COLUMNS) if divided else None
    found = path(values, columns, order, feedback, divisor=divisor)
    monkeypatch.setattr(column_path, "_compiled_block", column_path._block)
    expected = path(values, columns, order, feedback, divisor=divisor)
    assert expected.isfinite().all()
    # torch adds up in another order: a value at a middle may go either way, and its row with it.
    same = (found == expected).all(dim=1)
    assert same.double().mean() > (0.9 if kind == torch.float32 else 0.999)
