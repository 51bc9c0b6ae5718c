"""The kinds of job, each in a file of its own; add one there and to the map below."""

from __future__ import annotations

from bitquota.errors import InvalidInput
from bitquota.service.jobs.kinds import (
    compare,
    estimate,
    evaluate,
    export,
    finetune,
    frontier,
    learn,
    measure,
    plan,
    solve,
)
from bitquota.service.jobs.kinds.kind import Input, JobKind, Result

KINDS: dict[str, JobKind] = {
    module.KIND.name: module.KIND
    for module in (
        plan,
        estimate,
        measure,
        solve,
        frontier,
        evaluate,
        export,
        compare,
        finetune,
        learn,
    )
}
"""In the order of the documentation."""

__all__ = ["KINDS", "Input", "JobKind", "Result", "kind_by_name"]


def kind_by_name(name: str) -> JobKind:
    """Return the kind called ``name``; raises ``InvalidInput`` that lists them."""
    if name not in KINDS:
        msg = f"the kind of a job must be one of {', '.join(KINDS)}; got '{name}'"
        raise InvalidInput(msg, kind=name)
    return KINDS[name]
