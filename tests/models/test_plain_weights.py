"""Computed weights are folded, gates are apart, and outputs stay what they were."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.exports.export import export_plan, load_export
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from bitquota.models.loaded import finish, inventory_of
from bitquota.plan import Assignment, Plan
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.weights import quantize
from bitquota.sensitivity.runners.make import make_runner
from format_networks import write_pt2

pytestmark = pytest.mark.usefixtures("operators_read_once")


class Words(nn.Module):
    """Tokens through an embedding and a recurrent module to logits."""

    def __init__(self, kind=nn.LSTM, **settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 6)
        self.cell = kind(6, 8, batch_first=True, **settings)
        width = 8 * (2 if settings.get("bidirectional") else 1)
        self.head = nn.Linear(settings.get("proj_size", width), 20)

    def forward(self, ids):
        """Return logits of every position."""
        return self.head(self.cell(self.embed(ids))[0])


def old_weight_norm(layer):
    """Return a layer under the old kind of weight normalisation, which warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def planned(model, samples):
    """Return a plan with every layer at 4 bits."""
    inventory = inventory_of(model.module, model, samples)
    return Plan(
        model_digest=model.digest,
        assignments=tuple(
            Assignment(layer=la, candidate=Candidate.of(la, 4, Scheme())) for la in inventory.layers
        ),
        unquantized=inventory.unquantized,
    )


WRAPPERS = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}
IDS = torch.randint(20, (6, 5), generator=torch.Generator().manual_seed(1))


class TestFolding:
    @pytest.mark.parametrize("name", WRAPPERS)
    def test_same_outputs_and_plain_parameters(self, name):
        """The wrapped layer is a layer like any other."""
        torch.manual_seed(0)
        net = nn.Sequential(WRAPPERS[name](nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 6)).eval()
        x = torch.randn(4, 16)
        before = net(x)
        model = finish(net, source="s", architecture="a")
        assert torch.allclose(before, model.module(x), atol=1e-6)
        assert {n for n, _ in model.module.named_parameters()} == {
            "0.weight", "0.bias", "2.weight", "2.bias",
        }  # fmt: skip
        inventory = inventory_of(model.module, model, CalibrationSet(inputs=(x,)))
        assert [la.n_weights for la in inventory.layers] == [16 * 32, 32 * 6]


class TestRecurrent:
    @pytest.mark.filterwarnings("ignore:LSTM with projections")
    @pytest.mark.parametrize(
        ("kind", "settings", "n"),
        [
            (nn.LSTM, {}, 8), (nn.GRU, {}, 6), (nn.RNN, {}, 2),
            (nn.LSTM, {"bidirectional": True, "num_layers": 2}, 32),
            (nn.LSTM, {"proj_size": 4}, 9), (nn.GRU, {"bias": False}, 6),
        ],
    )  # fmt: skip
    def test_each_gate_is_a_layer(self, kind, settings, n):
        """Outputs stay, and every product of every step is counted."""
        net = Words(kind, **settings).eval()
        before, n_weights = net(IDS), sum(p.numel() for p in net.cell.parameters() if p.ndim > 1)
        model = finish(net, source="s", architecture="a")
        assert torch.allclose(before, model.module(IDS), atol=1e-6)
        inventory = inventory_of(model.module, model, CalibrationSet(inputs=(IDS,)))
        gates = [la for la in inventory.layers if la.kind is LayerKind.RECURRENT]
        assert len(gates) == n
        assert sum(la.n_weights for la in gates) == n_weights
        assert sum(la.n_macs for la in gates) == 5 * n_weights

    def test_cells(self):
        """A cell in a loop of the user's own counts each of its calls."""

        class Loop(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.cell = nn.GRUCell(6, 8)

            def forward(self, x):
                h = x.new_zeros(len(x), 8)
                for step in x.unbind(1):
                    h = self.cell(step, h)
                return h

        torch.manual_seed(0)
        net, x = Loop().eval(), torch.randn(4, 3, 6)
        before = net(x)
        model = finish(net, source="s", architecture="a")
        assert torch.allclose(before, model.module(x), atol=1e-6)
        inventory = inventory_of(model.module, model, CalibrationSet(inputs=(x,)))
        assert sum(la.n_macs for la in inventory.layers) == 3 * 3 * 8 * (6 + 8)

    def test_the_module_itself(self):
        """A model that is nothing but a GRU."""
        torch.manual_seed(0)
        net, x = nn.GRU(6, 8).eval(), torch.randn(5, 4, 6)
        before = net(x)[0]
        model = finish(net, source="s", architecture="a")
        assert torch.allclose(before, model.module(x)[0], atol=1e-6)
        assert model.module.hidden_size == 8

    def test_copies_are_independent(self):
        """A changed copy leaves the model as it was."""
        model = finish(Words().eval(), source="s", architecture="a")
        before, other = model.module(IDS), copy.deepcopy(model.module)
        with torch.no_grad():
            other.cell.weight_hh_l0.f.weight.zero_()
        assert not torch.allclose(before, other(IDS))
        assert torch.equal(before, model.module(IDS))

    @pytest.mark.parametrize("bits", [4, 8])
    def test_gates_are_rounded_as_rows_of_the_whole(self, bits):
        """A plan changes an LSTM as rounding each row of its stacked matrices does, no more."""
        net = Words().eval()
        plain = copy.deepcopy(net)
        model = finish(net, source="s", architecture="a")
        inventory = inventory_of(model.module, model, CalibrationSet(inputs=(IDS,)))
        gates = [la for la in inventory.layers if la.kind is LayerKind.RECURRENT]
        changed = apply_plan(
            model.module, inventory, [Candidate.of(la, bits, Scheme()) for la in gates]
        )
        with torch.no_grad():
            for weight in (plain.cell.weight_ih_l0, plain.cell.weight_hh_l0):
                weight.copy_(quantize(weight, bits, Scheme()).dequantize())
        assert torch.allclose(plain(IDS), changed(IDS), atol=1e-6)
        assert not torch.allclose(model.module(IDS), changed(IDS), atol=1e-6)

    def test_runner_and_export(self, tmp_path):
        """A gate is measured alone, and the plan is exported and runs in ONNX Runtime."""
        model = finish(Words().eval(), source="s", architecture="a")
        samples = CalibrationSet(inputs=(IDS,))
        inventory = inventory_of(model.module, model, samples)
        runner = make_runner(model.module, inventory, samples)
        gate = inventory.layer("cell.weight_hh_l0.f")
        changed = runner.start(0, {gate.name: Candidate.of(gate, 2, Scheme())}).output
        assert not torch.allclose(changed, runner.reference(0), atol=1e-4)
        plan = planned(model, samples)
        for name in ("ref-int", "onnx-qdq"):
            folder = tmp_path / name
            receipt = export_plan(model, plan, folder, format_name=name, samples=samples)
            assert receipt.difference.relative < 1e-5

    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            (nn.LSTM, {}), (nn.GRU, {}), (nn.RNN, {"nonlinearity": "relu"}),
            (nn.LSTM, {"bidirectional": True, "num_layers": 2}), (nn.GRU, {"bidirectional": True}),
            (nn.GRU, {"bias": False}),
        ],
    )  # fmt: skip
    def test_exported_as_one_operator(self, tmp_path, kind, settings):
        """The ONNX file takes samples of other lengths than the one that it was traced with."""
        model = finish(Words(kind, **settings).eval(), source="s", architecture="a")
        samples = CalibrationSet(inputs=(IDS,))
        plan = planned(model, samples)
        receipt = export_plan(model, plan, tmp_path / "o", format_name="onnx-qdq", samples=samples)
        assert receipt.difference.relative < 1e-5
        exported = load_export(model, plan, tmp_path / "o", format_name="onnx-qdq")
        assert exported(torch.randint(20, (3, 11))).shape == (3, 11, 20)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:LSTM with projections")
    @pytest.mark.parametrize(
        "settings", [{"bias": False}, {"bidirectional": True, "num_layers": 2}]
    )
    def test_projections_are_exported_in_steps(self, tmp_path, settings):
        """No operator of ONNX has one."""
        net = Words(nn.LSTM, proj_size=4, **settings)
        net.head = nn.Linear(8 if settings.get("bidirectional") else 4, 20)
        model = finish(net.eval(), source="s", architecture="a")
        samples = CalibrationSet(inputs=(IDS,))
        plan = planned(model, samples)
        report = export_plan(model, plan, tmp_path / "o", format_name="onnx-qdq", samples=samples)
        assert report.difference.relative < 1e-5


class TestRecurrentOfPt2:
    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            (nn.LSTM, {}), (nn.GRU, {"bias": False}), (nn.RNN, {"nonlinearity": "relu"}),
            (nn.LSTM, {"bidirectional": True, "num_layers": 2}), (nn.LSTM, {"proj_size": 4}),
        ],
    )  # fmt: skip
    @pytest.mark.filterwarnings("ignore:The tensor attributes", "ignore:LSTM with projections")
    def test_as_of_the_module(self, tmp_path, kind, settings):
        """An exported program has the layers of the module, and computes the same."""
        net = Words(kind, **settings).eval()
        model = load_model(str(write_pt2(net, (IDS,), tmp_path / "m.pt2")))
        other = IDS[:3]
        assert torch.equal(net(other), model.module(other))
        samples = CalibrationSet(inputs=(IDS,))
        own = finish(net, source="s", architecture="a")
        expected = [(la.name, la.n_macs) for la in inventory_of(own.module, own, samples).layers]
        found = inventory_of(model.module, model, samples).layers
        assert expected == [(la.name, la.n_macs) for la in found]

    @pytest.mark.filterwarnings("ignore:The tensor attributes")
    def test_cells_called_twice_and_one_at_the_root(self, tmp_path):
        """A cell is one module however often it is called; a model may be nothing but one."""

        class Steps(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.lstm, self.gru, self.rnn = (
                    nn.LSTMCell(6, 8), nn.GRUCell(8, 5), nn.RNNCell(5, 4)
                )  # fmt: skip

            def forward(self, x):
                state, cell = self.lstm(x[:, 1], self.lstm(x[:, 0]))
                return self.rnn(self.gru(state, cell[:, :5]), cell[:, :4])

        x, n = torch.randn(4, 2, 6), 4 * 8 * (6 + 8) + 3 * 5 * (8 + 5) + 4 * (5 + 4)
        for net in (Steps().eval(), nn.GRUCell(6, 8).eval()):
            given = x if isinstance(net, Steps) else x[:, 0]
            model = load_model(str(write_pt2(net, (given,), tmp_path / "m.pt2")))
            assert torch.allclose(net(given[:3]), model.module(given[:3]), atol=1e-6)
            layers = inventory_of(model.module, model, CalibrationSet(inputs=(given,))).layers
            assert {la.kind for la in layers} == {LayerKind.RECURRENT}
            assert sum(la.n_weights for la in layers) == n
            n = 3 * 8 * (6 + 8)

    @pytest.mark.filterwarnings("ignore:The tensor attributes")
    def test_weights_that_are_also_read_elsewhere(self, tmp_path):
        """They stay what the operator reads: nothing is computed with another copy."""

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.cell = nn.GRU(6, 8, batch_first=True)

            def forward(self, x):
                return self.cell(x)[0] + self.cell.weight_hh_l0[:8, 0]

        net, x = Both().eval(), torch.randn(4, 3, 6)
        model = load_model(str(write_pt2(net, (x,), tmp_path / "m.pt2")))
        assert torch.allclose(net(x), model.module(x), atol=1e-6)
        with torch.no_grad():
            net.cell.weight_hh_l0.add_(0.1)
            model.module.get_parameter("cell.weight_hh_l0").add_(0.1)
        assert torch.allclose(net(x), model.module(x), atol=1e-6)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:The tensor attributes")
    def test_runner_and_export(self, tmp_path):
        """A gate is measured alone, and the plan is exported and runs in ONNX Runtime."""
        model = load_model(str(write_pt2(Words().eval(), (IDS,), tmp_path / "m.pt2")))
        samples = CalibrationSet(inputs=(IDS,))
        inventory = inventory_of(model.module, model, samples)
        runner = make_runner(model.module, inventory, samples)
        gate = inventory.layer("cell.weight_hh_l0.f")
        changed = runner.start(0, {gate.name: Candidate.of(gate, 2, Scheme())}).output
        assert not torch.allclose(changed, runner.reference(0), atol=1e-4)
        plan = planned(model, samples)
        for name in ("ref-int", "onnx-qdq"):
            folder = tmp_path / name
            report = export_plan(model, plan, folder, format_name=name, samples=samples)
            assert report.difference.relative < 1e-5


class TestWhatIsNoLayer:
    def test_bilinear(self):
        """Three tensors are multiplied at once: its weight is no matrix per expert."""
        torch.manual_seed(0)
        net = nn.ModuleDict({"pair": nn.Bilinear(3, 4, 5), "head": nn.Linear(5, 2)})
        assert [la.name for la in discover(net, None).layers] == ["head"]

    def test_out_projection_of_attention_is_counted(self):
        """Though attention never calls the module."""

        class Attend(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x):
                return self.attention(x, x, x)[0]

        layers = {la.name: la for la in discover(Attend().eval(), (torch.randn(2, 5, 8),)).layers}
        assert layers["attention.out_proj"].n_macs == 5 * 8 * 8
        assert layers["attention.in_proj_weight"].n_macs == 5 * 8 * 24
