"""The former name of ``bitquota.ci.lock``."""

from bitquota.ci.lock import *  # noqa: F403
