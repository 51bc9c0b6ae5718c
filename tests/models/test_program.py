"""The program of a ``.pt2`` is the one that ``torch.export`` finds in it."""

import pytest
import torch
from torch import nn

from bitquota.models import graph
from bitquota.models.discovery import discover
from bitquota.models.graph import Graph
from bitquota.models.pt2.build import build_pt2
from bitquota.models.pt2.program import program_of
from bitquota.models.pt2.vetting import vet_pt2
from format_networks import tiny_net, write_pt2

torch.manual_seed(0)
leaves = torch.utils._pytree.tree_leaves
IMAGES = (torch.randn(3, 4, 8, 8),)


class Branches(nn.Module):
    """Sizes of the batch, several tensors from one call, constants, a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("scale", torch.linspace(1, 2, 8))

    def forward(self, x):
        y = self.layer(self.layer(x) * self.scale)
        left, right = y.reshape(x.shape[0] * 4, -1).split(32, dim=1)
        return (left + right[:, :1]).softmax(-1), y.mean((2, 3))


class Written(nn.Module):
    """A value is changed in place where it is read again."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        y = self.layer(x)
        return y.relu_() + y


class Chosen(nn.Module):
    """How many values there are is up to the data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        y = self.layer(x)
        return y[y > 0].sum() + y


def chain(*layers):
    return nn.Sequential(*layers)


PLAIN = {
    "convolutions": chain(
        nn.Conv2d(4, 6, 3, padding="same", bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, groups=2), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, dilation=2, groups=4), nn.Flatten(), nn.LazyLinear(5),
    ),
    "embedding": chain(nn.Flatten(), nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
    "branches": Branches(),
    "tiny": tiny_net(),
}  # fmt: skip
INPUTS = {"embedding": (torch.arange(15).reshape(3, 5) % 7,), "tiny": (torch.randn(3, 3, 8, 8),)}


@pytest.fixture
def rebuilt(tmp_path):
    """Return a function that exports a module and reads it again."""

    def export(module, inputs):
        module.eval()(*inputs)
        return build_pt2(vet_pt2(write_pt2(module, inputs, tmp_path / "model.pt2"))).module

    return export


def run(found, inputs):
    values = dict(zip(found.input_nodes, inputs, strict=True))
    with torch.no_grad():
        for op in found.operations:
            values[op.node] = found.execute(op, values.__getitem__, found.constants)
    return found.restore(values | found.constants)


class TestProgramOf:
    @pytest.mark.parametrize("name", PLAIN)
    def test_equals_the_exporters(self, rebuilt, name, monkeypatch):
        """The same operators, costs, reads and outputs; and no export."""
        inputs = INPUTS.get(name, IMAGES)
        module = rebuilt(PLAIN[name], inputs)
        inventory = discover(module, inputs)
        with monkeypatch.context() as patch:
            patch.setattr(graph, "_export", lambda *_: pytest.fail("exported"))
            ours = Graph(module, inventory, inputs)
        monkeypatch.setattr(graph, "program_of", lambda *_: None)
        theirs = Graph(module, inventory, inputs)
        called = [[str(op.target) for op in g.operations] for g in (ours, theirs)]
        assert called[0] == called[1]
        for a, b in zip(ours.operations, theirs.operations, strict=True):
            assert (a.macs, a.n_bytes) == (b.macs, b.n_bytes)
        for layer in inventory.layers:
            indices = [sorted(g.by_node[n].index for n in g.behind[layer.name])
                       for g in (ours, theirs)]  # fmt: skip
            assert indices[0] == indices[1]
        expected = module(*inputs)
        assert type(run(ours, inputs)) is type(expected)
        for a, b in zip(leaves(run(ours, inputs)), leaves(expected), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize(
        "module",
        [
            Written(),
            Chosen(),
            chain(nn.Flatten(2), nn.Linear(64, 8), nn.LSTM(8, 5, batch_first=True)),
        ],
        ids=["in place", "chosen by data", "recurrent"],
    )
    def test_leaves_others_to_the_exporter(self, rebuilt, module):
        """They are exported as before."""
        module = rebuilt(module, IMAGES)
        assert program_of(module, IMAGES) is None
        found = Graph(module, discover(module, IMAGES), IMAGES)
        for a, b in zip(leaves(run(found, IMAGES)), leaves(module(*IMAGES)), strict=True):
            assert torch.allclose(a, b, atol=1e-6)

    def test_hooks_are_not_passed_over(self, rebuilt):
        module = rebuilt(Branches(), IMAGES)
        assert program_of(module, IMAGES) is not None
        module.layer.register_forward_hook(lambda *_: None)
        assert program_of(module, IMAGES) is None
