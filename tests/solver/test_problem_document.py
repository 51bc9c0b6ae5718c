"""Problems as JSON: what they mean, the published schema, and what is refused."""

from __future__ import annotations

import copy
import json
import re

import jsonschema
import pytest

from bitquota.candidates.budget import Budget
from bitquota.candidates.cost_table import CostTable, LayerCost
from bitquota.errors import BitquotaError, InvalidInput
from bitquota.json_schema import json_schema
from bitquota.solver import build_problem, solve
from bitquota.solver.archive import problem_digest
from bitquota.solver.document import solve_document
from bitquota.solver.files import read_document
from bitquota.solver.posed_problem import posed
from bitquota.solver.problem_document import SCHEMA, ProblemDocument
from seeded_jobs import inventory_of, matrix_of

BIG = 2**53 + 1


def stated(**changes):
    """Return a document of two groups of two candidates, with some members replaced."""
    document = {
        "schema": SCHEMA,
        "groups": [
            {"name": name, "weights": 10**9, "candidates": [
                {"label": "W2", "loss": 4.0, "standard_error": 1.0, "costs": {"size_bits": BIG}},
                {"label": "W4", "loss": 1.0, "costs": {"size_bits": 2 * BIG}}]}
            for name in ("a", "b")
        ],
        "cross": [{"first": ["a", "W2"], "second": ["b", "W2"], "loss": -0.5}],
        "budgets": [{"resource": "size_bits", "limit": 3 * BIG}],
    }  # fmt: skip
    return copy.deepcopy(document | changes)


def problem_of(document):
    """Return the problem of a document that names no matrix."""
    return posed(ProblemDocument.from_json(document), pytest.fail).problem


class TestPosed:
    def test_numbers_to_the_last_unit(self):
        """Costs and limits beyond 2^53 are what stands in the JSON text."""
        problem = problem_of(json.loads(json.dumps(stated())))
        assert [[BIG, 2 * BIG, BIG, 2 * BIG]] == problem.costs.tolist()
        assert [3 * BIG] == problem.limits.tolist()
        assert [[0, 2]] == problem.terms.tolist()
        assert [-0.5] == problem.term_values.tolist()

    @pytest.mark.parametrize(
        ("text", "limit"),
        [("4.1 bits", 8_200_000_000), ("4.0000000005 bits", 8_000_000_001), ("1 GiB", 2**33)],
    )
    def test_decimals_as_they_are_written(self, text, limit):
        """No float stands between a budget and its integer."""
        document = stated(budgets=[{"resource": "size_bits", "text": text}])
        assert [limit] == problem_of(document).limits.tolist()

    def test_factor(self):
        """Vectors in place of cross-layer terms are the factor of a problem."""
        document = stated(cross=[])
        for group in document["groups"]:
            group["candidates"][0] |= {"standard_error": 0.0, "factor": [1.0, 2]}
            group["candidates"][1]["factor"] = [0.5, 0.0]
        document["budgets"][0]["pairs"] = [
            {"first": ["a", "W4"], "second": ["b", "W4"], "cost": -BIG}
        ]
        problem = problem_of(document)
        assert problem.cross is None
        assert [[1.0, 2.0], [0.5, 0.0]] * 2 == problem.factor[:4].tolist()
        # Both at 4 bits: 1 + 1 and the product .25.
        assert pytest.approx(2.25, rel=1e-4) == solve(problem).objective

    def test_robust(self):
        """Standard errors are added to the losses."""
        assert [6.0, 1.0, 6.0, 1.0] == problem_of(stated(robust=2.0)).diagonal.tolist()

    def test_is_what_the_builder_makes_of_a_matrix(self):
        """Rule by rule, the same problem to the last bit."""
        matrix = matrix_of(inventory_of(7))
        first, second, third = matrix.table.groups[:3]
        prices = CostTable(
            resource="latency_ns",
            model_digest="",
            layers=tuple(
                LayerCost(layer=c.layer, candidate=c.label, cost=160 if c.label == "W8" else 110)
                for row in matrix.table.rows
                for c in row.candidates[:1]
            )
            + tuple(
                LayerCost(layer=c.layer, candidate=c.label, cost=0)
                for row in matrix.table.rows
                for c in row.candidates[1:]
            ),
        )
        document = {
            "schema": SCHEMA,
            "matrix": "m.npz",
            "budgets": [
                {"resource": "code_bits", "limit": 400_000},
                {"resource": "latency_ns", "limit": 1000,
                 "costs": [{"of": ["*", "*"], "cost": 110}, {"of": ["*", "W8"], "cost": 160}]},
            ],
            "fixed": [[first, "W4"]],
            "forbidden": [[second, "W2"]],
            "forbidden_pairs": [[[second, "W4"], [third, "W4"]]],
            "required_pairs": [[[third, "W8"], [second, "W8"]]],
            "robust": 1.5,
        }  # fmt: skip
        found = posed(ProblemDocument.from_json(document), lambda _name: (matrix, None))
        built = build_problem(
            matrix.robust(1.5),
            [
                Budget(resource="code_bits", limit=400_000),
                Budget(resource="latency_ns", limit=1000, prices=prices),
            ],
            fixed=[(first, "W4")],
            forbidden=[(second, "W2")],
            forbidden_pairs=[((second, "W4"), (third, "W4"))],
            required_pairs=[((third, "W8"), (second, "W8"))],
        )
        assert problem_digest(built) == problem_digest(found.problem)

    def test_at_most_and_alternatives(self):
        """Few groups at a candidate; choices that differ in two groups."""
        document = stated(
            budgets=[{"resource": "size_bits", "limit": 4 * BIG}],
            at_most=[{"of": ["*", "W4"], "groups": 1}],
            top=2,
            distance=2,
        )
        asked = posed(ProblemDocument.from_json(document), pytest.fail)
        answer = solve_document(asked)
        assert [5.0, 5.0] == [other["objective"] for other in answer["top"]]
        assert ["W2", "W4"] == sorted(answer["labels"])
        first, second = (other["choice"] for other in answer["top"])
        assert all(a != b for a, b in zip(first, second, strict=True))
        assert answer["top_limit"] is None

    def test_alternatives_that_a_limit_cut_off(self):
        """The answer says which limit left fewer choices than were asked for."""
        cancelled = iter([False] * 3)
        document = stated(top=3, budgets=[])
        asked = posed(ProblemDocument.from_json(document), pytest.fail)
        whole = solve_document(asked)
        assert 3 == len(whole["top"])
        answer = solve_document(asked, cancelled=lambda: next(cancelled, True))
        assert len(answer["top"]) < 3
        assert "cancelled" == answer["top_limit"]

    def test_groups_for_pairs_are_not_shown(self):
        """The answer speaks of the user's groups, also where alternatives are listed."""
        document = stated(top=2)
        document["budgets"][0]["pairs"] = [
            {"first": ["a", "W4"], "second": ["b", "W4"], "cost": -BIG}
        ]
        asked = posed(ProblemDocument.from_json(document), pytest.fail)
        answer = solve_document(asked)
        assert ["a", "b"] == answer["groups"]
        assert [1, 1] == answer["choice"]
        assert {"size_bits": 3 * BIG} == answer["spent"]
        assert len({tuple(other["choice"]) for other in answer["top"]}) == 2
        with pytest.raises(InvalidInput, match="explanation"):
            solve_document(asked, explain=True)


def bad_documents():
    """Yield documents that state no problem."""
    for number in (float("nan"), float("inf"), 1e308, 10**400, 5e-324, 1e-310):
        yield stated(groups=[{"name": "a", "candidates": [{"label": "x", "loss": number}] * 2}])
        yield stated(cross=[{"first": ["a", "W2"], "second": ["b", "W2"], "loss": number}])
        yield stated(budgets=[{"resource": "size_bits", "limit": number}])
    for robust in (float("nan"), float("inf"), -1.0):
        yield stated(robust=robust)
    for limit in (2**62, -(2**70), 1.5, "3", None, True):
        yield stated(budgets=[{"resource": "size_bits", "limit": limit}])
    for text in ("3,5 bits", "1e3 bits", "9" * 5000 + " bits", "٣٣ furlongs", "nan bits", ""):
        yield stated(budgets=[{"text": text}])
    yield stated(budgets=[{"resource": "energy", "limit": 3}])
    yield stated(budgets=[{"resource": "size_bits", "limit": 3, "text": "3 bits"}])
    yield stated(budgets=[{"resource": "t", "limit": 3, "costs": [{"of": ["a", "*"], "cost": 1}]}])
    for cost in (-1, 2**62, 2**5000, 0.5):
        yield stated(
            budgets=[{"resource": "t", "limit": 3, "costs": [{"of": ["*", "*"], "cost": cost}]}]
        )
    pair = {"first": ["a", "*"], "second": ["a", "*"], "cost": 1}
    yield stated(budgets=[{"resource": "size_bits", "limit": 3, "pairs": [pair]}])
    yield stated(budgets=[{"resource": "size_bits", "limit": 3}] * 2)
    yield stated(cross=[{"first": ["a", "W2"], "second": ["a", "W4"], "loss": 1.0}])
    yield stated(cross=[{"first": ["a", "W2"], "second": ["b", "W2"], "loss": 1.0}] * 2)
    yield stated(cross=[{"first": ["a", "W9"], "second": ["b", "W2"], "loss": 1.0}])
    yield stated(
        groups=[
            {
                "name": "a",
                "candidates": [
                    {"label": "x", "loss": 1.0, "factor": [1.0]},
                    {"label": "y", "loss": 1.0},
                ],
            }
        ],
        cross=[],
    )
    yield stated(fixed=[["c", "W2"]])
    yield stated(forbidden=[["a", "W9"]])
    yield stated(fixed=[["a"]])
    yield stated(matrix="m.npz")
    yield stated(groups=[])
    yield stated(groups=[{"name": "a", "candidates": []}])
    yield stated(groups=[{"name": "a", "candidates": [{"label": "x", "loss": 1.0}]}] * 2)
    yield stated(top=0)
    yield stated(distance=-(2**5000))
    yield stated(unknown=1)
    yield stated(schema="bitquota/problem/2")
    yield []


class TestRefusals:
    @pytest.mark.parametrize("document", list(bad_documents()))
    def test_one_sentence(self, document):
        """Whatever is wrong: an error of ours, short, and never anything else."""
        with pytest.raises(BitquotaError) as caught:
            problem_of(document)
        assert caught.value.exit_code in {2, 5}
        assert len(str(caught.value)) < 1000


class TestSchema:
    def test_published(self, repository):
        """The file in the reference is what the tool prints."""
        published = json.loads((repository / "docs/reference/problem.schema.json").read_text())
        assert json_schema(ProblemDocument, title="Bitquota problem") == published

    def test_examples(self, repository):
        """Every example of the page is valid, and read."""
        page = (repository / "docs/reference/problems.md").read_text()
        examples = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
        schema = json_schema(ProblemDocument, title="Bitquota problem")
        checker = jsonschema.Draft202012Validator(schema)
        assert 2 == len(examples)
        for example in [*examples, stated(top=3)]:
            checker.validate(example)
            document = ProblemDocument.from_json(example)
            assert document == ProblemDocument.from_json(document.to_json())
        answer = solve_document(posed(ProblemDocument.from_json(examples[0]), pytest.fail))
        assert ["W4", "W4"] == answer["labels"]

    @pytest.mark.parametrize(
        "document", [stated(unknown=1), stated(fixed=[["a"]]), stated(top="3"), stated(schema="x")]
    )
    def test_what_the_reader_refuses(self, document):
        """Types and names are the schema's too."""
        schema = json_schema(ProblemDocument, title="Bitquota problem")
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema).validate(document)


class TestReadDocument:
    def test_matrix_beside_it(self, tmp_path):
        """A path is read from where the document lies; other JSON is none of ours."""
        matrix_of(inventory_of(3)).save(tmp_path / "m.npz")
        path = tmp_path / "p.json"
        path.write_text(
            json.dumps({"schema": SCHEMA, "matrix": "m.npz", "budgets": [{"text": "3 bits"}]})
        )
        assert ("code_bits",) == read_document(path).problem.resources
        path.write_text("{}")
        assert read_document(path) is None
