"""The former name of ``bitquota.report.comparison_plot``."""

from bitquota.report.comparison_plot import *  # noqa: F403
