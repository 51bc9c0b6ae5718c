"""The part of a tenant's ledger that one job may use: what was measured of its own models.

An evaluator computes the keys itself, and a driver cannot tell what one stands for. So keys are
kept together with the digests of the models that the job was submitted for: whatever an evaluator
writes, jobs on other models never find it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.canonical import digest_json
from bitquota.service.security.limits import Resource, exceeded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from bitquota.context import Ledger


class ScopedLedger:
    """A ledger of some models in the ledger of a tenant.

    Args:
        ledger: Of the tenant.
        models: Digests of the uploads that are measured.
        max_bytes: What one job may add.
    """

    def __init__(self, ledger: Ledger, models: Sequence[str], max_bytes: int) -> None:
        self._ledger = ledger
        self._models = sorted(models)
        self._max_bytes = max_bytes
        self._added = 0

    def __len__(self) -> int:
        """Return the number of entries of the tenant."""
        return len(self._ledger)

    def get_many(self, keys: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Return the arrays of those ``keys`` that are there."""
        own = {self._own(key): key for key in keys}
        return {own[name]: array for name, array in self._ledger.get_many(list(own)).items()}

    def put_many(self, entries: Mapping[str, NDArray[np.float64]]) -> None:
        """Store several arrays, all of them or none.

        Raises:
            LimitExceeded: The job has stored more than it may.
        """
        self._added += sum(array.nbytes for array in entries.values())
        if self._added > self._max_bytes:
            raise exceeded(Resource.DISK, self._max_bytes, self._added)
        self._ledger.put_many({self._own(key): array for key, array in entries.items()})

    def _own(self, key: str) -> str:
        return digest_json([self._models, key])
