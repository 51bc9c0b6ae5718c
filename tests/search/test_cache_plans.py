"""Plans whose budget holds the KV cache too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitquota.candidates.storage import Granularity, ScaleFormat, Scheme
from bitquota.ci.diff import diff_plans
from bitquota.context import Context
from bitquota.errors import InvalidBudget, InvalidInput, InvalidPlan
from bitquota.evaluate.scoring import score_plans
from bitquota.exports.export import export_plan
from bitquota.exports.kv_cache import OPTIONS_FILE
from bitquota.measurement_setup import build_setup
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model, load_within
from bitquota.plan import Plan
from bitquota.quantizers.quantized_model import QuantizedModel, named
from bitquota.quantizers.quantized_weights import QuantizedWeights
from bitquota.report.charts import frontier_of, matrix_json, plan_json
from bitquota.report.text import render_markdown
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.search.compare import compare
from bitquota.sensitivity.metrics.gram_weighted import GramWeightedError
from bitquota.sensitivity.runners.eager import EagerRunner
from bitquota.solver.files import read_problem
from format_networks import write_llama
from transformer_families import write_family

BUDGET = "24 kB"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(write_family("llama", tmp_path_factory.mktemp("llama"))))


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(2)
    return CalibrationSet(inputs=(torch.randint(3, 96, (24, 12), generator=generator),))


def request(**changed) -> PlanRequest:
    """Return a request in which weights have three widths and caches too."""
    given = {
        "budgets": (BUDGET,),
        "weight_bits": (2, 4, 8),
        "scheme": Scheme(
            granularity=Granularity.GROUP, group_size=16, scale_format=ScaleFormat.FP16
        ),
        "kv_bits": (2, 4, 16),
        "context": 64,
        "samples": 12,
        "holdout_samples": 12,
        "effort": "quick",
        "rounding": "nearest",
    }
    return PlanRequest(**(given | changed))


@pytest.fixture(scope="module")
def setup(model, samples):
    return build_setup(model, samples, request())


@pytest.fixture(scope="module")
def found(model, samples):
    return allocate(model, samples, request())


@pytest.fixture(scope="module")
def plan(found) -> Plan:
    return found.plans[0]


class TestSetup:
    def test_groups_follow_those_of_layers(self, setup):
        table = setup.table
        caches = [c.name for c in setup.inventory.caches]
        assert caches == list(table.groups[-4:])
        assert caches[:2] == [
            "model.layers.0.self_attn.k_cache",
            "model.layers.0.self_attn.v_cache",
        ]
        # 64 tokens of 2 heads of 8 numbers: at 4 bits with two fp16 numbers for each head.
        costs = {
            (row.group, row.label): cost
            for row, cost in zip(table.rows, table.costs("cache_bits"), strict=True)
        }
        assert costs[caches[0], "KV4"] == 64 * 2 * (8 * 4 + 2 * 16)
        assert costs[caches[0], "KV16"] == 64 * 2 * 8 * 16
        assert costs[table.groups[0], "W4"] == 0
        parts = table.costs("weight_size_bits") + table.costs("cache_bits")
        assert np.array_equal(table.costs("size_bits"), parts)
        assert not table.costs("code_bits")[-12:].any()

    @pytest.mark.parametrize(
        ("text", "resource", "limit"),
        [
            ("1 MB", "size_bits", 8_000_000),
            ("1 MB of model", "weight_size_bits", 8_000_000),
            ("1 kB of cache", "cache_bits", 8_000),
            ("0.5x of cache", "cache_bits", 4 * 64 * 16 * 16 // 2),
            ("4 bits", "code_bits", 4 * 18432),
            ("4 bpw", "weight_size_bits", 4 * 18432),
        ],
    )
    def test_budgets(self, setup, text, resource, limit):
        from bitquota.candidates.budget import Budget

        found = Budget.parse(text, setup.inventory)
        assert (found.resource, found.limit) == (resource, limit)

    def test_budget_of_a_cache_that_is_not_planned(self, setup):
        from bitquota.candidates.budget import Budget

        with pytest.raises(InvalidBudget):
            Budget.parse("1 kB of cache", replace(setup.inventory, caches=()))
        with pytest.raises(InvalidBudget):
            Budget.parse("3 bits of cache", setup.inventory)

    def test_part_by_part_as_the_whole_model(self, setup):
        """The same outputs, caches and weights quantized together or each alone."""
        walked = setup.runner()
        whole = EagerRunner(setup.module, setup.inventory, setup.fit, chunk_size=len(setup.fit))
        whole.weights = setup.fitted.weights
        n = len(setup.table.groups)
        for choice in ((0,) * n, (*(2,) * (n - 4), 0, 1, 2, 0), (*(1,) * (n - 4), 2, 2, 2, 1)):
            change = {c.layer: c for c in setup.table.decode(choice)}
            states = [walked.start(c, change) for c in range(len(walked.chunks))]
            assert torch.equal(
                torch.cat([state.output for state in states]), whole.start(0, change).output
            )

    def test_scores_are_of_the_size_of_losses(self, setup):
        """What the walk backwards predicts of each candidate of a cache, against its loss."""
        runner = setup.runner(setup.fit)
        matrix = GramWeightedError().measure(setup.runner(), setup.table, setup.loss)
        rows = [r for r, row in enumerate(setup.table.rows) if row.cached and row.label != "KV16"]
        changes = [{c.layer: c for c in setup.table.rows[r].candidates} for r in rows]
        full, *losses = runner.losses(0, [None, *changes], setup.loss)
        measured = np.array([float((loss - full).mean()) for loss in losses])
        ratio = matrix.diagonal[rows] / measured
        assert bool(((ratio > 0.5) & (ratio < 2)).all()), ratio
        kept = [r for r, row in enumerate(setup.table.rows) if row.label == "KV16"]
        assert not matrix.diagonal[kept].any()


class TestRequest:
    @pytest.mark.parametrize(
        "changed",
        [
            {"context": 0},
            {"kv_bits": ()},
            {"kv_bits": (7,)},
            {"kv_bits": (4, 4)},
            {"kv_scales": "row"},
            {"sequences": 0},
            {"activation_bits": 8},
            {"measure": "hessian_trace"},
        ],
    )
    def test_refused(self, changed):
        with pytest.raises(InvalidInput):
            request(**changed)

    def test_targets(self, model, samples, tmp_path):
        """Runtimes decide which formats, for which heads, and what shares one."""
        with pytest.raises(InvalidInput) as caught:
            build_setup(model, samples, request(target="ct-vllm-marlin", scheme=Scheme()))
        assert caught.value.details["target"] == "ct-vllm-marlin"
        offered = {"weight_bits": (4, 8), "scheme": Scheme(), "kv_bits": (4, 8, 16)}
        with pytest.raises(InvalidInput) as caught:
            build_setup(model, samples, request(target="gguf-py", **offered))
        assert caught.value.details["head_size"] == 8
        wide = load_model(str(write_llama(tmp_path, width=128)))
        ids = CalibrationSet(inputs=(samples.inputs[0] % 64,))
        table = build_setup(wide, ids, request(target="gguf-py", **offered)).table
        assert table.groups[-2:] == ("k_caches", "v_caches")
        assert [row.label for row in table.rows[-3:]] == ["KV4", "KV8", "KV16"]
        # Q8_0: 34 bytes for 32 numbers.
        assert table.costs("cache_bits")[-2] == 2 * 64 * 64 // 32 * 34 * 8


class TestPlan:
    def test_the_budget_holds_both(self, plan):
        assert len(plan.caches) == 4
        (budget,) = plan.budgets
        assert plan.spent(budget) == plan.model_bits + plan.cache_size_bits <= budget.limit
        assert Plan.from_json(plan.to_json()) == plan
        assert plan.totals["cache_bits"] == plan.cache_size_bits
        assert plan.measured.mean == pytest.approx(plan.predicted, rel=1)
        worse = plan.to_json()
        worse["caches"][0]["candidate"]["size"]["codes"] += 8
        worse["caches"][0]["candidate"]["size"]["total"] += 8
        del worse["digest"]
        with pytest.raises(InvalidPlan):
            Plan.from_json(worse)

    def test_evaluated_as_measured(self, model, samples, plan):
        """Another run of the plan on the same samples, by its file alone, measures the same."""
        holdout = samples.take(plan.provenance["holdout"]["indices"])
        scores = {
            score.name: score
            for score in score_plans(model, holdout, plans={"plan": plan}, with_baselines=True)
        }
        assert scores["plan"].metrics["kl"].mean == pytest.approx(plan.measured.mean, rel=1e-3)
        assert scores["plan"].size_bits == plan.size_bits
        # What is uniform beside it has the same cache.
        (uniform,) = [s for s in scores.values() if s.kind == "uniform"]
        without = replace(plan, caches=(), budgets=())
        plain = score_plans(model, holdout, plans={"plan": without})
        alone = next(s for s in plain if s.kind == "uniform")
        assert uniform.size_bits == alone.size_bits
        assert uniform.metrics["kl"].mean != alone.metrics["kl"].mean
        (baseline,) = plan.baselines
        found = scores[f"{baseline.name} of plan"].metrics["kl"].mean
        assert found == pytest.approx(baseline.measured.mean, rel=1e-3)
        assert "KV" in baseline.name

    def test_evaluated_block_by_block(self, model, plan, tmp_path):
        """With weights in files, and those of the plan beside it, as from memory."""
        stored = QuantizedWeights(model.module, plan.inventory).stored
        own = (a.candidate for a in plan.assignments if a.candidate.weight_bits < 16)
        content = QuantizedModel(
            model_digest=model.digest, rounding="qep", weights={c.layer: stored(c) for c in own}
        ).to_bytes()
        path = tmp_path / "plan.weights.safetensors"
        path.write_bytes(content)
        shipped = replace(plan, weights=named(content, "qep"))
        tokens = torch.randint(3, 96, (70, 12), generator=torch.Generator().manual_seed(5))
        found, told = [], []
        for loaded in (model, load_within(model.source, 1)):
            told.clear()
            scores = score_plans(
                replace(loaded, weights=(path,)),
                CalibrationSet(inputs=(tokens,)),
                plans={"plan": shipped, "weights alone": replace(shipped, caches=(), budgets=())},
                context=Context(device="cpu", on_progress=told.append),
            )
            found.append({score.name: score for score in scores})
        assert found[0] == found[1]
        assert len(told) == 3 + 2  # parts and batches
        kl = [found[1][name].metrics["kl"].mean for name in ("plan", "weights alone")]
        assert kl[0] != kl[1]

    def test_report(self, plan):
        text = render_markdown([plan])
        assert "KV cache for 64 tokens" in text
        assert "model.layers.1.self_attn.v_cache | values | 64×16" in text

    def test_charts(self, found, plan):
        """Points of the frontier and the plan are sizes of the same things."""
        drawn = plan_json(plan)
        assert drawn["size_bits"] == plan.size_bits + plan.cache_size_bits
        assert "KV cache for 64 tokens" in drawn["verdict"]
        points = frontier_of(found.matrix, points=3)
        assert len(points[0]["bits"]) == len(plan.assignments)
        assert points[-1]["size_bits"] > drawn["size_bits"]
        assert matrix_json(found.matrix)["columns"][-1] == "KV16"

    def test_matrix_solved_alone(self, found, plan, tmp_path):
        """Averages of a matrix file count its weights, not its caches."""
        found.matrix.save(tmp_path / "m.npz")
        problem = read_problem(tmp_path / "m.npz", budget="4 bpw")
        assert problem.limits.tolist() == [4 * plan.n_weights]
        assert not problem.costs[0, -3:].any()

    def test_compare(self, model, samples):
        with pytest.raises(InvalidInput) as caught:
            compare(model, samples, request())
        assert caught.value.details["kv_bits"] == [2, 4, 16]

    def test_difference(self, plan):
        """A diff names the caches that changed."""
        first = plan.caches[0]
        other = plan.caches_at([32 for _ in plan.caches])
        changed = replace(
            plan,
            budgets=(),
            caches=tuple(replace(a, candidate=c) for a, c in zip(plan.caches, other, strict=True)),
        )
        names = {change.layer for change in diff_plans(plan, changed).changes}
        assert (first.cache.name in names) == (first.candidate.weight_bits != 32)
        assert (
            names == {a.cache.name for a in plan.caches if a.candidate.weight_bits != 32} != set()
        )

    def test_exports_without_a_place_for_it(self, model, plan, tmp_path):
        with pytest.raises(InvalidPlan) as caught:
            export_plan(model, plan, tmp_path / "o", format_name="ref-int")
        assert caught.value.details["format"] == "ref-int"
        with pytest.raises(InvalidPlan) as caught:
            export_plan(model, plan, tmp_path / "o", format_name="gguf")
        assert not (tmp_path / "o").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("target", "bits", "options"),
        [
            (
                "gguf-py",
                (8, 16),
                "--flash-attn on --cache-type-k q8_0 --cache-type-v q8_0",
            ),
            ("mlx", (4,), "--kv-bits 4 --kv-group-size 64 --quantized-kv-start 0"),
        ],
    )
    def test_options_of_runtimes(self, target, bits, options, samples, tmp_path):
        """They stand beside the export, whose report names their file."""
        wide = load_model(str(write_llama(tmp_path / "model", width=256)))
        ids = CalibrationSet(inputs=(samples.inputs[0] % 64,))
        asked = request(
            target=target,
            scheme=Scheme(),
            weight_bits=(4, 8),
            kv_bits=bits,
            budgets=("5 bpw of weights + 40 kB of cache",),
        )
        made = allocate(wide, ids, asked).plans[0]
        report = export_plan(wide, made, tmp_path / "o", target=target, samples=ids)
        assert (tmp_path / "o" / OPTIONS_FILE).read_text() == options + "\n"
        assert OPTIONS_FILE in {file.name for file in report.files}
