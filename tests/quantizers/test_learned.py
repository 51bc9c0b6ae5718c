"""Learned rounding: smaller errors than what it starts from, never larger ones, legal codes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, Scheme
from bitquota.candidates.table import Candidate
from bitquota.context import Context
from bitquota.errors import Cancelled, InvalidInput
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.fitted import fit_quantizers
from bitquota.quantizers.grid import code_range
from bitquota.quantizers.learned import learn_block, learn_in_blocks
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
    return inputs.T @ inputs / 500, torch.randn(rows, columns, generator=generator)


def error_of(matrix, gram):
    def objective(weights, batch):
        assert batch == 0
        error = weights["layer"] - matrix
        return ((error @ gram.float()) * error).sum()

    return objective


class TestLearnBlock:
    @pytest.mark.parametrize("name", SCHEMES)
    def test_is_better_than_its_start_and_legal(self, name):
        """Codes and scales are those of the grid; twice the same."""
        gram, matrix = problem()
        scheme = SCHEMES[name]
        start = {"layer": quantize(matrix, 3, scheme)}
        objective = error_of(matrix, gram)
        learned, again = (
            learn_block({"layer": matrix}, start, objective, n_batches=1, iterations=60)["layer"]
            for _ in range(2)
        )
        before, after = (
            float(objective({"layer": w.dequantize()}, 0)) for w in (start["layer"], learned)
        )
        assert after < 0.7 * before
        least, most = code_range(scheme.grid, 3)
        assert least <= int(learned.codes.min())
        assert int(learned.codes.max()) <= most
        assert start["layer"].scales.dtype == learned.scales.dtype
        assert torch.equal(again.codes, learned.codes)
        assert torch.equal(again.scales, learned.scales)

    def test_keeps_the_start_where_nothing_is_better(self):
        """Weights on the grid have no error to lose."""
        gram, matrix = problem(64)
        start = quantize(matrix, 3, Scheme())
        exact = start.dequantize()
        learned = learn_block(
            {"layer": exact}, {"layer": start}, error_of(exact, gram), n_batches=1, iterations=20
        )["layer"]
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
            learn_block({"layer": matrix}, {"layer": start}, error_of(matrix, gram), n_batches=1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.two = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x + self.two(torch.relu(self.one(self.norm(x))))


class TestLearnInBlocks:
    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3), Residual(), Residual(), nn.Flatten(), nn.Linear(128, 5)
        ).eval()
        x = torch.einsum("nchw,cd->ndhw", torch.randn(96, 3, 6, 6), torch.randn(3, 3))
        return module, discover(module, (x[:2],)), x

    def quantized(self, network, scheme, last):
        """Return the network in 2 bits by QEP, and its codes."""
        module, inventory, x = network
        candidates = [
            Candidate.of(la, 2, last if la.name == "2.two" else scheme) for la in inventory.layers
        ]
        samples = CalibrationSet(inputs=(x,))
        fitted = fit_quantizers(module, inventory, candidates, samples, rounding="qep")
        stored = {}
        found = apply_plan(module, inventory, candidates, fitted=fitted, stored=stored)
        return found, stored

    def test_every_block_errs_less_and_nothing_else_changes(self, network):
        """Layers outside of blocks, codebooks, and gradients of the model stay as they are."""
        module, inventory, x = network
        quantized, stored = self.quantized(network, Scheme(), Scheme(grid=Grid.CODEBOOK))
        before = copy.deepcopy(quantized)
        layers = {la.name: la for la in inventory.layers}
        found = learn_in_blocks(module, quantized, stored, layers, [(x,)], iterations=60)
        assert set(found) == {"1.one", "1.two", "2.one"}
        for name, weight in found.items():
            place = quantized.get_submodule(name).weight
            assert torch.equal(place, weight.dequantize().reshape(place.shape))
        for name, place in quantized.named_parameters():
            same = torch.equal(place, before.get_parameter(name))
            assert same == (name.removesuffix(".weight") not in found)
            assert place.grad is None
        with torch.no_grad():
            errors = [
                [float((net[:n](x) - module[:n](x)).square().mean()) for n in (2, 3)]
                for net in (before, quantized)
            ]
        assert errors[1][0] < errors[0][0]
        assert errors[1][1] < errors[0][1]

    def test_twice_the_same(self, network):
        module, inventory, x = network
        layers = {la.name: la for la in inventory.layers}
        codes = []
        for _ in range(2):
            quantized, stored = self.quantized(network, GROUPS, GROUPS)
            found = learn_in_blocks(module, quantized, stored, layers, [(x[:32],)], iterations=10)
            codes.append(torch.cat([w.codes.flatten() for w in found.values()]))
        assert torch.equal(*codes)

    def test_tells_of_each_block_and_stops_within_one(self, network):
        module, inventory, x = network
        layers = {la.name: la for la in inventory.layers}
        told = []
        telling = Context(on_progress=lambda p: told.append((p.stage, p.done, p.total)))
        quantized, stored = self.quantized(network, GROUPS, GROUPS)
        learn_in_blocks(module, quantized, stored, layers, [(x,)], iterations=2, context=telling)
        assert told == [("rounding", done, 2) for done in range(3)]

        # Asked more often than there are blocks.
        answers = iter([False] * 5 + [True])
        stopping = Context(cancelled=lambda: next(answers))
        with refused(Cancelled, stage="rounding"):
            learn_in_blocks(
                module, quantized, stored, layers, [(x,)], iterations=2, context=stopping
            )
        assert not list(answers)
