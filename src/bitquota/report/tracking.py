"""Experiment trackers: plans and checks as runs beside a team's other experiments.

A tracker is optional (``bitquota[mlflow]``, ``bitquota[wandb]``) and finds its server as its own
documentation says (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``; ``WANDB_API_KEY``,
``WANDB_PROJECT``, ``WANDB_MODE``).
"""

from __future__ import annotations

import importlib
import os
import re
from typing import TYPE_CHECKING, NamedTuple

from bitquota.errors import InvalidInput, MissingDependency, ServiceError
from bitquota.report import text as report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bitquota.plan import MeasuredLoss, Plan


class _Tracker(NamedTuple):
    """What a tracker comes in, and what it raises where it does not take a run."""

    package: str
    errors: str
    refusal: str


TRACKERS = {
    "mlflow": _Tracker("mlflow-skinny", "mlflow.exceptions", "MlflowException"),
    "wandb": _Tracker("wandb", "wandb.errors", "Error"),
}
_LONGEST_PARAMETER = 500


def require_tracker(name: str) -> None:
    """Raise unless ``name`` is a tracker whose package is installed; cheap enough to ask first.

    Raises:
        InvalidInput: No tracker of that name.
        MissingDependency: Its package is missing.
    """
    if name not in TRACKERS:
        msg = f"a tracker must be one of {', '.join(TRACKERS)}; got '{name}'"
        raise InvalidInput(msg, tracker=name)
    try:
        importlib.import_module(name)
    except ImportError as err:
        package = TRACKERS[name].package
        msg = f"logging to {name} needs the package {package}: pip install 'bitquota[{name}]'"
        raise MissingDependency(msg, extra=name) from err


def log_plans(plans: Sequence[Plan], *, tracker: str, source: str) -> list[str]:
    """Log each plan as a run: what was asked, what was measured, the plan and its report.

    Args:
        plans: Plans of one model.
        tracker: Name of the tracker.
        source: What the model was called, for the run's name.

    Returns:
        Identifiers of the runs.

    Raises:
        ServiceError: The tracker did not take a run.
    """
    runs = []
    for plan in plans:
        asked = " + ".join(b.text or f"{b.limit} {b.unit}" for b in plan.budgets)
        proof = plan.proof
        metrics = {
            "size_bytes": plan.model_bits / 8,
            "average_bits": plan.average_bits,
            "effective_bits": plan.effective_bits,
            "predicted_loss_increase": plan.predicted,
            **_measurement("", plan.measured),
            "bound": None if proof is None else proof.bound,
            "absolute_gap": None if proof is None else proof.absolute_gap,
        }
        for baseline in plan.baselines:
            metrics |= _measurement(f"baselines/{baseline.name}/", baseline.measured)
        runs.append(
            _log(
                tracker,
                name=f"{source} at {asked}",
                parameters={
                    "model_digest": plan.model_digest,
                    "plan_digest": plan.digest(),
                    "budget": asked,
                    "loss": plan.loss,
                    "selected": plan.selected,
                    "corrections": ", ".join(map(str, plan.corrections)) or "none",
                    "weight_bits": ",".join(
                        f"{a.candidate.mean_bits:.4g}" for a in plan.assignments
                    ),
                },
                metrics=metrics,
                files={
                    "plan.json": plan.dumps(),
                    "report.md": report.render_markdown([plan], title=f"Plan of {source}"),
                },
            )
        )
    return runs


def log_check(
    name: str,
    *,
    tracker: str,
    outcomes: Mapping[str, str],
    measured: MeasuredLoss | None,
    exit_code: int,
    summary: str,
) -> str:
    """Log the check of a lock file as a run, and return the run's identifier.

    Args:
        name: Of the lock file.
        tracker: Name of the tracker.
        outcomes: Check to ``passed``, ``failed``, ``stale`` or ``skipped``.
        measured: A fresh measurement, if one was made.
        exit_code: Of the command.
        summary: The table as Markdown.

    Raises:
        ServiceError: The tracker did not take the run.
    """
    return _log(
        tracker,
        name=f"check of {name}",
        parameters=dict(outcomes),
        metrics={"exit_code": exit_code, **_measurement("", measured)},
        files={"check.md": summary},
    )


def _measurement(prefix: str, measured: MeasuredLoss | None) -> dict[str, float | None]:
    if measured is None:
        return {}
    return {
        f"{prefix}loss_increase": measured.mean,
        f"{prefix}loss_increase_error": measured.standard_error,
        f"{prefix}accuracy": measured.accuracy,
    }


def _log(
    tracker: str,
    *,
    name: str,
    parameters: Mapping[str, str],
    metrics: Mapping[str, float | None],
    files: Mapping[str, str],
) -> str:
    require_tracker(tracker)
    write = {"mlflow": _to_mlflow, "wandb": _to_wandb}[tracker]
    known = {_key(k): v for k, v in metrics.items() if v is not None}
    try:
        return write(name, {_key(k): v for k, v in parameters.items()}, known, files)
    except (_refusals(tracker), OSError) as err:
        msg = f"{tracker} must accept the run '{name}'; it answered: {err}"
        raise ServiceError(msg, tracker=tracker) from err


def _to_mlflow(
    name: str,
    parameters: Mapping[str, str],
    metrics: Mapping[str, float],
    files: Mapping[str, str],
) -> str:
    import mlflow

    with mlflow.start_run(run_name=name) as run:
        mlflow.log_params({k: v[:_LONGEST_PARAMETER] for k, v in parameters.items()})
        mlflow.log_metrics(dict(metrics))
        for file, text in files.items():
            mlflow.log_text(text, file)
        return str(run.info.run_id)


def _to_wandb(
    name: str,
    parameters: Mapping[str, str],
    metrics: Mapping[str, float],
    files: Mapping[str, str],
) -> str:
    import wandb

    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", "bitquota"), name=name, config=dict(parameters),
        reinit="create_new", settings=wandb.Settings(silent=True, console="off"),
    ) as run:  # fmt: skip
        run.summary.update(dict(metrics))
        kept = wandb.Artifact(f"run-{run.id}", type="bitquota")
        for file, text in files.items():
            with kept.new_file(file, encoding="utf-8") as out:
                out.write(text)
        run.log_artifact(kept)
        return str(run.id)


def _refusals(tracker: str) -> type[Exception]:
    """Return what a tracker raises where it does not take a run."""
    known = TRACKERS[tracker]
    found: type[Exception] = getattr(importlib.import_module(known.errors), known.refusal)
    return found


def _key(name: str) -> str:
    """Return a name that trackers take: letters, digits and a few signs."""
    return re.sub(r"[^\w./ -]", "_", name)
