"""The sensitivity matrix: what a choice of candidates costs in loss, around a base point.

For a one-hot ``x`` per group, ``loss increase = constant + diagonal·x + ½ xᵀ cross x``.

Design: docs/design/bytes.md
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bitquota.candidates.table import CandidateTable
from bitquota.canonical import canonical_json, digest_bytes, write_whole
from bitquota.errors import BitquotaError, InvalidInput, InvalidMatrix

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject

_FORMAT = "bitquota/matrix/1"
SYMMETRY_TOLERANCE = 1e-12
"""Largest relative asymmetry of ``cross`` that counts as rounding and is averaged away."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SensitivityMatrix:
    """Measured loss increases of every candidate and of every pair of candidates.

    Attributes:
        table: What the ``n`` rows and columns stand for.
        diagonal: f64[n], loss increase of one row alone, the rest at the base point.
        cross: f64[n, n], extra loss increase of two rows together beyond the sum; symmetric,
            zero inside a group. ``None`` when only the diagonal was measured.
        constant: Loss increase of the base point over full precision.
        base_point: For each group the row within it that the model had during measurement, or
            ``None`` for full precision.
        diagonal_error: f64[n], standard error over samples, or ``None``.
        cross_error: f64[n, n], likewise.
        loss: Name of the loss.
        unit: Unit of every number here, such as ``nats/sample``.
        provenance: Where it comes from: digests, measure, samples, seed, versions.
    """

    table: CandidateTable
    diagonal: NDArray[np.float64]
    cross: NDArray[np.float64] | None = None
    constant: float = 0.0
    base_point: tuple[int, ...] | None = None
    diagonal_error: NDArray[np.float64] | None = None
    cross_error: NDArray[np.float64] | None = None
    loss: str = "kl"
    unit: str = "nats/sample"
    provenance: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check shapes, finiteness, symmetry and zero blocks; make arrays read-only."""
        n = len(self.table.rows)
        for name, shape in (
            ("diagonal", (n,)),
            ("cross", (n, n)),
            ("diagonal_error", (n,)),
            ("cross_error", (n, n)),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            array = np.array(value, dtype=np.float64)
            if array.shape != shape:
                msg = f"'{name}' must have shape {list(shape)}; got {list(array.shape)}"
                raise InvalidMatrix(msg, member=name)
            if not np.isfinite(array).all():
                bad = int((~np.isfinite(array)).sum())
                msg = (
                    f"'{name}' must be finite; {bad} of its {array.size} entries are not: "
                    "check the weights of the model and the calibration set for NaN and infinity"
                )
                raise InvalidMatrix(msg, member=name, entries=bad)
            if array.ndim == 2:
                array = _symmetric(name, array, self.table.group_of_row)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.base_point is not None:
            self.table.decode(self.base_point)

    def predict(self, choice: Sequence[int]) -> float:
        """Return the predicted loss increase of ``choice`` (row within group, per group).

        Raises:
            InvalidInput: Wrong length, or a row outside its group.
        """
        offsets = self.table.offsets
        local = np.asarray(choice, dtype=np.int64)
        counts = np.diff(offsets)
        if local.shape != counts.shape or (local < 0).any() or (local >= counts).any():
            self.table.decode(choice)  # says what is wrong
        chosen = offsets[:-1] + local
        value = self.constant + float(self.diagonal[chosen].sum())
        if self.cross is not None:
            value += 0.5 * float(self.cross[np.ix_(chosen, chosen)].sum())
        return value

    def robust(self, kappa: float) -> Self:
        """Return the matrix of mean + ``kappa`` standard errors, term by term.

        A sum of terms is off by at most as many standard errors as its terms together, whatever
        their correlation, so the best choice of this matrix is the one whose loss is least at the
        pessimistic end. An exact optimum of the means alone stacks the terms that noise made small.

        Args:
            kappa: 0 changes nothing.

        Raises:
            InvalidInput: ``kappa`` is negative or not finite, or there are no standard errors.
        """
        if not 0.0 <= kappa < float("inf"):
            msg = f"the standard errors to add must be a number from 0 on; got {kappa}"
            raise InvalidInput(msg, robust=kappa)
        if not kappa:
            return self
        if self.diagonal_error is None or (self.cross is not None and self.cross_error is None):
            msg = (
                "a robust choice needs the standard errors of the matrix; this one has none: "
                "measure with --measure gram or pairs, which estimate them, or leave --robust out"
            )
            raise InvalidInput(msg, robust=kappa)
        cross = self.cross
        if cross is not None and self.cross_error is not None:
            cross = cross + kappa * self.cross_error
        done = [*self.provenance.get("transformed", []), f"robust {kappa:g}"]
        return replace(
            self,
            diagonal=self.diagonal + kappa * self.diagonal_error,
            cross=cross,
            provenance={**self.provenance, "transformed": done},
        )

    def digest(self) -> str:
        """Return a digest of the numbers and of what they stand for (not of provenance)."""
        parts = [canonical_json(self._meta() | {"provenance": None}).encode()]
        parts += [a.tobytes() for a in self._arrays().values()]
        return digest_bytes(parts)

    def _arrays(self) -> dict[str, NDArray[np.float64]]:
        named = ("diagonal", "cross", "diagonal_error", "cross_error")
        return {name: a for name in named if (a := getattr(self, name)) is not None}

    def _meta(self) -> JsonObject:
        return {
            "format": _FORMAT,
            "table": self.table.to_json(),
            "constant": self.constant,
            "base_point": None if self.base_point is None else list(self.base_point),
            "loss": self.loss,
            "unit": self.unit,
            "provenance": self.provenance,
            "arrays": sorted(self._arrays()),
        }

    def to_bytes(self) -> bytes:
        """Return the matrix as a byte-stable ``.npz`` archive (no pickle inside)."""
        meta = np.frombuffer(canonical_json(self._meta()).encode(), dtype=np.uint8)
        buffer = io.BytesIO()
        # np.savez stamps the current time on its members; a fixed date keeps equal
        # matrices equal byte for byte.
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, array in {"meta": meta, **self._arrays()}.items():
                member = io.BytesIO()
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
        return buffer.getvalue()

    def save(self, path: Path) -> None:
        """Write ``to_bytes`` to ``path`` (whole or not at all)."""
        write_whole(path, self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Rebuild from ``to_bytes``.

        Raises:
            InvalidMatrix: Not such an archive, or an invariant does not hold.
        """
        if not data.startswith(b"PK"):
            msg = "a matrix file must be the .npz that 'bitquota measure' writes; got another kind"
            raise InvalidMatrix(msg)
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
            meta = dict(json.loads(arrays.pop("meta").tobytes()))
        except (
            ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error,
            NotImplementedError, RuntimeError,
        ) as err:  # fmt: skip
            # What zipfile and numpy raise on a damaged archive, whichever byte it was.
            found = f"an archive without {err}" if isinstance(err, KeyError) else f"{err}"
            msg = f"a matrix file must be the .npz that 'bitquota measure' writes; got {found}"
            raise InvalidMatrix(msg) from err
        if meta.get("format") != _FORMAT:
            msg = f"a matrix file must have format '{_FORMAT}'; got '{meta.get('format')}'"
            raise InvalidMatrix(msg)
        try:
            base_point = meta["base_point"]
            members = {
                "table": CandidateTable.from_json(meta["table"]),
                "constant": float(meta["constant"]),
                "base_point": None if base_point is None else tuple(map(int, base_point)),
                "loss": str(meta["loss"]),
                "unit": str(meta["unit"]),
                "provenance": dict(meta["provenance"]),
                **{name: arrays[name] for name in meta["arrays"]},
            }
            return cls(**members)
        except BitquotaError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            msg = f"a matrix file must hold every member of format '{_FORMAT}'; got: {err!r}"
            raise InvalidMatrix(msg) from err

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that ``save`` wrote; raises ``InvalidMatrix`` as ``from_bytes`` does."""
        try:
            data = path.read_bytes()
        except OSError as err:
            msg = f"a matrix file must be readable; got: {err}"
            raise InvalidMatrix(msg, path=str(path)) from err
        return cls.from_bytes(data)


def _symmetric(
    name: str, array: NDArray[np.float64], group_of_row: NDArray[np.int64]
) -> NDArray[np.float64]:
    scale = float(np.abs(array).max(initial=0.0))
    if float(np.abs(array - array.T).max(initial=0.0)) > SYMMETRY_TOLERANCE * scale:
        msg = f"'{name}' must be symmetric; average it with its transpose first if that is meant"
        raise InvalidMatrix(msg, member=name)
    same_group = group_of_row[:, None] == group_of_row[None, :]
    if np.any(array[same_group]):
        msg = f"'{name}' must be zero inside a group: two rows of one group never meet"
        raise InvalidMatrix(msg, member=name)
    averaged: NDArray[np.float64] = (array + array.T) / 2
    return averaged
