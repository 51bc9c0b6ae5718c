"""Learned rounding: smaller errors than what it starts from, never larger ones, legal codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, Scheme
from bitquota.errors import InvalidInput
from bitquota.quantizers.grid import code_range
from bitquota.quantizers.learned import learn_block, learn_layer
from bitquota.quantizers.weights import quantize
from refusals import refused

GROUPS = Scheme(granularity=Granularity.GROUP, group_size=16, scale_format=ScaleFormat.FP16)
SCHEMES = {
    "channel": Scheme(),
    "groups": GROUPS,
    "tensor": Scheme(granularity=Granularity.TENSOR),
    "asymmetric": Scheme(grid=Grid.ASYMMETRIC),
    "offset": Scheme(grid=Grid.OFFSET, granularity=Granularity.GROUP, group_size=16),
    "K blocks": Scheme(
        grid=Grid.K_BLOCKS,
        granularity=Granularity.GROUP,
        group_size=256,
        scale_format=ScaleFormat.FP16,
    ),
}


def problem(columns: int = 256, rows: int = 12):
    """Return correlated inputs' Gram and weights."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(500, 8, generator=generator).double()
    mixing = torch.randn(8, columns, generator=generator).double()
    inputs = common @ mixing + torch.randn(500, columns, generator=generator).double()
    return inputs.T @ inputs, torch.randn(rows, columns, generator=generator)


def errors(matrix, stored, gram):
    error = matrix.double() - stored.dequantize().double()
    return ((error @ gram) * error).sum(dim=1)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("name", SCHEMES)
class TestLearnLayer:
    def test_is_better_than_its_start_and_legal(self, name, rounding):
        """In every row no worse; codes and scales are those of the grid; twice the same."""
        gram, matrix = problem()
        scheme = SCHEMES[name]
        start = quantize(matrix, 3, scheme, inputs_gram=gram, rounding=rounding)
        learned = learn_layer(matrix, start, gram, iterations=60)

        before, after = errors(matrix, start, gram), errors(matrix, learned, gram)
        assert bool((after <= before * (1 + 1e-4)).all())
        if rounding == "nearest":  # from GPTQ's codes there is next to nothing left to gain
            assert float(after.sum()) < 0.7 * float(before.sum())
        least, most = code_range(scheme.grid, 3)
        assert least <= int(learned.codes.min())
        assert int(learned.codes.max()) <= most
        assert start.scales.dtype == learned.scales.dtype
        again = learn_layer(matrix, start, gram, iterations=60)
        assert torch.equal(again.codes, learned.codes)
        assert torch.equal(again.scales, learned.scales)


class TestLearnBlock:
    def test_learns_through_what_lies_between_two_layers(self):
        """The error of a block's output, layers before a nonlinearity included."""
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).requires_grad_(False)
        x = torch.randn(300, 6) @ torch.randn(6, 32)
        exact = block(x)
        matrices = {"0.weight": block[0].weight.clone(), "2.weight": block[2].weight.clone()}
        start = {name: quantize(w, 3, GROUPS) for name, w in matrices.items()}

        def objective(weights, step):
            part = slice(None) if step is None else slice(step % 3 * 100, step % 3 * 100 + 100)
            out = torch.func.functional_call(block, dict(weights), (x[part],))
            return (out - exact[part]).square().mean()

        learned = learn_block(matrices, start, objective, iterations=100)
        before, after = (
            float(objective({k: w.dequantize() for k, w in stored.items()}, None))
            for stored in (start, learned)
        )
        assert after < 0.6 * before

    def test_keeps_the_start_where_nothing_is_better(self):
        """Weights on the grid have no error to lose."""
        gram, matrix = problem(64)
        start = quantize(matrix, 3, Scheme())
        exact = start.dequantize()
        learned = learn_layer(exact, start, gram, iterations=20)
        assert torch.equal(start.codes, learned.codes)
        assert torch.equal(start.scales, learned.scales)

    @pytest.mark.parametrize(
        ("grid", "bits"), [(Grid.CODEBOOK, 3), (Grid.POWER_OF_TWO, 3), (Grid.SYMMETRIC, 1)]
    )
    def test_refuses_grids_without_steps(self, grid, bits):
        """The message says why."""
        gram, matrix = problem(64)
        start = quantize(matrix, bits, Scheme(grid=grid))
        with refused(InvalidInput, grid=str(grid), weight_bits=bits):
            learn_layer(matrix, start, gram)
