"""``bitquota.lock.json``: what was decided, in git, byte-stable.

The file holds the plan, the target, the limits that it must keep, and the receipts of its
exports. Everything that may differ between two runs of the same plan stands under ``volatile``,
which no digest covers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from bitquota.canonical import digest_json, read_json, schema_of, write_whole
from bitquota.errors import InvalidInput, InvalidPlan
from bitquota.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from bitquota.canonical import JsonObject
    from bitquota.exports.receipt import Receipt

SCHEMA = "bitquota/lock/1"
LOCK_FILE = "bitquota.lock.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a plan must keep; ``None`` is not checked.

    Attributes:
        max_kl: Mean loss increase over full precision, in the plan's unit.
        max_drop: Top-1 accuracy lost against full precision, in points (0.5 is half a per cent).
        max_bytes: Stored size of the whole model.
        max_file_bytes: Size of all exported files together.
        not_worse_than: Prefix of the names of baselines that must not measure better, such as
            ``uniform``: those of no more bytes than the plan, or within its budgets, count.
    """

    max_kl: float | None = None
    max_drop: float | None = None
    max_bytes: int | None = None
    max_file_bytes: int | None = None
    not_worse_than: str | None = None

    def __post_init__(self) -> None:
        """Refuse limits that nothing could keep."""
        for name in ("max_kl", "max_drop", "max_bytes", "max_file_bytes"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                msg = f"{name} must be at least 0; got {value}"
                raise InvalidInput(msg, **{name: value})

    def override(self, other: Limits) -> Limits:
        """Return these limits with those that ``other`` sets in their place."""
        given = {k: v for k, v in asdict(other).items() if v is not None}
        return Limits(**(asdict(self) | given))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A decision that is kept in git.

    Attributes:
        plan: What was decided.
        target: Name of the deployment target, if one was named.
        limits: What ``bitquota check`` holds the plan to.
        exports: Receipts of the exports, as plain JSON.
        volatile: Dates, durations, machine: covered by no digest.
    """

    plan: Plan
    target: str | None = None
    limits: Limits = field(default_factory=Limits)
    exports: tuple[JsonObject, ...] = ()
    volatile: JsonObject = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """Return everything as plain JSON; the digest covers all but ``volatile``."""
        body = {
            "schema": SCHEMA,
            "plan": self.plan.to_json(),
            "target": self.target,
            "limits": asdict(self.limits),
            "exports": list(self.exports),
        }
        return body | {"digest": digest_json(body), "volatile": self.volatile}

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
    def from_json(cls, data: Any) -> Self:  # noqa: ANN401  # whatever a file held
        """Rebuild from ``to_json``.

        Raises:
            InvalidPlan: Another schema, a missing member, or a digest that does not fit: the
                file was edited by hand.
        """
        got = data.get("schema") if isinstance(data, dict) else type(data).__name__
        if got != SCHEMA:
            msg = f"a lock file must be a JSON object of schema '{SCHEMA}'; got {schema_of(data)}"
            raise InvalidPlan(msg)
        try:
            lock = cls(
                plan=Plan.from_json(data["plan"]),
                target=data["target"],
                limits=Limits(**data["limits"]),
                exports=tuple(data["exports"]),
                volatile=data.get("volatile", {}),
            )
        except (KeyError, TypeError) as err:
            msg = f"a lock file must have every member of '{SCHEMA}'; got: {err!r}"
            raise InvalidPlan(msg) from err
        if data.get("digest") != lock.digest():
            msg = (
                "the digest of a lock file must fit its content; this one was edited: write it "
                "anew with 'bitquota lock'"
            )
            raise InvalidPlan(msg, digest=data.get("digest"), computed=lock.digest())
        return lock

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
    receipts: tuple[Receipt, ...] = (),
    volatile: Mapping[str, Any] | None = None,
) -> Lock:
    """Return the lock of a plan and what was exported from it.

    Raises:
        InvalidInput: A receipt is of another plan, or the target is unknown.
        InvalidPlan: The plan breaks the target's rules.
    """
    if target is None and plan.target is not None:
        target = plan.target.name
    if target is not None:
        from bitquota.candidates.targets import target_by_name

        target_by_name(target).require(plan)
    for receipt in receipts:
        if receipt.plan_digest != plan.digest():
            msg = f"a lock's receipts must be of its plan; one is of {receipt.plan_digest[:19]}…"
            raise InvalidInput(msg, plan=plan.digest())
    return Lock(
        plan=plan,
        target=target,
        limits=limits or Limits(),
        exports=tuple(receipt.to_json() for receipt in receipts),
        volatile=dict(volatile or {}),
    )
