"""Operations in place: the graph computes what the module does, whoever reads the value later."""

import pytest
import torch
from torch import nn

from bitquota.models.discovery import discover
from bitquota.models.graph import Graph

INPUTS = (torch.linspace(-2, 2, 8).reshape(2, 4),)


def last_use(y):
    """Nothing else reads what is written."""
    return y.relu_().mul_(3.0)


def read_later(y):
    """What was written is read again."""
    return y.relu_() + y


def read_through_a_view(y):
    """What is written is a view of a value that is read again."""
    return y.view(4, 2).relu_().reshape(2, 4) + y


def read_through_an_earlier_view(y):
    """What is written is read again through a view that was made before."""
    earlier = y.view(8)
    return y.relu_() + earlier.view(2, 4)


def of_another_type(y):
    """In place a sum keeps its type; elsewhere it would be promoted."""
    return y.sum(dim=0, dtype=torch.float16).add_(y[0] * 0.3).float()


WRITES = [
    last_use,
    read_later,
    read_through_a_view,
    read_through_an_earlier_view,
    of_another_type,
]


class Writing(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.write = write

    def forward(self, x):
        return self.write(self.layer(x))


def graph_of(write):
    torch.manual_seed(0)
    module = Writing(write).eval()
    return module, Graph(module, discover(module, INPUTS), INPUTS)


def run(graph):
    """Return what the graph computes from ``INPUTS``."""
    values = dict(zip(graph.input_nodes, INPUTS, strict=True))
    with torch.no_grad():
        for op in graph.operations:
            values[op.node] = graph.execute(op, values.__getitem__, graph.constants)
    return graph.restore(values)


class TestInPlace:
    @pytest.mark.parametrize("write", WRITES)
    def test_equals_the_module(self, write):
        module, graph = graph_of(write)
        with torch.no_grad():
            expected = module(*INPUTS)
        assert torch.equal(run(graph), expected)
        assert not any(op.target._schema.is_mutable for op in graph.operations)

    def test_last_uses_are_not_functionalized(self, monkeypatch):
        """That takes the exporter several times as long as the export."""

        def refuse(*_):
            pytest.fail("functionalized")

        monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refuse)
        _, graph = graph_of(last_use)
        assert [op.target._schema.name for op in graph.operations] == [
            "aten::linear", "aten::relu", "aten::mul",
        ]  # fmt: skip
