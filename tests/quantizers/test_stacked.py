"""Language models quantized part by part: the same weights and losses as the whole model gives."""

from __future__ import annotations

import pytest
import torch

from bitquota.candidates.storage import Granularity, ScaleFormat, Scheme
from bitquota.context import Context
from bitquota.errors import Cancelled, InvalidInput
from bitquota.measurement_setup import build_setup
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model, load_within
from bitquota.models.processes import Processes
from bitquota.models.running import primary_output
from bitquota.quantizers import sequential, weights
from bitquota.quantizers import stacked as module
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.fitted import fit_quantizers
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.stack_rounding import round_stack
from bitquota.quantizers.weights import estimated
from bitquota.request import PlanRequest
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.metrics.gram_weighted import GramWeightedError, random_direction
from bitquota.sensitivity.runners.eager import EagerRunner
from transformer_families import write_family


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of two blocks whose inputs have more positions than columns."""
    return write_family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(2)
    return CalibrationSet(inputs=(torch.randint(3, 96, (48, 24), generator=generator),))


def setup_of(folder, samples, *, load=load_model, memory: int = 2**30, **changed):
    """Return the setup of a request in which every layer has three candidates."""
    request = PlanRequest(
        budgets=("3 bits",),
        weight_bits=(2, 3, 8),
        scheme=Scheme(granularity=Granularity.GROUP, group_size=16, scale_format=ScaleFormat.FP16),
        samples=24,
        holdout_samples=24,
        **changed,
    )
    return build_setup(load(str(folder)), samples, request, context=Context(memory_bytes=memory))


class TestRoundStack:
    @pytest.mark.parametrize("rounding", ["qep", "gptq", "nearest"])
    def test_codes_are_those_of_the_whole_model(self, rounding, folder, samples):
        setup = setup_of(folder, samples, rounding=rounding)
        chosen = setup.table.decode((0,) * (len(setup.table.offsets) - 1))
        stored = {}
        apply_plan(
            setup.module,
            setup.inventory,
            chosen,
            fitted=fit_quantizers(
                setup.module, setup.inventory, chosen, setup.fit, rounding=rounding
            ),
            stored=stored,
        )
        found = round_stack(setup.stacked, chosen, rounding=rounding, context=Context())
        assert found.keys() == stored.keys()
        for name, weight in found.items():
            # Sums over batches of another size round otherwise, which may move a tie.
            same = (weight.codes == stored[name].codes).double().mean()
            assert same > 0.98, name
            # Scales are fitted to codes.
            pair = weight.scales.float(), stored[name].scales.float()
            assert torch.isclose(*pair, rtol=2e-3, atol=0).double().mean() > 0.95, name

    def test_tells_of_each_block_and_stops_before_one(self, folder, samples):
        """Also where only the whole of a comparison is told otherwise."""
        setup = setup_of(folder, samples, rounding="qep")
        choice = (1,) * (len(setup.table.offsets) - 1)
        told = []
        listening = Context(
            on_progress=told.append,
            cancelled=lambda: any(p.stage == "rounding" and p.done for p in told),
        )
        with pytest.raises(Cancelled, match="rounding the weights"):
            setup.measure_choice(choice, stage="a", rounding=listening)
        assert [p.done for p in told if p.stage == "rounding"] == [0, 1]

    def test_memory_does_not_change_what_is_found(self, folder, samples):
        """With activations in files and weights in theirs, the same codes."""
        codes = []
        for load, memory in ((load_model, 2**30), (lambda spec: load_within(spec, 1), 2**16)):
            setup = setup_of(folder, samples, load=load, memory=memory, rounding="qep")
            chosen = setup.table.decode((1,) * (len(setup.table.offsets) - 1))
            codes.append(round_stack(setup.stacked, chosen, rounding="qep", context=Context()))
            spilled = setup.stacked.keeper.written_bytes
            assert (spilled > 0) == (memory < 2**20)
        for name, weight in codes[0].items():
            same = (weight.codes == codes[1][name].codes).double().mean()
            assert same > 0.98, name


class TestStackRunner:
    def test_losses_are_those_of_the_whole_model(self, folder, samples):
        setup = setup_of(folder, samples, rounding="nearest")
        groups = len(setup.table.offsets) - 1
        choices = [(0,) * groups, (1,) * groups, (0,) * (groups - 1) + (2,), (2,) * groups]
        runner = setup.runner(setup.holdout)
        eager = EagerRunner(setup.module, setup.inventory, setup.holdout)
        for centre in (None, choices[1]):
            found, expected = (
                measure_choices(r, setup.table, setup.loss, choices, centre=centre)
                for r in (runner, eager)
            )
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)

    def test_what_choices_share_runs_once(self, folder, samples):
        """Two choices that differ in the last layer alone take little more than one pass."""
        setup = setup_of(folder, samples, rounding="nearest")
        groups = len(setup.table.offsets) - 1
        # The tied embedding is the first and the last layer; these differ in the last block.
        first = (1,) * groups
        last = (*first[:-1], 0)
        runner = setup.runner(setup.holdout)
        measure_choices(runner, setup.table, setup.loss, [first])
        alone = runner.passes.passes
        measure_choices(runner, setup.table, setup.loss, [first, last])
        assert runner.passes.passes - alone < 2 * alone


class TestGramWeighted:
    def measured(self, setup, runner):
        return GramWeightedError().measure(runner, setup.table, setup.loss).diagonal

    def test_scores_are_slopes_along_each_row_of_a_change(self, folder, samples, monkeypatch):
        """Half the squared slope of the loss in a random direction, of each sample and row."""
        monkeypatch.setattr(module, "SAMPLED_ROWS", 10**6)
        setup = setup_of(folder, samples, rounding="nearest")
        found = self.measured(setup, setup.runner())
        names = setup.stacked.stack.layers[1]  # of the first block
        weights = [setup.module.get_parameter(f"{name}.weight") for name in names]
        expected = dict.fromkeys(
            (c for row in setup.table.rows for c in row.candidates if c.layer in names), 0.0
        )
        for k in range(len(setup.fit)):
            with torch.enable_grad():
                output = primary_output(setup.module(setup.fit.inputs[0][k : k + 1]))
                direction = random_direction(setup.loss, output.detach(), [k])
                total = (output * direction.to(output.dtype)).sum()
                slopes = dict(zip(names, torch.autograd.grad(total, weights), strict=True))
            for candidate in expected:
                original = setup.fitted.weights.original(candidate.layer)
                kind = candidate.weight_bits, candidate.scheme
                change = next(estimated(original, [kind])) - original
                along = (slopes[candidate.layer] * change.detach()).sum(dim=1)
                expected[candidate] += 0.5 * float(along.square().sum()) / len(setup.fit)
        rows = {row.candidates[0]: r for r, row in enumerate(setup.table.rows)}
        for candidate, score in expected.items():
            assert found[rows[candidate]] == pytest.approx(score, rel=5e-3)

    def test_some_rows_tell_of_all(self, folder, samples, monkeypatch):
        setup = setup_of(folder, samples, rounding="gptq")
        monkeypatch.setattr(module, "SAMPLED_ROWS", 10**6)
        every = self.measured(setup, setup.runner())
        monkeypatch.setattr(module, "SAMPLED_ROWS", 12)
        setup = setup_of(folder, samples, rounding="gptq")
        assert self.measured(setup, setup.runner()) == pytest.approx(every, rel=0.35)

    def test_errors_are_over_folds(self, folder, samples):
        setup = setup_of(folder, samples, rounding="nearest")
        found = GramWeightedError().measure(setup.runner(), setup.table, setup.loss)
        assert len(setup.runner().chunks) == 8
        assert (found.diagonal_error > 0).all()


class TestWhichModels:
    def test_requests_that_need_the_whole_model(self, folder, samples):
        """Other measures, learned rounding and quantized inputs take the model as a whole."""
        for changed in (
            {"measure": "gram"}, {"rounding": "learned"}, {"activation_bits": 8},
            {"precision": "bf16"},
        ):  # fmt: skip
            assert setup_of(folder, samples, **changed).stacked is None

    def test_weights_in_files_are_read_where_all_are_needed(self, folder, samples):
        """A request that needs the whole model gets it, in float32."""
        setup = setup_of(
            folder, samples, load=lambda spec: load_within(spec, 1), measure="weight_mse"
        )
        assert setup.stacked is None
        assert {p.dtype for p in setup.module.parameters()} == {torch.float32}

    def test_rounder(self, folder, samples):
        assert setup_of(folder, samples).stacked.rounder is Rounder.GPTQ
        assert setup_of(folder, samples, rounding="nearest").stacked.rounder is Rounder.NEAREST


class TestProcesses:
    def test_round_as_one_does(self, folder, samples, monkeypatch):
        """Also where they share moments, and rows of a layer, as they do of larger models."""
        monkeypatch.setattr(sequential, "FORK_WORTH", 0)
        found = []
        for count, block in ((1, 700), (3, 700), (1, 2**21)):
            monkeypatch.setattr(weights, "BLOCK_WEIGHTS", block)
            setup = setup_of(folder, samples, rounding="qep")
            setup.stacked.processes = Processes(count)
            chosen = setup.table.decode((0,) * (len(setup.table.offsets) - 1))
            found.append(round_stack(setup.stacked, chosen, rounding="qep", context=Context()))
        for name, weight in found[0].items():
            assert torch.equal(weight.codes, found[1][name].codes), name
            assert torch.equal(weight.scales, found[1][name].scales), name
            # Products of some rows may round otherwise than those of all.
            same = (weight.codes == found[2][name].codes).double().mean()
            assert same > 0.98, name

    def test_need_a_model_that_is_walked(self, folder, samples):
        request = PlanRequest(budgets=("3 bits",), measure="weight_mse")
        with pytest.raises(InvalidInput, match="leave --processes out"):
            build_setup(load_model(str(folder)), samples, request, context=Context(processes=2))
