"""Columns of tables as samples."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from bitquota.errors import InvalidCalibration
from bitquota.models.samples import load_calibration
from bitquota.models.tables import read_table
from refusals import refused

ROWS = [
    {"input_ids": [k, k + 1, k + 2], "attention_mask": [1, 1, 0], "image": [[k / 2] * 4] * 2}
    for k in range(5)
]


def jsonl(path, rows):
    """Write one object per line."""
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def as_parquet(path, **columns):
    """Write columns."""
    parquet.write_table(pa.table(columns), path)
    return path


class TestReadTable:
    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_columns_are_inputs(self, tmp_path, suffix):
        """The same samples as from an ``.npz``; nested lists are further dimensions."""
        path = tmp_path / f"c{suffix}"
        if suffix == ".jsonl":
            jsonl(path, ROWS)
        else:
            parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
        columns = {name: np.array([row[name] for row in ROWS]) for name in ROWS[0]}
        np.savez(tmp_path / "c.npz", **columns)
        found = load_calibration(str(path))
        assert found.digest == load_calibration(str(tmp_path / "c.npz")).digest
        assert found.names == ("input_ids", "attention_mask", "image")
        assert [tuple(t.shape[1:]) for t in found.inputs] == [(3,), (3,), (2, 4)]
        assert found.inputs[2].dtype == torch.float32

    def test_fixed_size_lists_flags_and_labels(self, tmp_path):
        """As other writers store them."""
        fixed = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float16(), 2))
        path = as_parquet(tmp_path / "c.parquet", x=fixed, known=[True, False], labels=[3, 4])
        found = load_calibration(str(path))
        assert found.inputs[0].tolist() == [[1.0, 2.0], [3.0, 4.0]]
        assert found.inputs[1].dtype == torch.bool
        assert found.labels.tolist() == [3, 4]

    def test_slices_of_a_larger_array(self, tmp_path):
        """Rows are cut where they begin, whatever lies before them in the buffer."""
        whole = pa.array([[k, k] for k in range(6)])
        path = as_parquet(tmp_path / "c.parquet", x=whole[3:])
        assert read_table(path)["x"].tolist() == [[3, 3], [4, 4], [5, 5]]

    @pytest.mark.parametrize(
        ("column", "what"),
        [
            ([[1, 2], [3]], "different lengths"), ([[1, 2], None], "different lengths"),
            (["a", "b"], "type string"), ([1, None], "missing values"),
            ([{"a": 1}, {"a": 2}], "type struct"),
        ],
    )  # fmt: skip
    def test_columns_that_are_no_arrays(self, tmp_path, column, what):
        """The column is named, with what it holds."""
        path = as_parquet(tmp_path / "c.parquet", x=[1.0, 2.0], other=column)
        with pytest.raises(InvalidCalibration, match=what) as caught:
            load_calibration(str(path))
        assert caught.value.details["column"] == "other"

    @pytest.mark.parametrize(
        "values", [[[1, 2], [3]], ["a", "b"], [1, None], [{"a": 1}, {}], [2**70, 1]]
    )
    def test_values_that_are_no_arrays(self, tmp_path, values):
        """The key is named."""
        path = jsonl(tmp_path / "c.jsonl", [{"x": 1.0, "other": v} for v in values])
        with refused(InvalidCalibration, column="other"):
            load_calibration(str(path))

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("{", "must be an object in UTF-8"), ("[1]", "must be an object"),
            ('{"x": 1}\n{"z": 1}', "object 1 has x and object 2 z"),
            ('{"text": "a"}\n{"x": 1}', "or a 'text' each"), ("", "holds nothing"),
            ("[" * 100_000, "must be an object"),
        ],
    )  # fmt: skip
    def test_broken_lines(self, tmp_path, text, sentence):
        """Each is one sentence."""
        (tmp_path / "c.jsonl").write_text(text)
        with pytest.raises(InvalidCalibration, match=sentence):
            load_calibration(str(tmp_path / "c.jsonl"), tokenizer="bytes")

    def test_documents(self, tmp_path):
        """A column ``text`` makes it a text, whatever stands beside it."""
        assert read_table(jsonl(tmp_path / "t.jsonl", [{"text": "a", "n": 1}, {"text": "b"}])) == (
            "a\n\nb"
        )
        path = as_parquet(tmp_path / "t.parquet", id=[1, 2, 3], text=["a", None, "b"])
        assert read_table(path) == "a\n\nb"

    def test_what_unpacks_to_too_much(self, tmp_path):
        """A column of one repeated value is small on disk."""
        path = as_parquet(tmp_path / "c.parquet", x=[[0.0] * 100] * 10_000)
        assert path.stat().st_size < 100_000
        assert read_table(path)["x"].shape == (10_000, 100)
        for small in (path, jsonl(tmp_path / "c.jsonl", [{"x": k} for k in range(10_000)])):
            with pytest.raises(InvalidCalibration, match="unpack to at most 100,000"):
                read_table(small, max_bytes=100_000)

    def test_torn_parquet(self, tmp_path):
        """A file that was cut short is named."""
        (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(InvalidCalibration, match="must be a whole file"):
            read_table(tmp_path / "t.parquet")
