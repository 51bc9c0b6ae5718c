"""``solve`` and ``frontier`` on plain problem files: answers, proofs, explanations, exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bitquota.candidates.cost_table import CostTable, LayerCost
from seeded_jobs import inventory_of, matrix_of


@pytest.fixture
def file(tmp_path):
    """Return a plain archive: 5 layers at 2, 4 or 8 bits, correlated errors, three budgets."""
    rng = np.random.default_rng(0)
    n_layers, widths = 5, np.array([2.0, 4.0, 8.0])
    params = np.array([16.0, 64.0, 64.0, 256.0, 32.0])
    factors = rng.standard_normal((15, 4)) * np.tile(4.0**-widths * 16, n_layers)[:, None]
    matrix = factors @ factors.T
    for k in range(n_layers):
        block = slice(3 * k, 3 * k + 3)
        matrix[block, block] = np.diag(np.diag(matrix[block, block]))
    sizes = params[:, None] * widths
    budgets = params.sum() * np.array([1.0, 3.0, 4.0])
    np.savez(
        tmp_path / "problem.npz",
        G=matrix,
        sizes=sizes,
        params=params,
        budgets=budgets,
        budget_names=np.array(["1", "3", "4"]),
    )
    return tmp_path / "problem.npz"


class TestSolve:
    def test_json(self, bitquota, file):
        """The members that scripts rely on are there; the budget is kept."""
        code, out, _ = bitquota("solve", file, "--budget-index", 1, "--json")

        found = json.loads(out)
        assert code == 0
        wanted = {"choice", "objective", "bound", "status", "limit", "cpu_seconds"}
        assert wanted <= set(found)
        assert found["status"] == "optimal"
        assert all(found["spent"][k] <= found["limits"][k] for k in found["limits"])

    def test_cross_check(self, bitquota, file):
        """The certificate is verified and another solver proves the same."""
        code, out, _ = bitquota("solve", file, "--budget-index", 1, "--cross-check", "--json")

        checked = json.loads(out)["cross_check"]
        assert code == 0
        assert checked["holds"]
        assert checked["confirmed"]

    def test_top_and_explanation(self, bitquota, file):
        """Alternatives come best first; every group's bits have a price."""
        code, out, _ = bitquota(
            "solve", file, "--budget-index", 1, "--top", 3, "--explain", "--json"
        )

        found = json.loads(out)
        objectives = [other["objective"] for other in found["top"]]
        assert code == 0
        assert objectives == sorted(objectives)
        assert len({tuple(other["choice"]) for other in found["top"]}) == 3
        assert len(found["explanation"]["groups"]) == 5

    def test_table_says_all_of_it(self, bitquota, file):
        """Without --json the same facts are readable."""
        code, out, _ = bitquota(
            "solve", file, "--budget-index", 1, "--top", 2, "--explain", "--cross-check"
        )

        assert code == 0
        for text in ("no choice is below", "buys", "certificate holds", "Other solvers", "2. obj"):
            assert text in out

    def test_tolerance(self, bitquota, file):
        """The smallest size for a loss is never larger than the size that reached it."""
        _, out, _ = bitquota("solve", file, "--budget-index", 1, "--json")
        best = json.loads(out)
        code, out, _ = bitquota(
            "solve", file, "--budget-index", 2, "--tolerance", best["objective"] * 1.001, "--json"
        )

        found = json.loads(out)
        assert code == 0
        assert found["cost"] <= next(iter(best["spent"].values()))
        assert found["bound"] <= found["cost"]

    def test_tolerance_ignores_nothing(self, bitquota, file):
        """Options that the smallest size has no use for are refused, not dropped."""
        code, _, err = bitquota(
            "solve", file, "--budget-index", 2, "--tolerance", 0.2, "--solver", "cp_sat", "--top", 3
        )
        assert code != 0
        assert "--solver, --top" in " ".join(err.split())

    def test_certificate_is_verified(self, bitquota, file, tmp_path):
        """The proof leaves in a file and holds; a changed answer, file or budget is refused."""
        solved = ("solve", file, "--budget-index", 1, "--json", "--certificate", "c.npz")
        code, out, _ = bitquota(*solved)
        (tmp_path / "s.json").write_text(out)
        assert code == 0

        code, out, _ = bitquota("verify", "s.json", file, "c.npz")
        assert code == 0
        assert out.index("Proved:") < out.index("no choice within") < out.index("Not proved:")
        found = json.loads(bitquota("verify", "s.json", file, "c.npz", "--json")[1])
        assert found["nodes"] >= 1

        again = (tmp_path / "c.npz").read_bytes()
        assert bitquota(*solved)[0] == 0
        assert (tmp_path / "c.npz").read_bytes() == again

        solution = json.loads((tmp_path / "s.json").read_text())
        better = solution | {"bound": solution["objective"] * 1.01}
        (tmp_path / "better.json").write_text(json.dumps(better))
        (tmp_path / "cut.npz").write_bytes(again[:-100])
        bitquota("solve", file, "--budget-index", 2, "--certificate", "other.npz")
        for arguments in (
            ("better.json", file, "c.npz"),
            ("s.json", file, "cut.npz"),
            ("s.json", file, "other.npz"),
        ):
            code, _, err = bitquota("verify", *arguments)
            assert code == 1
            assert err.startswith("error:")
            assert err.count("\n") == 1
        assert bitquota("verify", "s.json", file, "none.npz")[0] == 2
        assert bitquota("verify", file, file, "c.npz")[0] == 2

    def test_robust_is_verified_as_such(self, bitquota, file, tmp_path):
        """The answer names the standard errors that were added, and its proof is about them."""
        matrix_of(inventory_of(4)).save(tmp_path / "m.npz")
        solved = ("solve", "m.npz", "--budget", "3 bits", "--robust", 1.5, "--json")
        code, out, _ = bitquota(*solved, "--certificate", "c.npz")
        assert (0, 1.5) == (code, json.loads(out)["robust"])
        (tmp_path / "s.json").write_text(out)
        assert 0 == bitquota("verify", "s.json", "m.npz", "c.npz")[0]
        means = json.loads(out) | {"robust": 0.0}
        (tmp_path / "means.json").write_text(json.dumps(means))
        assert 1 == bitquota("verify", "means.json", "m.npz", "c.npz")[0]
        code, _, err = bitquota("solve", file, "--budget-index", 1, "--robust", 1)
        assert code == 2
        assert "standard errors" in err

    def test_other_solvers_give_no_certificate(self, bitquota, file):
        code, _, err = bitquota(
            "solve", file, "--budget-index", 1, "--solver", "brute_force", "--certificate", "c.npz"
        )
        assert code == 2
        assert "--solver brute_force" in err

    def test_infeasible(self, bitquota, file):
        """A budget that nothing meets ends with exit code 5 and what to raise."""
        code, _, err = bitquota("solve", file, "--budget-index", 0)

        assert code == 5
        assert "raise" in err

    def test_needs_one_budget(self, bitquota, file):
        """Neither or both ways to name a budget are an input error."""
        assert bitquota("solve", file)[0] == 2
        assert bitquota("solve", file, "--budget-index", 1, "-b", "3 bits")[0] == 2


class TestFrontier:
    def test_losses_fall_as_budgets_rise(self, bitquota, file):
        """Every point is certified and no larger budget is worse."""
        code, out, _ = bitquota("frontier", file, "--budget-index", 2, "--points", 6, "--json")

        points = json.loads(out)
        losses = [p["objective"] for p in points]
        assert code == 0
        assert losses == sorted(losses, reverse=True)
        assert all(p["bound"] <= p["objective"] for p in points)

    def test_table(self, bitquota, file):
        """The table has one row per budget."""
        code, out, _ = bitquota("frontier", file, "--budget-index", 2, "--points", 4)

        assert code == 0
        assert out.count("optimal") == 4

    def test_one_point_is_no_frontier(self, bitquota, file):
        """At least two."""
        assert bitquota("frontier", file, "--budget-index", 2, "--points", 1)[0] == 2

    def test_time_varies_with_a_table(self, bitquota, tmp_path):
        """The whole time of each point, the constant included; less time loses more."""
        matrix = matrix_of(inventory_of(3))
        matrix.save(tmp_path / "m.npz")
        table = CostTable(
            resource="latency_ns",
            model_digest="",
            constant=10_000,
            layers=tuple(
                LayerCost(layer=c.layer, candidate=c.label, cost=100 * c.weight_bits)
                for row in matrix.table.rows
                for c in row.candidates
            ),
        )
        (tmp_path / "t.json").write_text(json.dumps(table.to_json()))
        args = ("frontier", tmp_path / "m.npz", "--table", tmp_path / "t.json", "--json")
        code, out, _ = bitquota(*args, "--points", 3)

        points = json.loads(out)
        losses = [p["objective"] for p in points]
        assert code == 0
        assert losses == sorted(losses, reverse=True)
        assert all(10_000 < p["spent"]["latency_ns"] <= p["limits"]["latency_ns"] for p in points)
        assert bitquota(*args, "--budget", "3 bits")[0] == 2


class TestProblemFiles:
    @pytest.fixture
    def problem(self, tmp_path):
        """Return a document of two layers, whose 4-bit kernels are fused."""
        document = {
            "schema": "bitquota/problem/1",
            "groups": [
                {"name": name, "candidates": [
                    {"label": "W2", "loss": 1.0, "costs": {"ns": 50}},
                    {"label": "W4", "loss": 0.25, "costs": {"ns": 90}}]}
                for name in ("a", "b")
            ],
            "budgets": [{"resource": "ns", "limit": 150, "pairs": [
                {"first": ["a", "W4"], "second": ["b", "W4"], "cost": -40}]}],
            "top": 2,
        }  # fmt: skip
        path = tmp_path / "problem.json"
        path.write_text(json.dumps(document))
        return path

    def test_solved_and_verified(self, bitquota, problem, tmp_path):
        """The answer names the two layers, and its certificate proves it."""
        proof, answer = tmp_path / "proof.npz", tmp_path / "answer.json"
        code, out, _ = bitquota("solve", problem, "--json", "--certificate", proof)
        answer.write_text(out)
        found = json.loads(out)
        assert code == 0
        assert found["labels"] == ["W4", "W4"]
        assert found["spent"] == {"ns": 140}
        assert len(found["top"]) == 2

        code, out, _ = bitquota("verify", answer, problem, proof)
        assert code == 0
        assert "ns at most 150" in out
        found["objective"] = found["bound"] = 0.1
        answer.write_text(json.dumps(found))
        assert bitquota("verify", answer, problem, proof)[0] == 1

    @pytest.mark.parametrize(
        "options", [("-b", "3 bits"), ("--explain",), ("--tolerance", "1"), ("--robust", "1")]
    )
    def test_what_it_does_not_take(self, bitquota, problem, options):
        """One sentence and exit code 2."""
        code, _, err = bitquota("solve", problem, *options)
        assert code == 2
        assert err.startswith("error: ")
        assert "Traceback" not in err

    @pytest.mark.parametrize(
        "text", ['{"schema": "bitquota/problem/1"}', "[" * 100_000, "NaN", '{"schema": NaN}', ""]
    )
    def test_what_is_no_problem(self, bitquota, tmp_path, text):
        """One sentence and exit code 2."""
        path = tmp_path / "problem.json"
        path.write_text(text)
        code, _, err = bitquota("solve", path, "-b", "1x")
        assert code == 2
        assert "Traceback" not in err

    def test_schema(self, bitquota):
        """Printed without a file."""
        code, out, _ = bitquota("solve", "--schema")
        assert code == 0
        assert json.loads(out)["properties"]["schema"] == {"const": "bitquota/problem/1"}


class TestNumbers:
    @pytest.mark.parametrize(
        "budget", ["9" * 5000, "9" * 5000 + " bits", "1e400", "nan bits", "-1", "inf", "²", "1/0"]
    )
    @pytest.mark.parametrize("kind", ["plain", "matrix"])
    def test_budgets_that_are_none(self, bitquota, file, tmp_path, kind, budget):
        """One sentence and exit code 2, whatever the file."""
        if kind == "matrix":
            file = tmp_path / "matrix.npz"
            matrix_of(inventory_of(3)).save(file)
        code, _, err = bitquota("solve", file, f"--budget={budget}")
        assert code == 2
        assert err.startswith("error: ")
        assert len(err) < 1000

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--gap", "nan"), ("--tolerance", "nan"), ("--time-limit", "nan"), ("--robust", "inf")],
    )
    def test_options_that_are_none(self, bitquota, tmp_path, option, value):
        """One sentence and exit code 2."""
        file = tmp_path / "matrix.npz"
        matrix_of(inventory_of(3)).save(file)
        code, _, err = bitquota("solve", file, "-b", "3 bits", option, value)
        assert code == 2
        assert "Traceback" not in err

    @pytest.mark.parametrize("size", [1e300, np.inf, np.nan, -1.0, 0.5])
    def test_sizes_that_are_none(self, bitquota, file, size):
        """One sentence and exit code 2."""
        with np.load(file) as archive:
            arrays = dict(archive)
        arrays["sizes"][0, 0] = size
        np.savez(file, **arrays)
        code, _, err = bitquota("solve", file, "--budget-index", 1)
        assert code == 2
        assert err.startswith("error: ")

    def test_weights_of_a_matrix_in_bytes(self, bitquota, tmp_path):
        """A budget of its weights in any unit."""
        file = tmp_path / "matrix.npz"
        matrix_of(inventory_of(3)).save(file)
        code, out, _ = bitquota("solve", file, "-b", "16.5 KiB of weights", "--json")
        assert code == 0
        assert json.loads(out)["limits"] == {"size_bits": 135_168}
