from dataclasses import replace

import pytest
import torch
from torch import nn

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.corrections import Correction
from bitquota.errors import InvalidCalibration, InvalidInput, InvalidModel
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.running import cut
from bitquota.quantizers.apply import apply_plan, as_change
from bitquota.quantizers.fitted import fit_quantizers
from bitquota.sensitivity.runners.eager import EagerRunner
from bitquota.sensitivity.runners.graph import GraphRunner
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import (
    Attention,
    Branches,
    Branching,
    Residual,
    build,
    inventory_of,
    samples,
)

KINDS = [Residual, Branches, Attention]


def runners(kind, **kwargs):
    module = build(kind)
    inventory, data = inventory_of(module), samples(kind)
    return [
        make_runner(module, inventory, data, engine=engine, chunk_size=5, **kwargs)
        for engine in ("graph", "eager")
    ]


def changes(inventory, bits=2):
    return [{la.name: Candidate.of(la, bits, Scheme())} for la in inventory.layers]


class TestGraphRunner:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("batch_norm", ["eval", "moved"])
    def test_equals_the_module_bit_for_bit(self, kind, batch_norm):
        """Full precision, every single layer, and every ordered pair, against full passes."""
        graph, eager = runners(kind, batch_norm=batch_norm)
        assert isinstance(graph, GraphRunner)
        singles = changes(graph.inventory)
        later = tuple(la.name for la in graph.inventory.layers)
        for chunk in range(len(graph.chunks)):
            assert torch.equal(graph.reference(chunk), eager.reference(chunk))
            a, b = graph.start(chunk, {}), eager.start(chunk, {})
            assert torch.equal(a.output, b.output)
            for one in singles:
                kept, plain = graph.extend(a, one, keep_for=later), eager.extend(b, one)
                assert torch.equal(kept.output, plain.output)
                for two in singles:
                    if two != one:
                        expected = eager.output(plain, two)
                        assert torch.equal(graph.output(kept, two), expected)

    @pytest.mark.parametrize("first", ["reference", "change"])
    @pytest.mark.parametrize("correction", [{"batch_norm": "moved"}, {"bias_correction": True}])
    def test_what_corrections_compare_with_is_the_reference(self, correction, first):
        """One pass in full precision gives both, whichever is asked for first."""
        for runner in runners(Residual, **correction):
            (one, *_) = changes(runner.inventory)
            if first == "reference":
                runner.reference(0)
            runner.start(0, one)
            runner.reference(0)
            assert runner.passes.calls == 2

    @pytest.mark.parametrize("limit", [1, 3000, 20000])
    def test_recomputes_what_memory_does_not_hold(self, limit):
        """With a tiny limit fewer activations are kept, more is run, and nothing changes."""
        module = build(Residual)
        inventory, data = inventory_of(module), samples(Residual)
        # Batch statistics fix the chunk, so that only recomputation can save memory.
        kwargs = {"engine": "graph", "chunk_size": 12, "batch_norm": "moved"}
        small = make_runner(module, inventory, data, memory_limit_bytes=limit, **kwargs)
        large = make_runner(module, inventory, data, **kwargs)
        outputs, later = [], tuple(la.name for la in inventory.layers)
        for runner in (small, large):
            state = runner.start(0, {})
            results = [state.output]
            for one in changes(inventory):
                front = runner.extend(state, one, keep_for=later)
                results += [front.output, *(runner.output(front, c) for c in changes(inventory, 4))]
            outputs.append(torch.stack(results))

        assert torch.equal(*outputs)
        assert small.passes.macs > large.passes.macs
        kept = small.start(0, {}).store.values()
        assert sum(v.numel() * v.element_size() for v in kept) <= limit / 2

    def test_shrinks_the_chunk_to_the_memory_limit(self):
        """Independent samples are simply taken fewer at a time."""
        module = build(Residual)
        runner = make_runner(
            module, inventory_of(module), samples(Residual), engine="graph",
            memory_limit_bytes=40_000,
        )  # fmt: skip
        kept = runner.start(0, {}).store.values()

        assert 1 <= runner.chunk_size < 12
        assert 2 * sum(v.numel() * v.element_size() for v in kept) <= 40_000

    def test_runs_only_what_lies_behind(self):
        """Multiply-accumulates: the head alone, all but the stem, parallel branches apart."""
        graph, _ = runners(Residual)
        stem, inner, side, head = 3 * 6 * 9 * 64, 6 * 6 * 9 * 64, 6 * 6 * 64, 6 * 5
        total = stem + inner + side + head

        assert graph.share(["stem"]) == 1
        assert graph.share(["head"]) == pytest.approx(head / total)
        assert graph.share(["inner"]) == pytest.approx((inner + head) / total)
        assert graph.share(["inner", "side"]) == pytest.approx((inner + side + head) / total)

        state = graph.start(0, {})
        before = graph.passes.macs
        graph.output(state, changes(graph.inventory)[-1])
        assert graph.passes.macs - before == 5 * head

    def test_counts_full_passes(self):
        """Starting on every chunk is one pass."""
        graph, eager = runners(Residual)
        for runner in (graph, eager):
            for chunk in range(len(runner.chunks)):
                runner.start(chunk, {})
            assert runner.passes.passes == pytest.approx(1.0)

    def test_leaves_the_module_alone(self):
        """Weights and statistics are as before."""
        module = build(Residual)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        for engine in ("graph", "eager"):
            runner = make_runner(
                module, inventory_of(module), samples(Residual), engine=engine, batch_norm="moved"
            )
            runner.start(0, changes(runner.inventory)[1])

        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())

    @pytest.mark.parametrize("engine", ["graph", "eager"])
    def test_moved_statistics_are_those_that_the_correction_stores(self, engine):
        """On one chunk a measured pass sees the corrected model; without a change, the model."""
        module = build(Residual)
        data = samples(Residual)
        runner = make_runner(module, inventory_of(module), data, batch_norm="moved", engine=engine)
        state = runner.start(0, {})
        torch.testing.assert_close(state.output, runner.reference(0))
        for change in changes(runner.inventory)[:4]:
            fixed = apply_plan(
                module, runner.inventory, list(change.values()),
                corrections=[Correction.BATCH_NORM_STATISTICS], correction_data=data,
            )  # fmt: skip
            plain = apply_plan(module, runner.inventory, list(change.values()))
            output = runner.output(state, change)
            torch.testing.assert_close(output, fixed(data.inputs[0]), rtol=1e-4, atol=1e-5)
            if change.keys() & {"stem", "inner"}:  # a batch norm follows
                assert not torch.allclose(output, plain(data.inputs[0]), atol=1e-3)

    @pytest.mark.parametrize("engine", ["graph", "eager"])
    def test_quantizes_activations(self, engine):
        """The input quantizer of a layer applies to that layer only, and to nothing before it."""
        module = build(Branches)
        inventory, data = inventory_of(module), samples(Branches)
        left = inventory.layers[0]
        candidate = Candidate.of(left, 32, Scheme(), activation_bits=4)
        runner = make_runner(
            module, inventory, data, engine=engine,
            activations=lambda layer, bits: lambda x: (x * bits).round() / bits,
        )  # fmt: skip
        x = data.inputs[0]
        with torch.no_grad():
            expected = module.left((x * 4).round() / 4) + module.right(x)

        assert torch.equal(runner.start(0, as_change([candidate])).output, expected)

    def test_activation_bits_need_quantizers(self):
        """A candidate with activation bits cannot be run without ranges."""
        graph, eager = runners(Branches)
        candidate = Candidate.of(graph.inventory.layers[0], 4, Scheme(), activation_bits=8)
        for runner in (graph, eager):
            with pytest.raises(InvalidInput, match="'activations'"):
                runner.start(0, as_change([candidate]))


class TestMakeRunner:
    def test_falls_back_where_the_model_cannot_be_exported(self):
        """Data-dependent control flow runs eagerly, and the reason is kept."""
        module = build(Branching)
        args = module, inventory_of(module), samples(Branching)
        runner = make_runner(*args)

        assert isinstance(runner, EagerRunner)
        assert "exportable" in runner.fallback
        with pytest.raises(InvalidModel, match="exportable"):
            make_runner(*args, engine="graph")

    @pytest.mark.parametrize("engine", ["auto", "graph", "eager"])
    def test_samples_of_the_wrong_shape(self, engine):
        """One sentence, with the shape."""
        module = build(Residual)
        wrong = CalibrationSet(inputs=(torch.ones(4, 5, 8, 8),))
        with pytest.raises(InvalidCalibration, match=r"samples of shape \[5, 8, 8\] float32"):
            make_runner(module, inventory_of(module), wrong, engine=engine)

    def test_runs_modules_of_torch_export(self):
        """What a .pt2 file gives can be run again as a graph, and equals the module."""
        module, data = build(Residual), samples(Residual)
        batch = torch.export.Dim.AUTO
        exported = torch.export.export(
            module, (data.inputs[0][:2],), dynamic_shapes=({0: batch},)
        ).module()
        runner = make_runner(exported, inventory_of(module), data, chunk_size=5)
        plain = make_runner(module, inventory_of(module), data, chunk_size=5)
        one = changes(plain.inventory)[1]

        assert runner.engine == "graph"
        assert torch.equal(runner.start(0, one).output, plain.start(0, one).output)

    def test_ties_change_together(self):
        """A tied weight is replaced wherever it is used."""
        graph, eager = runners(Attention)
        assert [la.name for la in graph.inventory.layers] == ["embed", "q", "k", "v", "o"]
        one = changes(graph.inventory)[0]

        assert torch.equal(graph.start(0, one).output, eager.start(0, one).output)
        assert not torch.equal(graph.start(0, one).output, graph.start(0, {}).output)


class TestPrecision:
    @pytest.mark.parametrize("kind", KINDS)
    def test_bf16_is_close_and_equal_between_engines(self, kind):
        """Both engines round in the same places; outputs are float32 and near full precision."""
        plain, _ = runners(kind)
        graph, eager = runners(kind, precision="bf16")
        exact, rough = plain.start(0, {}).output, graph.start(0, {}).output

        assert rough.dtype == torch.float32
        assert torch.equal(rough, eager.start(0, {}).output)
        assert not torch.equal(rough, exact)
        torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
        state = graph.start(0, {})
        for change in changes(graph.inventory):
            torch.testing.assert_close(
                graph.output(state, change), eager.start(0, change).output, rtol=0.02, atol=0.02
            )

    def test_is_part_of_what_a_ledger_knows(self):
        """Numbers of one precision never stand for those of another; old keys stay valid."""
        plain, rough = runners(Residual)[0], runners(Residual, precision="bf16")[0]
        assert "precision" not in plain.describe()
        assert rough.describe() == plain.describe() | {"precision": "bf16"}

    def test_full_precision_loses_nothing_against_itself(self):
        """The reference is run in the same arithmetic, so the loss at full precision is zero."""
        for runner in runners(Residual, precision="bf16"):
            assert torch.equal(runner.reference(0), runner.start(0, {}).output)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_nothing_waits_for_the_gpu(self, precision):
        """Once weights are quantized, variants run without a host synchronisation."""
        module = build(Residual).cuda()
        data = samples(Residual).placed("cuda", resident_bytes=0)
        runner = make_runner(module, inventory_of(module), data, chunk_size=5, precision=precision)
        assert data.inputs[0].is_pinned()
        state = runner.start(0, {})
        for change in changes(runner.inventory):
            runner.output(state, change)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for change in changes(runner.inventory):
                runner.output(runner.extend(state, change, keep_for=("head",)), change)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class TestCut:
    def test_covers_all_samples(self):
        """Chunks are consecutive; the last is the rest."""
        assert cut(7, 3) == (range(3), range(3, 6), range(6, 7))


@pytest.fixture(scope="module")
def large():
    module = nn.Sequential(nn.Conv2d(1, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    data = CalibrationSet(inputs=(torch.randn(18, 1, 1024, 1024),))
    return module, discover(module, (data.inputs[0][:2],)), data


class TestLargeActivations:
    """16 channels of 1,024 x 1,024: 67 MB of one sample, 71 with the layer's input."""

    @pytest.mark.parametrize("engine", ["graph", "eager"])
    @pytest.mark.parametrize("batch_norm", ["eval", "moved"])
    def test_as_many_samples_run_at_once_as_half_a_gibibyte_takes(self, large, engine, batch_norm):
        module, inventory, data = large
        assert inventory.sample_bytes == 4 * 17 * 2**20
        runner = make_runner(module, inventory, data, engine=engine, batch_norm=batch_norm)
        assert max(len(chunk) for chunk in runner.chunks) == 7

    def test_every_sample_is_taken_where_all_fit(self, large):
        _, inventory, _ = large
        small = CalibrationSet(inputs=(torch.randn(70, 1, 8, 8),))
        offered = [Candidate.of(la, 3, Scheme()) for la in inventory.layers]
        inventory = replace(
            inventory, layers=tuple(replace(la, n_macs=0, n_inputs=0) for la in inventory.layers)
        )
        order = fit_quantizers(large[0], inventory, offered, small, rounding="qep").order
        assert [len(batch[0]) for batch in order.batches] == [64, 6]

    def test_weights_are_rounded_on_as_many_as_two_gibibytes_take(self, large):
        module, inventory, data = large
        more = CalibrationSet(inputs=(data.inputs[0].expand(2, -1, -1, -1, -1).flatten(0, 1),))
        offered = [Candidate.of(la, 3, Scheme()) for la in inventory.layers]
        order = fit_quantizers(module, inventory, offered, more, rounding="qep").order
        assert [len(batch[0]) for batch in order.batches] == [7, 7, 7, 7, 7]
