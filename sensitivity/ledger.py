"""The former name of ``bitquota.sensitivity.cache``."""

from bitquota.context import Ledger, MemoryLedger  # noqa: F401
from bitquota.sensitivity.cache import *  # noqa: F403
