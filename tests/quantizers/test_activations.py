"""Activation quantizers: ranges from data, and a model that runs with them."""

import pytest
import torch
from torch import nn

from bitquota.candidates.storage import Grid
from bitquota.errors import InvalidInput, MeasurementFailed
from bitquota.quantizers.activations import (
    ActivationQuantizer,
    InputHistogram,
    RangeRule,
    collect_inputs,
    layers_of_one_input,
    quantized_inputs,
)
from refusals import refused
from sensitivity_networks import Attention, Residual, build, inventory_of, samples


def histogram_of(values):
    """Return the histogram of values as calibration collects it."""
    root = nn.Sequential(nn.Linear(values.shape[1], 1))
    return collect_inputs(root, inventory_of(root), [(values,)]).histograms["0"]


class TestActivationQuantizer:
    def test_rounds_to_the_grid_and_clips(self):
        """Codes 0..3, zero point 1, step 0.5."""
        quantizer = ActivationQuantizer(bits=2, scale=0.5, zero_point=1, lowest=0, highest=3)
        values = torch.tensor([-9.0, -0.3, 0.0, 0.6, 9.0])
        assert [-0.5, -0.5, 0.0, 0.5, 1.0] == quantizer(values).tolist()

    def test_leaves_integers_alone(self):
        """Token ids are no activations."""
        quantizer = ActivationQuantizer(bits=2, scale=0.5, zero_point=1, lowest=0, highest=3)
        ids = torch.tensor([3, 9])
        assert quantizer(ids) is ids


class TestInputHistogram:
    @pytest.mark.parametrize("grid", [Grid.SYMMETRIC, Grid.ASYMMETRIC])
    @pytest.mark.parametrize("rule", RangeRule)
    @pytest.mark.parametrize("bits", [2, 4, 8, 16])
    def test_zero_is_exact(self, grid, rule, bits):
        """Padding and ReLU make zeros; they must stay zeros."""
        values = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) + 1
        quantizer = histogram_of(values).quantizer(bits, rule, grid)
        assert 0.0 == float(quantizer(torch.zeros(1)))
        assert quantizer.lowest <= quantizer.zero_point <= quantizer.highest

    def test_minmax_keeps_everything_within_half_a_step(self):
        """Nothing is clipped by more than rounding."""
        values = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
        quantizer = histogram_of(values).quantizer(4, RangeRule.MINMAX)
        assert float((quantizer(values) - values).abs().max()) <= quantizer.scale * 0.5001

    def test_non_negative_inputs_waste_no_codes(self):
        """Behind a ReLU the zero point is 0."""
        values = torch.rand(50, 20, generator=torch.Generator().manual_seed(0))
        for rule in RangeRule:
            assert 0 == histogram_of(values).quantizer(4, rule).zero_point

    @pytest.mark.parametrize("grid", [Grid.SYMMETRIC, Grid.ASYMMETRIC])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_mse_is_near_the_best_of_a_dense_scan(self, grid, bits):
        """Within 5 % of the best of 300 ranges, on heavy-tailed values."""
        values = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) ** 3
        values = values.clamp(min=0) if grid is Grid.ASYMMETRIC else values
        quantizer = histogram_of(values).quantizer(bits, RangeRule.MSE, grid)
        found = float((quantizer(values) - values).square().mean())
        best = float("inf")
        reach = float(values.abs().max())
        for share in torch.linspace(0.01, 1.0, 300).tolist():
            levels = 2**bits - 1 if grid is Grid.ASYMMETRIC else 2 ** (bits - 1) - 0.5
            lowest = 0 if grid is Grid.ASYMMETRIC else -(2 ** (bits - 1))
            tried = ActivationQuantizer(
                bits=bits,
                scale=reach * share / levels,
                zero_point=0,
                lowest=lowest,
                highest=lowest + 2**bits - 1,
            )
            best = min(best, float((tried(values) - values).square().mean()))
        assert found <= 1.05 * best

    def test_mse_beats_minmax_on_outliers(self):
        """One large value must not cost all others their precision."""
        values = torch.rand(1000, 20, generator=torch.Generator().manual_seed(0))
        values[0, 0] = 10.0
        errors = [
            float((histogram_of(values).quantizer(4, r)(values) - values)[1:].square().mean())
            for r in (RangeRule.MSE, RangeRule.MINMAX)
        ]
        assert errors[0] < errors[1] / 10

    def test_percentile_leaves_out_the_outermost_values(self):
        """One value in 20,000 far out is beyond the range; the rest is inside."""
        values = torch.rand(1000, 20, generator=torch.Generator().manual_seed(0))
        values[0, 0] = 5.0
        quantizer = histogram_of(values).quantizer(8, RangeRule.PERCENTILE)
        assert 1.0 <= quantizer.scale * 255 < 1.01

    def test_an_input_that_is_always_zero_stays_zero(self):
        """No division by a range of zero."""
        quantizer = histogram_of(torch.zeros(4, 3)).quantizer(4)
        assert torch.equal(torch.zeros(2), quantizer(torch.zeros(2)))

    def test_refuses_a_width_off_the_list(self):
        """One-bit activations are not offered."""
        with refused(InvalidInput, activation_bits=1):
            InputHistogram().quantizer(1)


class TestCollectInputs:
    def test_sees_what_each_layer_multiplies(self):
        """Ranges are those of forward hooks on the modules."""
        module = build(Residual)
        seen = {}
        for name, part in module.named_modules():
            if hasattr(part, "weight") and part.weight.ndim > 1:
                part.register_forward_pre_hook(
                    lambda _, args, n=name: seen.__setitem__(n, args[0].clone())
                )
        data = samples(Residual)
        inputs = collect_inputs(module, inventory_of(module), [data.inputs])
        assert set(seen) == set(inputs.histograms)
        for name, values in seen.items():
            histogram = inputs.histograms[name]
            assert max(0.0, float(values.max())) == histogram.high
            assert min(0.0, float(values.min())) == histogram.low
            assert values.numel() == int(histogram.counts.sum())

    def test_batches_add_up(self):
        """Two batches give the histogram of their union."""
        module = build(Residual)
        data = samples(Residual)
        inventory = inventory_of(module)
        whole = collect_inputs(module, inventory, [data.inputs]).histograms["side"]
        parts = collect_inputs(module, inventory, [b.inputs for b in data.batches(12)])
        assert torch.equal(whole.counts, parts.histograms["side"].counts)

    def test_token_ids_pass(self):
        """An embedding's input is never quantized; the tied output layer shares its name."""
        module = build(Attention)
        inputs = collect_inputs(module, inventory_of(module), [samples(Attention).inputs])
        ids = torch.tensor([1, 2])
        assert torch.equal(ids, inputs("embed", 8)(ids))

    def test_unseen_layers_are_named(self):
        """Without data there is no range."""
        module = build(Residual)
        inputs = collect_inputs(module, inventory_of(module), [])
        with pytest.raises(InvalidInput, match="layer 'head' was not seen"):
            inputs("head", 8)

    def test_refuses_activations_that_are_not_finite(self):
        """The layer is named."""
        module = nn.Sequential(nn.Linear(3, 2))
        with pytest.raises(MeasurementFailed, match="input of layer '0' must be finite"):
            collect_inputs(module, inventory_of(module), [(torch.full((1, 3), torch.nan),)])

    def test_works_on_an_exported_graph(self):
        """The same ranges without any modules."""
        from bitquota.models.discovery import discover

        module = build(Residual)
        data = samples(Residual)
        exported = torch.export.export(module, data.inputs).module(check_guards=False)
        plain = collect_inputs(module, discover(module, data.inputs), [data.inputs])
        graph = collect_inputs(exported, discover(exported, data.inputs), [data.inputs])
        assert plain.histograms["inner"].high == graph.histograms["inner"].high
        assert torch.equal(plain.histograms["head"].counts, graph.histograms["head"].counts)


def quantizers_at(module, inventory, batches, bits):
    """The quantizer of every layer's input at one bit-width."""
    inputs = collect_inputs(module, inventory, batches)
    return {name: inputs(name, bits) for name in inputs.histograms}


class TestQuantizedInputs:
    def test_equals_pre_hooks_on_the_modules(self):
        """The context does what forward pre-hooks would do."""
        module = build(Residual)
        data, inventory = samples(Residual), inventory_of(module)
        quantizers = quantizers_at(module, inventory, [data.inputs], 3)
        with torch.no_grad(), quantized_inputs(module, inventory, quantizers):
            ours = module(*data.inputs)
        plain = module(*data.inputs)
        for name, quantizer in quantizers.items():
            module.get_submodule(name).register_forward_pre_hook(
                lambda _, args, q=quantizer: (q(args[0]),)
            )
        assert torch.equal(module(*data.inputs), ours)
        assert not torch.allclose(plain, ours, atol=1e-3)

    def test_leaves_the_module_as_it_was(self):
        """Nothing stays behind."""
        module = build(Residual)
        data, inventory = samples(Residual), inventory_of(module)
        before = module(*data.inputs)
        quantizers = quantizers_at(module, inventory, [data.inputs], 3)
        with quantized_inputs(module, inventory, quantizers):
            module(*data.inputs)
        assert torch.equal(before, module(*data.inputs))

    def test_more_bits_bring_the_output_closer(self):
        """8 bits are closer than 4, 4 closer than 2."""
        module = build(Residual)
        data, inventory = samples(Residual), inventory_of(module)
        exact = module(*data.inputs).detach()
        errors = []
        for bits in (2, 4, 8, 16):
            quantizers = quantizers_at(module, inventory, [data.inputs], bits)
            with quantized_inputs(module, inventory, quantizers):
                errors.append(float((module(*data.inputs).detach() - exact).abs().mean()))
        assert sorted(errors, reverse=True) == errors


class TestLayersOfOneInput:
    def test_names_those_that_read_one_tensor(self):
        """``left`` and ``right`` read what ``first`` makes; ``last`` reads a copy."""

        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.left, self.right, self.last = (nn.Linear(4, 4) for _ in range(4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.first(x)
                return self.left(x) + self.right(x) + self.last(x.clone())

        module = Branches().eval()
        found = layers_of_one_input(module, inventory_of(module), (torch.randn(2, 4),))
        assert found == [("left", "right")]
