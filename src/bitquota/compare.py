"""The former name of ``bitquota.search.compare``."""

from bitquota.search.compare import *  # noqa: F403
