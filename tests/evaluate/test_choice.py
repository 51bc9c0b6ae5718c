import numpy as np
import pytest
import torch

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.context import Context, MemoryLedger
from bitquota.corrections import Correction
from bitquota.errors import InvalidInput
from bitquota.evaluate.choice import measure_choice
from bitquota.models.references import References
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.corrections import reestimate_batch_norm
from bitquota.quantizers.fitted import Fitted
from bitquota.quantizers.quantized_weights import QuantizedWeights
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.runners.make import make_runner
from refusals import refused
from sensitivity_networks import (
    Attention,
    Branches,
    Residual,
    build,
    inventory_of,
    samples,
    table_of,
)

KL = loss_by_name("kl")


def chosen(kind, choice):
    module = build(kind)
    inventory = inventory_of(module)
    return module, inventory, table_of(inventory).decode(choice)


class OnceLedger(MemoryLedger):
    """Refuses what it has."""

    def put_many(self, entries):
        assert not self.get_many(list(entries))
        super().put_many(entries)


class TestNothingIsHandedInTwice:
    def test_choices_of_a_plan_share_the_reference(self):
        ledger, data = OnceLedger(), samples(Residual)
        for choice in [(0, 1, 0, 1), (0, 0, 0, 1)]:
            module, inventory, candidates = chosen(Residual, choice)
            measure_choice(module, inventory, candidates, data, KL, context=Context(ledger=ledger))
        assert len(ledger) % 3 == 0

    def test_choices_that_were_measured_in_part(self):
        ledger, module = OnceLedger(), build(Residual)
        inventory = inventory_of(module)
        runner = make_runner(module, inventory, samples(Residual), chunk_size=2)
        first, both = [(0, 1, 0, 1)], [(0, 1, 0, 1), (0, 0, 0, 1)]
        table = table_of(inventory)
        alone = measure_choices(runner, table, KL, first, context=Context(ledger=ledger))
        found = measure_choices(runner, table, KL, both, context=Context(ledger=ledger))
        assert np.array_equal(alone[0], found[0])
        assert len(ledger) == 3 * len(runner.chunks)


class TestApplyPlan:
    def test_returns_a_quantized_copy(self):
        """Weights lie on their grid, the original is untouched, biases stay."""
        module, inventory, candidates = chosen(Residual, (0, 1, 0, 1))
        before = {k: v.clone() for k, v in module.state_dict().items()}

        quantized = apply_plan(module, inventory, candidates)

        for name, bits in (("stem", 2), ("inner", 4), ("side", 2), ("head", 4)):
            rows = quantized.get_submodule(name).weight.detach().flatten(1)
            assert all(len(row.unique()) <= 2**bits for row in rows)
        assert torch.equal(quantized.inner.bias, module.inner.bias)
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())

    def test_tied_weights_stay_tied(self):
        """Embedding and output keep sharing one storage."""
        module, inventory, candidates = chosen(Attention, (0, 1, 1, 1, 1))
        quantized = apply_plan(module, inventory, candidates)

        assert quantized.out.weight is quantized.embed.weight
        assert not torch.equal(quantized.out.weight, module.out.weight)

    def test_corrections_need_samples(self):
        """Statistics cannot be re-estimated on nothing."""
        module, inventory, candidates = chosen(Residual, (0, 0, 0, 0))
        with refused(InvalidInput, corrections=["batch_norm_statistics"]):
            apply_plan(
                module, inventory, candidates, corrections=[Correction.BATCH_NORM_STATISTICS]
            )

    @pytest.mark.parametrize(
        "correction", [Correction.BIAS_CORRECTION, Correction.BATCH_NORM_STATISTICS]
    )
    def test_corrections_repair_something(self, correction):
        """Each correction lowers the loss of a crude quantization of this network."""
        module, inventory, candidates = chosen(Residual, (0, 0, 0, 0))
        data = samples(Residual, n=64)
        # The statistics of this random network fit nothing; start from those of the data.
        reestimate_batch_norm(module, data)
        plain = measure_choice(module, inventory, candidates, data, KL)
        repaired = measure_choice(
            module, inventory, candidates, data, KL, corrections=[correction], correction_data=data
        )

        assert repaired.mean < plain.mean


class TestMeasureChoice:
    @pytest.mark.parametrize("kind", [Residual, Attention])
    def test_equals_a_pass_of_the_quantized_model(self, kind):
        """Loss increase by sample, and accuracy."""
        module = build(kind)
        inventory, data = inventory_of(module), samples(kind)
        candidates = table_of(inventory).decode([0] * len(inventory.layers))
        quantized = apply_plan(module, inventory, candidates)
        with torch.no_grad():
            outputs = [m(*data.inputs) for m in (module, quantized)]
        reference, output = (o["logits"] if isinstance(o, dict) else o for o in outputs)
        loss = loss_by_name("cross_entropy")
        expected = loss.per_sample(output, output, data.labels) - loss.per_sample(
            reference, reference, data.labels
        )

        found = measure_choice(module, inventory, candidates, data, loss)

        np.testing.assert_allclose(found.per_sample, expected, atol=1e-5)
        assert found.mean == pytest.approx(float(expected.mean()), abs=1e-6)
        accuracy = float((output.argmax(-1) == data.labels).double().mean())
        assert found.accuracy == pytest.approx(accuracy)
        assert found.measured.n_samples == len(data)

    def test_full_precision_loses_nothing(self):
        """No candidates, no loss."""
        module, inventory, _ = chosen(Residual, (0, 0, 0, 0))
        found = measure_choice(module, inventory, (), samples(Residual), KL)

        assert (found.per_sample == 0).all()

    def test_runs_nothing_twice(self):
        """With everything in the ledger the model is not called."""
        module, inventory, candidates = chosen(Branches, (0, 1))
        ledger, data = MemoryLedger(), samples(Branches)
        calls = []
        module.register_forward_pre_hook(lambda *_: calls.append(1))
        one = measure_choice(
            module, inventory, candidates, data, KL, context=Context(ledger=ledger)
        )
        before = len(calls)
        assert before
        two = measure_choice(
            module, inventory, candidates, data, KL, context=Context(ledger=ledger)
        )

        np.testing.assert_array_equal(one.per_sample, two.per_sample)
        assert len(calls) == before

    def test_corrections_are_part_of_the_key(self):
        """A corrected choice is another measurement, and so are other correction samples."""
        module, inventory, candidates = chosen(Residual, (0, 0, 0, 0))
        ledger, data = MemoryLedger(), samples(Residual)
        means = {
            measure_choice(
                module, inventory, candidates, data, KL, context=Context(ledger=ledger), **kwargs
            ).mean
            for kwargs in (
                {},
                {"corrections": [Correction.BATCH_NORM_STATISTICS], "correction_data": data},
                {
                    "corrections": [Correction.BATCH_NORM_STATISTICS],
                    "correction_data": data.first(6),
                },
            )
        }

        assert len(means) == 3

    def test_paired_difference(self):
        """Mean and standard error of the difference, sample by sample."""
        module, inventory, candidates = chosen(Residual, (0, 0, 0, 0))
        data = samples(Residual)
        low = measure_choice(module, inventory, candidates, data, KL)
        high = measure_choice(module, inventory, table_of(inventory).decode((1, 1, 1, 1)), data, KL)
        difference = low.per_sample - high.per_sample

        mean, error = low.paired(high)

        assert mean == pytest.approx(low.mean - high.mean)
        assert error == pytest.approx(difference.std(ddof=1) / np.sqrt(len(difference)))

    def test_full_precision_is_run_once_for_several_choices(self):
        """With shared references the module itself runs once, and every value stays the same."""
        module, inventory, _ = chosen(Residual, (0, 0, 0, 0))
        table, data = table_of(inventory), samples(Residual, 12)
        choices = [table.decode(c) for c in ((0, 1, 0, 1), (1, 1, 0, 0), (0, 0, 0, 0))]
        alone = [measure_choice(module, inventory, c, data, KL).per_sample for c in choices]
        runs = []
        module.register_forward_hook(lambda model, *_: runs.append(model))

        outputs = References()
        together = [
            measure_choice(module, inventory, c, data, KL, batch_size=6, references=outputs)
            for c in choices
        ]

        assert sum(model is module for model in runs) == 2
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one, other.per_sample, rtol=1e-5, atol=1e-9)


class TestMeasureChoices:
    @pytest.mark.parametrize("centre", [None, (1, 1, 1, 1), (0, 1, 0, 1)])
    @pytest.mark.parametrize("engine", ["graph", "eager"])
    def test_equals_measuring_one_by_one(self, centre, engine):
        """Re-executing from a centre changes nothing."""
        module = build(Residual)
        inventory, data = inventory_of(module), samples(Residual)
        table = table_of(inventory)
        runner = make_runner(module, inventory, data, engine=engine)
        choices = [(0, 0, 0, 0), (1, 1, 1, 1), (1, 1, 1, 0), (0, 1, 0, 1)]

        values = measure_choices(runner, table, KL, choices, centre=centre)

        for choice, row in zip(choices, values, strict=True):
            single = measure_choice(module, inventory, table.decode(choice), data, KL)
            np.testing.assert_allclose(row, single.per_sample, atol=1e-9)

    def test_activation_candidates(self):
        """Joint weight and activation candidates run through the same interface."""
        module = build(Branches)
        inventory, data = inventory_of(module), samples(Branches)
        fitted = Fitted(
            weights=QuantizedWeights(module, inventory),
            activations=lambda layer, bits: lambda x: (x * 8).round() / 8,
        )
        candidates = [Candidate.of(la, 4, Scheme(), activation_bits=8) for la in inventory.layers]
        found = measure_choice(module, inventory, candidates, data, KL, fitted=fitted)
        plain = measure_choice(
            module, inventory, [Candidate.of(la, 4, Scheme()) for la in inventory.layers], data, KL
        )

        assert found.mean != plain.mean
