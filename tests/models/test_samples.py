"""Calibration sets from files and factories."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from bitquota.errors import InvalidCalibration
from bitquota.models.binding import bound
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.models.samples import check_calibration, load_calibration
from format_networks import tiny_net, write_pt2
from refusals import refused


@pytest.fixture
def images() -> np.ndarray:
    """Ten images as the tiny network takes them."""
    return np.random.default_rng(0).normal(size=(10, 3, 8, 8)).astype(np.float32)


def npz(path, **members):
    """Write an ``.npz`` and return its path as text."""
    np.savez(path, **members)
    return str(path)


class TestLoadCalibration:
    def test_npz(self, tmp_path, images):
        """X and y become inputs and labels."""
        data = load_calibration(npz(tmp_path / "c.npz", x=images, y=np.arange(10, dtype=np.uint8)))
        assert np.array_equal(images, data.inputs[0].numpy())
        assert data.labels.tolist() == list(range(10))
        assert data.labels.dtype == torch.int64

    def test_compressed_and_fortran_order(self, tmp_path, images):
        """Both are ordinary things to save."""
        np.savez_compressed(tmp_path / "c.npz", inputs=np.asfortranarray(images))
        data = load_calibration(str(tmp_path / "c.npz"))
        assert np.array_equal(images, data.inputs[0].numpy())
        assert data.labels is None

    def test_float64_and_big_endian(self, tmp_path, images):
        """Other floats are converted to float32."""
        data = load_calibration(npz(tmp_path / "c.npz", x=images.astype(">f8")))
        assert data.inputs[0].dtype == torch.float32
        assert np.array_equal(images, data.inputs[0].numpy())

    def test_tokens_and_mask(self, tmp_path):
        """Tokens become int64; a mask is the second input."""
        ids = np.arange(12, dtype=np.int32).reshape(3, 4)
        data = load_calibration(
            npz(tmp_path / "c.npz", input_ids=ids, attention_mask=np.ones((3, 4), np.int8))
        )
        assert [t.dtype for t in data.inputs] == [torch.int64, torch.int64]
        assert data.inputs[0].tolist() == ids.tolist()

    def test_names_that_only_onnx_knows(self, tmp_path, images):
        """TensorFlow's exports call their input ``serving_default_input:0``."""
        members = {"serving_default_input_2:0": images, "onnx::Gather.1": np.arange(10)}
        data = load_calibration(npz(tmp_path / "c.npz", **members))
        assert set(data.names) == set(members)

    def test_safetensors(self, tmp_path, images):
        """The same names in safetensors give the same set."""
        save_file(
            {"x": torch.from_numpy(images), "y": torch.arange(10)}, tmp_path / "c.safetensors"
        )
        data = load_calibration(str(tmp_path / "c.safetensors"))
        other = load_calibration(npz(tmp_path / "c.npz", x=images, y=np.arange(10)))
        assert other.digest == data.digest

    def test_factory(self):
        """A factory returns inputs and labels."""
        data = load_calibration("format_networks:samples")
        assert tuple(data.inputs[0].shape) == (8, 3, 8, 8)
        assert data.labels.tolist() == list(range(8))

    def test_draw(self, tmp_path, images):
        """N samples, reproducible, in their original order."""
        path = npz(tmp_path / "c.npz", x=images)
        first, again, other = (load_calibration(path, n=4, seed=s) for s in (1, 1, 2))
        assert first.indices == again.indices == tuple(sorted(first.indices))
        assert first.indices != other.indices
        with refused(InvalidCalibration, samples=11, available=10):
            load_calibration(path, n=11)

    def test_uint8_images(self, tmp_path):
        """Raw pixels are refused with the line of code that normalises them."""
        path = npz(tmp_path / "c.npz", x=np.zeros((4, 8, 8, 3), np.uint8))
        with refused(InvalidCalibration, member="x", shape=[4, 8, 8, 3]):
            load_calibration(path)

    def test_nan(self, tmp_path, images):
        """How many samples are not finite is said."""
        images[3, 0, 0, 0] = np.nan
        with refused(InvalidCalibration, tensor="input 0", samples=1):
            load_calibration(npz(tmp_path / "c.npz", x=images))

    @pytest.mark.parametrize(
        ("members", "sentence"),
        [
            ({"attention_mask": np.zeros((2, 3), int)}, "holds attention_mask"),
            ({"x": np.zeros((2, 3)), "y": np.zeros(2), "labels": np.zeros(2)}, "not both"),
            ({"x": np.zeros((2, 3)), "y": np.zeros(3, int)}, "same first dimension"),
            ({"x": np.zeros((2, 3), complex)}, "must be numbers"),
            ({"x": np.array(["a", "b"])}, "must be numbers"),
            ({"x": np.zeros((0, 3))}, "at least one sample"),
            ({"x": np.zeros((2, 3), bool)}, "is boolean"),
        ],
    )
    def test_members_that_do_not_hold(self, tmp_path, members, sentence):
        """Each is one sentence."""
        with pytest.raises(InvalidCalibration, match=sentence):
            load_calibration(npz(tmp_path / "c.npz", **members))

    def test_pickled_member(self, tmp_path):
        """An object array is refused without unpickling."""
        np.savez(tmp_path / "c.npz", x=np.array([{"a": 1}], dtype=object))
        with pytest.raises(InvalidCalibration, match="plain arrays"):
            load_calibration(str(tmp_path / "c.npz"))

    def test_bomb(self, tmp_path):
        """A member that would inflate a thousandfold is refused from the directory alone."""
        with zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            member = io.BytesIO()
            np.lib.format.write_array(member, np.zeros(2**22, np.float32))
            archive.writestr("x.npy", member.getvalue())
        with refused(InvalidCalibration, member="x.npy", bytes=16777344):
            load_calibration(str(tmp_path / "c.npz"))

    def test_header_that_claims_terabytes(self, tmp_path):
        """A header larger than its member is refused before anything is allocated."""
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (500000000000,), }"
        header += b" " * (117 - len(header)) + b"\n"
        with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
            archive.writestr(
                "x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
            )
        with pytest.raises(InvalidCalibration, match="as large as they say"):
            load_calibration(str(tmp_path / "c.npz"))

    @pytest.mark.parametrize(
        "described", ["'<f4<f4'", "'tensor_0'", "None", "'|O'", "[('a', '<f4')]"]
    )
    def test_unknown_data_type(self, tmp_path, described):
        """What numpy does not understand, or would unpickle, is refused in a sentence."""
        header = f"{{'descr': {described}, 'fortran_order': False, 'shape': (2,), }}".encode()
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\x00" * 8
        with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
            archive.writestr("x.npy", data)
        with pytest.raises(InvalidCalibration):
            load_calibration(str(tmp_path / "c.npz"))

    def test_truncated(self, tmp_path, images):
        """Half a file."""
        path = tmp_path / "c.npz"
        npz(path, x=images)
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(InvalidCalibration, match=r"whole \.npz archive"):
            load_calibration(str(path))

    def test_truncated_safetensors(self, tmp_path, images):
        """Half a safetensors file."""
        path = tmp_path / "c.safetensors"
        save_file({"x": torch.from_numpy(images)}, path)
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(InvalidCalibration, match="whole safetensors file"):
            load_calibration(str(path))

    @pytest.mark.parametrize("name", ["c.pkl", "c.pt", "c.csv"])
    def test_other_files(self, tmp_path, name):
        """Pickles and others are refused with the right way to save."""
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InvalidCalibration, match=r"numpy\.savez"):
            load_calibration(str(tmp_path / name))

    def test_missing(self):
        """That it is not there is said, with everything that is accepted."""
        with pytest.raises(InvalidCalibration, match=r"'nowhere\.npz' does not exist") as caught:
            load_calibration("nowhere.npz")
        assert all(s in str(caught.value) for s in (".npz", ".txt", ".parquet", "factory"))

    def test_folder(self, tmp_path):
        """A folder is called one."""
        with pytest.raises(InvalidCalibration, match="is a folder"):
            load_calibration(str(tmp_path))

    def test_factory_that_returns_something_else(self):
        """Named with what it returned."""
        with pytest.raises(InvalidCalibration, match="it returned int"):
            load_calibration("format_networks:not_a_module")


class TestCheckCalibration:
    def test_shape_of_output(self, tmp_path, images):
        """The shape of one sample's output comes back."""
        data = load_calibration(npz(tmp_path / "c.npz", x=images))
        assert check_calibration(tiny_net(), data) == (10,)

    def test_wrong_shape(self, tmp_path):
        """What was got and why it does not fit."""
        data = load_calibration(npz(tmp_path / "c.npz", x=np.zeros((4, 1, 8, 8), np.float32)))
        with pytest.raises(
            InvalidCalibration, match=r"got \[1, 8, 8\] float32 per sample .*failed"
        ):
            check_calibration(tiny_net(), data)

    def test_expected_shape_is_said_where_known(self, llama_folder, tmp_path):
        """A folder's config tells what is expected."""
        from bitquota.models.load import load_model

        data = load_calibration(npz(tmp_path / "c.npz", x=np.zeros((4, 7), np.float32)))
        with refused(InvalidCalibration, got="[7] float32"):
            check_calibration(load_model(str(llama_folder)), data)

    def test_output_that_is_no_batch(self, images, tmp_path):
        """A model that averages over the batch cannot be measured per sample."""

        class Mean(torch.nn.Module):
            def forward(self, x):
                return x.mean((0, 2, 3))

        data = load_calibration(npz(tmp_path / "c.npz", x=images))
        with pytest.raises(InvalidCalibration, match="one row per sample"):
            check_calibration(Mean(), data)


class TestBound:
    @staticmethod
    def graph(path, order, kind=TensorProto.INT64):
        """Write a graph that declares its inputs in this order."""
        rng = np.random.default_rng(0)
        value = helper.make_tensor_value_info
        nodes = [
            helper.make_node("Gather", ["emb", "input_ids"], ["e"]),
            helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["m", "axis"], ["u"]),
            helper.make_node("Mul", ["e", "u"], ["h"]),
            helper.make_node("MatMul", ["h", "w"], ["y"], "w"),
        ]
        tensors = [
            numpy_helper.from_array(rng.normal(size=(50, 8)).astype(np.float32), "emb"),
            numpy_helper.from_array(rng.normal(size=(8, 4)).astype(np.float32), "w"),
            numpy_helper.from_array(np.array([2]), "axis"),
        ]
        inputs = [value(name, kind, ["n", "s"]) for name in order]
        outputs = [value("y", TensorProto.FLOAT, None)]
        graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
        opsets = [helper.make_opsetid("", 21)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
        return load_model(str(path))

    @staticmethod
    def samples(path, **more):
        """Write tokens and a mask."""
        rng = np.random.default_rng(1)
        ids, mask = rng.integers(2, 50, (6, 5)), rng.integers(0, 2, (6, 5))
        np.savez(path, input_ids=ids, attention_mask=mask, **more)
        return load_calibration(str(path)), ids, mask

    def test_names_decide_not_the_order(self, tmp_path):
        """The same file goes to the same inputs, in whatever order they are declared."""
        samples, ids, mask = self.samples(tmp_path / "c.npz")
        outputs = []
        for order in (["input_ids", "attention_mask"], ["attention_mask", "input_ids"]):
            model = self.graph(tmp_path / "m.onnx", order)
            found = bound(model, samples)
            assert found.names == tuple(order)
            given = {"input_ids": ids, "attention_mask": mask}
            for name, tensor in zip(order, found.inputs, strict=True):
                assert np.array_equal(given[name], tensor)
            outputs.append(model.module(*found.inputs))
        assert torch.equal(*outputs)

    def test_missing_and_extra_are_named(self, tmp_path):
        """With what the model declares."""
        model = self.graph(tmp_path / "m.onnx", ["attention_mask", "input_ids"])
        samples, ids, _ = self.samples(tmp_path / "c.npz", token_type_ids=np.zeros((6, 5), int))
        with pytest.raises(InvalidCalibration, match="'token_type_ids' is none.*attention_mask"):
            bound(model, samples)
        np.savez(tmp_path / "d.npz", input_ids=ids)
        with pytest.raises(InvalidCalibration, match="'attention_mask' is missing"):
            bound(model, load_calibration(str(tmp_path / "d.npz")))

    def test_wrong_type(self, tmp_path):
        """Floating point is not cut to integers."""
        model = self.graph(tmp_path / "m.onnx", ["input_ids", "attention_mask"])
        _, ids, mask = self.samples(tmp_path / "c.npz")
        np.savez(tmp_path / "d.npz", input_ids=ids / 2, attention_mask=mask)
        with pytest.raises(InvalidCalibration, match="integers"):
            bound(model, load_calibration(str(tmp_path / "d.npz")))

    def test_parameters_of_a_forward_pass(self):
        """Names of a torch module; what has a default may be left out, but not before another."""

        class Two(torch.nn.Module):
            def forward(self, left, right, scale=None, shift=None):
                return left - right if shift is None else left + shift

        left, right = torch.ones(3, 2), torch.zeros(3, 2)
        swapped = CalibrationSet(inputs=(right, left), names=("right", "left"))
        assert torch.equal(Two()(*bound(Two(), swapped).inputs), left)
        gap = CalibrationSet(inputs=(left, right, left), names=("left", "right", "shift"))
        with pytest.raises(InvalidCalibration, match="'scale' must be there too"):
            bound(Two(), gap)
        two = CalibrationSet(inputs=(left, right), names=("x", "inputs"))
        with pytest.raises(InvalidCalibration, match="'left' is missing"):
            bound(Two(), two)
        usual = CalibrationSet(inputs=(left, right), names=("x", "right"))
        assert bound(Two(), usual).names == ("left", "right")

    @staticmethod
    def exported(path, order):
        """Write a ``.pt2`` whose forward pass takes tokens and flags in this order."""

        class Masked(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.embed = torch.nn.Embedding(50, 8)
                self.head = torch.nn.Linear(8, 4)

            def both(self, ids, mask):
                return self.head(self.embed(ids) * mask.unsqueeze(-1)).sum(1)

        class Swapped(Masked):
            def forward(self, attention_mask, input_ids):
                return self.both(input_ids, attention_mask)

        class Usual(Masked):
            def forward(self, input_ids, attention_mask):
                return self.both(input_ids, attention_mask)

        net = (Usual() if order[0] == "input_ids" else Swapped()).eval()
        given = {"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 5).bool()}
        write_pt2(net, tuple(given[name] for name in order), path)
        return load_model(str(path)), net

    def test_inputs_of_a_pt2(self, tmp_path):
        """They go by name too, in their exported types, and the order is part of the model."""
        samples, _, mask = self.samples(tmp_path / "c.npz")
        orders = ["input_ids", "attention_mask"], ["attention_mask", "input_ids"]
        found = []
        for order in orders:
            model, net = self.exported(tmp_path / "m.pt2", order)
            few = bound(model, samples)
            assert few.names == tuple(order)
            flags = few.inputs[order.index("attention_mask")]
            assert flags.dtype == torch.bool
            assert np.array_equal(mask.astype(bool), flags)
            with torch.no_grad():
                found.append((model.digest, model.module(*few.inputs)))
                assert torch.equal(net(*few.inputs), found[-1][1])
        assert torch.equal(found[0][1], found[1][1])
        assert found[0][0] != found[1][0]

    def test_refusals_of_a_pt2(self, tmp_path):
        """They say what it declares."""
        model, _ = self.exported(tmp_path / "m.pt2", ["input_ids", "attention_mask"])
        ids = torch.ones(3, 5).long()
        with refused(InvalidCalibration, missing=["attention_mask"]):
            bound(model, CalibrationSet(inputs=(ids,), names=("x",)))
        three = CalibrationSet(inputs=(ids,) * 3, names=("input_ids", "attention_mask", "types"))
        with refused(InvalidCalibration, extra=["types"]):
            bound(model, three)
        wrong = CalibrationSet(inputs=(ids / 2, ids), names=("input_ids", "attention_mask"))
        with pytest.raises(InvalidCalibration, match=r"the model takes input_ids \(integers\)"):
            bound(model, wrong)

    def test_names_are_part_of_the_digest(self):
        """They decide what is computed."""
        a, b = torch.ones(3, 2), torch.zeros(3, 2)
        one = CalibrationSet(inputs=(a, b), names=("left", "right"))
        assert one.digest != CalibrationSet(inputs=(a, b), names=("right", "left")).digest
        assert (
            CalibrationSet(inputs=(a,), names=("x",)).digest == CalibrationSet(inputs=(a,)).digest
        )

    def test_factory_of_a_dict(self, tmp_path, monkeypatch):
        """By name, with labels or without."""
        (tmp_path / "own_samples.py").write_text(
            "import torch\n"
            "def plain(): return {'left': torch.ones(3, 2), 'right': torch.zeros(3, 2)}\n"
            "def labelled(): return plain(), torch.arange(3)\n"
        )
        monkeypatch.chdir(tmp_path)
        assert load_calibration("own_samples:plain").names == ("left", "right")
        assert torch.equal(load_calibration("own_samples:labelled").labels, torch.arange(3))
