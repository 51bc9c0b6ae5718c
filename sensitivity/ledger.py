"""The former name of ``bitquota.sensitivity.cache``."""

from bitquota.sensitivity.cache import *  # noqa: F403
