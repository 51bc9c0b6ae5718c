"""The ONNX Runtime runner against torch on the same network, and on what torch cannot run."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate, enumerate_candidates
from bitquota.context import Context, MemoryLedger
from bitquota.corrections import Correction
from bitquota.errors import InvalidCalibration, InvalidInput, InvalidModel, MeasurementFailed
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from bitquota.quantizers.apply import apply_plan
from bitquota.search.refine import refine
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.gram import measure_gram
from bitquota.sensitivity.measures.pairs import measure_pairs, measure_singles
from bitquota.sensitivity.registry import measure_by_name, measures
from bitquota.sensitivity.runners.make import make_runner
from bitquota.sensitivity.runners.onnx import OnnxRunner
from onnx_graphs import image_graph, odd_graph, residual_graph, token_graph
from refusals import refused
from sensitivity_networks import Residual, build, samples

pytest.importorskip("onnxruntime")
KL = loss_by_name("kl")


def changes(inventory, bits=2):
    return [{la.name: Candidate.of(la, bits, Scheme())} for la in inventory.layers]


@pytest.fixture
def residual(tmp_path):
    """Return the torch module and the same network as an ONNX file, loaded."""
    module = build(Residual)
    return module, load_model(str(residual_graph(tmp_path / "m.onnx", module))).module


def prepared(module, data, **kwargs):
    inventory = discover(module, tuple(t[:2] for t in data.inputs))
    return make_runner(module, inventory, data, chunk_size=5, **kwargs)


class TestOnnxRunner:
    @pytest.mark.parametrize("corrected", [False, True])
    @pytest.mark.parametrize("batch_norm", ["eval", "moved"])
    def test_equals_torch(self, residual, batch_norm, corrected):
        """Full precision, every layer, every ordered pair, on every chunk; corrections too."""
        data, kwargs = samples(Residual), {"batch_norm": batch_norm, "bias_correction": corrected}
        ort = prepared(residual[1], data, **kwargs)
        eager = prepared(residual[0], data, **kwargs, engine="eager")
        assert isinstance(ort, OnnxRunner)
        later = tuple(la.name for la in ort.inventory.layers)
        assert later == tuple(la.name for la in eager.inventory.layers)
        for chunk in range(len(ort.chunks)):
            torch.testing.assert_close(ort.reference(chunk), eager.reference(chunk))
            a, b = ort.start(chunk, {}), eager.start(chunk, {})
            torch.testing.assert_close(a.output, b.output)
            for one in changes(ort.inventory):
                kept, plain = ort.extend(a, one, keep_for=later), eager.extend(b, one)
                torch.testing.assert_close(kept.output, plain.output)
                for two in changes(ort.inventory, 3):
                    if two.keys() != one.keys():
                        torch.testing.assert_close(ort.output(kept, two), eager.output(plain, two))

    @pytest.mark.parametrize("kwargs", [{}, {"batch_norm": "moved"}, {"bias_correction": True}])
    def test_a_suffix_equals_the_whole_bit_for_bit(self, residual, kwargs):
        """Where the graph is cut changes no bit."""
        runner = prepared(residual[1], samples(Residual), **kwargs)
        state = runner.start(0, {})
        for change in changes(runner.inventory):
            assert torch.equal(runner.output(state, change), runner.start(0, change).output)

    def test_runs_only_what_lies_behind(self, residual):
        """The shares and the counted work are those of the graph that torch exports."""
        data = samples(Residual)
        ort, graph = (prepared(m, data, engine="auto") for m in residual[::-1])
        assert (ort.engine, graph.engine) == ("onnxruntime", "graph")
        for layers in (["stem"], ["inner"], ["side"], ["head"], ["inner", "side"]):
            assert ort.share(layers) == pytest.approx(graph.share(layers))
        for runner in (ort, graph):
            for chunk in range(len(runner.chunks)):
                state = runner.start(chunk, {})
                for change in changes(runner.inventory):
                    runner.output(state, change)
        assert ort.passes.passes == pytest.approx(graph.passes.passes)
        assert ort.passes.calls == graph.passes.calls

    @pytest.mark.parametrize("limit", [1, 3000, 20000])
    def test_recomputes_what_memory_does_not_hold(self, residual, limit):
        """With a tiny limit fewer values are kept, more is run, and nothing changes."""
        data = samples(Residual)
        inventory = discover(residual[1], (data.inputs[0][:2],))
        kwargs = {"chunk_size": 12, "batch_norm": "moved"}
        small = make_runner(residual[1], inventory, data, memory_limit_bytes=limit, **kwargs)
        large = make_runner(residual[1], inventory, data, **kwargs)
        outputs, later = [], tuple(la.name for la in inventory.layers)
        for runner in (small, large):
            state = runner.start(0, {})
            front = runner.extend(state, changes(inventory)[1], keep_for=later)
            results = [state.output, front.output]
            results += [runner.output(front, change) for change in changes(inventory, 4)]
            outputs.append(torch.stack(results))

        assert torch.equal(*outputs)
        assert small.passes.macs > large.passes.macs
        kept = small.start(0, {}).store[0].values()
        assert sum(v.nbytes for v in kept) <= limit / 2

    def test_shrinks_the_chunk_to_the_memory_limit(self, residual):
        """Independent samples are simply taken fewer at a time."""
        data = samples(Residual)
        inventory = discover(residual[1], (data.inputs[0][:2],))
        runner = make_runner(residual[1], inventory, data, memory_limit_bytes=40_000)

        assert 1 <= runner.chunk_size < 12
        assert 2 * sum(v.nbytes for v in runner.start(0, {}).store[0].values()) <= 40_000

    def test_fixed_batch(self, tmp_path):
        """A graph exported for one batch size runs in pieces, the last one padded."""
        module, data = build(Residual), samples(Residual)
        outputs, passes = [], []
        for batch in ("n", 1, 4):
            path = residual_graph(tmp_path / f"{batch}.onnx", module, batch=batch)
            runner = prepared(load_model(str(path)).module, data)
            state = runner.start(0, {})
            outputs.append([runner.output(state, change) for change in changes(runner.inventory)])
            passes.append(runner.passes.passes)
        assert passes == pytest.approx([passes[0]] * 3)
        for other in outputs[1:]:
            for one, two in zip(outputs[0], other, strict=True):
                torch.testing.assert_close(one, two)

    def test_batch_statistics_need_a_free_batch(self, tmp_path):
        """Statistics of one sample stand for nothing."""
        path = residual_graph(tmp_path / "m.onnx", build(Residual), batch=1)
        with refused(InvalidInput, fixed_batch=1):
            prepared(load_model(str(path)).module, samples(Residual), batch_norm="moved")

    def test_means_behind_products(self, tmp_path):
        """Channels last, of whatever rank: the first layer's mean is that of full precision."""
        module = load_model(str(odd_graph(tmp_path / "m.onnx"))).module
        x = torch.randn(5, 5, 4, generator=torch.Generator().manual_seed(0))
        runner = prepared(module, CalibrationSet(inputs=(x,)), bias_correction=True)
        (mean,) = runner.means(0).values()
        change = changes(runner.inventory)[0]
        fixed = apply_plan(
            module, runner.inventory, list(change.values()),
            corrections=[Correction.BIAS_CORRECTION], correction_data=CalibrationSet(inputs=(x,)),
        )  # fmt: skip

        expected = (x.reshape(-1, 4) @ module.get_submodule("first").weight).mean(0).detach()
        np.testing.assert_allclose(mean[0], expected, atol=1e-6)
        output = runner.output(runner.start(0, {}), change)
        torch.testing.assert_close(output, fixed(x))

    def test_means_need_a_place_and_a_free_batch(self, tmp_path):
        """The correction would do nothing, or something else."""
        data = samples(Residual)
        path = residual_graph(tmp_path / "m.onnx", build(Residual), batch=4)
        with pytest.raises(InvalidInput, match="fixed batch of 4"):
            prepared(load_model(str(path)).module, data, bias_correction=True)
        tokens = CalibrationSet(inputs=(torch.zeros(4, 6, dtype=torch.int64),))
        path = token_graph(tmp_path / "t.onnx")
        with pytest.raises(InvalidInput, match="has none: leave the correction out"):
            prepared(load_model(str(path)).module, tokens, bias_correction=True)

    def test_batch_statistics_need_batch_norms(self, tmp_path):
        """A graph whose exporter folded them says so, rather than ignore the correction."""
        module = load_model(str(image_graph(tmp_path / "m.onnx"))).module
        with refused(InvalidInput, batch_norms=0, opset=21):
            prepared(module, samples(Residual), batch_norm="moved")

    def test_operators_that_torch_does_not_know(self, tmp_path):
        """LSTM, a branch that reads outer values, TopK: equal to the file with edited weights."""
        path = odd_graph(tmp_path / "m.onnx")
        x = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0))
        module = load_model(str(path)).module
        runner = prepared(module, CalibrationSet(inputs=(x,)))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        expected = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

        state = runner.start(0, {})
        torch.testing.assert_close(torch.cat([state.output, runner.start(1, {}).output]), expected)
        assert 0 < runner.share(["last"]) < runner.share(["first"]) == 1
        for change in changes(runner.inventory):
            output = runner.output(state, change)
            quantized = apply_plan(module, runner.inventory, list(change.values()))
            torch.testing.assert_close(output, quantized(x[:5]))
            assert not torch.equal(output, state.output)

    def test_tied_weights_change_together(self, tmp_path):
        """An embedding that is also the head, through a Transpose."""
        module = load_model(str(token_graph(tmp_path / "m.onnx"))).module
        ids = torch.randint(0, 32, (5, 6), generator=torch.Generator().manual_seed(0))
        runner = prepared(module, CalibrationSet(inputs=(ids,)))
        change = changes(runner.inventory)[0]
        expected = apply_plan(module, runner.inventory, list(change.values()))(ids)

        torch.testing.assert_close(runner.output(runner.start(0, {}), change), expected)

    def test_activation_bits_are_refused(self, residual):
        """With what to do instead."""
        runner = prepared(residual[1], samples(Residual))
        candidate = Candidate.of(runner.inventory.layers[0], 4, Scheme(), activation_bits=8)
        with pytest.raises(MeasurementFailed, match="leave out activation bits"):
            runner.start(0, {"stem": candidate})

    def test_engine_for_onnx_files_only(self, residual):
        """Asked for by name on a torch module, it is one sentence."""
        with pytest.raises(InvalidModel, match=r"runs ONNX files"):
            prepared(residual[0], samples(Residual), engine="onnxruntime")
        with refused(InvalidInput, engine="eager"):
            prepared(residual[1], samples(Residual), engine="eager", batch_norm="moved")

    def test_wrong_samples(self, residual):
        """One sentence, with the shape."""
        wrong = CalibrationSet(inputs=(torch.ones(4, 5, 8, 8),))
        inventory = discover(residual[1], (samples(Residual).inputs[0][:2],))
        with pytest.raises(InvalidCalibration, match=r"samples of shape \[5, 8, 8\]"):
            make_runner(residual[1], inventory, wrong)


class TestMeasuresOnOnnx:
    @pytest.mark.parametrize("measure", [measure_singles, measure_gram, measure_pairs])
    def test_equal_those_of_torch(self, residual, measure):
        """The matrix of the file is that of the module it was written from."""
        data, found = samples(Residual), []
        for module in residual:
            runner = prepared(module, data)
            table = enumerate_candidates(runner.inventory, (2, 4))
            found.append(measure(runner, table, KL))

        np.testing.assert_allclose(found[1].diagonal, found[0].diagonal, rtol=1e-4, atol=1e-7)
        if found[0].cross is not None:
            scale = np.abs(found[0].cross).max()
            np.testing.assert_allclose(found[1].cross, found[0].cross, atol=1e-4 * scale)

    @pytest.mark.parametrize("name", list(measures()))
    def test_every_other_measure_runs_or_says_why_not(self, residual, name):
        """No measure fails in its own way on a model that torch does not run."""
        runner = prepared(residual[1], samples(Residual))
        table = enumerate_candidates(runner.inventory, (2, 4))
        measure = measure_by_name(name)
        if name in {"gram", "pairs", "diagonal", "relative_mse", "weight_mse"}:
            diagonal = measure.measure(runner, table, KL).diagonal
            assert (diagonal > 0).all()
        else:
            with pytest.raises(InvalidInput, match="'gram'"):
                measure.measure(runner, table, KL)

    def test_resumes_from_the_ledger(self, residual):
        """Nothing but reference outputs is run again, and not a bit differs."""
        ledger, data, found = MemoryLedger(), samples(Residual), []
        for _ in range(2):
            runner = prepared(residual[1], data)
            table = enumerate_candidates(runner.inventory, (2, 4))
            found.append(measure_pairs(runner, table, KL, context=Context(ledger=ledger)))

        assert found[0].to_bytes() == found[1].to_bytes()
        assert runner.passes.passes <= 1

    def test_refinement(self, residual):
        """Refinement runs on it and ends at a measured choice no worse than its start."""
        from bitquota.search.neighborhood import Limits

        runner = prepared(residual[1], samples(Residual))
        table = enumerate_candidates(runner.inventory, (2, 4, 8))
        sizes = np.array([[sum(c.size_bits for c in row.candidates) for row in table.rows]])
        limits = Limits(costs=sizes, limits=np.array([int(sizes[0, 1::3].sum())]))
        start = (1,) * len(table.groups)

        found = refine(
            runner, table, KL, limits=limits, solve=lambda *_: None, starts={"uniform": start}
        )

        assert sum(sizes[0, table.offsets[:-1] + found.choice]) <= limits.limits[0]
        assert found.loss <= measure_gram(runner, table, KL, base_point=start).constant + 1e-9
