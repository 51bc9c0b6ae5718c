"""The former name of ``bitquota.candidates.budget``."""

from bitquota.candidates.budget import *  # noqa: F403
