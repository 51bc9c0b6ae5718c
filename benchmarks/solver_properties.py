"""Many random small problems with random mixes of constraints: solver, enumeration, checker.

Every answer must equal enumeration, and every certificate must pass the independent checker. Ends
with an error at the first problem that does not; ``--save FILE`` keeps that problem bit for bit
(``bitquota.solver.archive.problem_from_bytes``), ``--shrink`` looks for the smallest one (slow).

    python benchmarks/solver_properties.py --examples 10000 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path

import hypothesis
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from typing import TYPE_CHECKING

from bitquota.solver.archive import problem_to_bytes
from solver_claims import GAP, assert_equals_brute_force
from strategies import any_problems

if TYPE_CHECKING:
    from bitquota.solver import Problem


def main() -> None:
    """Run the properties and print what was covered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    phases = [hypothesis.Phase.generate, *[hypothesis.Phase.shrink] * given.shrink]
    tally: collections.Counter[str] = collections.Counter()

    @hypothesis.seed(given.seed)
    @hypothesis.settings(
        max_examples=given.examples,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        any_problems(max_groups=given.groups, max_rows=given.rows),
        st.sampled_from([GAP, 1e-4, 1e-2]),
        st.integers(0, 3),
        st.booleans(),
    )
    def holds(problem: Problem, gap: float, seed: int, listed: bool) -> None:  # noqa: FBT001
        problem = problem.listed() if listed else problem
        try:
            solution = assert_equals_brute_force(problem, gap=gap, seed=seed)
        except BaseException:
            if given.save:
                given.save.write_bytes(problem_to_bytes(problem))
            print(f"failed after {tally['problems']} problems, at gap {gap}, seed {seed}")
            raise
        tally["problems"] += 1
        tally[f"status {solution.status}"] += 1
        tally["with a certificate"] += solution.certificate is not None
        tally["several budgets"] += len(problem.limits) > 1
        tally["pairs"] += len(problem.forbidden_pairs) + len(problem.required_pairs) > 0
        tally["forbidden rows"] += not problem.allowed.all()
        tally["cross terms"] += problem.cross is not None
        tally["cross terms as a list"] += len(problem.terms) > 0
        tally["more than one node"] += solution.stats.nodes > 1
        tally["nodes"] += solution.stats.nodes

    begin = time.process_time()
    holds()
    for name, count in tally.items():
        print(f"{name:24s} {count:>10,}")
    print(f"{'CPU seconds':24s} {time.process_time() - begin:>10.1f}")


if __name__ == "__main__":
    main()
