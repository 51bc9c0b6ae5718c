"""The former name of ``bitquota.models.pt2.vetting``."""

from bitquota.models.pt2.vetting import *  # noqa: F403
