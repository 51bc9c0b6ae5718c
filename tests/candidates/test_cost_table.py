"""Cost tables: budgets of time and energy, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest

from bitquota.candidates.budget import Budget, check_budgets
from bitquota.candidates.cost_table import (
    CostTable,
    LayerCost,
    TogetherCost,
    format_cost,
)
from bitquota.candidates.layers import Inventory, Layer, LayerKind
from bitquota.candidates.table import enumerate_candidates
from bitquota.canonical import canonical_json
from bitquota.errors import BudgetTooSmall, InvalidBudget, InvalidInput
from bitquota.json_schema import json_schema
from refusals import refused


def layer(name: str) -> Layer:
    """A layer of 64 weights."""
    return Layer(
        name=name, kind=LayerKind.LINEAR, weight_name=name, weight_shape=(8, 8), rows=8, columns=8,
        n_weights=64, n_macs=64, n_inputs=8,
    )  # fmt: skip


MODEL = Inventory(model_digest="sha256:00", layers=(layer("a"), layer("b")))
ROWS = enumerate_candidates(MODEL, (4, 8))
LAYERS = tuple(
    LayerCost(layer=name, candidate=label, cost=cost)
    for name, costs in {"a": (300, 100, 700), "b": (500, 900, 800)}.items()
    for label, cost in zip(("W4", "W8", "W32"), costs, strict=True)
)
TABLE = CostTable(
    resource="latency_ns", model_digest="sha256:00", constant=1000, layers=LAYERS, batch=2,
    length=10, device="a board",
)  # fmt: skip


class TestBudgets:
    @pytest.mark.parametrize(
        ("text", "limit"),
        [("5 ms", 5_000_000), ("2.5 us", 2500), ("1.5µs", 1500), ("3 s", 3 * 10**9),
         ("4000 ns", 4000), ("10_000_000 tok/s", 2000)],
    )  # fmt: skip
    def test_means_nanoseconds_of_a_run(self, text, limit):
        """Times are written in any unit; 20 tokens in 2 µs are ten million a second."""
        budget = Budget.parse(text, MODEL, [TABLE])
        assert ("latency_ns", limit) == (budget.resource, budget.limit)
        assert budget.constant == 1000

    def test_energy_has_its_own_table(self):
        """Two tables serve two budgets; each finds its own."""
        energy = replace(TABLE, resource="energy_pj", constant=7)
        budget = Budget.parse("2 mJ", MODEL, [TABLE, energy])
        assert (2 * 10**9, 7) == (budget.limit, budget.constant)
        with refused(InvalidInput, resource="energy_pj"):
            Budget.parse("2 mJ", MODEL, [TABLE])

    def test_prices_rows(self):
        """Rows cost what the table says, in the order of the candidates."""
        budget = Budget.parse("1 ms", MODEL, [TABLE])
        assert [300, 100, 500, 900] == budget.costs(ROWS).tolist()
        assert 1000 + 100 + 500 == budget.spent(ROWS.decode((1, 0)))

    def test_pairs(self):
        """A plan takes its pairs exactly; rows count what they may meet, and no saving."""
        pairs = (
            TogetherCost(first=("a", "W8"), second=("b", "W4"), cost=50),
            TogetherCost(first=("a", "W4"), second=("b", "W4"), cost=-200),
        )
        budget = Budget.parse("1 ms", MODEL, [replace(TABLE, pairs=pairs)])
        assert [300, 150, 500, 900] == budget.costs(ROWS).tolist()
        spent = [budget.spent(ROWS.decode((k, 0))) for k in (0, 1)]
        assert [1000 + 800 - 200, 1000 + 600 + 50] == spent

    def test_an_excluded_layer_counts_in_full_precision(self):
        """What is not planned still takes its time."""
        alone = replace(MODEL, layers=MODEL.layers[:1])
        assert 1000 + 800 == Budget.parse("1 ms", alone, [TABLE]).constant

    def test_sums_with_the_constant(self):
        """What a frontier varies is the whole time."""
        whole = TABLE.with_whole_sums()
        assert [1300, 1100, 500, 900] == whole.costs(ROWS).tolist()
        assert 0 == whole.constant

    def test_names_the_nearest_feasible(self):
        """The error says what the fastest plan takes."""
        with refused(BudgetTooSmall, smallest=1600):
            Budget.parse("1.599 us", MODEL, [TABLE]).check(ROWS)
        Budget.parse("1.6 us", MODEL, [TABLE]).check(ROWS)

    def test_a_table_is_needed(self):
        """Before anything is loaded; also one of a language model for tokens per second."""
        with refused(InvalidInput, resource="latency_ns"):
            check_budgets(["3 bits + 5 ms"])
        with refused(InvalidBudget, budget=" 9 tok/s"):
            check_budgets(["3 bits + 9 tok/s"], [replace(TABLE, length=0)])
        with refused(InvalidBudget):
            check_budgets(["5 ms of weights"], [TABLE])

    def test_budgets_survive_json(self):
        """A plan's budget holds its table; one without is written as it always was."""
        budget = Budget.parse("5 ms", MODEL, [TABLE])
        assert budget == Budget.from_json(json.loads(canonical_json(budget.to_json())))
        assert "prices" not in Budget.parse("3 bits", MODEL).to_json()


class TestCostTable:
    @pytest.mark.parametrize(
        "broken",
        [
            {"resource": "latency_ms"},
            {"constant": -1},
            {"constant": float("nan")},
            {"layers": ()},
            {"layers": (LayerCost(layer="a", candidate="W4", cost=-3),)},
            {"layers": (LayerCost(layer="a", candidate="W4", cost=2**53),)},
            {"layers": (*LAYERS, LAYERS[0])},
            {"layers": (replace(LAYERS[0], standard_error=float("nan")),)},
            {"threads": 0},
            {"pairs": (TogetherCost(first=("a", "W4"), second=("a", "W8"), cost=1),)},
            {"pairs": (TogetherCost(first=("a", "W4"), second=("c", "W8"), cost=1),)},
        ],
        ids=str,
    )
    def test_refuses(self, broken):
        """Everything that could not be added up."""
        with refused(InvalidInput):
            replace(TABLE, **broken)

    def test_refuses_another_model_and_missing_candidates(self):
        """A table must be of the model, and price what is offered."""
        with refused(InvalidInput, table="sha256:00"):
            Budget.parse("5 ms", replace(MODEL, model_digest="sha256:11"), [TABLE])
        with refused(InvalidInput, layer="b", candidate="W4"):
            replace(TABLE, layers=LAYERS[:3]).costs(ROWS)

    def test_a_file_that_is_none(self, tmp_path):
        """Of another kind, with NaN, or with a member of another type."""
        for text in ("[]", '{"schema": "bitquota/plan/1"}'):
            (tmp_path / "t.json").write_text(text)
            with refused(InvalidInput):
                CostTable.load(tmp_path / "t.json")
        body = TABLE.to_json()
        for cost in (float("nan"), "3", 1.5):
            body["constant"] = cost
            (tmp_path / "t.json").write_text(json.dumps(body))
            with refused(InvalidInput):
                CostTable.load(tmp_path / "t.json")

    def test_schema_is_published(self, repository):
        """The file in the docs is the schema, and a table follows it."""
        published = json.loads((repository / "docs/reference/costs.schema.json").read_text())
        assert published == json_schema(CostTable, title="Bitquota cost table")
        jsonschema.validate(json.loads(canonical_json(TABLE.to_json())), published)

    def test_costs_for_people(self):
        """In the largest unit of which there is at least one."""
        found = [format_cost(n, "latency_ns") for n in (0, 999, 1_500_000, 2 * 10**12)]
        assert ["0 ns", "999 ns", "1.5 ms", "2000 s"] == found
        assert "2 µJ" == format_cost(2_000_000, "energy_pj")
