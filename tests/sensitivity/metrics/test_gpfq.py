import numpy as np
import pytest
import torch

from bitquota.candidates.storage import Granularity, Grid, Scheme
from bitquota.errors import InvalidInput
from bitquota.quantizers.grid import nearest_codes
from bitquota.quantizers.weights import quantize
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import GpfqError
from bitquota.sensitivity.metrics.gpfq import follow_path
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")
SCHEMES = {
    "channel": Scheme(),
    "asymmetric": Scheme(grid=Grid.ASYMMETRIC),
    "groups of 5": Scheme(granularity=Granularity.GROUP, group_size=5),
    "tensor": Scheme(granularity=Granularity.TENSOR),
}


def problem(seed=0, rows=8, columns=24, samples_=200):
    """Correlated inputs after ReLU, and random weights."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    latent = torch.randn(samples_, columns, generator=generator, dtype=torch.float64)
    x = torch.relu(latent @ mixing / columns**0.5 + 0.5)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return x, w


def relative_error(x, w, stored, codes):
    from dataclasses import replace

    error = (w - replace(stored, codes=codes).dequantize().double()) @ x.T
    return float(error.square().sum() / (w @ x.T).square().sum())


class TestFollowPath:
    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
    @pytest.mark.parametrize("name", list(SCHEMES))
    def test_beats_rounding_to_nearest_and_fits_its_bits(self, bits, name):
        """A smaller output error at every width, from at most 2^b levels."""
        x, w = problem()
        stored = quantize(w, bits, SCHEMES[name])
        grid = (stored.scales, stored.zero_points, bits, SCHEMES[name])
        codes = follow_path(w, *grid, (x.T @ x)[None])

        assert relative_error(x, w, stored, codes) < relative_error(x, w, stored, stored.codes)
        assert len(codes.unique()) <= 2**bits
        low, high = (
            (0, 2**bits - 1) if stored.zero_points is not None else (-(2 ** (bits - 1)),) * 2
        )
        if stored.zero_points is None:
            high = 1 if bits == 1 else -low - 1
        assert low <= int(codes.min())
        assert int(codes.max()) <= high

    def test_by_hand(self):
        """Two equal inputs: what the first column loses, the second repays."""
        w = torch.tensor([[0.4, 0.4]], dtype=torch.float64)
        gram = torch.ones(1, 2, 2, dtype=torch.float64)
        one = torch.ones(1, 1)
        codes = follow_path(w, one, None, 4, Scheme(), gram)

        # 0.4 -> 0, then 0.4 + 0.4 -> 1: the sum 0.8 becomes 1, not 0.
        assert [[0, 1]] == codes.tolist()
        assert [[0, 0]] == nearest_codes(w, one, None, 4, Scheme()).tolist()

    def test_uncorrelated_inputs_round_to_nearest(self):
        """Nothing can be repaid."""
        _, w = problem()
        stored = quantize(w, 3, Scheme())
        codes = follow_path(w, stored.scales, None, 3, Scheme(), torch.eye(24).double()[None])

        assert torch.equal(stored.codes, codes)

    def test_inputs_that_are_always_zero(self):
        """No energy, no division."""
        _, w = problem()
        stored = quantize(w, 3, Scheme())
        gram = torch.zeros(1, 24, 24, dtype=torch.float64)
        codes = follow_path(w, stored.scales, None, 3, Scheme(), gram)

        assert torch.equal(stored.codes, codes)

    def test_every_group_has_its_own_inputs(self):
        """Two groups of rows equal two calls."""
        (x, w), (y, _) = problem(0), problem(1)
        stored = quantize(w, 3, Scheme())
        grams = torch.stack([x.T @ x, y.T @ y])
        both = follow_path(w, stored.scales, None, 3, Scheme(), grams)
        parts = [
            follow_path(w[rows], stored.scales[rows], None, 3, Scheme(), grams[k : k + 1])
            for k, rows in enumerate((slice(0, 4), slice(4, 8)))
        ]

        assert torch.equal(torch.cat(parts), both)


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
            stored = quantize(w.float(), bits, Scheme())
            codes = follow_path(w, stored.scales, None, bits, Scheme(), (h.T @ h)[None])
            expected = relative_error(h, w, stored, codes)
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
