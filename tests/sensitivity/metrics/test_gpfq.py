import numpy as np
import pytest
import torch

from bitquota.candidates.storage import Scheme
from bitquota.errors import InvalidInput
from bitquota.quantizers.weights import quantize
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import GpfqError
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")


def relative_error(x, w, stored):
    error = (w - stored.dequantize().double()) @ x.T
    return float(error.square().sum() / (w @ x.T).square().sum())


class TestGpfqError:
    def prepare(self, **kwargs):
        module = build(Residual)
        inventory = inventory_of(module)
        runner = make_runner(module, inventory, samples(Residual), engine="eager", **kwargs)
        return runner, table_of(inventory, (2, 3, 4, 8))

    def test_is_the_relative_output_error_of_the_layer(self):
        """The head alone, by matrices."""
        runner, table = self.prepare()
        module, x = runner.module, runner.calibration.inputs[0]
        inputs = []
        module.head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with torch.no_grad():
            module(x)
        h, w = inputs[0].double(), module.head.weight.detach().double()

        matrix = GpfqError().measure(runner, table, KL)

        for r in range(12, 16):
            bits = table.rows[r].candidates[0].weight_bits
            fed = quantize(w.float(), bits, Scheme(), importance=torch.ones(()),
                           inputs_gram=h.T @ h, rounding="gpfq")  # fmt: skip
            expected = relative_error(h, w, fed)
            assert matrix.diagonal[r] == pytest.approx(expected, rel=1e-3)

    def test_is_at_most_the_error_of_rounding(self):
        """Every row of every layer, on the samples that codes were fitted to."""
        runner, table = self.prepare()
        matrix = GpfqError().measure(runner, table, KL)
        from bitquota.sensitivity.metrics.layer_trace import trace_layers

        calls = trace_layers(runner, 0, list(table.groups), "test")
        for r, row in enumerate(table.rows):
            (candidate,) = row.candidates
            original = runner.weights.original(candidate.layer).detach()
            moved = calls[candidate.layer][0].respond(runner.weights(candidate) - original)
            energy = calls[candidate.layer][0].respond(original).double().square().sum()
            nearest = float(moved.double().square().sum() / energy)
            assert matrix.diagonal[r] <= nearest * (1 + 1e-5)
        assert matrix.diagonal[0] < 0.9  # and the bound is not vacuous

    def test_fits_to_the_first_samples_only(self):
        """Fewer samples to fit to, other codes."""
        all_of_them = GpfqError(fit_samples=12).measure(*self.prepare(chunk_size=4), KL)
        few = GpfqError(fit_samples=3).measure(*self.prepare(chunk_size=4), KL)

        assert not np.allclose(all_of_them.diagonal, few.diagonal, rtol=1e-3)

    def test_needs_samples_to_fit_to(self):
        """None is refused."""
        with pytest.raises(InvalidInput, match="at least one sample"):
            GpfqError(fit_samples=0)
