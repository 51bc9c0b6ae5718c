"""A certificate file proves what it is for, and nothing that was changed or belongs elsewhere."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitquota.candidates.budget import Budget
from bitquota.errors import GateFailed
from bitquota.plan import Assignment
from bitquota.solver import build_problem, solve
from bitquota.solver.archive import CertificateFile, certificate_file, problem_digest
from bitquota.solver.document import solution_json
from bitquota.solver.verify import choice_of, verify_plan, verify_solution
from seeded_jobs import inventory_of, matrix_of, plan_of


def chosen_by(plan, matrix):
    return choice_of(matrix.table, [a.candidate for a in plan.assignments])


@pytest.fixture(scope="module")
def made():
    """Return a plan of six layers, its matrix, its problem and the solver's certificate."""
    inventory = inventory_of(6)
    matrix = matrix_of(inventory)
    plan = plan_of(inventory, matrix, "3.3 bits")
    problem = build_problem(matrix, plan.budgets)
    solution = solve(problem, gap=1e-9)
    assert solution.choice.tolist() == chosen_by(plan, matrix).tolist()
    proof = replace(plan.proof, bound=solution.bound, objective=solution.objective)
    return replace(plan, proof=proof), matrix, problem, solution.certificate


@pytest.fixture(scope="module")
def data(made):
    _, matrix, problem, certificate = made
    return certificate_file(certificate, problem, matrix.digest())


class TestVerifyPlan:
    def test_optimum(self, made, data):
        """The solver's own plan is the optimum; what is said names matrix, base and gap."""
        plan, matrix, problem, _ = made
        found = verify_plan(plan, matrix, data)
        assert found.optimal
        assert found.problem == problem_digest(problem)
        assert found.bound == plan.proof.bound
        said = " ".join(found.proved())
        assert matrix.digest() in said
        assert "full precision" in said
        assert "3.3 bits" in said
        assert not any("optimum" in text for text in found.not_proved())
        assert json.loads(json.dumps(found.to_json()))["gap"] == found.gap

    def test_refined_plan_is_not_called_the_optimum(self, made, data):
        """A plan that measured better than the optimum keeps the bound, and that is said."""
        plan, matrix, problem, _ = made
        choice = chosen_by(plan, matrix)
        choice[np.argmax(choice)] -= 1  # a smaller candidate somewhere: within every budget
        chosen = {c.layer: c for c in matrix.table.decode(choice)}
        other = replace(
            plan,
            assignments=tuple(
                Assignment(layer=a.layer, candidate=chosen[a.layer.name]) for a in plan.assignments
            ),
            proof=replace(plan.proof, objective=problem.evaluate(choice)),
        )
        found = verify_plan(other, matrix, data)
        assert not found.optimal
        assert "optimum" in found.not_proved()[0]
        assert found.bound == plan.proof.bound

    @pytest.mark.parametrize(
        "change",
        [
            {"bound": 1e-9},  # above what is proved
            {"objective": -1e-9},
            {"bound": math.nan},
            {"bound": math.inf},
            {"matrix_digest": "sha256:0"},
            {"bound": None},
        ],
    )
    def test_changed_claims_are_refused(self, made, data, change):
        """A better bound or objective than the certificate proves is no longer proved."""
        plan, matrix, *_ = made
        values = {
            name: getattr(plan.proof, name) + by if isinstance(by, float) else by
            for name, by in change.items()
        }
        with pytest.raises(GateFailed):
            verify_plan(replace(plan, proof=replace(plan.proof, **values)), matrix, data)

    def test_foreign_files_are_refused(self, made, data):
        """Another matrix, another budget's certificate, and another model's plan."""
        plan, matrix, *_ = made
        other = matrix_of(inventory_of(6), seed=1)
        with pytest.raises(GateFailed) as refused:
            verify_plan(plan, other, data)
        assert refused.value.details == {"wanted": matrix.digest(), "got": other.digest()}

        budget = Budget.parse("4 bits", inventory_of(6))
        larger = build_problem(matrix, [budget])
        wrong = certificate_file(solve(larger).certificate, larger, matrix.digest())
        with pytest.raises(GateFailed) as refused:
            verify_plan(plan, matrix, wrong)
        assert refused.value.details["got"] == problem_digest(build_problem(matrix, plan.budgets))

        stranger = matrix_of(inventory_of(6, "encoder"))
        claimed = replace(plan.proof, matrix_digest=stranger.digest())
        with pytest.raises(GateFailed, match="encoder"):
            verify_plan(replace(plan, proof=claimed), stranger, data)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(drawn=st.data())
    def test_no_changed_byte_is_believed(self, made, data, drawn):
        """Whichever byte is changed: refused with a sentence, or it was no part of the content."""
        plan, matrix, *_ = made
        at = drawn.draw(st.integers(0, len(data) - 1))
        bit = drawn.draw(st.integers(0, 7))
        bad = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        try:
            found = verify_plan(plan, matrix, bad)
        except GateFailed:
            return
        assert CertificateFile.from_bytes(bad).to_bytes() == data
        assert found == verify_plan(plan, matrix, data)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(drawn=st.data())
    def test_no_forged_number_raises_the_bound(self, made, data, drawn):
        """A forger who also computes the digest anew cannot claim more than is proved."""
        plan, matrix, problem, certificate = made
        names = ("parent", "allowed", "convexification", "point", "multipliers")
        name = names[drawn.draw(st.integers(0, len(names) - 1))]
        array = getattr(certificate, name).copy()
        at = drawn.draw(st.integers(0, 10**6)) % array.size
        by = drawn.draw(st.integers(0, 4))
        array.flat[at] = array.flat[at] * 2 if by == 4 else (0, 1, 2, 200)[by]
        forged = replace(certificate, bound=certificate.bound + 1e-6, **{name: array})
        claimed = replace(plan.proof, bound=plan.proof.bound + 1e-6)
        with pytest.raises(GateFailed):
            verify_plan(
                replace(plan, proof=claimed),
                matrix,
                certificate_file(forged, problem, matrix.digest()),
            )

    @pytest.mark.parametrize(
        "arrays",
        [
            {"parent": np.array(["a"])},
            {"point": np.zeros(3)},
            {"convexification0_support": np.zeros((2, 2), dtype=np.bool_)},
            {"allowed": np.array(1, dtype=np.uint8)},
        ],
    )
    def test_arrays_of_another_kind_are_refused(self, made, data, arrays):
        """Text for numbers, axes too few or too many: a sentence, no numpy error."""
        from bitquota.solver import archive

        plan, matrix, *_ = made
        meta, given_arrays = archive._unpack(data, archive._PROOF)
        meta.pop("digest")
        given_arrays |= arrays
        bad = archive._pack(meta | {"digest": archive._digest(meta, given_arrays)}, given_arrays)
        with pytest.raises(GateFailed):
            verify_plan(plan, matrix, bad)


class TestVerifySolution:
    def test_answer_of_solve(self, made, data):
        """What 'solve --json' prints is verified as a plan is."""
        _, matrix, problem, _ = made
        document = json.loads(json.dumps(solution_json(problem, solve(problem, gap=1e-9))))
        found = verify_solution(document, problem, matrix, data)
        assert found.optimal
        assert found.subject == "solution"
        with pytest.raises(GateFailed):
            verify_solution(document | {"bound": document["bound"] + 1e-9}, problem, matrix, data)


class TestCertificateFile:
    def test_equal_values_give_equal_bytes(self, made, data):
        """Canonical bytes, and the round trip gives them again."""
        kept = CertificateFile.from_bytes(data)
        assert kept.to_bytes() == data
        assert kept.matrix == made[1].digest()
        with np.load(io.BytesIO(data)) as archive:
            assert "meta" in archive.files
