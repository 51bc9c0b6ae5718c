"""What may become of each layer: layers, formats and their sizes, targets, budgets."""

from bitquota.candidates.layers import Inventory, Layer, LayerKind, UnquantizedTensor
from bitquota.candidates.table import Candidate, CandidateTable, Row, enumerate_candidates

__all__ = [
    "Candidate",
    "CandidateTable",
    "Inventory",
    "Layer",
    "LayerKind",
    "Row",
    "UnquantizedTensor",
    "enumerate_candidates",
]
