"""Every error that Bitquota raises on purpose, in one tree.

BitquotaError
├── InvalidInput(ValueError)          exit 2, HTTP 422
│   ├── InvalidBudget                 a budget text or value that cannot be read
│   ├── UnknownLayer(LookupError)     a name or pattern that matches no layer
│   ├── InvalidModel                  a model file or module that cannot be used
│   │   └── UnsafeModel               a file that could run code when read (pickle, TorchScript)
│   ├── InvalidCalibration            a calibration set that does not fit the model
│   ├── InvalidMatrix                 a sensitivity matrix that breaks an invariant
│   ├── InvalidProblem                an optimisation problem that breaks an invariant
│   └── InvalidPlan                   a plan that breaks an invariant or does not fit the model
├── Infeasible(ValueError)            exit 5, HTTP 422
│   └── BudgetTooSmall                no plan fits the budget
├── MeasurementFailed(RuntimeError)   exit 1, HTTP 500
│   └── LimitExceeded                 a job used more memory, disk or processes than it may
├── SolverFailed(RuntimeError)        exit 1, HTTP 500
├── ExportFailed(RuntimeError)        exit 1, HTTP 500
├── MissingDependency(ImportError)    exit 2, HTTP 501
├── GateFailed                        exit 1, HTTP 409: a quality gate said no
├── StalePlan                         exit 4, HTTP 409: the plan is of another model
├── Cancelled                         exit 3, HTTP 409
└── ServiceError                      exit 3, HTTP 500: the server, or the way to it
    ├── NotFound(LookupError)         HTTP 404
    ├── Unauthorized                  HTTP 401
    ├── Forbidden                     HTTP 403
    ├── Conflict                      HTTP 409
    ├── TooLarge                      HTTP 413
    ├── QuotaExceeded                 HTTP 429
    ├── Unavailable                   HTTP 503
    │   └── StorageFull               HTTP 507
    └── ServiceTimeout(TimeoutError)  HTTP 504

A message says what must hold, what was got, and what to do. The values of the message sit on
``details`` too, so that a program need not parse a sentence.

Design: docs/design/errors.md
"""

from __future__ import annotations

from typing import ClassVar


class BitquotaError(Exception):
    """Root of all errors raised on purpose.

    Attributes:
        message: One sentence for a person.
        details: The values in the message, JSON-serialisable.
        slug: Stable name, the last part of the problem+json ``type``.
        exit_code: What the command line exits with.
        http_status: What the service answers with.
    """

    slug: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        """The sentence alone (LookupError would quote it)."""
        return self.message


class InvalidInput(BitquotaError, ValueError):
    """Something handed in cannot be used as it is."""

    slug = "invalid-input"
    exit_code = 2
    http_status = 422


class InvalidBudget(InvalidInput):
    """A budget text or value that cannot be read."""

    slug = "invalid-budget"


class UnknownLayer(InvalidInput, LookupError):
    """A layer name or pattern that matches no layer of the model."""

    slug = "unknown-layer"


class InvalidModel(InvalidInput):
    """A model file or module that cannot be measured."""

    slug = "invalid-model"


class UnsafeModel(InvalidModel):
    """A model file that could run code when it is read; the safe alternative is named."""

    slug = "unsafe-model"


class InvalidCalibration(InvalidInput):
    """A calibration set that cannot be read or does not fit the model."""

    slug = "invalid-calibration"


class InvalidMatrix(InvalidInput):
    """A sensitivity matrix that breaks one of its invariants."""

    slug = "invalid-matrix"


class InvalidProblem(InvalidInput):
    """An optimisation problem that breaks one of its invariants."""

    slug = "invalid-problem"


class InvalidPlan(InvalidInput):
    """A plan that breaks one of its invariants or does not fit the model at hand."""

    slug = "invalid-plan"


class Infeasible(BitquotaError, ValueError):
    """No choice satisfies all constraints."""

    slug = "infeasible"
    exit_code = 5
    http_status = 422


class BudgetTooSmall(Infeasible):
    """The smallest possible plan is larger than the budget."""

    slug = "budget-too-small"


class MeasurementFailed(BitquotaError, RuntimeError):
    """A forward pass failed or gave a value that is not finite."""

    slug = "measurement-failed"


class LimitExceeded(MeasurementFailed):
    """A job used more memory, disk, processes or time than it may and was ended."""

    slug = "limit-exceeded"


class SolverFailed(BitquotaError, RuntimeError):
    """A solver backend died or answered with something that does not hold."""

    slug = "solver-failed"


class ExportFailed(BitquotaError, RuntimeError):
    """Files that were written do not read back as the plan says."""

    slug = "export-failed"


class MissingDependency(BitquotaError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""

    slug = "missing-dependency"
    exit_code = 2
    http_status = 501


class GateFailed(BitquotaError):
    """A quality gate said no."""

    slug = "gate-failed"
    http_status = 409


class StalePlan(BitquotaError):
    """The plan was made for another model than the one at hand."""

    slug = "stale-plan"
    exit_code = 4
    http_status = 409


class Cancelled(BitquotaError):
    """The work was cancelled on request; what was measured is kept."""

    slug = "cancelled"
    exit_code = 3
    http_status = 409


class ServiceError(BitquotaError):
    """The server, or the way to it, failed."""

    slug = "service-error"
    exit_code = 3


class NotFound(ServiceError, LookupError):
    """No such resource (also: not yours)."""

    slug = "not-found"
    http_status = 404


class Unauthorized(ServiceError):
    """No valid API key was sent."""

    slug = "unauthorized"
    http_status = 401


class Forbidden(ServiceError):
    """The API key does not allow this."""

    slug = "forbidden"
    http_status = 403


class Conflict(ServiceError):
    """The resource is in a state that does not allow this."""

    slug = "conflict"
    http_status = 409


class TooLarge(ServiceError):
    """An upload or a request body over the limit."""

    slug = "too-large"
    http_status = 413


class QuotaExceeded(ServiceError):
    """A quota of the tenant is used up."""

    slug = "quota-exceeded"
    http_status = 429


class Unavailable(ServiceError):
    """The server cannot answer at the moment; the same request later may succeed."""

    slug = "unavailable"
    http_status = 503


class StorageFull(Unavailable):
    """The server's disk is full; nothing was stored."""

    slug = "storage-full"
    http_status = 507


class ServiceTimeout(ServiceError, TimeoutError):
    """The server did not answer, or the job did not end, in time."""

    slug = "service-timeout"
    http_status = 504
