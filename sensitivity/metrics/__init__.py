"""The metrics that a user may know, each a measure like any other.

All score single candidates around full precision (no cross-layer terms) on the same runner, so
that they can be compared on the user's own model: ``bitquota compare``. One-layer loss (ZeroQ) is
``bitquota.sensitivity.measures.pairs.DiagonalMeasure``.
"""

from bitquota.sensitivity.metrics.attribution import AttributionChange
from bitquota.sensitivity.metrics.class_separability import ClassSeparability
from bitquota.sensitivity.metrics.first_order import FirstOrder
from bitquota.sensitivity.metrics.fisher import EmpiricalFisher, OutputFisher
from bitquota.sensitivity.metrics.flags import Flag, FlagKind, find_flags
from bitquota.sensitivity.metrics.gpfq import GpfqError
from bitquota.sensitivity.metrics.gram_weighted import GramWeightedError
from bitquota.sensitivity.metrics.hessian_trace import HessianTrace
from bitquota.sensitivity.metrics.kronecker import KroneckerFisher
from bitquota.sensitivity.metrics.learned_steps import LearnedIndicators
from bitquota.sensitivity.metrics.metric import Metric
from bitquota.sensitivity.metrics.noise_response import NoiseResponse
from bitquota.sensitivity.metrics.orthogonality import Orthogonality
from bitquota.sensitivity.metrics.shapley import ShapleyShare
from bitquota.sensitivity.metrics.weight_error import RelativeWeightMse, WeightMse

METRICS: dict[str, Metric] = {
    "gram_weighted": GramWeightedError(),
    "empirical_fisher": EmpiricalFisher(),
    "output_fisher": OutputFisher(),
    "kronecker": KroneckerFisher(),
    "relative_mse": RelativeWeightMse(),
    "noise_response": NoiseResponse(),
    "shapley": ShapleyShare(),
    "gpfq": GpfqError(),
    "weight_mse": WeightMse(),
    "first_order": FirstOrder(),
    "hessian_trace": HessianTrace(),
    "attribution": AttributionChange(),
    "class_separability": ClassSeparability(),
    "orthogonality": Orthogonality(),
    "limpq": LearnedIndicators(),
}
"""Metrics by name, in order of preference (docs/design/measures.md)."""

__all__ = [
    "METRICS",
    "AttributionChange",
    "ClassSeparability",
    "EmpiricalFisher",
    "FirstOrder",
    "Flag",
    "FlagKind",
    "GpfqError",
    "GramWeightedError",
    "HessianTrace",
    "KroneckerFisher",
    "LearnedIndicators",
    "Metric",
    "NoiseResponse",
    "Orthogonality",
    "OutputFisher",
    "RelativeWeightMse",
    "ShapleyShare",
    "WeightMse",
    "find_flags",
]
