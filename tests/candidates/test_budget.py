"""What users write becomes one integer, and never more than they wrote."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquota.candidates.budget import Budget, Scope, check_budgets
from bitquota.candidates.layers import Inventory, Layer, LayerKind, UnquantizedTensor
from bitquota.candidates.table import enumerate_candidates
from bitquota.canonical import canonical_json
from bitquota.errors import BudgetTooSmall, InvalidBudget, InvalidInput
from refusals import refused
from vocabulary_strategies import choices, inventories, schemes

# 1,001 weights in fp32 and a bias of 10 fp32 values.
MODEL = Inventory(
    model_digest="sha256:00",
    layers=(
        Layer(
            name="fc",
            kind=LayerKind.LINEAR,
            weight_name="fc.weight",
            weight_shape=(7, 143),
            rows=7,
            columns=143,
            n_weights=1001,
            n_macs=1001,
            n_inputs=143,
        ),
    ),
    unquantized=(UnquantizedTensor(name="fc.bias", shape=(10,), format="fp32", size_bits=320),),
)
FULL = 1001 * 32


class TestParse:
    @pytest.mark.parametrize(
        ("text", "resource", "limit", "constant"),
        [
            ("3 bits", "code_bits", 3003, 0),
            ("1 bit", "code_bits", 1001, 0),
            ("3.5 bits", "code_bits", 3503, 0),  # 3,503.5 rounded down
            ("4.25 bits/weight", "code_bits", 4254, 0),  # 4,254.25
            (".5 bits", "code_bits", 500, 0),
            ("3 bits of weights", "code_bits", 3003, 0),
            ("3.6 bpw", "size_bits", 3603, 0),  # 3,603.6
            ("3.6 bpw of weights", "size_bits", 3603, 0),
            ("3.6 bpw of model", "size_bits", 3639, 320),  # 3.6 x 1,011, biases included
            ("2 KiB", "size_bits", 2 * 1024 * 8, 320),
            ("2 KiB of model", "size_bits", 2 * 1024 * 8, 320),
            ("2 KiB of weights", "size_bits", 2 * 1024 * 8, 0),
            ("2 kB", "size_bits", 16_000, 320),
            ("1.5 MB", "size_bits", 12_000_000, 320),
            ("12 MiB", "size_bits", 12 * 2**20 * 8, 320),
            ("1 GB", "size_bits", 8 * 10**9, 320),
            ("1 GiB", "size_bits", 2**33, 320),
            ("1500000 B", "size_bits", 12_000_000, 320),
            ("1,500,000 B", "size_bits", 12_000_000, 320),
            ("1_500_000 bytes", "size_bits", 12_000_000, 320),
            ("1.7 B", "size_bits", 8, 320),  # whole bytes only
            ("0.25x", "size_bits", (FULL + 320) // 4, 320),
            ("0.25 x", "size_bits", (FULL + 320) // 4, 320),
            ("0.25x of weights", "size_bits", FULL // 4, 0),
            ("7 BitOps", "bit_ops", 7, 0),
            ("2.5 GBitOps", "bit_ops", 2_500_000_000, 0),
            ("1 TBitOps", "bit_ops", 10**12, 0),
            ("0.3 MBitOps", "bit_ops", 300_000, 0),
            ("act 96 KiB", "activation_bits_max", 96 * 1024 * 8, 0),
            ("activations 10 B", "activation_bits_max", 80, 0),
        ],
    )
    def test_every_unit(self, text, resource, limit, constant):
        found = Budget.parse(text, MODEL)
        assert (resource, limit, constant) == (found.resource, found.limit, found.constant)
        assert found.text == text

    @pytest.mark.parametrize(
        "text", ["12 MiB", "12mib", "  12 MIB ", "12.0 MiB", "12 mib of MODEL"]
    )
    def test_spaces_and_case_do_not_matter(self, text):
        expected = Budget.parse("12 MiB", MODEL)
        found = Budget.parse(text, MODEL)
        assert (expected.limit, expected.scope) == (found.limit, found.scope)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "bits",
            "3",
            "3 bit s",
            "3 potatoes",
            "-3 bits",
            "3e3 B",
            "3,5 bits",  # a decimal comma is not 35
            "1,50 MB",
            "1__0 B",
            "1_ B",
            "nan bits",
            "inf MiB",
            "3 bits 4 bits",
            "3 MiB/weight",
            "act 3 bits",
            "act 0.5x",
            "3 bits of layers",
        ],
    )
    def test_anything_else_is_refused(self, text):
        with pytest.raises(InvalidBudget, match="must read like '3.5 bits'.*got '") as got:
            Budget.parse(text, MODEL)
        assert text == got.value.details["budget"]

    @pytest.mark.parametrize("text", ["0 bits", "0.0 MiB", "0x", "act 0 B"])
    def test_nothing_is_refused(self, text):
        with pytest.raises(InvalidBudget, match="must be positive"):
            Budget.parse(text, MODEL)

    @pytest.mark.parametrize(
        "text",
        ["3 bits of model", "3 bits/weight of model", "1 GBitOps of weights", "act 1 KiB of model"],
    )
    def test_a_scope_without_meaning_is_refused(self, text):
        """Averages are of the weights; reading 'of model' as such would be a surprise."""
        with pytest.raises(InvalidBudget, match="only sizes, shares"):
            Budget.parse(text, MODEL)

    @given(inventories(), st.decimals("0.001", 40, places=3))
    def test_never_more_than_written(self, model, value):
        """The limit is the largest integer that does not exceed the exact value."""
        exact = Fraction(value)
        per_weight = Budget.parse(f"{value} bits", model).limit
        assert 0 <= exact * model.n_weights - per_weight < 1
        share = Budget.parse(f"{value}x", model).limit
        assert 0 <= exact * model.full_precision_bits - share < 1
        whole_bytes = Budget.parse(f"{value} kB", model).limit
        assert 0 <= exact * 8000 - whole_bytes < 8

    @given(inventories(), st.integers(1, 32))
    def test_average_fits_exactly_the_uniform_plan(self, model, bits):
        """``b bits`` is what every layer at ``b`` bits takes, to the bit."""
        assert bits * model.n_weights == Budget.parse(f"{bits} bits", model).limit

    @given(inventories())
    def test_the_whole_model_fits_its_own_size(self, model):
        """At 1.0x everything may stay in full precision."""
        table = enumerate_candidates(model, [32])
        budget = Budget.parse("1x", model)
        budget.check(table)
        assert budget.available == int(table.costs("size_bits").sum())

    @given(inventories(), st.sampled_from(["3 bits", "3 bpw", "2 KiB", "0.5x of weights"]))
    def test_survives_json(self, model, text):
        budget = Budget.parse(text, model)
        assert budget == Budget.from_json(budget.to_json())
        canonical_json(budget.to_json())

    @pytest.mark.parametrize(
        "text", ["1" + "0" * 30 + " TBitOps", "9" * 40 + " GiB", "9" * 25 + " bits"]
    )
    def test_a_limit_that_solvers_cannot_count_to_is_refused(self, text):
        with pytest.raises(InvalidBudget, match=r"below 2\^62"):
            Budget.parse(text, MODEL)


class TestAvailable:
    def test_is_what_unquantized_tensors_leave(self):
        assert 16_384 - 320 == Budget.parse("2 KiB", MODEL).available


class TestUnit:
    @pytest.mark.parametrize(
        ("text", "unit"), [("3 bits", "bits"), ("2 KiB", "bits"), ("1 GBitOps", "bit operations")]
    )
    def test_is_for_a_person(self, text, unit):
        assert unit == Budget.parse(text, MODEL).unit


class TestCheck:
    @given(st.data())
    def test_refuses_exactly_what_no_choice_fits(self, data):
        """Against the sum of the cheapest rows, group by group."""
        model = data.draw(inventories())
        table = enumerate_candidates(model, [2, 4, 8], scheme=data.draw(schemes()))
        costs = table.costs("size_bits")
        least = model.unquantized_bits + sum(
            int(min(costs[table.group_of_row == g])) for g in range(len(table.groups))
        )
        fits = Budget(resource="size_bits", limit=least, constant=model.unquantized_bits)
        fits.check(table)
        short = Budget(resource="size_bits", limit=least - 1, constant=model.unquantized_bits)
        with pytest.raises(BudgetTooSmall) as got:
            short.check(table)
        assert {"budget": "", "limit": least - 1, "smallest": least} == got.value.details

    @given(st.data())
    def test_accepts_what_some_choice_takes(self, data):
        """Whatever a choice takes is a budget that does not raise."""
        table = enumerate_candidates(data.draw(inventories()), [1, 3, 16])
        chosen = table.offsets[:-1] + np.array(data.draw(choices(table)))
        for resource, join in (("code_bits", np.sum), ("activation_bits_max", np.max)):
            Budget(resource=resource, limit=int(join(table.costs(resource)[chosen]))).check(table)

    def test_activations_are_limited_one_by_one(self):
        """The largest counts, not the sum."""
        two = Inventory(
            model_digest="",
            layers=tuple(
                Layer(
                    name=name,
                    kind=LayerKind.LINEAR,
                    weight_name=name,
                    weight_shape=(1, 1),
                    rows=1,
                    columns=1,
                    n_weights=1,
                    n_inputs=n_inputs,
                )
                for name, n_inputs in (("a", 10), ("b", 25))
            ),
        )
        table = enumerate_candidates(two, [4], activation_bits=8)
        Budget.parse("act 25 B", two).check(table)
        with refused(BudgetTooSmall, budget="act 24 B", limit=192, smallest=200):
            Budget.parse("act 24 B", two).check(table)

    def test_says_what_to_do(self):
        """Budget, limit, smallest plan, the part that is fixed, and three ways out."""
        table = enumerate_candidates(MODEL, [2, 4])
        with pytest.raises(BudgetTooSmall) as got:
            Budget.parse("100 B", MODEL).check(table)
        smallest = 1001 * 2 + 7 * 32 + 6 + 320
        expected = (
            f"budget '100 B' is 800 bits (size_bits), below the smallest plan, {smallest:,} bits, "
            "320 bits of them in tensors that ship as they are; raise the budget, offer smaller "
            "candidates, or fix and exclude fewer layers"
        )
        assert expected == str(got.value)


class TestScope:
    def test_is_recorded(self):
        """Sizes speak of the model, averages of the weights."""
        assert Budget.parse("2 KiB", MODEL).scope is Scope.MODEL
        assert Budget.parse("2 KiB of weights", MODEL).scope is Scope.WEIGHTS
        assert Budget.parse("3 bits", MODEL).scope is Scope.WEIGHTS


class TestCheckBudgets:
    def test_readable(self):
        """Nothing is said of what can be read, joined budgets included."""
        check_budgets(["3 bits", "0.25x + 2 GBitOps"])

    def test_none(self):
        """An example is given."""
        with pytest.raises(InvalidInput, match="at least one budget .* '3 bits'"):
            check_budgets([])

    @pytest.mark.parametrize("text", ["lots", "3 bits + ", "3 bits + lots", "0 bits"])
    def test_unreadable(self, text):
        """Each part must be a budget."""
        with pytest.raises(InvalidBudget, match="a budget must"):
            check_budgets([text])
