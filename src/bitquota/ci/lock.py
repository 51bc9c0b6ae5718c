"""``bitquota.lock.json``: what was decided, in git, byte-stable.

The file holds the plan, the target, the limits that it must keep, and the export reports of its
exports. Everything that may differ between two runs of the same plan stands under ``volatile``,
which no digest covers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from bitquota.candidates.targets import target_by_name
from bitquota.canonical import JsonObject, read_json, write_whole
from bitquota.codec import Document, Form, Seal
from bitquota.errors import InvalidInput, InvalidPlan
from bitquota.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from bitquota.exports.export_report import ExportReport

SCHEMA = "bitquota/lock/1"
LOCK_FILE = "bitquota.lock.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits(Document):
    """What a plan must keep; ``None`` is not checked.

    Attributes:
        max_kl: Mean loss increase over full precision, in the plan's unit.
        max_drop: Top-1 accuracy lost against full precision, in points (0.5 is half a per cent).
        max_bytes: Stored size of the whole model.
        max_file_bytes: Size of all exported files together.
        not_worse_than: Prefix of the names of baselines that must not measure better, such as
            ``uniform``: those of no more bytes than the plan, or within its budgets, count.
        max_latency_ns: Time of one run: as the plan's cost table predicts it, and as its exports
            were timed.
        latency_tolerance: Share of that limit by which a timed run may exceed it.
    """

    # Files without these keep the bytes that they always had.
    FORM: ClassVar[Form] = Form(what="limits", left_out=("max_latency_ns", "latency_tolerance"))

    max_kl: float | None = None
    max_drop: float | None = None
    max_bytes: int | None = None
    max_file_bytes: int | None = None
    not_worse_than: str | None = None
    max_latency_ns: int | None = None
    latency_tolerance: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that nothing could keep."""
        for name in (
            "max_kl", "max_drop", "max_bytes", "max_file_bytes", "max_latency_ns",
            "latency_tolerance",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= 0:
                msg = f"{name} must be at least 0; got {value}"
                raise InvalidInput(msg, **{name: value})

    def override(self, other: Limits) -> Limits:
        """Return these limits with those that ``other`` sets in their place."""
        given = {k: v for k, v in asdict(other).items() if v is not None}
        return Limits(**(asdict(self) | given))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock(Document):
    """A decision that is kept in git.

    Attributes:
        plan: What was decided.
        target: Name of the deployment target, if one was named.
        limits: What ``bitquota check`` holds the plan to.
        exports: Reports of the exports, as plain JSON.
        folders: Where each of them lay when the file was written, relative to it; ``None`` in files
            of earlier releases.
        volatile: Dates, durations, machine: covered by no digest.
    """

    FORM: ClassVar[Form] = Form(
        what="a lock file",
        error=InvalidPlan,
        schema=SCHEMA,
        left_out=("folders",),
        seal=Seal(leaves_out=("volatile",), remedy="write it anew with 'bitquota lock'"),
    )

    plan: Plan
    target: str | None = None
    limits: Limits = field(default_factory=Limits)
    exports: tuple[JsonObject, ...] = ()
    volatile: JsonObject = field(default_factory=dict)
    folders: tuple[str, ...] | None = None

    def digest(self) -> str:
        """Return the content digest."""
        return str(self.to_json()["digest"])

    def dumps(self) -> str:
        """Return the text of the file: sorted and indented, so that a diff in git reads well."""
        text = json.dumps(
            self.to_json(), sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False
        )
        return text + "\n"

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        write_whole(path, self.dumps().encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a lock file; raises ``InvalidPlan``."""
        advice = "'bitquota lock PLAN' writes one"
        return cls.from_json(read_json(path, "a lock file", advice, InvalidPlan))


def make_lock(
    plan: Plan,
    *,
    target: str | None = None,
    limits: Limits | None = None,
    reports: tuple[ExportReport, ...] = (),
    volatile: Mapping[str, Any] | None = None,
    folders: tuple[str, ...] | None = None,
) -> Lock:
    """Return the lock of a plan and what was exported from it.

    Raises:
        InvalidInput: An export report is of another plan, or the target is unknown.
        InvalidPlan: The plan breaks the target's rules.
    """
    if target is None and plan.target is not None:
        target = plan.target.name
    if target is not None:
        plan.require(target_by_name(target))
    for report in reports:
        if report.plan_digest != plan.digest():
            msg = f"the exports of a lock must be of its plan; one is of {report.plan_digest[:19]}…"
            raise InvalidInput(msg, plan=plan.digest())
    return Lock(
        plan=plan,
        target=target,
        limits=limits or Limits(),
        exports=tuple(report.to_json() for report in reports),
        volatile=dict(volatile or {}),
        folders=folders or None,
    )
