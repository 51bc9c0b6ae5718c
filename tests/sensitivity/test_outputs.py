"""What outputs are taken for, and that the loss measured on them is the right one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bitquota.errors import InvalidCalibration, InvalidInput
from bitquota.evaluate.scoring import evaluate_plans, score_plans
from bitquota.exports.export import export_plan
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.models.loaded import LoadedModel, finish
from bitquota.plan import Plan
from bitquota.report.text import output_sentences
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.outputs import Kind, read_outputs
from format_networks import write_pt2

if TYPE_CHECKING:
    from pathlib import Path

X = torch.randn(96, 8, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Two layers and an end."""

    def __init__(self, end, columns: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, columns)
        with torch.no_grad():
            self.second.weight *= 4
        self.end = end

    def forward(self, x: torch.Tensor):
        return self.end(self.second(torch.relu(self.first(x))))


def plain(x):
    return x


def softmax(x):
    return torch.softmax(x, -1)


def hidden_softmax(x):
    """Nobody can see that this is one."""
    return torch.exp(torch.log_softmax(x, dim=-1))


def squeezed_sigmoid(x):
    return torch.sigmoid(x).squeeze(-1)


def model_of(end, columns: int = 5) -> LoadedModel:
    return finish(Net(end, columns), source="net", architecture="Net")


def samples(labels=None) -> CalibrationSet:
    return CalibrationSet(inputs=(X,), labels=labels)


def request(**members) -> PlanRequest:
    return PlanRequest(
        budgets=("3 bits",), samples=32, holdout_samples=32, refine=False, weight_bits=(2, 4, 8),
        **members,
    )  # fmt: skip


@cache
def planned(end, columns: int = 5) -> Plan:
    asked = replace(request(), rounding="nearest")
    return allocate(model_of(end, columns), samples(), asked).plans[0]


def onnx_net(path: Path, ends: list[onnx.NodeProto], outputs: list[tuple[str, int]]) -> Path:
    """Write the two layers with other nodes behind their logits ``z``."""
    net = Net(plain)
    weights = {
        "w": net.first.weight.T, "a": net.first.bias, "v": net.second.weight.T, "b": net.second.bias
    }  # fmt: skip
    tensors = [numpy_helper.from_array(t.detach().numpy().copy(), k) for k, t in weights.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "w", "a"], ["h"], "first"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v", "b"], ["z"], "second"),
        *ends,
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
        tensors,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


class TestDiagnosis:
    @pytest.mark.parametrize(
        ("end", "columns", "kind", "loss", "undone"),
        [
            (plain, 5, Kind.LOGITS, "kl", ""),
            (lambda x: torch.log_softmax(x, -1), 5, Kind.LOGITS, "kl", ""),
            (softmax, 5, Kind.PROBABILITIES, "kl", "softmax"),
            (nn.Softmax(dim=1), 5, Kind.PROBABILITIES, "kl", "softmax"),
            (torch.sigmoid, 5, Kind.INDEPENDENT, "binary_kl", "sigmoid"),
            (torch.sigmoid, 1, Kind.INDEPENDENT, "binary_kl", "sigmoid"),
            (squeezed_sigmoid, 1, Kind.INDEPENDENT, "binary_kl", "sigmoid"),
            (lambda x: nn.functional.normalize(x, dim=-1), 5, Kind.EMBEDDING, "cosine", ""),
            (lambda x: x.reshape(-1, 5, 1, 1), 5, Kind.LOGITS, "kl", ""),
            (lambda x: softmax(x)[..., None, None], 5, Kind.PROBABILITIES, "kl", "softmax"),
            (lambda x: x.reshape(-1, 5, 2, 2), 20, Kind.FEATURE_MAP, "relative_mse", ""),
            (lambda x: {"pooler_output": x}, 5, Kind.EMBEDDING, "cosine", ""),
            (lambda x: {"stateN": x}, 5, Kind.EMBEDDING, "cosine", ""),
            (lambda x: x.argmax(-1), 5, Kind.CHOICE, "kl", "argmax"),
        ],
    )  # fmt: skip
    def test_kinds(self, end, columns, kind, loss, undone):
        """From the answers alone; the network that is measured ends before what was undone."""
        read = read_outputs(model_of(end, columns), samples())
        (output,) = read.outputs
        assert (kind, loss, undone) == (output.kind, output.loss, output.undone)
        logits = Net(plain, columns)(X)
        found = read.model.module(X).reshape(-1, columns) if undone else logits
        if undone == "softmax":  # up to a constant
            found, logits = found.log_softmax(-1), logits.log_softmax(-1)
        assert torch.allclose(found, logits, atol=1e-5)

    def test_classes_in_the_second_axis(self):
        """Maps of probabilities: classes come last in what is measured."""
        end = lambda x: torch.softmax(x.reshape(-1, 5, 2, 2), dim=1)  # noqa: E731
        (output,) = read_outputs(model_of(end, 20), samples()).outputs
        assert (Kind.PROBABILITIES, 1, (2, 2, 5)) == (output.kind, output.axis, output.shape)

    @pytest.mark.parametrize(
        ("labels", "kind", "loss"),
        [
            (torch.randint(0, 2, (96,)), Kind.BINARY_LOGIT, "binary_kl"),
            (torch.randn(96, 1), Kind.NUMBERS, "relative_mse"),
        ],
    )
    def test_labels_tell_what_a_column_is(self, labels, kind, loss):
        """A logit where they are 0 and 1, a number where they are numbers."""
        (output,) = read_outputs(model_of(plain, 1), samples(labels)).outputs
        assert (kind, loss) == (output.kind, output.loss)

    def test_a_column_without_labels_asks(self):
        """Either loss would do; naming one is enough."""
        with pytest.raises(InvalidInput, match="'binary_kl' for a logit or 'relative_mse'"):
            read_outputs(model_of(plain, 1), samples())
        for loss in ("binary_kl", "relative_mse"):
            assert read_outputs(model_of(plain, 1), samples(), loss=loss).loss.name == loss

    def test_a_loss_that_says_nothing_is_refused(self):
        """KL and cosine of one column are always zero."""
        for loss in ("kl", "cosine", "cross_entropy"):
            with pytest.raises(InvalidInput, match="says nothing"):
                read_outputs(model_of(plain, 1), samples(), loss=loss)

    def test_integers_from_nowhere_are_refused(self):
        """Rounded numbers have no scores behind them."""
        with pytest.raises(InvalidInput, match="hand in a model that returns the scores"):
            read_outputs(model_of(lambda x: x.round().long(), 5), samples())

    def test_infinite_answers_are_refused(self):
        """Nothing can be told from them."""
        with pytest.raises(InvalidCalibration, match="finite"):
            read_outputs(model_of(lambda x: x / 0), samples())

    def test_an_ordinary_model_stays_as_it_is(self):
        """The same module and loss: nothing that was measured changes."""
        model = model_of(plain)
        read = read_outputs(model, samples())
        assert read.model is model
        assert read.loss is loss_by_name("kl")

    def test_large_answers_are_looked_at_on_two_samples(self, monkeypatch):
        """A vocabulary at every position of 64 texts would fill the memory."""
        seen = []
        model = model_of(lambda x: seen.append(len(x)) or x)
        read_outputs(model, samples())
        assert seen == [2, *[8] * 8]
        monkeypatch.setattr("bitquota.sensitivity.outputs.MAX_ELEMENTS", 9)
        seen.clear()
        read_outputs(model, samples())
        assert seen == [2]

    def test_unknown_outputs_are_named(self):
        """With those that there are."""
        with pytest.raises(InvalidInput, match="one of output; got 'boxes'"):
            read_outputs(model_of(plain), samples(), outputs=("boxes=2",))


class TestCost:
    @pytest.mark.parametrize("n", [1, 6])
    def test_samples_run_whatever_the_number_of_outputs(self, n):
        """The answers, then all ends in one pass; two samples of each tell its shape."""

        class Counting(Net):
            ran = 0

            def forward(self, x):
                type(self).ran += len(x)
                return super().forward(x)

        end = lambda z: {f"y{k}": torch.sigmoid(z + k) for k in range(n)}  # noqa: E731
        model = finish(Counting(end), source="net", architecture="Net")
        Counting.ran = 0
        read = read_outputs(model, samples())
        assert ["sigmoid"] * n == [o.undone for o in read.outputs]
        assert Counting.ran <= 2 + 64 + 2 * n + 64


class TestPlans:
    @pytest.mark.slow
    @pytest.mark.parametrize("end", [softmax, hidden_softmax])
    def test_a_softmax_changes_nothing(self, end):
        """The plan and its loss are those of the same network that returns its logits."""
        one, two = planned(plain), planned(end)
        assert one.weight_bits == two.weight_bits
        assert one.measured.mean == pytest.approx(two.measured.mean, rel=1e-5)
        assert one.measured.mean > 1e-4
        assert one.outputs[0].changed == two.outputs[0].changed

    @pytest.mark.slow
    def test_a_sigmoid_has_a_loss(self):
        """One column: more bits lose less, and evaluation agrees with the plan."""
        plan, model = planned(squeezed_sigmoid, 1), model_of(squeezed_sigmoid, 1)
        assert plan.loss == "binary_kl"
        assert plan.measured.mean > 0
        assert len(set(plan.weight_bits)) > 1 or plan.weight_bits[0] > 2
        full, measured = evaluate_plans(model, samples(), [plan])
        assert full.measured.mean == 0
        assert measured.measured.mean == pytest.approx(plan.measured.mean, rel=1)
        assert "same_top" in score_plans(model, samples(), plans={"p": plan})[1].metrics

    @pytest.mark.slow
    def test_answers_that_never_change(self):
        """A constant output: every plan loses nothing, and nothing divides by it."""
        plan = planned(lambda x: x * 0)
        assert plan.measured.mean == 0
        assert plan.outputs[0].changed == 0
        assert plan.outputs[0].relative_error is None

    @pytest.mark.slow
    def test_two_heads_count(self):
        """Each output with its own loss and weight; a branch to either is measured."""

        def heads(x):
            return {"kind": torch.softmax(x[:, :4], -1), "size": x[:, 4:], "index": x.argmax(-1)}

        asked = request(loss="size=relative_mse", outputs=("kind", "size=0.5"))
        plan = allocate(model_of(heads), samples(), asked).plans[0]
        assert "kind=kl,size=relative_mse" == plan.loss
        assert [("kind", 1.0), ("size", 0.5)] == [(o.name, o.weight) for o in plan.outputs]
        alone = allocate(model_of(heads), samples(), request(outputs=("kind",))).plans[0]
        assert plan.measured.mean > alone.measured.mean > 0
        first, second = output_sentences(plan)
        assert "answers changed" in first
        assert "before the softmax" in first
        assert "relative error" in second
        assert Plan.from_json(plan.to_json()) == plan


class TestExportedGraphs:
    @pytest.mark.parametrize("end", [softmax, hidden_softmax, torch.sigmoid])
    def test_pt2(self, end, tmp_path):
        """Taken from the call, or computed back."""
        model = load_model(str(write_pt2(Net(end).eval(), (X[:2],), tmp_path / "m.pt2")))
        read = read_outputs(model, samples())
        again = read.model.module(X)
        end_of = torch.sigmoid if end is torch.sigmoid else softmax
        assert torch.allclose(end_of(again), model.module(X), atol=1e-6)

    def test_pt2_with_two_outputs(self, tmp_path):
        """Both are found, by position."""
        net = Net(lambda x: (torch.softmax(x[:, :4], -1), x[:, 4:] * 2)).eval()
        model = load_model(str(write_pt2(net, (X[:2],), tmp_path / "m.pt2")))
        read = read_outputs(model, samples(), loss="1=relative_mse")
        assert ["0", "1"] == [o.name for o in read.outputs]
        assert (96, 5) == read.model.module(X).shape

    @pytest.mark.parametrize("op", ["Softmax", "Sigmoid", "ArgMax"])
    def test_onnx(self, op, tmp_path):
        """The node before the end is the output that is measured."""
        axis = {} if op == "Sigmoid" else {"axis": -1}
        ends = [
            helper.make_node(op, ["z"], ["e"], **axis),
            helper.make_node("Identity", ["e"], ["y"]),
        ]
        kind = TensorProto.INT64 if op == "ArgMax" else TensorProto.FLOAT
        model = load_model(str(onnx_net(tmp_path / "m.onnx", ends, [("y", kind)])))
        read = read_outputs(model, samples())
        assert torch.allclose(read.model.module(X), Net(plain)(X), atol=1e-5)
        assert read.outputs[0].name == "y"

    @pytest.mark.slow
    def test_onnx_with_two_outputs(self, tmp_path):
        """Planned, exported, and evaluated as exported; a softmax computed back in the graph."""
        ends = [
            helper.make_node("LogSoftmax", ["z"], ["l"], axis=-1),
            helper.make_node("Exp", ["l"], ["probabilities"]),
            helper.make_node("ReduceSum", ["r", "one"], ["total"], keepdims=1),
        ]
        outputs = [("probabilities", TensorProto.FLOAT), ("total", TensorProto.FLOAT)]
        path = onnx_net(tmp_path / "m.onnx", ends, outputs)
        proto = onnx.load(path)
        proto.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
        onnx.save(proto, path)
        model = load_model(str(path))
        asked = request(loss="total=relative_mse", target="ort-cpu")
        asked = PlanRequest.from_json(
            asked.to_json() | {"weight_bits": [4, 8], "budgets": ["6 bits"]}
        )
        made = allocate(model, samples(), asked)
        (plan,), model = made.plans, made.with_weights(model)
        assert ["softmax", ""] == [o.undone for o in plan.outputs]
        export_plan(model, plan, tmp_path / "out", target="ort-cpu", samples=samples())
        found = score_plans(
            model, samples(), plans={"p": plan}, exported=[tmp_path / "out"], with_uniform=False
        )
        _, torch_run, file_run = (s.metrics[plan.loss].mean for s in found)
        assert torch_run == pytest.approx(file_run, rel=0.05)


class TestLosses:
    def test_binary_kl_is_the_divergence_of_bernoullis(self):
        """Against the formula, and finite where a probability is 0 or 1 in float32."""
        z, r = torch.tensor([[0.3], [120.0]]), torch.tensor([[-0.4], [100.0]])
        p, q = torch.sigmoid(r[0].double()), torch.sigmoid(z[0].double())
        expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        found = loss_by_name("binary_kl").per_sample(z, r, None)
        assert float(expected) == pytest.approx(float(found[0]), rel=1e-12)
        assert torch.isfinite(found).all()
        two = loss_by_name("binary_kl").per_sample(z.repeat(1, 2), r.repeat(1, 2), None)
        assert torch.allclose(two, 2 * found)

    def test_relative_error_does_not_depend_on_units(self):
        """Grams or kilograms: the same loss."""
        losses = []
        for unit in (1.0, 1000.0):
            read = read_outputs(
                model_of(lambda x, u=unit: x * u, 1), samples(), loss="relative_mse"
            )
            y = read.model.module(X).detach()
            losses.append(read.loss.per_sample(y * 1.1, y, None).mean())
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


class TestRequest:
    @pytest.mark.parametrize(
        ("members", "words"),
        [
            ({"loss": "huber"}, "loss must be one of auto, kl"),
            ({"loss": "a=huber"}, "loss must be one of auto, kl"),
            ({"loss": "=kl"}, "NAME=LOSS"),
            ({"outputs": ("a=0",)}, "positive weight"),
            ({"outputs": ("a=x",)}, "positive weight"),
            ({"outputs": ("a", "a=2")}, "given once"),
        ],
    )
    def test_refuses(self, members, words):
        """Before anything is loaded."""
        with pytest.raises(InvalidInput, match=words):
            request(**members)
