"""Parameters that are multiplied outside of layers are found, in factories and in .pt2 files."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitquota.candidates.layers import Inventory, Layer, LayerKind
from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.exports.export import export_plan
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from bitquota.models.loaded import finish, inventory_of
from bitquota.plan import Assignment, Plan
from bitquota.sensitivity.runners.make import make_runner

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


class Bare(nn.Module):
    """One of each way to multiply with a parameter, and one that is only added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.square = nn.Parameter(torch.randn(8, 8) / 3)
        self.dense = nn.Parameter(torch.randn(6, 8) / 3)
        self.heads = nn.Parameter(torch.randn(2, 6, 4) / 3)
        self.mixed = nn.Parameter(torch.randn(2, 4, 10) / 3)
        self.places = nn.Parameter(torch.randn(2, 5, 4) / 3)

    def forward(self, x):
        """Return logits of every position."""
        h = functional.linear(x.relu() @ self.square, self.dense)
        h = torch.matmul(h[:, None].relu(), self.heads) + self.places
        return torch.einsum("bhtk,hko->bto", h, self.mixed)


EXPECTED = {
    "square": (8, 8, (1, 0)), "dense": (6, 8, None), "heads": (8, 6, (0, 2, 1)),
    "mixed": (10, 8, (2, 0, 1)),
}  # fmt: skip


def loaded(source, tmp_path):
    """Return the model as a factory gives it, or from a .pt2 file."""
    net = Bare().eval()
    if source == "factory":
        return finish(net, source="s", architecture="a")
    path = tmp_path / "m.pt2"
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (X,), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, path)
    return load_model(str(path))


@pytest.mark.parametrize("source", ["factory", "pt2"])
class TestBareParameters:
    def test_found_with_rows_and_counts(self, tmp_path, source):
        """One row per output; a table of positions is no layer, and is named as such."""
        model = loaded(source, tmp_path)
        inventory = inventory_of(model.module, model, CalibrationSet(inputs=(X,)))
        found = {la.name: la for la in inventory.layers}
        assert EXPECTED == {n: (la.rows, la.columns, la.axes) for n, la in found.items()}
        assert {LayerKind.CONTRACTION} == {la.kind for la in inventory.layers}
        assert 5 * 8 * 8 == found["square"].n_macs
        assert 5 * 2 * 6 * 4 == found["heads"].n_macs
        (rest,) = inventory.unquantized
        assert rest.reason == "read by add, not by a matrix product"
        assert inventory == Inventory.from_json(inventory.to_json())

    def test_measured_and_exported(self, tmp_path, source):
        """A runner sees each of them change, and the export computes what the plan says."""
        model, samples = loaded(source, tmp_path), CalibrationSet(inputs=(X,))
        inventory = inventory_of(model.module, model, samples)
        for engine in ("graph", "eager"):
            runner = make_runner(model.module, inventory, samples, engine=engine)
            for layer in inventory.layers:
                change = {layer.name: Candidate.of(layer, 2, Scheme())}
                output = runner.output(runner.start(0, {}), change)
                assert not torch.allclose(output, runner.reference(0), atol=1e-3)
        plan = Plan(
            model_digest=model.digest,
            assignments=tuple(
                Assignment(layer=la, candidate=Candidate.of(la, 4, Scheme()))
                for la in inventory.layers
            ),
            unquantized=inventory.unquantized,
        )
        for name in ("ref-int", "onnx-qdq"):
            report = export_plan(model, plan, tmp_path / name, format_name=name, samples=samples)
            assert report.difference.relative < 1e-5


def test_tables_and_slices():
    """A looked-up parameter is an embedding; slices of a stack are matrices of their own."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 8))
            self.stack = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, ids):
            h = functional.embedding(ids, self.table)
            for matrix in self.stack:
                h = (h @ matrix.T.contiguous()).relu()
            return h

    found: dict[str, Layer] = {
        la.name: la for la in discover(Stack(), (torch.randint(9, (2, 4)),)).layers
    }
    assert found["table"].kind is LayerKind.EMBEDDING
    assert (found["stack"].rows, found["stack"].columns) == (24, 8)
    assert found["stack"].axes is None
