"""Zero bits: layers of zeros and two of four weights, planned, evaluated, exported, refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bitquota.candidates.layers import Layer, LayerKind
from bitquota.candidates.storage import Granularity, Scheme, Sparsity, storage_size
from bitquota.candidates.table import Candidate
from bitquota.candidates.targets import target_by_name
from bitquota.context import Context, MemoryLedger
from bitquota.corrections import Correction
from bitquota.errors import InvalidInput, InvalidPlan
from bitquota.evaluate.scoring import evaluate_plans
from bitquota.exports.export import export_plan, open_export
from bitquota.measurement_setup import build_setup
from bitquota.models.calibration import CalibrationSet
from bitquota.models.loaded import finish
from bitquota.plan import Plan
from bitquota.quantizers.packing import pack, unpack
from bitquota.quantizers.planned import quantized_module
from bitquota.quantizers.rounders import output_errors
from bitquota.quantizers.weights import estimated, quantize
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.search.idle import without_idle_layers
from bitquota.search.portfolio import measure_leading, measuring_runner
from bitquota.sensitivity.losses import divergence
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.service.api.solve_task import assignment
from bitquota.solver import build_problem
from refusals import refused

SPARSE = Scheme(sparsity=Sparsity.TWO_OF_FOUR)
REQUEST = PlanRequest(
    budgets=("2.4 bits",),
    target="ref-int",
    weight_bits=(2, 4, 8),
    effort="quick",
    refine=False,
    allow=("prune", "2:4"),
    samples=64,
    holdout_samples=64,
)


class Branches(nn.Module):
    """A branch that gives little but a constant, and one layer with many small weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.idle = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.head = nn.Linear(16, 6)
        half = torch.rand(16, 16, 3, 3).reshape(-1, 4)
        few = torch.zeros_like(half).scatter_(1, half.topk(2, dim=1).indices, 1.0)
        self.second.weight.data *= 0.02 + few.reshape(16, 16, 3, 3)
        self.idle.weight.data *= 0.02

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x) + x + self.idle(1 + x))
        return 4 * self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def samples():
    torch.manual_seed(1)
    return CalibrationSet(inputs=(torch.randn(160, 4, 8, 8) * torch.rand(160, 1, 1, 1) * 4,))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return finish(Branches().eval(), source="branches", architecture="Branches")


@pytest.fixture(scope="module")
def made(model, samples):
    context = Context(device="cpu", ledger=MemoryLedger())
    return allocate(model, samples, REQUEST, context=context)


@pytest.fixture(scope="module")
def planned(made, model):
    """Return the plan, and the model with its weights."""
    return made.plans[0], made.with_weights(model)


def correlated(rows=24, columns=32):
    torch.manual_seed(3)
    inputs = torch.randn(400, columns) @ torch.randn(columns, columns)
    return torch.randn(rows, columns) * torch.rand(columns), (inputs.T @ inputs).double()


class TestTwoOfFour:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_two_of_four_neighbours_stay_and_take_their_bits_and_places(self, bits):
        """Exact bytes, exact way back; never more than two of four differ from zero."""
        values, gram = correlated()
        weight = quantize(values, bits, SPARSE, inputs_gram=gram, rounding="gptq")
        blocks = weight.codes.reshape(-1, 4)
        assert int((blocks != 0).sum(dim=1).max()) <= 2
        packed = pack(weight)
        assert 24 * 32 // 2 * (bits + 2) == packed.size.codes
        assert storage_size(24, 32, bits, SPARSE) == packed.size
        assert packed.n_bytes * 8 == packed.size.total
        assert torch.equal(weight.codes, unpack(packed).codes)

    def test_those_stay_whose_loss_alone_would_be_largest(self):
        """Brute force over the pairs of each block, under a diagonal Gram, with fine codes."""
        values, gram = correlated()
        diagonal = gram.diagonal()
        weight = quantize(values, 8, SPARSE, inputs_gram=torch.diag(diagonal), rounding="gptq")
        energy = (values.double().square() * diagonal).reshape(-1, 4)
        kept = (energy * (weight.codes.reshape(-1, 4) != 0)).sum(dim=1)
        assert torch.allclose(energy.topk(2, dim=1).values.sum(dim=1), kept)

    def test_feedback_makes_up_for_what_is_left_out(self):
        """Correlated inputs: far less output error than without, and estimates in between."""
        values, gram = correlated()
        fed = quantize(values, 4, SPARSE, inputs_gram=gram, rounding="gptq").dequantize()
        plain = quantize(values, 4, SPARSE).dequantize()
        (estimate,) = estimated(values, [(4, SPARSE)], inputs_gram=gram, rounding="gptq")
        first, between, last = (
            float(output_errors(w.double() - values.double(), gram).sum())
            for w in (fed, estimate, plain)
        )
        assert first < 0.7 * last
        assert first <= between < last

    def test_estimates_of_several_candidates_are_those_of_each_alone(self):
        """Dense, sparse and pruned ones of a layer are rounded together."""
        values, gram = correlated()
        blocks = Scheme(granularity=Granularity.GROUP, group_size=8)
        wanted = [(4, SPARSE), (4, Scheme()), (0, Scheme()), (3, SPARSE), (0, blocks), (4, blocks)]
        together = estimated(values, wanted, inputs_gram=gram, rounding="gptq")
        for one, own in zip(together, wanted, strict=True):
            (alone,) = estimated(values, [own], inputs_gram=gram, rounding="gptq")
            assert torch.equal(alone, one)

    def test_what_cannot_be_sparse_is_refused(self):
        """Rows that four does not divide, one bit, grids without a zero."""
        with refused(InvalidInput, columns=30):
            quantize(torch.randn(4, 30), 4, SPARSE)
        with refused(InvalidInput, weight_bits=1):
            storage_size(4, 32, 1, SPARSE)
        with refused(InvalidInput, grid="asymmetric"):
            replace(SPARSE, grid="asymmetric")
        broken = replace(quantize(torch.randn(4, 32), 4, SPARSE), codes=torch.ones(4, 32).int())
        with pytest.raises(InvalidInput, match="two zeros among every four"):
            pack(broken)


class TestCandidates:
    def test_sizes_and_work_count_what_is_left(self):
        """Half the products with 2:4; nothing at all of zeros."""
        layer = Layer(
            name="a", kind=LayerKind.LINEAR, weight_name="a", weight_shape=(8, 16), rows=8,
            columns=16, n_weights=128, n_macs=128, n_inputs=16,
        )  # fmt: skip
        sparse, zeros = Candidate.of(layer, 4, SPARSE), Candidate.of(layer, 0, Scheme(), 8)
        assert (64 * 6, 64 * 4 * 32) == (sparse.size.codes, sparse.bit_ops)
        assert (0, 0, 0) == (zeros.size_bits, zeros.bit_ops, zeros.activation_size_bits)
        assert ("W4:2:4", "W0") == (sparse.label, zeros.label)
        assert (3.0, 0) == (sparse.mean_bits, zeros.mean_bits)
        assert (128, 0) == (sparse.n_weights, zeros.n_weights)
        said = assignment(sparse)
        assert (4, 3.0, "2:4") == (said["weight_bits"], said["mean_bits"], said["sparsity"])
        assert "mean_bits" not in assignment(zeros)

    def test_only_what_is_asked_for_is_on_offer(self, model, samples, made):
        """Without --allow none; with it every layer that can have it, never one that is fixed."""
        plan = made.plans[0]
        labels = {a.layer.name: a.candidate.label for a in plan.assignments}
        assert labels["idle"] == "W0"
        assert labels["second"] == "W4:2:4"
        request = replace(REQUEST, allow=("prune",), fixed={"idle": 8}, budgets=("5 bits",))
        context = Context(device="cpu", ledger=MemoryLedger())
        other = allocate(model, samples, request, context=context).plans[0]
        chosen = {a.layer.name: a.candidate for a in other.assignments}
        assert chosen["idle"].weight_bits == 8
        assert not any(c.sparse for c in chosen.values())


class TestPlans:
    def test_zero_bits_lose_less_than_bit_widths_at_the_same_bytes(self, planned, model, samples):
        """A branch that gives a constant costs nothing, and half of a layer is small."""
        plan, with_weights = planned
        request = replace(REQUEST, allow=(), budgets=(f"{plan.size_bits // 8} B of weights",))
        context = Context(device="cpu", ledger=MemoryLedger())
        result = allocate(model, samples, request, context=context)
        data = samples.subset(96, seed=5)

        def lost(of, weights):
            with torch.no_grad():
                full = model.module(*data.inputs)
                mine = quantized_module(weights, of)(*data.inputs)
            return float((full - mine).square().mean())

        assert lost(plan, with_weights) < 0.5 * lost(result.plans[0], result.with_weights(model))

    def test_the_constant_is_folded_into_the_bias(self, planned, model, samples):
        """The pruned layer has no bias of its own, and gives its mean output on any input."""
        plan, with_weights = planned
        assert Correction.BIAS_CORRECTION in plan.corrections
        module = quantized_module(with_weights, plan)
        assert not module.idle.weight.any()
        mean = module.idle.bias.detach()
        seen = []
        hook = model.module.idle.register_forward_hook(
            lambda *call: seen.append(call[2].mean((0, 2, 3)))
        )
        with torch.no_grad():
            model.module(*samples.inputs)
        hook.remove()
        assert torch.allclose(seen[0], mean, atol=0.1 * float(seen[0].abs().max()))
        assert float(mean.abs().max()) > 0

    def test_a_plan_survives_its_files_and_evaluates(self, planned, model, samples):
        """JSON and quantized weights; the report's baselines are made again from the plan."""
        plan, with_weights = planned
        again = Plan.from_json(plan.to_json())
        assert again == plan
        assert not again.violations(target_by_name("ref-int"))
        found = evaluate_plans(
            with_weights, samples, [again], correction_data=samples, with_baselines=True
        )
        scored = {evaluation.name: evaluation.measured.mean for evaluation in found}
        module = quantized_module(with_weights, again)
        with torch.no_grad():
            kl = divergence(module(*samples.inputs), model.module(*samples.inputs)).mean()
        assert scored["plan"] == pytest.approx(float(kl), rel=1e-4)
        assert scored.keys() >= {baseline.name for baseline in plan.baselines}

    def test_a_baseline_is_made_again_as_it_was(self, planned):
        """Of its bit-widths, with zeros and two of four where it had them."""
        plan, _ = planned
        names = [a.layer.name for a in plan.assignments]
        own = {a.layer.name: a.candidate for a in plan.assignments}
        baseline = replace(
            plan.baselines[0],
            weight_bits=plan.weight_bits,
            sparse=tuple(n for n in names if own[n].sparse),
        )
        assert plan.candidates_of(baseline) == plan.candidates


class TestExports:
    def test_ref_int_stores_what_was_planned(self, planned, samples, tmp_path):
        """Nothing of zeros, two codes with their places of four; the file runs as planned."""
        plan, with_weights = planned
        report = export_plan(
            with_weights, plan, tmp_path / "out", target="ref-int", samples=samples
        )
        sizes = {t.layer: t.actual_bits for t in report.tensors}
        assert {a.layer.name: a.candidate.size_bits for a in plan.assignments} == sizes
        assert sizes["idle"] == 0
        module, _, _ = open_export(with_weights, tmp_path / "out")
        with torch.no_grad():
            mine = quantized_module(with_weights, plan)(*samples.inputs)
            assert torch.allclose(mine, module(*samples.inputs), atol=1e-5)

    def test_onnx_holds_no_tensor_of_a_layer_of_zeros(self, model, samples, tmp_path):
        """The graph makes zeros of a shape; ONNX Runtime gives what was planned."""
        request = replace(REQUEST, target="ort-cpu", allow=("prune",))
        context = Context(device="cpu", ledger=MemoryLedger())
        result = allocate(model, samples, request, context=context)
        plan, with_weights = result.plans[0], result.with_weights(model)
        assert {a.layer.name for a in plan.assignments if a.candidate.pruned} == {"idle"}
        report = export_plan(
            with_weights, plan, tmp_path / "out", target="ort-cpu", samples=samples
        )
        assert report.difference.relative < 1e-5
        assert sum(t.actual_bits for t in report.tensors) == plan.size_bits
        assert 0 in {t.actual_bits for t in report.tensors}

    def test_formats_and_targets_that_gain_nothing_are_refused(self, planned, samples, tmp_path):
        """Before anything is measured, and for a plan at export."""
        plan, with_weights = planned
        for target, what in (("ort-cpu", "2:4"), ("mcu", "2:4"), ("gguf-k", "prune")):
            with refused(InvalidInput, target=target, allow=what):
                target_by_name(target).require_zero_bits((what,))
        with refused(InvalidPlan, format="onnx-qdq"):
            export_plan(with_weights, plan, tmp_path / "x", samples=samples, format_name="onnx-qdq")


class Channels(nn.Module):
    """Some channels of a layer give almost nothing but a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.head = nn.Linear(16, 6)
        self.first.weight.data *= torch.where(torch.arange(16) % 2 > 0, 2.0, 0.02)[
            :, None, None, None
        ]
        self.first.weight.data[0] += 0.01

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 4 * self.head(torch.relu(self.first(1 + x)).mean((2, 3)))


@pytest.fixture(scope="module")
def channels():
    torch.manual_seed(0)
    return finish(Channels().eval(), source="channels", architecture="Channels")


@pytest.fixture(scope="module")
def rows(channels, samples):
    """Return the plan, and the model with its weights."""
    asked = replace(
        REQUEST, target="ort-cpu", allow=("prune",), row_widths=3, budgets=("2.6 bits",)
    )
    context = Context(device="cpu", ledger=MemoryLedger())
    made = allocate(channels, samples, asked, context=context)
    return made.plans[0], made.with_weights(channels)


class TestRowsOfZeros:
    def test_idle_channels_become_zeros_and_a_constant(self, rows, channels, samples):
        """Only they; they cost nothing but their place, and their mean goes into the bias."""
        plan, with_weights = rows
        candidate = next(a.candidate for a in plan.assignments if a.layer.name == "first")
        zeros = [r for r, bits in enumerate(candidate.row_bits) if bits == 0]
        assert len(zeros) >= 3
        assert all(r % 2 == 0 for r in zeros)
        assert candidate.size.codes == 36 * sum(candidate.row_bits)
        assert candidate.size.scales == 32 * (16 - len(zeros))
        module = quantized_module(with_weights, plan)
        assert not module.first.weight[zeros].any()
        with torch.no_grad():
            mean = channels.module.first(1 + samples.inputs[0]).mean((0, 2, 3))
        assert torch.allclose(module.first.bias[zeros], mean[zeros], atol=0.01)

    def test_they_lose_less_than_bit_widths_at_the_same_bytes(self, rows, channels, samples):
        """Half of the channels need no bits, which the others then have."""
        plan, with_weights = rows
        size = f"{plan.size_bits // 8} B of weights"
        asked = replace(REQUEST, target="ort-cpu", allow=(), row_widths=3, budgets=(size,))
        context = Context(device="cpu", ledger=MemoryLedger())
        made = allocate(channels, samples, asked, context=context)

        def lost(model, of):
            with torch.no_grad():
                got = quantized_module(model, of)(*samples.inputs)
                return float((got - channels.module(*samples.inputs)).square().mean())

        assert lost(with_weights, plan) < 0.8 * lost(made.with_weights(channels), made.plans[0])

    @pytest.mark.parametrize("form", ["onnx-qdq", "ref-int"])
    def test_files_hold_the_plan(self, rows, samples, tmp_path, form):
        """Nothing is stored of zeros; JSON and file give the same plan and outputs."""
        plan, with_weights = rows
        assert Plan.from_json(plan.to_json()) == plan
        assert not plan.violations(target_by_name("ort-cpu"))
        report = export_plan(with_weights, plan, tmp_path / "o", format_name=form, samples=samples)
        assert report.difference.relative < 1e-5
        assert sum(t.actual_bits for t in report.tensors) == plan.size_bits

    def test_formats_without_zeros_refuse_them(self, rows, samples, tmp_path):
        """A target that holds neither, and training, which knows layers of one bit-width."""
        plan, with_weights = rows
        with refused(InvalidPlan, format="openvino"):
            export_plan(with_weights, plan, tmp_path / "x", samples=samples, format_name="openvino")


class Deep(nn.Module):
    """A residual branch of two layers that gives next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 1)
        self.outer = nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(8, 6)
        self.outer.weight.data *= 0.02

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return 4 * self.head((x + self.outer(torch.relu(self.inner(x)))).mean((2, 3)))


class TestIdleLayers:
    def test_what_feeds_only_zeros_becomes_zeros_and_its_bits_go_elsewhere(self, samples):
        """The branch vanishes as a whole, whichever of its layers is zeros, at no loss."""
        torch.manual_seed(0)
        model = finish(Deep().eval(), source="deep", architecture="Deep")
        asked = replace(REQUEST, allow=("prune",), budgets=("3.2 bits",))
        setup = build_setup(model, samples, asked)
        runner = measuring_runner(setup)
        matrix = measure_leading(setup, runner)[0]
        problem = build_problem(matrix, setup.budgets(asked.budgets[0]))
        rows = [row.label for row in setup.table.rows[: setup.table.offsets[1]]]
        zeros, two, four = (rows.index(label) for label in ("W0", "W2", "W4"))
        for given in ((two, four, zeros, two), (two, zeros, four, two)):
            assert problem.is_feasible(given)
            found = without_idle_layers(setup, runner, matrix, problem, given)
            assert (zeros, zeros) == found[1:3]
            assert found[0] > two
            assert problem.is_feasible(found)
            losses = measure_choices(runner, setup.table, setup.loss, [given, found]).mean(axis=1)
            assert losses[1] < losses[0]
        full = (two, four, four, two)
        assert full == without_idle_layers(setup, runner, matrix, problem, full)


class Expert(nn.Module):
    """Three linear layers, as experts of Mixtral have them."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(12, 24, bias=False)
        self.w3 = nn.Linear(12, 24, bias=False)
        self.w2 = nn.Linear(24, 12, bias=False)
        self.w2.weight.data *= size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """Two of four experts for each token; two experts give little.

    Args:
        dense: Run every expert on every token, which a graph without branches can do.
    """

    def __init__(self, *, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.router = nn.Linear(12, 4)
        self.experts = nn.ModuleList(Expert(size) for size in (4.0, 0.05, 4.0, 0.05))
        self.head = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, 12)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        out = tokens
        for e, expert in enumerate(self.experts):
            share = (weights * (chosen == e)).sum(dim=1, keepdim=True)
            if self.dense:
                out = out + share * expert(tokens)
            elif len(of := (chosen == e).any(dim=1).nonzero()[:, 0]):
                out = out.index_add(0, of, share[of] * expert(tokens[of]))
        return 3 * self.head(out).reshape(len(x), -1, 6).mean(dim=1)


class TestExperts:
    @pytest.mark.parametrize(
        ("dense", "ties"), [(False, ()), (True, (("w1", "w2", "w3"),))], ids=["routed", "tied"]
    )
    def test_an_expert_vanishes_as_a_whole(self, dense, ties, tmp_path):
        """All three layers, tied or not; less loss than bit-widths at more bytes; the file runs."""
        torch.manual_seed(1)
        tokens = CalibrationSet(inputs=(torch.randn(192, 5, 12),))
        torch.manual_seed(0)
        module = Mixture(dense=dense).eval()
        model = finish(module, source="mixture", architecture="Mixture")
        asked = replace(
            REQUEST,
            target="ort-cpu" if dense else "ref-int",
            allow=("prune",),
            ties=ties,
            budgets=("2.2 bits",),
            rounding="qep",
        )

        def made(request):
            context = Context(device="cpu", ledger=MemoryLedger())
            return allocate(model, tokens, request, context=context)

        def lost(found):
            with torch.no_grad():
                got = quantized_module(found.with_weights(model), found.plans[0])(*tokens.inputs)
                return float((got - module(*tokens.inputs)).square().mean())

        found, other = made(asked), made(replace(asked, allow=()))
        plan = found.plans[0]
        pruned = {a.layer.name for a in plan.assignments if a.candidate.pruned}
        assert {f"experts.{e}.{w}" for e in (1, 3) for w in ("w1", "w2", "w3")} == pruned
        assert lost(found) < 0.5 * lost(other)
        assert plan.size_bits < other.plans[0].size_bits
        with_weights = found.with_weights(model)
        report = export_plan(
            with_weights, plan, tmp_path / "out", target=asked.target, samples=tokens
        )
        assert report.difference.relative < 1e-5
        assert sum(t.actual_bits for t in report.tensors) == plan.size_bits


class TestRequests:
    def test_the_request_checks_what_is_allowed(self):
        """Names, company, and that nobody names sparse layers himself."""
        with refused(InvalidInput, allow="heads"):
            PlanRequest(allow=("heads",))
        with refused(InvalidInput, sparsity="2:4"):
            PlanRequest(scheme=SPARSE)
        with refused(InvalidInput, allow=["2:4"]):
            PlanRequest(allow=("2:4",), rounding="learned")
        statistics = (Correction.BATCH_NORM_STATISTICS,)
        assert PlanRequest(allow=("prune",), corrections=statistics).corrections == statistics
        assert PlanRequest(allow=("2:4",)).corrections == ()
        assert "allow" not in PlanRequest().to_json()
