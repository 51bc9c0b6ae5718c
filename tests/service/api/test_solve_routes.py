from __future__ import annotations

import base64
import io
import zipfile

import httpx
import numpy as np
import pytest

from bitquota.candidates.cost_table import CostTable, LayerCost
from bitquota.candidates.layers import Inventory, Layer, LayerKind
from bitquota.candidates.table import enumerate_candidates
from bitquota.errors import InvalidBudget, InvalidInput, TooLarge
from bitquota.matrix import SensitivityMatrix
from bitquota.solver.document import solve_document
from bitquota.solver.matrix_budgets import inventory_of
from bitquota.solver.posed_problem import posed
from bitquota.solver.problem_document import ProblemDocument
from live_server import LiveServer

BITS = (2, 4, 8)


def layer(number, n):
    return Layer(
        name=f"l{number}", kind=LayerKind.LINEAR, weight_name=f"l{number}.weight",
        weight_shape=(4, n), rows=4, columns=n, n_weights=4 * n,
    )  # fmt: skip


@pytest.fixture(scope="module")
def matrix():
    """Three layers without cross terms: the first suffers most from few bits."""
    inventory = Inventory(
        model_digest="sha256:x", layers=tuple(layer(k, 8 * (k + 1)) for k in range(3))
    )
    table = enumerate_candidates(inventory, BITS)
    harm = {2: 1.0, 4: 0.1, 8: 0.0}
    diagonal = [
        harm[row.candidates[0].weight_bits] * (10.0 if row.group == "l0" else 1.0)
        for row in table.rows
    ]
    return SensitivityMatrix(table=table, diagonal=np.array(diagonal))


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with (
        LiveServer(tmp_path_factory.mktemp("solving") / "data", slots=0) as server,
        server.client() as made,
    ):
        yield made


def best_by_hand(matrix, budget_bits):
    """Try every choice."""
    import itertools

    best = None
    for choice in itertools.product(range(3), repeat=3):
        chosen = matrix.table.decode(choice)
        if sum(c.size.codes for c in chosen) <= budget_bits:
            value = matrix.predict(choice)
            best = value if best is None else min(best, value)
    return best


class TestSolve:
    @pytest.mark.parametrize("average", [2.0, 3.0, 4.5, 6.0, 8.0])
    def test_inline_matrix_gets_the_best_choice(self, client, matrix, average):
        (answer,) = client.solve(
            matrix=matrix.to_bytes(), budgets=[f"{average} bits"], time_limit_s=30
        )
        n_weights = inventory_of(matrix).n_weights
        assert answer["predicted"] == pytest.approx(best_by_hand(matrix, average * n_weights))
        assert answer["bound"] <= answer["predicted"] + 1e-9
        assert set(answer["assignments"]) == {"l0", "l1", "l2"}

    def test_uploaded_matrix_is_the_inline_one(self, client, matrix):
        digest = client.upload("matrix", matrix.to_bytes())
        assert client.solve(matrix=digest, budgets=["3 bits"]) == client.solve(
            matrix=matrix.to_bytes(), budgets=["3 bits"]
        )

    def test_matrix_that_claims_more_than_it_may(self, client):
        """A few kilobytes that unpack to a gigabyte are refused before they are unpacked."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("meta.npy", bytes(2**28))
        with pytest.raises(TooLarge, match="unpack"):
            client.solve(matrix=buffer.getvalue(), budgets=["3 bits"])

    def test_budgets_are_answered_in_their_order(self, client, matrix):
        answers = client.solve(matrix=matrix.to_bytes(), budgets=["8 bits", "2 bits"])
        assert [a["budget"] for a in answers] == ["8 bits", "2 bits"]
        assert answers[0]["predicted"] < answers[1]["predicted"]

    def test_time_by_a_table(self, client, matrix):
        """Each bit takes a millisecond: nine for three layers leave three bits on average."""
        table = CostTable(
            resource="latency_ns",
            model_digest="",
            layers=tuple(
                LayerCost(layer=c.layer, candidate=c.label, cost=c.weight_bits * 10**6)
                for row in matrix.table.rows
                for c in row.candidates
            ),
        )
        given = {"matrix": matrix.to_bytes(), "budgets": ["14 ms"]}
        (answer,) = client.solve(**given, tables=[table], time_limit_s=30)
        assert 14 == sum(a["weight_bits"] for a in answer["assignments"].values())
        with pytest.raises(InvalidInput, match="cost table"):
            client.solve(**given)

    def test_share_of_a_model_that_is_not_known_is_refused(self, client, matrix):
        with pytest.raises(InvalidBudget, match="of weights"):
            client.solve(matrix=matrix.to_bytes(), budgets=["0.5x"])

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"matrix": "!"},
            {"matrix": base64.b64encode(b"no matrix").decode()},
            {"matrix": "", "job": "job_" + "0" * 32},
            {"budgets": []},
            {"time_limit_s": 1000},
        ],
    )
    def test_what_cannot_be_solved(self, client, changes):
        body = {"budgets": ["3 bits"]} | changes
        answer = httpx.post(str(client.base_url).rstrip("/") + "/v1/solve", json=body)
        assert answer.status_code == 422, answer.text
        assert answer.headers["content-type"] == "application/problem+json"

    def test_budget_below_the_minimum(self, client, matrix):
        answer = httpx.post(
            str(client.base_url).rstrip("/") + "/v1/solve",
            json={
                "matrix": base64.b64encode(matrix.to_bytes()).decode(),
                "budgets": ["1 bits"],
            },
        )
        assert answer.json()["type"] == "urn:bitquota:problem:budget-too-small"


class TestProblem:
    @pytest.fixture
    def problem(self):
        """Return a document of the matrix: two budgets, a fusion, a limit on layers, two plans."""
        return {
            "schema": "bitquota/problem/1",
            "budgets": [
                {"text": "5 bits"},
                {"resource": "ns", "limit": 200,
                 "costs": [{"of": ["*", "*"], "cost": 60}, {"of": ["*", "W8"], "cost": 90}],
                 "pairs": [{"first": ["l0", "W4"], "second": ["l1", "W4"], "cost": -20}]},
            ],
            "at_most": [{"of": ["*", "W8"], "groups": 1}],
            "top": 2,
        }  # fmt: skip

    def test_is_answered_as_on_the_command_line(self, client, matrix, problem):
        """Of an uploaded matrix and of one that is sent along: what a file would give."""
        document = ProblemDocument.from_json(problem | {"matrix": "m"})
        here = solve_document(posed(document, lambda _name: (matrix, None)), time_limit_s=30)
        inline = base64.b64encode(matrix.to_bytes()).decode()
        for source in (client.upload("matrix", matrix.to_bytes()), inline):
            answer = client.solve_problem(problem | {"matrix": source}, time_limit_s=30)
            for name in ("choice", "labels", "groups", "objective", "bound", "spent", "limits"):
                assert answer[name] == here[name]
            assert len(answer["top"]) == 2

    def test_integers_beyond_floats(self, client):
        """Costs and limits come through to the last unit."""
        big = 2**53 + 1
        candidates = [
            {"label": "W2", "loss": 1.0, "costs": {"ns": big}},
            {"label": "W4", "loss": 0.1, "costs": {"ns": 2 * big}},
        ]
        problem = {
            "schema": "bitquota/problem/1",
            "groups": [{"name": "a", "candidates": candidates}],
            "budgets": [{"resource": "ns", "limit": 2 * big}],
        }
        answer = client.solve_problem(problem, explain=True)
        assert answer["spent"] == answer["limits"] == {"ns": 2 * big}
        assert answer["explanation"]["groups"][0]["label"] == "W4"
        problem["budgets"][0]["limit"] -= 1
        assert client.solve_problem(problem)["labels"] == ["W2"]

    @pytest.mark.parametrize(
        "body",
        [
            {"problem": {}},
            {"problem": {"schema": "bitquota/problem/1"}},
            {"problem": {"schema": "bitquota/problem/1", "matrix": "!"}},
            {"problem": {"schema": "bitquota/problem/1", "matrix": "m"}, "budgets": ["3 bits"]},
            {"problem": {"schema": "bitquota/problem/1", "matrix": "m"}, "matrix": "m"},
            {"budgets": ["3 bits"], "matrix": "m", "explain": True},
            {"problem": {"schema": "bitquota/problem/1", "matrix": "m", "top": 2**70}},
            {"problem": {"schema": "bitquota/problem/1", "matrix": "m", "top": 2},
             "time_limit_s": 30, "explain": True},
        ],
    )  # fmt: skip
    def test_what_is_none(self, client, body):
        """A sentence as problem+json."""
        answer = httpx.post(str(client.base_url).rstrip("/") + "/v1/solve", json=body)
        assert answer.status_code == 422, answer.text
        assert answer.headers["content-type"] == "application/problem+json"

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "1e308", "1" * 50])
    def test_numbers_that_are_none(self, client, number):
        """Whatever JSON parsers take for a number."""
        text = (
            '{"problem": {"schema": "bitquota/problem/1", "groups": [{"name": "a", "candidates": '
            f'[{{"label": "W4", "loss": {number}}}]}}]}}}}'
        )
        answer = httpx.post(str(client.base_url).rstrip("/") + "/v1/solve", content=text)
        assert answer.status_code in {413, 422}, answer.text
