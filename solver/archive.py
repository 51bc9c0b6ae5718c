"""Problems and certificates as files, so that anyone can check a proof elsewhere, later.

Both are ``.npz`` archives without pickle; equal values give equal bytes. A certificate names by
digests the problem that it is about and the sensitivity matrix that the problem was made from, and
carries a digest of its own content.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bitquota.canonical import canonical_json, digest_array, digest_json
from bitquota.errors import InvalidInput
from bitquota.solver.problem import Problem
from bitquota.solver.solution import Certificate, Convexification

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject

    Arrays = dict[str, NDArray[Any]]

_PROBLEM = "bitquota/problem/1"
_CERTIFICATE = "bitquota/certificate/1"
_PROOF = "bitquota/certificate/2"
_LARGEST = 2**31
"""Bytes that an archive may unpack to; a certificate of 100,000 nodes and 500 rows takes 250 MB."""
_NAMES = ("resources", "groups", "labels")
_PROBLEM_ARRAYS = (
    "diagonal",
    "cross",
    "factor",
    "terms",
    "term_values",
    "offsets",
    "costs",
    "limits",
    "allowed",
    "forbidden_pairs",
    "required_pairs",
)
_Kinds = dict[str, tuple[type[np.generic], int]]

_CERTIFICATE_ARRAYS: _Kinds = {
    "parent": (np.int64, 1),
    "allowed": (np.uint8, 2),
    "convexification": (np.int64, 1),
    "point": (np.float32, 2),
    "multipliers": (np.float64, 2),
}
"""Type and number of axes of the arrays of a certificate."""
_OPTIONAL: _Kinds = {"orders": (np.int64, 2), "w": (np.float64, 2)}
"""The same of those that are left out where they are empty."""
_CONVEXIFICATION_ARRAYS: _Kinds = {
    "support": (np.bool_, 1),
    "shift": (np.float64, 2),
    "cut_rows": (np.int64, 1),
    "cut_columns": (np.int64, 1),
    "cut_values": (np.float64, 1),
    "products": (np.float64, 2),
}
"""The same of each convexification."""
_TRIPLES: _Kinds = {"triples": (np.int64, 2), "triple_values": (np.float64, 1)}
"""The same of those that are left out where there are no triples."""


def problem_to_bytes(problem: Problem) -> bytes:
    """Return ``problem`` as archive bytes."""
    return _pack(*_problem_parts(problem))


def _problem_parts(problem: Problem) -> tuple[JsonObject, Arrays]:
    arrays = {
        name: array
        for name in _PROBLEM_ARRAYS
        if (array := getattr(problem, name)) is not None
        and (len(array) or name not in ("terms", "term_values"))
    }
    meta = {"format": _PROBLEM, "constant": problem.constant}
    return meta | {name: list(getattr(problem, name)) for name in _NAMES}, arrays


def problem_from_bytes(data: bytes) -> Problem:
    """Rebuild from ``problem_to_bytes``.

    Raises:
        InvalidInput: Not such an archive (``InvalidProblem`` where an invariant does not hold).
    """
    meta, arrays = _unpack(data, _PROBLEM)
    try:
        optional = ("cross", "factor", "terms", "term_values")
        given: dict[str, Any] = {name: arrays[name] for name in optional if name in arrays}
        given |= {name: arrays[name] for name in _PROBLEM_ARRAYS if name not in optional}
        given |= {name: tuple(map(str, meta[name])) for name in _NAMES}
        return Problem(constant=float(meta["constant"]), **given)
    except (KeyError, TypeError) as err:
        raise _unreadable(_PROBLEM, err) from err


def certificate_to_bytes(certificate: Certificate) -> bytes:
    """Return ``certificate`` alone as archive bytes."""
    meta, arrays = _certificate_parts(certificate)
    return _pack({"format": _CERTIFICATE} | meta, arrays)


def certificate_from_bytes(data: bytes) -> Certificate:
    """Rebuild from ``certificate_to_bytes``. What it claims is for the checker to judge.

    Raises:
        InvalidInput: Not such an archive.
    """
    return _certificate(*_unpack(data, _CERTIFICATE), _CERTIFICATE)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CertificateFile:
    """A certificate and what it is about, as ``--certificate`` writes it.

    Attributes:
        certificate: The proof.
        problem: Digest of the problem (``problem_digest``).
        matrix: Digest of the sensitivity matrix that the problem was made from; ``None`` for a
            problem that was made from something else.
    """

    certificate: Certificate
    problem: str
    matrix: str | None

    def to_bytes(self) -> bytes:
        """Return the file, which carries a digest of all that it holds."""
        meta, arrays = _certificate_parts(self.certificate)
        meta |= {"format": _PROOF, "problem": self.problem, "matrix": self.matrix}
        return _pack(meta | {"digest": _digest(meta, arrays)}, arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Rebuild from ``to_bytes``. What the certificate claims is for the checker to judge.

        Raises:
            InvalidInput: Not such an archive, or one that was changed after it was written.
        """
        meta, arrays = _unpack(data, _PROOF)
        digest = meta.pop("digest", None)
        try:
            changed = digest != _digest(meta, arrays)
        except (TypeError, ValueError) as err:
            raise _unreadable(_PROOF, err) from err
        if changed:
            msg = (
                "the digest of a certificate must fit its content; this file was changed after "
                "it was written"
            )
            raise InvalidInput(msg)
        matrix = meta.get("matrix")
        return cls(
            certificate=_certificate(meta, arrays, _PROOF),
            problem=str(meta.get("problem")),
            matrix=None if matrix is None else str(matrix),
        )


def certificate_file(certificate: Certificate, problem: Problem, matrix: str | None) -> bytes:
    """Return the file that ``bitquota verify`` reads.

    Args:
        certificate: A proof.
        problem: The problem that it is about.
        matrix: Digest of the sensitivity matrix that the problem was made from, if from one.
    """
    about = problem_digest(problem)
    return CertificateFile(certificate=certificate, problem=about, matrix=matrix).to_bytes()


def problem_digest(problem: Problem) -> str:
    """Return a digest of everything that defines ``problem``, names included."""
    return _digest(*_problem_parts(problem))


def _certificate_parts(certificate: Certificate) -> tuple[JsonObject, Arrays]:
    arrays = {name: getattr(certificate, name) for name in _CERTIFICATE_ARRAYS}
    if len(certificate.orders):
        arrays["orders"] = certificate.orders
    if len(certificate.w):
        arrays["w"] = certificate.w
    for index, shape in enumerate(certificate.convexifications):
        for name in _CONVEXIFICATION_ARRAYS | (_TRIPLES if len(shape.triples) else {}):
            arrays[f"convexification{index}_{name}"] = getattr(shape, name)
    # In hexadecimal, so that infinities have a name and every bit survives.
    meta = {"bound": float(certificate.bound).hex(), "recursion": certificate.recursion}
    meta |= {"joint": True} if certificate.joint else {}
    return meta | {"convexifications": len(certificate.convexifications)}, arrays


def _certificate(meta: JsonObject, arrays: Arrays, wanted: str) -> Certificate:
    def take(kinds: _Kinds, prefix: str = "") -> dict[str, Any]:
        found = {name: arrays[prefix + name] for name in kinds}
        for name, (kind, axes) in kinds.items():
            if found[name].dtype != kind or found[name].ndim != axes:
                msg = f"'{prefix}{name}' must be {np.dtype(kind)} with {axes} axes"
                raise ValueError(msg)
        return found

    try:
        return Certificate(
            bound=float.fromhex(meta["bound"]),
            convexifications=tuple(
                Convexification(
                    **take(
                        _CONVEXIFICATION_ARRAYS
                        | (_TRIPLES if f"convexification{index}_triples" in arrays else {}),
                        f"convexification{index}_",
                    )
                )
                for index in range(int(meta["convexifications"]))
            ),
            recursion=bool(meta["recursion"]),
            joint=bool(meta.get("joint", False)),
            **take({name: kind for name, kind in _OPTIONAL.items() if name in arrays}),
            **take(_CERTIFICATE_ARRAYS),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as err:
        raise _unreadable(wanted, err) from err


def _digest(meta: JsonObject, arrays: Arrays) -> str:
    return digest_json(meta | {"arrays": {name: digest_array(a) for name, a in arrays.items()}})


def _pack(meta: JsonObject, arrays: Arrays) -> bytes:
    text = np.frombuffer(canonical_json(meta).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in {"meta": text, **arrays}.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")  # its default date is a fixed one
            archive.writestr(info, member.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _unpack(data: bytes, wanted: str) -> tuple[JsonObject, Arrays]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _LARGEST:
            raise _unreadable(wanted, f"one of {size:,} bytes, above {_LARGEST:,}")
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        found = meta["format"]
    except (
        ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error,
        NotImplementedError, RuntimeError, AttributeError, MemoryError, OverflowError,
    ) as err:  # fmt: skip
        # What zipfile and numpy raise on a damaged archive, whichever byte it was.
        raise _unreadable(wanted, err) from err
    if found != wanted:
        raise _unreadable(wanted, f"format '{found}'")
    return meta, arrays


def _unreadable(wanted: str, got: Exception | str) -> InvalidInput:
    text = got if isinstance(got, str) else f"{type(got).__name__}: {got}"
    return InvalidInput(f"a file of format '{wanted}' must be readable and complete; got {text}")
