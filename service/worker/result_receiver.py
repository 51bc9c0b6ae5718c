"""The results of one job on the driver's side: pieces in, checked files and their digests out."""

from __future__ import annotations

import zipfile
import zlib
from typing import TYPE_CHECKING

from bitquota.errors import BitquotaError, MeasurementFailed
from bitquota.service.jobs.job import KeptResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.kinds import JobKind
    from bitquota.service.store.blobs import BlobStore, Incoming

UNSOUND = (
    BitquotaError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
    RecursionError, zipfile.BadZipFile, zlib.error, EOFError,
)  # fmt: skip
"""What reading a file may raise that a stranger's model had a hand in."""


class ResultReceiver:
    """Takes results from an evaluator, which ran a stranger's model and is not trusted.

    Args:
        kind: What the job may leave.
        blobs: Where results are kept.
        most: How many there may be of a result of which there may be several: that many were
            asked for.
    """

    def __init__(self, kind: JobKind, blobs: BlobStore, most: int = 1) -> None:
        self._most = most
        self._kind = kind
        self._blobs = blobs
        self._incoming: Incoming | None = None
        self._largest = max(result.max_bytes for result in kind.results)
        self._digests: dict[str, list[str]] = {}
        self._sizes: dict[str, int] = {}

    def piece(self, parts: Sequence[bytes]) -> None:
        """Write the next bytes of a result; raises ``MeasurementFailed`` if it is too large."""
        if self._incoming is None:
            self._incoming = self._blobs.incoming(self._largest)
        for part in parts:
            if self._incoming.size + len(part) > self._largest:
                raise _too_large(self._largest)
            self._incoming.write(part)

    def result(self, name: str) -> None:
        """Check the bytes that arrived from first principles and keep them as result ``name``.

        Raises:
            MeasurementFailed: They are not what the kind says such a result is.
        """
        incoming = self._incoming or self._blobs.incoming(self._largest)
        self._incoming = None
        try:
            self._keep(name, incoming)
        finally:
            incoming.discard()

    def _keep(self, name: str, incoming: Incoming) -> None:
        try:
            result = self._kind.result(name)
            if incoming.size > result.max_bytes:
                raise _too_large(result.max_bytes)
            if len(self._digests.get(name, ())) >= (self._most if result.many else 1):
                raise _too_many(name, self._most if result.many else 1)
            incoming.flush()
            result.check(incoming.path)
        except MeasurementFailed:
            raise
        except UNSOUND as err:
            msg = f"a worker must return a whole {name}; what it returned is invalid: {err}"
            raise MeasurementFailed(msg) from err
        size = incoming.size
        self._add(name, self._blobs.keep(incoming), size)

    def complete(self) -> tuple[JsonObject, list[KeptResult]]:
        """Return digests by name, with everything derived from them, and each file once.

        Raises:
            MeasurementFailed: Something that must be there is missing.
        """
        given = {
            name: [self._blobs.path(digest) for digest in self._digests.get(name, ())]
            for name in self._kind.derive_from
        }
        for name, data in self._derived(given).items():
            self._add(name, self._blobs.put(data), len(data))
        results: JsonObject = {}
        kept = []
        for result in self._kind.results:
            digests = self._digests.get(result.name, [])
            if not digests and not result.optional:
                msg = f"a worker must return the {result.name} of a {self._kind.name} job; it ended"
                raise MeasurementFailed(msg + " without", kind=self._kind.name)
            if digests:
                results[result.name] = digests if result.many else digests[0]
            kept += [
                KeptResult(
                    digest=digest,
                    size=self._sizes[digest],
                    name=result.name + result.suffix,
                    artifact=result.keep_as,
                )
                for digest in dict.fromkeys(digests)
            ]
        return results, kept

    def _derived(self, given: Mapping[str, Sequence[Path]]) -> Mapping[str, bytes]:
        if not all(given.values()):
            return {}  # what is missing is said, or optional
        try:
            return self._kind.derive(given)
        except UNSOUND as err:
            msg = f"the results of a worker must be consistent; they are not: {err}"
            raise MeasurementFailed(msg) from err

    def close(self) -> None:
        """Remove what arrived of a result that was not finished."""
        if self._incoming is not None:
            self._incoming.discard()

    def _add(self, name: str, digest: str, size: int) -> None:
        self._digests.setdefault(name, []).append(digest)
        self._sizes[digest] = size


def _too_many(name: str, most: int) -> MeasurementFailed:
    msg = f"a worker must return at most {most} of the result {name}; it returned another"
    return MeasurementFailed(msg)


def _too_large(limit: int) -> MeasurementFailed:
    msg = f"a result must be at most {limit:,} bytes; this one has more"
    return MeasurementFailed(msg, limit=limit)
