"""Blocks of a network: which modules they are, and what goes in and comes out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitquota.models.blocks import at_block, repeated_blocks
from bitquota.models.discovery import discover
from bitquota.models.load import load_model


class Residual(nn.Module):
    def __init__(self, width: int, *, several: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.several = several

    def forward(self, x, *, scale):
        y = x + scale * self.down(torch.relu(self.up(x)))
        return (y, None) if self.several else y


class Stack(nn.Module):
    """A first layer, two stages of blocks, one block that runs twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.stages = nn.ModuleList(
            nn.ModuleList(Residual(8, several=k == 1) for _ in range(2)) for k in range(2)
        )
        self.again = nn.ModuleList(Residual(8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        for stage in self.stages:
            for block in stage:
                out = block(x, scale=0.5)
                x = out[0] if isinstance(out, tuple) else out
        x = self.again[1](self.again[0](self.again[0](x, scale=1.0), scale=1.0), scale=1.0)
        return self.head(x)


@pytest.fixture(scope="module")
def stack():
    torch.manual_seed(0)
    module = Stack().eval()
    x = torch.randn(6, 3)
    return module, {la.name: la for la in discover(module, (x[:2],)).layers}, x


class TestRepeatedBlocks:
    def test_finds_the_outermost_repeated_modules_in_the_order_in_which_they_run(self, stack):
        """Not first and last layer, not stages, and no block that runs twice."""
        module, layers, x = stack
        found = repeated_blocks(module, layers, (x,))
        assert list(found) == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "again.1"]
        assert found["stages.1.0"] == ("stages.1.0.up", "stages.1.0.down")

    def test_counts_the_layers_that_it_is_asked_about(self, stack):
        module, layers, x = stack
        some = {name: layer for name, layer in layers.items() if "stages.0" in name}
        assert list(repeated_blocks(module, some, (x,))) == ["stages.0.0", "stages.0.1"]

    def test_finds_none_in_a_plain_or_an_exported_network(self, stack, tmp_path):
        module, _, x = stack
        plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        layers = {la.name: la for la in discover(plain, (x[:2],)).layers}
        assert repeated_blocks(plain, layers, (x,)) == {}
        path = tmp_path / "stack.pt2"
        torch.export.save(torch.export.export(module, (x,)), path)
        exported = load_model(str(path))
        layers = {la.name: la for la in discover(exported.module, (x,)).layers}
        assert len(layers) == 14
        assert repeated_blocks(exported.module, layers, (x,)) == {}


class TestAtBlock:
    def test_returns_arguments_and_output_of_every_batch(self, stack):
        module, _, x = stack
        calls = at_block(module, "stages.1.0", [(x[:4],), (x[4:],)])
        assert [len(args[0]) for args, _, _ in calls] == [4, 2]
        for args, kwargs, output in calls:
            assert kwargs == {"scale": 0.5}
            with torch.no_grad():
                assert torch.equal(module.stages[1][0](*args, **kwargs)[0], output)
