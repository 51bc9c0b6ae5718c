from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest

from bitquota.errors import InvalidCalibration, InvalidModel, TooLarge, UnsafeModel
from bitquota.service.security.archives import check_zip
from bitquota.service.security.upload_inspection import inspect_dataset, inspect_model
from bitquota.service.store.formats import DatasetFormat, ModelFormat
from live_server import safetensors

SMALL = {"max_ratio": 100, "max_bytes": 10**6}


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


WEIGHT = safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8)


class TestInspectModel:
    def test_pt2(self, digits_files):
        assert ModelFormat.PT2 is inspect_model(digits_files[0], max_ratio=100)

    def test_pt2_is_vetted_on_arrival(self, tmp_path):
        path = zipped(tmp_path / "m", {"m/archive_format": "pt2", "m/models/model.json": "{}"})
        with pytest.raises(InvalidModel, match="pt2"):
            inspect_model(path, max_ratio=100)

    def test_huggingface_folder(self, tmp_path):
        path = zipped(tmp_path / "m", {"config.json": "{}", "model.safetensors": WEIGHT})
        assert ModelFormat.HUGGING_FACE is inspect_model(path, max_ratio=100)

    @pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
    def test_pickle_is_refused_in_every_protocol(self, tmp_path, protocol):
        path = tmp_path / "m"
        path.write_bytes(pickle.dumps({"w": [1, 2, 3]}, protocol=protocol))
        with pytest.raises((UnsafeModel, InvalidModel)) as caught:
            inspect_model(path, max_ratio=100)
        assert "safetensors" in caught.value.message

    def test_torch_save_is_refused(self, tmp_path):
        path = zipped(tmp_path / "m", {"m/data.pkl": b"\x80\x02.", "m/version": "3"})
        with pytest.raises(UnsafeModel, match=r"torch\.save"):
            inspect_model(path, max_ratio=100)

    def test_torchscript_is_refused(self, tmp_path):
        members = {"m/data.pkl": b"\x80\x02.", "m/constants.pkl": b"\x80\x02.", "m/code/a.py": ""}
        with pytest.raises(UnsafeModel, match="TorchScript"):
            inspect_model(zipped(tmp_path / "m", members), max_ratio=100)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_x.py", "a.pkl", "b.so"])
    def test_folder_with_code_is_refused(self, tmp_path, name):
        members = {"config.json": "{}", "model.safetensors": WEIGHT, name: b"x"}
        with pytest.raises(UnsafeModel, match=name.replace(".", r"\.")):
            inspect_model(zipped(tmp_path / "m", members), max_ratio=100)

    def test_bare_safetensors_needs_a_config(self, tmp_path):
        path = tmp_path / "m"
        path.write_bytes(WEIGHT)
        with pytest.raises(InvalidModel, match=r"config\.json"):
            inspect_model(path, max_ratio=100)

    def test_truncated_safetensors(self, tmp_path):
        path = tmp_path / "m"
        path.write_bytes(WEIGHT[:-3])
        with pytest.raises(InvalidModel, match="truncated"):
            inspect_model(path, max_ratio=100)

    def test_truncated_zip(self, tmp_path):
        path = zipped(tmp_path / "m", {"config.json": "{}" * 1000})
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(InvalidModel, match="whole"):
            inspect_model(path, max_ratio=100)

    @pytest.mark.parametrize("data", [b"", b"hello", b"\x00" * 64, b"\x7fELF" + b"\0" * 60])
    def test_anything_else(self, tmp_path, data):
        path = tmp_path / "m"
        path.write_bytes(data)
        with pytest.raises(InvalidModel, match="must be"):
            inspect_model(path, max_ratio=100)


class TestCheckZip:
    @pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\\..\\x"])
    def test_names_that_leave_the_folder(self, tmp_path, name):
        path = zipped(tmp_path / "m", {name: b"x"})
        with pytest.raises(InvalidModel, match="stay inside"):
            check_zip(path, max_ratio=100, error=InvalidModel)

    def test_links(self, tmp_path):
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        path = tmp_path / "m"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(link, "/etc/passwd")
        with pytest.raises(InvalidModel, match="link"):
            check_zip(path, max_ratio=100, error=InvalidModel)

    def test_bomb(self, tmp_path):
        path = tmp_path / "m"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("zeros", b"\0" * 20_000_000)
        with pytest.raises(TooLarge, match="unpack"):
            check_zip(path, max_ratio=100, error=InvalidModel)

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_doubled_names(self, tmp_path):
        path = tmp_path / "m"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "1")
            archive.writestr("a", "2")
        with pytest.raises(InvalidModel, match="twice"):
            check_zip(path, max_ratio=100, error=InvalidModel)


class TestInspectDataset:
    def test_npz(self, tmp_path):
        np.savez(tmp_path / "c.npz", x=np.zeros((4, 3), np.float32), y=np.zeros(4, np.int64))
        assert DatasetFormat.NPZ is inspect_dataset(tmp_path / "c.npz", **SMALL)

    def test_safetensors(self, tmp_path):
        (tmp_path / "c").write_bytes(WEIGHT)
        assert DatasetFormat.SAFETENSORS is inspect_dataset(tmp_path / "c", **SMALL)

    def test_python_objects_are_refused(self, tmp_path):
        objects = np.empty(2, object)
        objects[:] = [{}, []]
        np.savez(tmp_path / "c.npz", x=objects)
        with pytest.raises(InvalidCalibration, match="pickled"):
            inspect_dataset(tmp_path / "c.npz", **SMALL)

    def test_text_is_refused(self, tmp_path):
        np.savez(tmp_path / "c.npz", x=np.array(["a", "b"]))
        with pytest.raises(InvalidCalibration, match="numbers"):
            inspect_dataset(tmp_path / "c.npz", **SMALL)

    def test_different_numbers_of_samples(self, tmp_path):
        np.savez(tmp_path / "c.npz", x=np.zeros((4, 3)), y=np.zeros(5))
        with pytest.raises(InvalidCalibration, match="same number of samples"):
            inspect_dataset(tmp_path / "c.npz", **SMALL)

    def test_header_that_claims_terabytes(self, tmp_path):
        head = io.BytesIO()
        described = {"descr": "<f8", "fortran_order": False, "shape": (2**40,)}
        np.lib.format.write_array_header_1_0(head, described)
        zipped(tmp_path / "c.npz", {"x.npy": head.getvalue()})
        with pytest.raises(TooLarge, match="claims shape"):
            inspect_dataset(tmp_path / "c.npz", **SMALL)

    def test_array_shorter_than_its_header(self, tmp_path):
        head = io.BytesIO()
        described = {"descr": "<f8", "fortran_order": False, "shape": (1000,)}
        np.lib.format.write_array_header_1_0(head, described)
        zipped(tmp_path / "c.npz", {"x.npy": head.getvalue() + b"\0" * 80})
        with pytest.raises(InvalidCalibration, match="truncated"):
            inspect_dataset(tmp_path / "c.npz", **SMALL)

    def test_pickle(self, tmp_path):
        (tmp_path / "c").write_bytes(pickle.dumps([1]))
        with pytest.raises(InvalidCalibration, match="pickle"):
            inspect_dataset(tmp_path / "c", **SMALL)

    def test_npy_alone(self, tmp_path):
        np.save(tmp_path / "c.npy", np.zeros(3))
        with pytest.raises(InvalidCalibration, match=r"\.npz"):
            inspect_dataset(tmp_path / "c.npy", **SMALL)
