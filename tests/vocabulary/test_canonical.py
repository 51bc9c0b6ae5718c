"""Equal values give equal bytes; what JSON cannot hold is refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquota.canonical import (
    canonical_json,
    digest_array,
    digest_bytes,
    digest_json,
    read_json,
    replacing,
    schema_of,
    write_whole,
)
from bitquota.errors import InvalidPlan

if TYPE_CHECKING:
    from pathlib import Path

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class TestCanonicalJson:
    @given(VALUES)
    def test_reads_back(self, value):
        assert value == json.loads(canonical_json(value))

    @given(st.dictionaries(st.text(), SCALARS, min_size=2))
    def test_order_of_keys_does_not_matter(self, value):
        backwards = dict(reversed(value.items()))
        assert canonical_json(value) == canonical_json(backwards)

    @given(VALUES)
    def test_is_a_fixed_point(self, value):
        """Reading and writing again changes nothing."""
        text = canonical_json(value)
        assert text == canonical_json(json.loads(text))

    @given(st.floats(allow_nan=False, allow_infinity=False))
    def test_floats_keep_every_bit(self, value):
        assert value.hex() == json.loads(canonical_json(value)).hex()

    def test_has_no_white_space_and_no_escapes(self):
        assert '{"a":[1,2.5],"é":"Ω"}' == canonical_json({"é": "Ω", "a": [1, 2.5]})

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_refuses_what_is_not_finite(self, bad):
        with pytest.raises(ValueError, match="JSON compliant"):
            canonical_json({"loss": [1.0, bad]})

    @pytest.mark.parametrize("bad", [{1, 2}, b"bytes", np.float32(1.0), object()])
    def test_refuses_what_json_cannot_hold(self, bad):
        with pytest.raises(TypeError, match="not JSON serializable"):
            canonical_json({"value": bad})


class TestDigestJson:
    def test_is_sha256_of_the_text(self):
        expected = hashlib.sha256(b'{"a":1}').hexdigest()
        assert f"sha256:{expected}" == digest_json({"a": 1})

    @given(VALUES, VALUES)
    def test_differs_exactly_when_the_text_does(self, one, other):
        same = canonical_json(one) == canonical_json(other)
        assert same == (digest_json(one) == digest_json(other))


class TestDigestBytes:
    @given(st.lists(st.binary(), max_size=5))
    def test_chunks_do_not_matter(self, chunks):
        assert digest_bytes([b"".join(chunks)]) == digest_bytes(chunks)

    def test_of_nothing_is_the_empty_hash(self):
        assert f"sha256:{hashlib.sha256().hexdigest()}" == digest_bytes([])


class TestDigestArray:
    def test_layout_in_memory_does_not_matter(self):
        array = np.arange(12.0).reshape(3, 4)
        assert digest_array(array) == digest_array(np.asfortranarray(array))
        assert digest_array(array[:, ::2]) == digest_array(array[:, ::2].copy())

    def test_shape_matters(self):
        assert digest_array(np.zeros((2, 6))) != digest_array(np.zeros((3, 4)))

    def test_dtype_matters(self):
        """Both are twelve zero bytes."""
        assert digest_array(np.zeros(3, np.float32)) != digest_array(np.zeros(3, np.int32))

    def test_content_matters(self):
        assert digest_array(np.array([1.0, 2.0])) != digest_array(np.array([2.0, 1.0]))

    def test_refuses_objects(self):
        """The bytes of an object array are addresses, which differ from run to run."""
        with pytest.raises(TypeError, match="must hold numbers"):
            digest_array(np.array(["a", None], dtype=object))


class TestReadJson:
    def test_a_file_is_its_json(self, tmp_path: Path) -> None:
        """What was written comes back."""
        file = tmp_path / "a.json"
        file.write_text('{"ä": [1, null]}', encoding="utf-8")
        assert {"ä": [1, None]} == read_json(file, "a plan", "write one", InvalidPlan)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (None, "does not exist"),
            (b"", "is no JSON from line 1, column 1 on"),
            (b"{\n]", "is no JSON from line 2, column 1 on"),
            (b"\xff\xfe", "is not UTF-8 text"),
            (b"[" * 100_000, "cannot be read"),
        ],
    )
    def test_the_error_says_what_is_wrong_and_what_to_do(
        self, tmp_path: Path, content: bytes | None, reason: str
    ) -> None:
        """One sentence: what must hold, the file and its fault, the advice; no errno."""
        file = tmp_path / "a.json"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InvalidPlan) as caught:
            read_json(file, "a plan", "write one", InvalidPlan)
        assert f"a plan must be readable JSON; '{file}' {reason}" in str(caught.value)
        assert str(caught.value).endswith(": write one")
        assert "Errno" not in str(caught.value)

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        """A folder in place of a file is named as one."""
        with pytest.raises(InvalidPlan, match="is a folder: write one"):
            read_json(tmp_path, "a plan", "write one", InvalidPlan)


class TestSchemaOf:
    @pytest.mark.parametrize(
        ("data", "said"),
        [({}, "an object without a schema"), ([], "a list"), ({"schema": "x/1"}, "'x/1'")],
    )
    def test_it_names_what_was_found(self, data: object, said: str) -> None:
        """The kind of JSON, or the other schema."""
        assert said == schema_of(data)


class TestWriteWhole:
    def test_replaces(self, tmp_path):
        """The new content is there, and nothing beside it."""
        (tmp_path / "f").write_bytes(b"old")
        write_whole(tmp_path / "f", b"new")
        assert (tmp_path / "f").read_bytes() == b"new"
        assert [path.name for path in tmp_path.iterdir()] == ["f"]

    def test_error_names_the_file(self, tmp_path):
        """No name that the user never gave."""
        with pytest.raises(FileNotFoundError) as caught:
            write_whole(tmp_path / "nowhere" / "f", b"")
        assert caught.value.filename == str(tmp_path / "nowhere" / "f")


class TestReplacing:
    def test_stays_as_it_was(self, tmp_path):
        """What fails half-way leaves the old file and no other."""
        (tmp_path / "f").write_bytes(b"old")

        def fail() -> None:
            with replacing(tmp_path / "f") as place:
                place.write_bytes(b"half")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert (tmp_path / "f").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["f"]

    def test_no_regular_file(self, tmp_path):
        """A device or a pipe is written to, never replaced."""
        os.mkfifo(tmp_path / "pipe")
        with replacing(tmp_path / "pipe") as place:
            assert place == tmp_path / "pipe"
        assert (tmp_path / "pipe").is_fifo()
