"""Deployment targets: candidates, ties, and what they refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from bitquota.candidates.layers import Inventory, Layer, LayerKind, UnquantizedTensor
from bitquota.candidates.targets import TARGETS, target_by_name
from bitquota.ci.diff import diff_plans
from bitquota.ci.lock import make_lock
from bitquota.errors import InvalidInput, InvalidPlan
from bitquota.exports.export import EXPORTERS
from bitquota.plan import Assignment, Plan, PlanTarget
from refusals import refused


def layer(name: str, kind: LayerKind, *shape: int) -> Layer:
    """A layer of one of the kinds of a small model."""
    columns_first = kind is LayerKind.LINEAR_TRANSPOSED
    rows = shape[1] if columns_first else shape[0]
    n = math.prod(shape)
    return Layer(
        name=name,
        kind=kind,
        weight_name=f"{name}.weight",
        weight_shape=shape,
        rows=rows,
        columns=n // rows,
        n_weights=n,
        n_macs=n,
        n_inputs=n // rows,
    )


@pytest.fixture
def inventory() -> Inventory:
    """Convolutions, a Llama block with odd sizes, an embedding and a head."""
    block = "model.layers.0"
    return Inventory(
        model_digest="sha256:0",
        layers=(
            layer("conv", LayerKind.CONV2D, 16, 3, 3, 3),
            layer("model.embed_tokens", LayerKind.EMBEDDING, 256, 128),
            layer(f"{block}.self_attn.q_proj", LayerKind.LINEAR, 128, 128),
            layer(f"{block}.self_attn.k_proj", LayerKind.LINEAR, 64, 128),
            layer(f"{block}.self_attn.v_proj", LayerKind.LINEAR, 64, 128),
            layer(f"{block}.self_attn.o_proj", LayerKind.LINEAR, 128, 128),
            layer(f"{block}.mlp.gate_proj", LayerKind.LINEAR, 192, 128),
            layer(f"{block}.mlp.up_proj", LayerKind.LINEAR, 192, 128),
            layer(f"{block}.mlp.down_proj", LayerKind.LINEAR, 128, 192),
            layer("odd", LayerKind.LINEAR, 10, 50),
            layer("mix", LayerKind.LINEAR_TRANSPOSED, 64, 32),
            layer("wide", LayerKind.LINEAR, 128, 512),
            layer("lm_head", LayerKind.LINEAR, 256, 128),
        ),
        unquantized=(
            UnquantizedTensor(
                name="model.norm.weight", shape=(128,), format="fp32", size_bits=4096
            ),
        ),
    )


def plan_of(inventory: Inventory, rows) -> Plan:
    """The plan that takes one row of each group."""
    chosen = {c.layer: c for row in rows for c in row.candidates}
    return Plan(
        model_digest=inventory.model_digest,
        assignments=tuple(
            Assignment(layer=la, candidate=chosen[la.name]) for la in inventory.layers
        ),
        unquantized=inventory.unquantized,
    )


def pick(table, prefer) -> list:
    """One row per group: what ``prefer`` ranks first."""
    groups: dict[str, list] = {}
    for row in table.rows:
        groups.setdefault(row.group, []).append(row)
    return [min(rows, key=prefer) for rows in groups.values()]


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
class TestEveryTarget:
    def test_candidates_keep_its_own_rules(self, target, inventory):
        """Whatever the solver picks, the target accepts."""
        prepared = target.prepare(inventory)
        table = target.candidates(prepared)
        for prefer in (
            lambda row: row.candidates[0].size_bits,
            lambda row: -row.candidates[0].size_bits,
        ):
            assert plan_of(prepared, pick(table, prefer)).violations(target) == ()

    def test_nothing_is_lost(self, target, inventory):
        """Every layer is either in the table or counted as it ships."""
        prepared = target.prepare(inventory)
        names = {la.name for la in prepared.layers}
        shipped = {t.name.removesuffix(".weight") for t in prepared.unquantized}
        assert {la.name for la in inventory.layers} <= names | shipped
        assert inventory.full_precision_bits == prepared.full_precision_bits

    def test_fused_siblings_decide_together(self, target, inventory):
        """Where the runtime fuses projections, they are one group."""
        prepared = target.prepare(inventory)
        groups = {la.name.rpartition(".")[2]: la.group for la in prepared.layers}
        if target.ties and "q_proj" in groups:
            assert groups["q_proj"] == groups["k_proj"] == groups["v_proj"]
            assert groups["gate_proj"] == groups["up_proj"]
            assert groups["q_proj"] != groups["gate_proj"]

    def test_foreign_width_is_refused_with_the_layer_named(self, target, inventory):
        """A plan of one bit fits no target."""
        from bitquota.candidates.table import enumerate_candidates

        prepared = target.prepare(inventory)
        table = enumerate_candidates(prepared, (1,))
        with pytest.raises(InvalidPlan, match=r"1 bits is not one of its widths") as caught:
            plan_of(prepared, table.rows).require(target)
        named = {n for v in caught.value.details["violations"] for n in v["layers"]}
        assert {la.name for la in prepared.layers} == named

    def test_describes_itself(self, target):
        """Its description is JSON and names an exporter that exists."""
        described = json.loads(json.dumps(target.to_json()))
        assert described["exporter"] in EXPORTERS
        assert described["verified"] in ("run", "read", "documented")
        assert (described["verified"] == "run") == ("not_run" not in described)
        assert all(f["bits_per_weight"] >= f["weight_bits"] for f in described["formats"])

    def test_narrower_offer(self, target, inventory):
        """Only what is asked for is offered; nothing legal is an error that names widths."""
        prepared = target.prepare(inventory)
        widths = {f.weight_bits for f in target.formats} - {32}
        table = target.candidates(prepared, weight_bits=sorted(widths))
        offered = {c.weight_bits for row in table.rows for c in row.candidates}
        assert offered == widths
        with pytest.raises(InvalidInput, match=f"target '{target.name}' stores"):
            target.candidates(prepared, weight_bits=[1])


class TestSizes:
    @pytest.mark.parametrize(
        ("target", "name", "bits_per_weight"),
        [
            ("gguf-py", "Q4_0", 4.5),
            ("gguf-py", "Q5_0", 5.5),
            ("gguf-py", "Q8_0", 8.5),
            ("gguf-k", "Q2_K", 2.625),
            ("gguf-k", "Q3_K", 3.4375),
            ("gguf-k", "Q4_K", 4.5),
            ("gguf-k", "Q5_K", 5.5),
            ("gguf-k", "Q6_K", 6.5625),
            ("ct-vllm-marlin", "W4A16-g128", 4.125),
            ("ct-vllm-humming", "W3A16-g32", 3.5),
            ("ort-cpu", "int4-b32", 5.0),
        ],
    )
    def test_real_bits_per_weight(self, target, name, bits_per_weight):
        """The published bits per weight of well-known formats come out."""
        formats = {f.name: f for f in TARGETS[target].formats}
        assert bits_per_weight == formats[name].bits_per_weight

    def test_group_that_does_not_divide_falls_back(self, inventory):
        """A row of 192 takes groups of 32 where 128 do not divide it."""
        target = TARGETS["ct-vllm-marlin"]
        down = inventory.layer("model.layers.0.mlp.down_proj")
        assert [f.name for f in target.formats_for(down)] == [
            "W4A16-g32", "W8A16-g32", "bf16",
        ]  # fmt: skip


class TestRequire:
    def test_broken_tie_names_the_layers(self, inventory):
        """Q at another width than k and v is refused with all three named."""
        target = TARGETS["ct-vllm-humming"]
        prepared = target.prepare(inventory)
        plan = plan_of(
            prepared, pick(target.candidates(prepared), lambda r: r.candidates[0].size_bits)
        )
        formats = {f.weight_bits: f for f in target.formats_for(plan.assignments[0].layer)}
        first = plan.assignments[0]
        assert first.layer.name.endswith("q_proj")
        other = target._candidate(first.layer, formats[8])
        broken = replace(plan, assignments=(replace(first, candidate=other), *plan.assignments[1:]))
        with pytest.raises(InvalidPlan, match=r"q_proj=W8, .*k_proj=W2, .*v_proj=W2"):
            broken.require(target)

    def test_one_sibling_left_out(self, inventory):
        """A fused sibling in full precision beside quantized ones is refused."""
        target = TARGETS["ct-vllm-humming"]
        prepared = target.prepare(inventory).exclude(["v_proj"])
        table = target.candidates(prepared, weight_bits=[4])
        with pytest.raises(InvalidPlan, match=r"v_proj in full precision"):
            plan_of(prepared, table.rows).require(target)
        with pytest.raises(InvalidInput, match=r"fuses .*q_proj.*; .*v_proj is excluded"):
            target.prepare(inventory.exclude(["v_proj"]))

    def test_other_scales_are_refused(self, inventory):
        """The same bits with fp32 scales are another file."""
        from bitquota.candidates.table import enumerate_candidates

        target = TARGETS["gguf-py"]
        prepared = target.prepare(inventory)
        table = enumerate_candidates(prepared, (4,))
        with pytest.raises(InvalidPlan, match="fp32 scales, where it stores symmetric per group"):
            plan_of(prepared, table.rows).require(target)

    def test_scale_rule_does_not_matter(self, inventory):
        """How scales were fitted leaves no trace in a file."""
        target = TARGETS["ref-int"]
        prepared = target.prepare(inventory)
        from bitquota.candidates.storage import ScaleFormat, ScaleRule, Scheme
        from bitquota.candidates.table import enumerate_candidates

        scheme = Scheme(scale_rule=ScaleRule.ABSMAX, scale_format=ScaleFormat.FP16)
        plan_of(prepared, enumerate_candidates(prepared, (3,), scheme=scheme).rows).require(target)


def test_what_inputs_and_files_can_be_is_said_in_words():
    """Bits of inputs, ranges of each token, and what is not offered unless asked for."""
    said = {name: (t.inputs, t.on_request) for name, t in TARGETS.items()}
    assert ("8 bits (4, 6, 16 on request)", ("--row-widths", "--allow prune")) == said[
        "ort-cpu-integer"
    ]
    assert ("8 bits (FP8) per token", ()) == said["ct-vllm-fp8"]
    assert ("8 bits per token", ()) == said["ct-vllm-int8"]
    everything = ("--row-widths", "--allow prune", "--allow 2:4")
    assert ("as they are", everything) == said["ref-int"]


class TestTargetByName:
    def test_unknown(self):
        """The message lists what there is."""
        with pytest.raises(InvalidInput, match="ort-cpu"):
            target_by_name("gameboy")


class TestFixed:
    def test_pinned_group(self, inventory):
        """Fixing one of a tied group fixes all of it."""
        target = TARGETS["gguf-py"]
        prepared = target.prepare(inventory)
        table = target.candidates(prepared, fixed={"k_proj": 8})
        rows = [row for row in table.rows if "q_proj" in row.group]
        assert [[c.weight_bits for c in row.candidates] for row in rows] == [[8, 8, 8]]

    def test_impossible(self, inventory):
        """A width the target has not, named with its layers."""
        target = TARGETS["gguf-py"]
        prepared = target.prepare(inventory)
        with refused(InvalidInput, target="gguf-py", layers=["model.layers.0.self_attn.o_proj"]):
            target.candidates(prepared, fixed={"o_proj": 3})


class TestVersion:
    def test_changes_with_the_rules(self):
        """The digest in a plan names the rules that it was made under, not their description."""
        target = TARGETS["ort-cpu"]
        assert target.version == replace(target, summary="other words").version
        assert target.version != replace(target, formats=target.formats[1:]).version
        assert len({t.version for t in TARGETS.values()}) == len(TARGETS)
        assert PlanTarget.of(target).to_json() == {
            "name": "ort-cpu", "version": target.version, "packages": dict(target.versions),
        }  # fmt: skip


class TestRecordedTarget:
    def test_lock_and_diff_know_it(self, inventory):
        """A lock takes the plan's own target; a diff names targets and their rules."""
        target = TARGETS["ort-cpu"]
        prepared = target.prepare(inventory)
        rows = pick(target.candidates(prepared), lambda r: r.candidates[0].size_bits)
        plan = plan_of(prepared, rows)
        made = replace(plan, target=PlanTarget.of(target))
        assert made == Plan.from_json(made.to_json())
        assert "target" not in plan.to_json()
        assert "ort-cpu" == make_lock(made).target
        assert make_lock(plan).target is None
        (fact,) = diff_plans(plan, made).facts
        assert ("target", "none") == (fact.name, fact.old)
        assert fact.new.startswith("ort-cpu, rules ")


class TestCandidatesAt:
    def test_layers_that_ship_as_they_are(self, inventory):
        """At other widths a layer gets the target's own scheme, also from full precision."""
        target = TARGETS["ort-cpu"]
        prepared = target.prepare(inventory)
        table = target.candidates(prepared)
        plan = plan_of(prepared, pick(table, lambda r: -r.candidates[0].weight_bits))
        assert {32} == set(plan.weight_bits)
        widths = [4] * len(plan.assignments)
        found = replace(plan, target=PlanTarget.of(target))
        at_four = {c.layer: c for row in table.rows for c in row.candidates if c.weight_bits == 4}
        assert [at_four[la.name] for la in prepared.layers] == list(found.candidates_at(widths))

    def test_impossible_width(self, inventory):
        """The layer and the width are named."""
        target = TARGETS["ort-cpu"]
        prepared = target.prepare(inventory)
        rows = pick(target.candidates(prepared), lambda r: r.candidates[0].weight_bits)
        planned = replace(plan_of(prepared, rows), target=PlanTarget.of(target))
        with refused(InvalidPlan, layer="conv", weight_bits=3):
            planned.candidates_at([3] * len(prepared.layers))
        with pytest.raises(InvalidPlan, match="one bit-width must be given"):
            planned.candidates_at([4])
