import json
import struct

import numpy as np
import pytest

from bitquota.errors import InvalidInput
from bitquota.sensitivity.foreign import layer_name, read_imatrix, read_measurement
from bitquota.solver import Problem, solve


def solved(measurement, limit):
    """Solve an imported measurement with the project's solver."""
    problem = Problem(
        diagonal=measurement.diagonal,
        offsets=measurement.offsets,
        costs=measurement.costs,
        limits=np.array([limit + measurement.shift_bits], dtype=np.int64),
    )
    return measurement.chosen(solve(problem).choice)


def write(tmp_path, data):
    path = tmp_path / "measurement.json"
    path.write_text(json.dumps(data))
    return path


def exllamav2_option(accuracy, total_bits, bits):
    return {
        "accuracy": accuracy,
        "total_bits": total_bits,
        "q_proj": {"group_size": {"4": 128}, "bits": bits, "bits_prop": [1], "scale_bits": 4},
    }


class TestReadMeasurement:
    def test_exllamav2(self, tmp_path):
        """Accuracies multiply; the best product within the bits is found."""
        block = [exllamav2_option(0.9, 100, [3]), exllamav2_option(0.99, 200, [4])]
        head = [exllamav2_option(0.5, 100, [3]), exllamav2_option(0.98, 200, [4])]
        path = write(tmp_path, {"measurement": {"a.self_attn": block, "a.mlp": head}})

        found = read_measurement(path)

        assert found.source == "exllamav2"
        assert found.groups == ("a.self_attn", "a.mlp")
        np.testing.assert_allclose(np.exp(-found.diagonal), [0.9, 0.99, 0.5, 0.98])
        assert [o.cost_bits for o in solved(found, 300)] == [100, 200]

    def test_exllamav3(self, tmp_path):
        """Changes against a base: options that save bits have negative costs of their own."""
        groups = [
            {"layers": ["q", "k"], "candidates": [{"dkld": -0.3, "dbits": 50}]},
            {"layers": ["o"], "candidates": [{"dkld": 0.01, "dbits": -40}]},
        ]
        found = read_measurement(write(tmp_path, {"base_kld": 1.0, "groups": groups}))

        assert found.groups == ("q+k", "o")
        assert (found.costs >= 0).all()
        assert [o.label for o in solved(found, 0)] == ["base", "base"]
        assert [o.label for o in solved(found, 10)] == ["alternative 0", "alternative 0"]

    def test_modelopt(self, tmp_path):
        """Formats, scores and costs of every layer."""
        stats = {
            "l1": {"formats": ["INT4", "INT8"], "scores": [5.0, 1.0], "costs": [4.0, 8.0],
                   "module_names": ["a", "b"]},
            "l2": {"formats": ["INT4", "INT8"], "scores": [2.0, 1.0], "costs": [4.0, 8.0]},
        }  # fmt: skip
        found = read_measurement(write(tmp_path, {"candidate_stats": stats}))

        assert [o.label for o in solved(found, 12)] == ["INT8", "INT4"]
        assert found.options[0].detail == {"module_names": ["a", "b"]}

    @pytest.mark.parametrize(
        "data",
        [
            [],
            {},
            {"measurement": {}},
            {"measurement": {"a": [{"accuracy": 2.0, "total_bits": 1}]}},
            {"measurement": {"a": [{"total_bits": 1}]}},
            {"groups": [{"layers": ["a"], "candidates": [{"dkld": "x", "dbits": 1}]}]},
            {"a": {"formats": ["INT4"], "scores": [1.0, 2.0], "costs": [1.0]}},
        ],
    )
    def test_anything_else_is_refused(self, tmp_path, data):
        """One clear error for every way to be wrong."""
        with pytest.raises(InvalidInput):
            read_measurement(write(tmp_path, data))

    def test_not_json(self, tmp_path):
        """A pickle, for instance."""
        path = tmp_path / "m.json"
        path.write_bytes(b"\x80\x04\x95")
        with pytest.raises(InvalidInput, match="readable JSON"):
            read_measurement(path)


def imatrix(entries):
    """Return the binary layout."""
    data = struct.pack("<i", len(entries))
    for name, calls, sums in entries:
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", calls, len(sums)) + np.asarray(sums, dtype="<f4").tobytes()
    return data


class TestReadImatrix:
    def test_means_by_tensor(self, tmp_path):
        """Sums divided by calls; what follows the entries is ignored."""
        path = tmp_path / "imatrix.dat"
        entries = [("blk.0.attn_q.weight", 4, [4.0, 8.0]), ("output.weight", 0, [3.0])]
        path.write_bytes(imatrix(entries) + struct.pack("<i", 7))

        found = read_imatrix(path)

        assert {k: v.tolist() for k, v in found.items()} == {
            "blk.0.attn_q.weight": [1.0, 2.0],
            "output.weight": [3.0],
        }

    @pytest.mark.parametrize("cut", range(0, 40, 3))
    def test_a_cut_file_is_refused(self, tmp_path, cut):
        """At whatever byte it ends."""
        path = tmp_path / "imatrix.dat"
        path.write_bytes(imatrix([("blk.0.attn_q.weight", 4, [4.0, 8.0])])[:cut])
        with pytest.raises(InvalidInput):
            read_imatrix(path)

    def test_impossible_values_and_gguf(self, tmp_path):
        """Negative sums of squares, and the other container."""
        path = tmp_path / "imatrix.dat"
        path.write_bytes(imatrix([("a", 1, [-1.0])]))
        with pytest.raises(InvalidInput, match="negative"):
            read_imatrix(path)
        path.write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(InvalidInput, match="output-format dat"):
            read_imatrix(path)


class TestLayerName:
    def test_known_names(self):
        """Attention, feed-forward, output; others are unknown."""
        assert layer_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj"
        assert layer_name("output.weight") == "lm_head"
        assert layer_name("blk.0.attn_norm.weight") is None
