"""The command line ``bitquota``.

Exit codes: 0 done; 1 a measurement, solver or quality gate failed; 2 bad input or usage;
3 the service failed, timed out, or the work was cancelled; 4 a plan of another model;
5 no plan fits the budget.
"""

from bitquota.cli.app import app, main

__all__ = ["app", "main"]
