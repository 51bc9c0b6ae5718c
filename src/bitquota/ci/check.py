"""``bitquota check``: hold a lock file to its model, target, bytes and quality limits."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from xml.etree import ElementTree as ET

from bitquota.candidates.cost_table import LATENCY, format_cost
from bitquota.candidates.targets import target_by_name
from bitquota.codec import Document, Form
from bitquota.errors import GateFailed, InvalidInput, InvalidPlan, StalePlan
from bitquota.exports.export_report import ExportedFile, ExportReport
from bitquota.plan import ONLY_WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bitquota.candidates.cost_table import CostTable
    from bitquota.canonical import JsonObject
    from bitquota.ci.lock import Limits, Lock
    from bitquota.plan import Baseline, MeasuredLoss, Plan

LATENCY_TOLERANCE = 0.1
"""Share of a limit by which a timed run may exceed it: machines are not equally fast all day."""
STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
"""Environment variable that names the file of a GitHub job's summary."""


class Status(StrEnum):
    """How one check came out."""

    PASSED = "passed"
    FAILED = "failed"
    STALE = "stale"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One check: what must hold, what was got, what to do."""

    check: str
    status: Status
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A fresh measurement of the plan, to be held against the limits.

    Attributes:
        measured: The plan's loss increase (and accuracy).
        full_precision: Of the unquantized model, for the drop in accuracy.
        baselines: Baselines by name, measured on the same samples.
    """

    measured: MeasuredLoss
    full_precision: MeasuredLoss | None = None
    baselines: Mapping[str, MeasuredLoss] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport(Document):
    """All checks of one lock file."""

    FORM: ClassVar[Form] = Form(derived=("exit_code",))

    lock_digest: str
    outcomes: tuple[Outcome, ...]

    @property
    def exit_code(self) -> int:
        """0 if all passed, 4 if something is stale, 1 if a limit is broken."""
        statuses = {outcome.status for outcome in self.outcomes}
        if Status.STALE in statuses:
            return StalePlan.exit_code
        return GateFailed.exit_code if Status.FAILED in statuses else 0

    def require(self) -> None:
        """Raise ``StalePlan`` or ``GateFailed`` with every message, unless all passed."""
        bad = [o for o in self.outcomes if o.status in (Status.FAILED, Status.STALE)]
        if bad:
            kind = StalePlan if self.exit_code == StalePlan.exit_code else GateFailed
            raise kind("; ".join(o.message for o in bad), checks=[o.check for o in bad])

    def to_markdown(self, name: str) -> str:
        """Return a table for a job summary, under the name of the lock file."""
        verdict = {0: "passed", 1: "failed", 4: "is stale"}[self.exit_code]
        lines = [
            f"### Bitquota check of {name} {verdict}",
            "",
            "| check | result | |",
            "|---|---|---|",
        ]
        for o in self.outcomes:
            mark = {"passed": "✅", "failed": "❌", "stale": "⏳", "skipped": "➖"}[o.status]
            message = o.message.replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {o.check} | {mark} {o.status} | {message} |")
        return "\n".join(lines) + "\n"


def worst_exit_code(reports: Iterable[CheckReport]) -> int:
    """Return the code for several reports: stale outranks failed, failed outranks passed."""
    return max((report.exit_code for report in reports), default=0)


def to_junit(reports: Mapping[str, CheckReport]) -> str:
    """Return JUnit XML: a suite per lock file, a case per check; stale counts as an error."""
    root = ET.Element("testsuites")
    for name, report in reports.items():
        counts = {s: sum(o.status is s for o in report.outcomes) for s in Status}
        suite = ET.SubElement(
            root,
            "testsuite",
            name=f"bitquota check {name}",
            tests=str(len(report.outcomes)),
            failures=str(counts[Status.FAILED]),
            errors=str(counts[Status.STALE]),
            skipped=str(counts[Status.SKIPPED]),
        )
        for o in report.outcomes:
            case = ET.SubElement(suite, "testcase", classname="bitquota.check", name=o.check)
            tag = {"failed": "failure", "stale": "error", "skipped": "skipped"}.get(o.status)
            if tag:
                ET.SubElement(case, tag, message=o.message).text = o.message
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, "unicode") + "\n"


def check_lock(
    lock: Lock,
    *,
    model_digest: str | None = None,
    weights_digest: str | None = None,
    plan: Plan | None = None,
    folders: Sequence[Path] = (),
    quality: Quality | None = None,
    limits: Limits | None = None,
    base: Lock | None = None,
    root: Path | None = None,
    table: CostTable | None = None,
) -> CheckReport:
    """Check a lock file against whatever is given.

    Args:
        lock: The file in git.
        model_digest: Fingerprint of the model as it is now.
        weights_digest: Of its weights alone, by which earlier releases named a model.
        plan: A plan just made, which the lock must hold (else it is stale).
        folders: Exports, each of which must hold the files of one of the lock's export reports; by
            default those that the lock names, as far as they are there.
        quality: A fresh measurement; without one the plan's own record is held to the limits.
        limits: Override the lock's own.
        base: The lock of the branch that this one is merged into: the model must not grow.
        root: Folder of the lock file, where the folders that it names are looked for.
        table: The cost table as it is now, which the plan must have been made with.

    Cost: hashes the files of ``folders``.
    """
    wanted = lock.limits if limits is None else lock.limits.override(limits)
    folders = folders or _named_folders(lock, root)
    outcomes = [
        _fingerprint(lock, model_digest, weights_digest),
        _same_plan(lock, plan),
        _target(lock),
        _bytes(lock, wanted, base),
        *_files(lock, folders, wanted),
        *_latency(lock, wanted, table, folders),
        _loss(lock, quality, wanted),
        _drop(lock, quality, wanted),
        _baselines(lock, quality, wanted),
    ]
    return CheckReport(lock_digest=lock.digest(), outcomes=tuple(outcomes))


def append_step_summary(markdown: str, environment: Mapping[str, str]) -> bool:
    """Append to the job summary if ``GITHUB_STEP_SUMMARY`` names one; say whether it did.

    Raises:
        InvalidInput: The file cannot be written.
    """
    name = environment.get(STEP_SUMMARY)
    if not name:
        return False
    try:
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(markdown)
    except OSError as err:
        msg = f"{STEP_SUMMARY} must name a file that can be written; '{name}': {err}"
        raise InvalidInput(msg, path=name) from err
    return True


def _is_fair(plan: Plan, baseline: Baseline) -> bool:
    """Whether a baseline takes no more bytes than the plan, or keeps the budgets it was made for.

    A budget of "3 bits" counts codes: uniform 3 bits keeps it, at a few bytes more of scales.
    """
    if baseline.total_bits <= plan.size_bits + plan.cache_size_bits:
        return True
    try:
        candidates = plan.candidates_of(baseline)
        cached = plan.caches_at(baseline.cache_bits)
        replace(
            plan,
            assignments=tuple(
                replace(a, candidate=c) for a, c in zip(plan.assignments, candidates, strict=True)
            ),
            caches=tuple(replace(a, candidate=c) for a, c in zip(plan.caches, cached, strict=True)),
        )
    except InvalidPlan:
        return False
    return bool(plan.budgets)


def _outcome(check: str, *, holds: bool, message: str, stale: bool = False) -> Outcome:
    bad = Status.STALE if stale else Status.FAILED
    return Outcome(check=check, status=Status.PASSED if holds else bad, message=message)


def _skipped(check: str, why: str) -> Outcome:
    return Outcome(check=check, status=Status.SKIPPED, message=why)


def _fingerprint(lock: Lock, digest: str | None, weights_digest: str | None) -> Outcome:
    check = "model fingerprint"
    if digest is None:
        return _skipped(check, "no model was given")
    planned = lock.plan.model_digest
    if planned == digest:
        return _outcome(check, holds=True, message="the model is the one the plan was made for")
    if planned == weights_digest:
        return _outcome(check, holds=True, message=ONLY_WEIGHTS)
    text = (
        f"the plan was made for {planned[:19]}…, the model is now {digest[:19]}…: its weights or "
        "what it computes with them changed, plan again and commit the new lock file"
    )
    return _outcome(check, holds=False, message=text, stale=True)


def _same_plan(lock: Lock, plan: Plan | None) -> Outcome:
    check = "lock is current"
    if plan is None:
        return _skipped(check, "no plan was given")
    same = plan.digest() == lock.plan.digest()
    text = (
        "the lock holds this plan"
        if same
        else f"the lock holds {lock.plan.digest()[:19]}…, the plan is {plan.digest()[:19]}…: "
        "write the lock file anew"
    )
    return _outcome(check, holds=same, message=text, stale=True)


def _target(lock: Lock) -> Outcome:
    check = "target"
    if lock.target is None:
        return _skipped(check, "the lock names no target")
    found = lock.plan.violations(target_by_name(lock.target))
    if not found:
        return _outcome(check, holds=True, message=f"{lock.target} can store every layer")
    shown = "; ".join(f"{', '.join(v.layers)}: {v.reason}" for v in found[:3])
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    text = f"{lock.target} cannot store {shown}{more}: plan with --target {lock.target}"
    return _outcome(check, holds=False, message=text)


def _bytes(lock: Lock, limits: Limits, base: Lock | None) -> Outcome:
    check = "bytes of the model"
    size = -(-lock.plan.model_bits // 8)
    caps = {}
    if limits.max_bytes is not None:
        caps["the limit"] = limits.max_bytes
    if base is not None:
        caps["the base branch"] = -(-base.plan.model_bits // 8)
    if not caps:
        return _skipped(check, f"{size:,} bytes; no limit was set")
    who, cap = min(caps.items(), key=lambda item: item[1])
    text = f"{size:,} bytes, {who} is {cap:,}"
    return _outcome(
        check, holds=size <= cap, message=text if size <= cap else f"{text}: lower the budget"
    )


def _named_folders(lock: Lock, root: Path | None) -> tuple[Path, ...]:
    """Return the folders of exports that the lock names and that are there."""
    if root is None:
        return ()
    return tuple(root / name for name in lock.folders or () if (root / name).is_dir())


def require_limits(lock: Lock) -> None:
    """Raise ``GateFailed`` if the plan, as it is recorded, breaks a limit of its own lock.

    What cannot be told without samples, such as a drop in accuracy, is left to ``check_lock``.
    """
    limits, plan = lock.limits, lock.plan
    outcomes = [_bytes(lock, limits, None), *_latency(lock, limits)]
    if limits.max_file_bytes is not None and lock.exports:
        sizes = [item["size_bytes"] for report in lock.exports for item in report["files"]]
        outcomes.append(_file_bytes(sum(sizes), limits.max_file_bytes))
    if plan.measured is not None:
        outcomes.append(_loss(lock, None, limits))
        prefix = limits.not_worse_than
        if prefix is not None and any(b.name.startswith(prefix) for b in plan.baselines):
            outcomes.append(_baselines(lock, None, limits))
    broken = [o for o in outcomes if o.status is Status.FAILED]
    if broken:
        found = "; ".join(f"{o.check}: {o.message}" for o in broken)
        msg = f"a plan must keep the limits that it is locked with; {found}; or set other limits"
        raise GateFailed(msg, checks=[o.check for o in broken])


def _file_bytes(total: int, limit: int) -> Outcome:
    text = f"{total:,} bytes in files, the limit is {limit:,}"
    return _outcome("bytes of the files", holds=total <= limit, message=text)


def _files(lock: Lock, folders: Sequence[Path], limits: Limits) -> Sequence[Outcome]:
    check = "exported files"
    if not folders:
        named = ", ".join(lock.folders or ())
        why = f"'{named}' is not here" if named else "no folder was given"
        return [_skipped(check, f"{why}: name it with --exported" if named else why)]
    known = {(report["exporter"], report["target"]): report for report in lock.exports}
    outcomes = []
    total = 0
    for folder in folders:
        try:
            found = ExportReport.load(folder)
        except InvalidInput as err:
            outcomes.append(_outcome(check, holds=False, message=f"{err}: export again"))
            continue
        report = known.get((found.exporter, found.target))
        if report is None:
            text = (
                f"the lock holds no export to {found.target or found.exporter} like that of "
                f"'{folder}': write the lock with --exported {folder}"
            )
            outcomes.append(_outcome(check, holds=False, message=text, stale=True))
            continue
        wrong, size = _differences(folder, report["files"])
        total += size
        text = "; ".join(wrong) or f"{len(report['files'])} files are those of the export report"
        if wrong:
            text = f"in '{folder}' {text}: export again"
        outcomes.append(_outcome(check, holds=not wrong, message=text))
    if limits.max_file_bytes is not None:
        outcomes.append(_file_bytes(total, limits.max_file_bytes))
    return outcomes


def _differences(folder: Path, expected: Sequence[JsonObject]) -> tuple[list[str], int]:
    """Return what is wrong with the files of an export, and the bytes that they take."""
    wrong = []
    total = 0
    for item in expected:
        name = item["name"]
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
            continue
        actual = ExportedFile.of(path, folder)
        total += actual.size_bytes
        if actual.size_bytes != item["size_bytes"]:
            wrong.append(f"{name} has {actual.size_bytes:,} bytes, not {item['size_bytes']:,}")
        elif actual.digest != item["digest"]:
            wrong.append(f"{name} has other content")
    return wrong, total


def _latency(
    lock: Lock, limits: Limits, table: CostTable | None = None, folders: Sequence[Path] = ()
) -> list[Outcome]:
    """Hold the predicted time, the times of exports, and the cost table to what they must be.

    Exports were timed when they were written: those in ``folders``, else those in the lock.
    """
    check, plan = "latency", lock.plan
    budget = next((b for b in plan.budgets if b.resource == LATENCY and b.prices), None)
    prices = None if budget is None else budget.prices
    outcomes = []
    if table is not None:
        made = "none" if prices is None else f"{prices.digest()[:19]}…"
        same = prices is not None and prices.digest() == table.digest()
        text = (
            f"the plan was made with {made}"
            if same
            else f"the plan was made with {made}, the table is now {table.digest()[:19]}…: plan "
            "again and commit the new lock file"
        )
        outcomes.append(_outcome("cost table", holds=same, message=text, stale=True))
    limit = limits.max_latency_ns
    if limit is None:
        return outcomes
    tolerance = LATENCY_TOLERANCE if limits.latency_tolerance is None else limits.latency_tolerance
    shown = f"the limit is {format_cost(limit, LATENCY)}"
    reports = [ExportReport.from_json(report) for report in lock.exports]
    with contextlib.suppress(InvalidInput):  # ``_files`` tells of folders that cannot be read
        reports = [ExportReport.load(folder) for folder in folders] or reports
    timed = [report.timed for report in reports if report.timed is not None]
    if budget is not None:
        spent = budget.spent(plan.candidates)
        text = f"predicted {format_cost(spent, LATENCY)}, {shown}"
        outcomes.append(_outcome(check, holds=spent <= limit, message=text))
    for found in timed:
        spent = found.measured_ns
        text = f"timed {format_cost(spent, LATENCY)}, {shown} (and {100 * tolerance:g} %)"
        outcomes.append(_outcome(check, holds=spent <= limit * (1 + tolerance), message=text))
    if budget is None and not timed:
        text = (
            f"{shown}, and nothing says what the plan takes: plan with a budget of time and "
            "--table, or remove --max-latency"
        )
        outcomes.append(_outcome(check, holds=False, message=text))
    return outcomes


def _loss(lock: Lock, quality: Quality | None, limits: Limits) -> Outcome:
    check = "loss increase"
    if limits.max_kl is None:
        return _skipped(check, "no limit was set")
    measured = lock.plan.measured if quality is None else quality.measured
    if measured is None:
        text = "the plan holds no measurement: evaluate it, or remove --max-kl"
        return _outcome(check, holds=False, message=text)
    holds = measured.mean <= limits.max_kl
    text = (
        f"{measured.mean:.6g} ± {measured.standard_error:.2g} {measured.unit} on "
        f"{measured.n_samples} samples, the limit is {limits.max_kl:g}"
    )
    return _outcome(check, holds=holds, message=text)


def _drop(lock: Lock, quality: Quality | None, limits: Limits) -> Outcome:
    check = "accuracy drop"
    if limits.max_drop is None:
        return _skipped(check, "no limit was set")
    del lock
    full = None if quality is None else quality.full_precision
    if quality is None or full is None or None in (quality.measured.accuracy, full.accuracy):
        text = "a drop in accuracy needs labelled samples: provide an evaluation set with labels"
        return _outcome(check, holds=False, message=text)
    assert quality.measured.accuracy is not None  # noqa: S101  # checked above
    assert full.accuracy is not None  # noqa: S101  # checked above
    drop = 100 * (full.accuracy - quality.measured.accuracy)
    text = (
        f"{100 * quality.measured.accuracy:.2f} % against {100 * full.accuracy:.2f} % in full "
        f"precision: {drop:.2f} points, the limit is {limits.max_drop:g}"
    )
    return _outcome(check, holds=drop <= limits.max_drop, message=text)


def _baselines(lock: Lock, quality: Quality | None, limits: Limits) -> Outcome:
    check = "not worse than a baseline"
    prefix = limits.not_worse_than
    if prefix is None:
        return _skipped(check, "no baseline was named")
    check = f"not worse than {prefix}"
    plan = lock.plan
    fair = {
        b.name: b.measured
        for b in plan.baselines
        if b.name.startswith(prefix) and _is_fair(plan, b)
    }
    measured = plan.measured
    if quality is not None and quality.baselines is not None:
        # Like is held against like: both fresh, or both as the plan recorded them.
        measured, fresh = quality.measured, quality.baselines
        fair = {name: fresh[name] for name in fair if name in fresh}
    if measured is None or not fair:
        text = f"the plan must be measured beside baselines called '{prefix}…' that fit its budget"
        return _outcome(check, holds=False, message=f"{text}; there are none: plan again")
    best = min(fair, key=lambda name: fair[name].mean)
    holds = measured.mean <= fair[best].mean
    text = f"{measured.mean:.6g} against {fair[best].mean:.6g} of {best} within the same budget"
    return _outcome(check, holds=holds, message=text)
