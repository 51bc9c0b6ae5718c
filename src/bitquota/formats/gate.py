"""The former name of ``bitquota.ci.check``."""

from bitquota.ci.check import *  # noqa: F403
