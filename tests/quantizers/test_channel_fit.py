"""Channel-aware fit: most channels gain, a few loud ones pay."""

import pytest
import torch

from bitquota.errors import InvalidInput
from bitquota.quantizers.channel_fit import (
    ChannelRule,
    calibrate_channels,
    collect_by,
    fit_channels,
    relative_errors,
)
from refusals import refused
from sensitivity_networks import Residual, build, inventory_of, samples


def loud_channels(n=400):
    """64 half-normal channels, 4 of them six times larger."""
    values = torch.randn(64, n, generator=torch.Generator().manual_seed(0)).abs()
    values[:4] *= 6
    return values


class TestFitChannels:
    @pytest.mark.parametrize(
        ("bits", "before", "after"), [(2, 0.381, 0.047), (3, 0.169, 0.016), (4, 0.062, 0.010)]
    )
    def test_serves_the_majority(self, bits, before, after):
        """At least 90 % of the channels improve; medians as in research/prior-measurements.md."""
        values = loud_channels()
        joint, chan = (
            relative_errors(values, fit_channels(values, bits, rule))
            for rule in (ChannelRule.JOINT, ChannelRule.CHAN)
        )
        assert int((chan < joint).sum()) >= 58
        assert before == pytest.approx(float(joint.median()), rel=0.15)
        assert after == pytest.approx(float(chan.median()), rel=0.3)

    def test_the_loud_channels_pay(self):
        """That is the price, and why it is a choice."""
        values = loud_channels()
        joint, chan = (
            relative_errors(values, fit_channels(values, 2, rule))[:4]
            for rule in (ChannelRule.JOINT, ChannelRule.CHAN)
        )
        assert bool((chan > joint).all())

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_irls_lowers_the_sum_of_relative_errors(self, bits):
        """Its own objective, never above that of its start."""
        values = loud_channels(80)
        sums = [
            float(relative_errors(values, fit_channels(values, bits, rule)).sqrt().sum())
            for rule in (ChannelRule.CHAN, ChannelRule.IRLS)
        ]
        assert sums[1] <= sums[0]

    def test_equal_channels_are_fitted_alike_by_all_rules(self):
        """With nothing to weigh, weighing changes nothing."""
        values = torch.rand(1, 500, generator=torch.Generator().manual_seed(0)).expand(8, -1)
        scales = [fit_channels(values, 3, rule).scale for rule in ChannelRule]
        assert scales[0] == pytest.approx(scales[1])
        assert scales[0] == pytest.approx(scales[2])

    def test_silent_channels_count_for_nothing(self):
        """A channel that is always zero has no relative error."""
        values = loud_channels(80)
        with_silence = torch.cat([values, torch.zeros(9, values.shape[1])])
        for rule in ChannelRule:
            ours = fit_channels(with_silence, 3, rule).scale
            assert fit_channels(values, 3, rule).scale == pytest.approx(ours)

    def test_negative_values_get_a_symmetric_grid(self):
        """Zero stays exact."""
        values = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
        quantizer = fit_channels(values, 4, ChannelRule.CHAN)
        assert (-8, 7, 0) == (quantizer.lowest, quantizer.highest, quantizer.zero_point)

    def test_refuses_a_width_off_the_list(self):
        """The list is in the message."""
        with refused(InvalidInput, activation_bits=1):
            fit_channels(loud_channels(80), 1, ChannelRule.CHAN)


class TestCalibrateChannels:
    def test_weighs_the_channels_of_each_layer(self):
        """Channels are those of the layer's own input: axis 1 of images, the last of vectors."""
        module = build(Residual)
        data, inventory = samples(Residual), inventory_of(module)
        found = calibrate_channels(module, inventory, [data.inputs], 4)
        assert {"stem", "inner", "side", "head"} == set(found)
        rows = data.inputs[0].movedim(1, 0).flatten(1)[:, ::1][:, :512]
        assert fit_channels(rows, 4, ChannelRule.CHAN) == found["stem"]


class TestCollectBy:
    def test_gives_the_grids_of_the_rule(self):
        """At any width, from one collection; the plain fit is another."""
        module = build(Residual)
        inventory, data = inventory_of(module), samples(Residual)
        batches = [b.inputs for b in data.batches(8)]
        name = inventory.layers[1].name
        found = {fit: collect_by(fit, module, inventory, batches) for fit in ("mse", *ChannelRule)}
        for rule in ChannelRule:
            for bits in (3, 4):
                expected = calibrate_channels(module, inventory, batches, bits, rule)[name]
                assert expected == found[rule](name, bits)
        assert found["mse"](name, 3) != found[ChannelRule.CHAN](name, 3)

    def test_refuses_layers_that_were_not_seen(self):
        """As plain calibration does."""
        module = build(Residual)
        batches = [samples(Residual).inputs]
        found = collect_by("chan", module, inventory_of(module), batches)
        with pytest.raises(InvalidInput, match="was not seen"):
            found("nowhere", 4)
