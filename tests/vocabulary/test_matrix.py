"""The sensitivity matrix keeps its invariants, predicts its quadratic, and survives a file."""

from __future__ import annotations

import io
import itertools
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquota.candidates.layers import Inventory, Layer, LayerKind
from bitquota.candidates.table import enumerate_candidates
from bitquota.errors import InvalidInput, InvalidMatrix
from bitquota.matrix import SensitivityMatrix
from vocabulary_strategies import choices, matrices

ARRAYS = ("diagonal", "cross", "diagonal_error", "cross_error")
TABLE = enumerate_candidates(
    Inventory(
        model_digest="sha256:00",
        layers=tuple(
            Layer(
                name=name,
                kind=LayerKind.LINEAR,
                weight_name=f"{name}.weight",
                weight_shape=(2, 2),
                rows=2,
                columns=2,
                n_weights=4,
            )
            for name in "ab"
        ),
    ),
    [2, 4],
)


def matrix(**members) -> SensitivityMatrix:
    """Two groups of two rows: losses 8, 2 | 6, 1, and -3 extra when both are at 2 bits."""
    cross = np.zeros((4, 4))
    cross[0, 2] = cross[2, 0] = -3.0
    return SensitivityMatrix(
        **{"table": TABLE, "diagonal": np.array([8.0, 2.0, 6.0, 1.0]), "cross": cross} | members
    )


def same(one: SensitivityMatrix, other: SensitivityMatrix) -> bool:
    scalars = ("table", "constant", "base_point", "loss", "unit", "provenance")
    return all(getattr(one, n) == getattr(other, n) for n in scalars) and all(
        np.array_equal(getattr(one, n), getattr(other, n))
        if getattr(one, n) is not None
        else getattr(other, n) is None
        for n in ARRAYS
    )


class TestInvariants:
    @pytest.mark.parametrize(
        ("member", "shape"),
        [("diagonal", (3,)), ("diagonal", (4, 1)), ("cross", (4,)), ("cross_error", (3, 3))],
    )
    def test_shapes_agree_with_the_table(self, member, shape):
        with pytest.raises(InvalidMatrix, match=f"'{member}' must have shape"):
            matrix(**{member: np.zeros(shape)})

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("member", ARRAYS)
    def test_entries_are_finite(self, member, bad):
        array = np.zeros(4 if "diagonal" in member else (4, 4))
        array.flat[1] = bad
        with pytest.raises(InvalidMatrix, match=f"'{member}' must be finite; 1 of its .*check"):
            matrix(**{member: array})

    @pytest.mark.parametrize("member", ["cross", "cross_error"])
    def test_pairs_are_symmetric(self, member):
        array = np.zeros((4, 4))
        array[0, 2] = 1.0
        with pytest.raises(InvalidMatrix, match=f"'{member}' must be symmetric"):
            matrix(**{member: array})

    def test_asymmetry_of_rounding_is_averaged_away(self):
        cross = matrix().cross.copy()
        cross[0, 2] *= 1 + 2**-50
        found = matrix(cross=cross).cross
        assert np.array_equal(found, found.T)

    @pytest.mark.parametrize("entry", [(0, 0), (0, 1), (3, 2)])
    def test_pairs_inside_a_group_are_zero(self, entry):
        """Two rows of one group never meet, so such a number would mean nothing."""
        cross = np.zeros((4, 4))
        cross[entry] = cross[entry[::-1]] = 1.0
        with pytest.raises(InvalidMatrix, match="zero inside a group"):
            matrix(cross=cross)

    @pytest.mark.parametrize("base_point", [(0,), (0, 2), (-1, 0)])
    def test_base_point_is_a_choice(self, base_point):
        with pytest.raises(InvalidInput, match="row"):
            matrix(base_point=base_point)

    @given(matrices())
    def test_arrays_cannot_be_written(self, found):
        for name in ARRAYS:
            array = getattr(found, name)
            if array is not None:
                assert array.dtype == np.float64
                with pytest.raises(ValueError, match="read-only"):
                    array[0] = 1.0

    def test_the_caller_keeps_his_array(self):
        """It is copied: writing to it later changes nothing."""
        diagonal = np.ones(4)
        found = matrix(diagonal=diagonal)
        diagonal[0] = 5.0
        assert found.diagonal.tolist() == [1.0] * 4


class TestPredict:
    @pytest.mark.parametrize(
        ("choice", "expected"),
        [((0, 0), 8 + 6 - 3), ((0, 1), 8 + 1), ((1, 0), 2 + 6), ((1, 1), 2 + 1)],
    )
    def test_by_hand(self, choice, expected):
        assert expected + 0.5 == matrix(constant=0.5).predict(choice)

    def test_without_cross_layer_terms(self):
        assert matrix(cross=None).predict((0, 0)) == 14.0

    @given(st.data())
    def test_is_the_quadratic_form(self, data):
        """Against one-hot vectors and plain loops."""
        found = data.draw(matrices())
        choice = data.draw(choices(found.table))
        x = np.zeros(len(found.table.rows))
        x[found.table.offsets[:-1] + np.array(choice)] = 1.0
        expected = found.constant + sum(found.diagonal[x == 1.0])
        if found.cross is not None:
            on = np.flatnonzero(x)
            expected += sum(found.cross[i, j] for i, j in itertools.combinations(on, 2))
        scale = abs(found.constant) + np.abs(found.diagonal).sum()
        scale += 0.0 if found.cross is None else np.abs(found.cross).sum()
        assert abs(found.predict(choice) - expected) <= 1e-12 * max(scale, 1.0)

    @pytest.mark.parametrize("choice", [(0, 2), (2, 0), (-1, 0), (0,), (0, 0, 0)])
    def test_stays_inside_the_groups(self, choice):
        """The next group's rows are not taken by mistake."""
        with pytest.raises(InvalidInput, match="no row|one row for each"):
            matrix().predict(choice)


class TestDigest:
    @given(matrices())
    def test_ignores_provenance(self, found):
        members = {n: getattr(found, n) for n in (*ARRAYS, "table", "constant", "base_point")}
        other = SensitivityMatrix(**members, provenance={"host": "elsewhere"})
        assert found.digest() == other.digest()

    @pytest.mark.parametrize(
        "members",
        [
            {"diagonal": np.array([8.0, 2.0, 6.0, 1.5])},
            {"cross": None},
            {"cross": np.zeros((4, 4))},
            {"diagonal_error": np.zeros(4)},
            {"constant": 1.0},
            {"base_point": (0, 0)},
            {"loss": "mse"},
            {"unit": "bits/sample"},
        ],
    )
    def test_sees_everything_else(self, members):
        assert matrix().digest() != matrix(**members).digest()

    def test_tells_an_error_from_a_value(self):
        """Arrays of one shape in different places."""
        zeros = np.zeros((4, 4))
        one = matrix(cross=zeros, cross_error=None)
        other = matrix(cross=None, cross_error=zeros)
        assert one.digest() != other.digest()


class TestFile:
    @given(matrices())
    def test_survives_bytes(self, found):
        data = found.to_bytes()
        again = SensitivityMatrix.from_bytes(data)
        assert same(found, again)
        assert data == again.to_bytes()
        assert found.digest() == again.digest()

    def test_survives_a_file(self, tmp_path):
        path = tmp_path / "matrix.npz"
        matrix().save(path)
        assert same(matrix(), SensitivityMatrix.load(path))

    def test_bytes_do_not_depend_on_the_time(self):
        with zipfile.ZipFile(io.BytesIO(matrix().to_bytes())) as archive:
            assert {(1980, 1, 1, 0, 0, 0)} == {info.date_time for info in archive.infolist()}

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(InvalidMatrix, match="must be readable; got: .*No such file"):
            SensitivityMatrix.load(tmp_path / "none.npz")

    def test_a_pickle_is_refused_unread(self):
        """Its code does not run."""
        ran = []

        class Attack:
            def __reduce__(self):
                return (ran.append, (1,))

        with pytest.raises(InvalidMatrix, match="must be the .npz that 'bitquota measure' writes"):
            SensitivityMatrix.from_bytes(pickle.dumps(Attack()))
        assert not ran

    def test_an_object_array_is_refused(self):
        member = io.BytesIO()
        np.save(member, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("meta.npy", member.getvalue())
        with pytest.raises(InvalidMatrix, match="allow_pickle"):
            SensitivityMatrix.from_bytes(data.getvalue())

    @pytest.mark.parametrize("data", [b"", b"PK", b"{}", b"\x93NUMPY", b"\x80\x04."])
    def test_other_files_are_refused(self, data):
        with pytest.raises(InvalidMatrix, match="must be the .npz"):
            SensitivityMatrix.from_bytes(data)

    def test_an_array_alone_is_refused(self):
        data = io.BytesIO()
        np.save(data, np.zeros(3))
        with pytest.raises(InvalidMatrix, match="must be the .npz"):
            SensitivityMatrix.from_bytes(data.getvalue())

    def test_another_npz_is_refused(self):
        data = io.BytesIO()
        np.savez(data, x=np.zeros(3))
        with pytest.raises(InvalidMatrix, match="must be the .npz"):
            SensitivityMatrix.from_bytes(data.getvalue())

    @pytest.mark.parametrize(
        "meta",
        ['{"format":"other/1"}', "{}", "[]", "3", '{"format":"bitquota/matrix/1"}', "{", "\x00"],
    )
    def test_wrong_metadata_is_refused(self, meta):
        data = io.BytesIO()
        np.savez(data, meta=np.frombuffer(meta.encode(), dtype=np.uint8))
        with pytest.raises(InvalidMatrix, match="a matrix file must"):
            SensitivityMatrix.from_bytes(data.getvalue())

    @given(st.data())
    def test_a_truncated_file_is_refused(self, data):
        whole = matrix().to_bytes()
        cut = data.draw(st.integers(0, len(whole) - 1))
        with pytest.raises(InvalidMatrix, match="a matrix file must"):
            SensitivityMatrix.from_bytes(whole[:cut])

    @given(st.data())
    def test_a_damaged_file_is_refused_or_harmless(self, data):
        """One changed byte is an InvalidInput, or lies where nothing reads it."""
        whole = bytearray(matrix().to_bytes())
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] ^= data.draw(st.integers(1, 255))
        try:
            found = SensitivityMatrix.from_bytes(bytes(whole))
        except InvalidInput:
            return
        assert found.digest() == matrix().digest()
