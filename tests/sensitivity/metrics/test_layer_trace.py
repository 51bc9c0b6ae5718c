import pytest
import torch
from torch import nn
from torch.nn import functional

from bitquota.errors import InvalidModel
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics.layer_trace import trace_layers
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Attention, Residual, build, inventory_of, samples

CE = loss_by_name("cross_entropy")


class InPlace(nn.Module):
    """Changes a layer's input after the layer has read it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        h = x * 1.0
        y = self.a(h)
        h.zero_()
        return y


class Hidden(nn.Module):
    """Multiplies with a view of the weight that no operator call shows."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return torch.einsum("nk,ok->no", x, self.a.weight * 1.0)


def prepare(kind):
    module = build(kind)
    return make_runner(module, inventory_of(module), samples(kind), engine="eager")


class TestTraceLayers:
    def test_gradient_is_that_of_the_output(self):
        """Against autograd on the head's own output, sample by sample."""
        runner = prepare(Residual)
        module, data = runner.module, runner.calibration
        kept = []

        def keep(_, __, output):
            output.retain_grad()
            kept.append(output)

        hook = module.head.register_forward_hook(keep)
        functional.cross_entropy(module(data.inputs[0]), data.labels, reduction="sum").backward()
        hook.remove()
        calls = trace_layers(runner, 0, ["stem", "head"], "test", loss=CE)

        torch.testing.assert_close(calls["head"][0].gradient, kept[0].grad)

    def test_response_is_linear_in_the_weight(self):
        """layer(x; 2 W) = 2 (layer(x; W)), the bias left out."""
        runner = prepare(Residual)
        for name, (call,) in trace_layers(
            runner, 0, ["stem", "inner", "side", "head"], "test"
        ).items():
            weight = runner.weights.original(name).detach()
            torch.testing.assert_close(call.respond(2 * weight), 2 * call.respond(weight))

    def test_a_tied_weight_has_two_calls(self):
        """Embedding and output share it."""
        calls = trace_layers(prepare(Attention), 0, ["embed", "q"], "test")

        assert ["embedding", "linear"] == [c.operator for c in calls["embed"]]
        assert 1 == len(calls["q"])

    def test_inputs_survive_changes_in_place(self):
        """A copy is kept."""
        runner = prepare(InPlace)
        (call,) = trace_layers(runner, 0, ["a"], "test")["a"]

        assert torch.equal(runner.calibration.inputs[0], call.inputs)

    def test_feature_is_what_follows_before_the_next_layer(self):
        """Convolution, batch norm, ReLU; the in-place one too."""
        runner = prepare(Residual)
        module, x = runner.module, runner.calibration.inputs[0]
        with torch.no_grad():
            expected = torch.relu(module.norm(module.stem(x)))
        calls = trace_layers(runner, 0, ["stem", "inner", "side", "head"], "test", features=True)

        torch.testing.assert_close(calls["stem"][0].feature, expected)
        assert (12, 6) == calls["side"][0].feature.shape  # after addition and pooling

    def test_an_invisible_layer_is_an_error(self):
        """With what to do instead."""
        with pytest.raises(InvalidModel, match="does not see a .*use 'diagonal', 'gram'"):
            trace_layers(prepare(Hidden), 0, ["a"], "test")
