"""The former name of ``bitquota.candidates.storage``."""

from bitquota.candidates.storage import *  # noqa: F403
