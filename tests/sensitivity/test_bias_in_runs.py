"""Runs that correct the means of outputs see what a corrected plan will ship."""

import pytest
import torch

from bitquota.corrections import Correction
from bitquota.errors import InvalidInput
from bitquota.models.running import run_module
from bitquota.quantizers.apply import apply_plan, as_change
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.pairs import measure_pairs
from bitquota.sensitivity.measures.tangent import TangentMeasure
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Attention, Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")


def a_runner(kind, engine="auto", **options):
    module = build(kind)
    data = samples(kind)
    options = {"bias_correction": True, "chunk_size": len(data), **options}
    return make_runner(module, inventory_of(module), data, engine=engine, **options)


class TestBiasCorrection:
    @pytest.mark.parametrize("engine", ["graph", "eager"])
    @pytest.mark.parametrize("kind", [Residual, Attention])
    @pytest.mark.parametrize("row", [0, 1])
    def test_equals_the_corrected_model(self, kind, engine, row):
        """Against biases that are really corrected on the same samples, however it was reached."""
        runner = a_runner(kind, engine)
        table = table_of(runner.inventory)
        candidates = table.decode([row] * len(table.groups))
        shipped = apply_plan(
            runner.module, runner.inventory, candidates,
            corrections=[Correction.BIAS_CORRECTION], correction_data=runner.calibration,
        )  # fmt: skip
        expected = run_module(shipped, runner.calibration.inputs)
        plain = run_module(
            apply_plan(runner.module, runner.inventory, candidates), runner.calibration.inputs
        )
        change = as_change(candidates)
        front, rest = dict(list(change.items())[:2]), dict(list(change.items())[2:])
        start = runner.start(0, {})
        ways = [
            runner.start(0, change).output,
            runner.output(start, change),
            runner.output(runner.extend(start, front, keep_for=tuple(rest)), rest),
        ]

        for found in ways:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (expected - plain).abs().max() > 1e-3

    @pytest.mark.parametrize("engine", ["graph", "eager"])
    def test_full_precision_stays_as_it_is(self, engine):
        """Nothing to correct: the same bits."""
        runner = a_runner(Residual, engine)
        torch.testing.assert_close(
            runner.start(0, {}).output, runner.reference(0), rtol=0.0, atol=0.0
        )

    def test_is_part_of_ledger_keys(self):
        """A measurement with it is another one; without it keys are what they were."""
        corrected, plain = a_runner(Residual), a_runner(Residual, bias_correction=False)
        assert corrected.describe() == plain.describe() | {"bias_correction": True}
        table = table_of(plain.inventory)
        one, other = (measure_pairs(runner, table, KL) for runner in (corrected, plain))
        assert abs(one.cross - other.cross).max() > 1e-6

    @pytest.mark.parametrize("correction", [{}, {"bias_correction": False, "batch_norm": "moved"}])
    def test_reverse_mode_is_refused(self, correction):
        """Means over samples make them depend on each other; a backward pass would sum them up."""
        runner = a_runner(Residual, **correction)
        with pytest.raises(InvalidInput, match="use the measure 'gram'"):
            TangentMeasure().measure(runner, table_of(runner.inventory, (8,)), KL)
