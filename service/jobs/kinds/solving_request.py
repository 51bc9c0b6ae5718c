"""Requests of the kinds that solve a stored matrix, and what those kinds share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from bitquota.service.jobs.work import Work
    from bitquota.solver import Problem


class SolvingRequest(BaseModel):
    """A budget of a stored matrix, and how long to look."""

    model_config = ConfigDict(extra="forbid")

    budget: str | None = Field(
        default=None, max_length=200, description="`3 bits`, `3.6 bpw` or a whole number of bits."
    )
    budget_index: int | None = Field(
        default=None, ge=0, description="Which of the file's own budgets, in its place."
    )
    gap: float = Field(default=1e-4, ge=0, lt=1, description="Relative gap to stop at.")
    time_limit_s: float | None = Field(default=None, gt=0, description="Seconds to solve.")
    node_limit: int | None = Field(
        default=None, ge=1, description="Branch-and-bound nodes; unlike seconds, reproducible."
    )
    seed: int = Field(default=0, ge=0, lt=2**31)


def problem_of(work: Work) -> Problem:
    """Return the problem that a job is about."""
    from bitquota.solver import read_problem

    (path,) = work.paths("matrix")
    request = work.request
    return read_problem(
        path,
        budget_index=request["budget_index"],
        budget=request["budget"],
        robust=request.get("robust", 0.0),
    )
