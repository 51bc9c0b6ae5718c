"""Problems and certificates survive their files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquota.errors import InvalidInput
from bitquota.solver import Certificate, Convexification, Problem, solve
from bitquota.solver.archive import (
    certificate_from_bytes,
    certificate_to_bytes,
    problem_from_bytes,
    problem_to_bytes,
)
from bitquota.solver.checker import check_certificate
from certificate_maker import make_certificate, with_fields
from contracts.solver_backend import small
from strategies import any_problems


class TestProblemFromBytes:
    @settings(max_examples=50)
    @given(any_problems())
    def test_round_trip(self, problem):
        """Every field, bit for bit; equal problems give equal bytes."""
        data = problem_to_bytes(problem)
        again = problem_from_bytes(data)
        for name in Problem.__slots__:
            assert np.array_equal(getattr(problem, name), getattr(again, name)), name
        assert data == problem_to_bytes(again)


class TestCertificateFromBytes:
    @settings(max_examples=50)
    @given(any_problems(), st.integers(0, 10**6), st.sampled_from([-np.inf, np.inf, 0.1, -3e-310]))
    def test_round_trip(self, problem, seed, bound):
        """Every field, infinite and tiny bounds included."""
        certificate, _ = make_certificate(problem, seed=seed)
        certificate = with_fields(certificate, bound=bound)
        data = certificate_to_bytes(certificate)
        again = certificate_from_bytes(data)
        assert certificate.bound == again.bound
        for name in Certificate.__slots__[2:]:
            assert np.array_equal(getattr(certificate, name), getattr(again, name)), name
        for one, other in zip(certificate.convexifications, again.convexifications, strict=True):
            for name in Convexification.__slots__:
                assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert data == certificate_to_bytes(again)

    def test_proof_is_checked_from_two_files(self):
        """A problem and its certificate, read from bytes alone, still prove the bound."""
        solution = solve(small(), gap=1e-6)
        problem = problem_from_bytes(problem_to_bytes(small()))
        certificate = certificate_from_bytes(certificate_to_bytes(solution.certificate))
        assert check_certificate(problem, certificate).holds

    @pytest.mark.parametrize("read", [certificate_from_bytes, problem_from_bytes])
    def test_damaged_files_are_refused(self, read):
        """Not an archive, cut short, without a member, of another format, with pickles."""
        certificate, _ = make_certificate(small())
        write = {
            certificate_from_bytes: lambda: certificate_to_bytes(certificate),
            problem_from_bytes: lambda: problem_to_bytes(small()),
        }
        data = write[read]()
        other = next(write[r]() for r in write if r is not read)
        with np.load(io.BytesIO(data)) as archive:
            members = {name: archive[name] for name in archive.files}
        lacking = io.BytesIO()
        np.savez(lacking, **{k: v for k, v in members.items() if k != "allowed"})
        pickled = io.BytesIO()
        np.savez(pickled, **members | {"allowed": np.array([{}])})
        for bad in (b"", b"PK", data[: len(data) // 2], other, lacking.getvalue()):
            with pytest.raises(InvalidInput, match="format"):
                read(bad)
        with pytest.raises(InvalidInput, match="format"):
            read(pickled.getvalue())
