import json
import struct

import numpy as np
import pytest
import torch

from bitquota.candidates.layers import Inventory, Layer, LayerKind
from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidInput
from bitquota.quantizers.imatrix import importance_of, layer_name, read_imatrix
from bitquota.quantizers.quantized_weights import QuantizedWeights
from bitquota.sensitivity.importers import read_measurement
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


def linear(name, columns, rows=3):
    return Layer(
        name=name,
        kind=LayerKind.LINEAR,
        weight_name=f"{name}.weight",
        weight_shape=(rows, columns),
        rows=rows,
        columns=columns,
        n_weights=rows * columns,
    )


def inventory(*layers):
    return Inventory(model_digest="test", layers=layers)


class TestImportanceOf:
    def test_names_of_llama_cpp_and_of_the_model(self, tmp_path):
        """Both find their layers; what is missing is said, and norms are ignored."""
        path = tmp_path / "imatrix.dat"
        path.write_bytes(
            imatrix(
                [
                    ("blk.0.attn_q.weight", 2, [2.0, 4.0]),
                    ("head.weight", 1, [1.0, 3.0, 8.0]),
                    ("blk.0.attn_norm.weight", 1, [1.0]),
                ]
            )
        )
        q = "model.layers.0.self_attn.q_proj"
        found = importance_of(path, inventory(linear(q, 2), linear("head", 3), linear("other", 2)))

        assert {k: v.tolist() for k, v in found.columns.items()} == {
            q: [1.0, 2.0],
            "head": [1.0, 3.0, 8.0],
        }
        assert found.missing == ("other",)

    def test_digest_is_that_of_the_values(self, tmp_path):
        """Equal importances have equal digests, whatever the order; others differ."""
        digests = []
        for entries in ([("a.weight", 1, [1, 2]), ("b.weight", 1, [3])],
                        [("b.weight", 2, [6]), ("a.weight", 1, [1, 2])],
                        [("b.weight", 1, [3]), ("a.weight", 1, [1, 3])]):  # fmt: skip
            path = tmp_path / "i.dat"
            path.write_bytes(imatrix(entries))
            digests.append(importance_of(path, inventory(linear("a", 2), linear("b", 1))).digest)
        assert digests[0] == digests[1] != digests[2]

    def test_another_model(self, tmp_path):
        """No known name, or another width."""
        path = tmp_path / "imatrix.dat"
        path.write_bytes(imatrix([("a.weight", 1, [1.0, 2.0])]))
        with pytest.raises(InvalidInput, match="names none"):
            importance_of(path, inventory(linear("b", 2)))
        with pytest.raises(InvalidInput, match="has 2 columns, layer 'a' has 3"):
            importance_of(path, inventory(linear("a", 3)))

    def test_scales_are_the_weighted_least_squares_ones(self, tmp_path):
        """No scale on a fine grid has a smaller weighted error; the unweighted one has a larger."""
        torch.manual_seed(0)
        module = torch.nn.Module()
        module.a = torch.nn.Linear(16, 4, bias=False)
        layer = linear("a", 16, rows=4)
        h = torch.logspace(-2, 2, 16, dtype=torch.float64)
        path = tmp_path / "imatrix.dat"
        path.write_bytes(imatrix([("a.weight", 1, h.tolist())]))
        columns = importance_of(path, inventory(layer)).columns
        candidate = Candidate.of(layer, 3, Scheme())

        def error(weights):
            difference = weights - module.a.weight.detach()
            return (h * difference.double().square()).sum(dim=1)

        weighted, plain = (
            QuantizedWeights(module, inventory(layer), importance=given)(candidate)
            for given in (columns, None)
        )

        w = module.a.weight.detach().double()
        scales = torch.linspace(-0.4, 0.4, 4001, dtype=torch.float64).reshape(-1, 1, 1)
        codes = (w / scales.where(scales != 0, 1.0)).round().clamp(-4, 3)
        best = (h * (codes * scales - w).square()).sum(dim=2).amin(dim=0)
        assert (error(weighted) <= best * (1 + 1e-4)).all()
        assert (error(weighted) < error(plain)).all()

    def test_columns_without_inputs_still_count_a_little(self, tmp_path):
        """Where nothing ever arrived, weights are not thrown away."""
        path = tmp_path / "imatrix.dat"
        path.write_bytes(imatrix([("a.weight", 1, [0.0, 2.0]), ("b.weight", 1, [0.0, 0.0])]))
        found = importance_of(path, inventory(linear("a", 2), linear("b", 2))).columns

        assert found["a"].tolist() == [1e-6, 2.0]
        assert found["b"].tolist() == [1.0, 1.0]
