"""The former name of ``bitquota.search.allocate``."""

from bitquota.evaluate.scoring import Evaluation, evaluate_plans
from bitquota.search.allocate import Allocation, allocate, measure_matrix

__all__ = ["Allocation", "Evaluation", "allocate", "evaluate_plans", "measure_matrix"]
