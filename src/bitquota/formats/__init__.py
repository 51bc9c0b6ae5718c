"""The former name of ``bitquota.models``."""

from bitquota.models import *  # noqa: F403
