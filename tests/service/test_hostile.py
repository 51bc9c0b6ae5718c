"""Uploads that mean harm: each is answered at once, none runs, and the next job is unharmed."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest

from bitquota.request import PlanRequest
from live_server import folder_zip, safetensors
from waiting import PATIENCE_S, PATIENTLY


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def zipped(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npz(**members):
    return zipped({f"{name}.npy": data for name, data in members.items()})


def npy(shape, dtype="<f4", data=b"", version=(1, 0)):
    head = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    write = {
        (1, 0): np.lib.format.write_array_header_1_0,
        (2, 0): np.lib.format.write_array_header_2_0,
    }[version]
    write(head, described)
    return head.getvalue() + data


def edited_pt2(digits, edit):
    """Return the honest .pt2 after ``edit(members)`` changed what is in it."""
    with zipfile.ZipFile(digits) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    return zipped(members)


def member(members, ending):
    return next(name for name in members if name.endswith(ending))


def edit_json(ending, change):
    def edit(members):
        name = member(members, ending)
        text = members[name].decode()
        members[name] = change(text).encode()

    return edit


def expression(text):
    """Put ``text`` where torch would evaluate it."""

    def change(program):
        import re

        return re.sub(r'"expr_str":\s*"[^"]*"', '"expr_str": ' + json.dumps(text), program)

    return edit_json("models/model.json", change)


def pickled_weights(payload):
    def edit(members):
        name = member(members, "model_weights_config.json")
        config = json.loads(members[name])
        for entry in config["config"].values():
            entry["use_pickle"] = True
        members[name] = json.dumps(config).encode()
        weight = member(members, "weights/weight_0")
        members[weight] = payload

    return edit


def sample_inputs(payload):
    def edit(members):
        members[member(members, "sample_inputs/model.pt")] = payload

    return edit


def opaque_constant(payload):
    def edit(members):
        config = member(members, "model_constants_config.json")
        root = config.split("/")[0]
        members[f"{root}/data/constants/opaque_obj_0"] = payload
        data = json.loads(members[config])
        data["config"]["x"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}
        members[config] = json.dumps(data).encode()

    return edit


def operator(target):
    def change(program):
        return program.replace("torch.ops.aten.conv2d.default", target)

    return edit_json("models/model.json", change)


def native_code(members):
    root = member(members, "archive_format").split("/")[0]
    members[f"{root}/data/aotinductor/model/model.so"] = b"\x7fELF"


def cut(data):
    return data[: len(data) // 2]


def deep_json(n):
    header = (b'{"a":' * n) + b"1" + b"}" * n
    return struct.pack("<Q", len(header)) + header


MODELS = {
    "pickle": lambda d, m: pickle.dumps(Payload(m)),
    "pickle, protocol 2": lambda d, m: pickle.dumps(Payload(m), protocol=2),
    "torch.save": lambda d, m: zipped({"a/data.pkl": pickle.dumps(Payload(m)), "a/version": "3"}),
    "torchscript": lambda d, m: zipped(
        {"a/data.pkl": pickle.dumps(Payload(m)), "a/constants.pkl": pickle.dumps(Payload(m))}
    ),
    "pt2 with pickled weights": lambda d, m: edited_pt2(
        d, pickled_weights(pickle.dumps(Payload(m)))
    ),
    "pt2 with an opaque constant": lambda d, m: edited_pt2(
        d, opaque_constant(pickle.dumps(Payload(m)))
    ),
    "pt2 with code in an expression": lambda d, m: edited_pt2(
        d, expression(f"__import__('os').mkdir({str(m)!r})")
    ),
    "pt2 with an operator of the system": lambda d, m: edited_pt2(d, operator("torch.os.system")),
    "pt2 with an operator that reads files": lambda d, m: edited_pt2(
        d, operator("torch.ops.aten.from_file.default")
    ),
    "pt2 with native code": lambda d, m: edited_pt2(d, native_code),
    "pt2 cut in half": lambda d, m: cut(Path(d).read_bytes()),
    "folder with a pickle": lambda d, m: zipped(
        {"config.json": "{}", "pytorch_model.bin": pickle.dumps(Payload(m))}
    ),
    "folder with remote code": lambda d, m: zipped(
        {"config.json": '{"auto_map": {"AutoModel": "evil.Model"}}', "evil.py": "raise SystemExit",
         "model.safetensors": b""}
    ),
    "folder with a path that leaves it": lambda d, m: zipped(
        {"config.json": "{}", "model.safetensors": b"", "../../evil": b"x"}
    ),
    "folder with an absolute path": lambda d, m: zipped({"config.json": "{}", "/evil": b"x"}),
    "zip bomb": lambda d, m: zipped({"config.json": b" " * 50_000_000}, zipfile.ZIP_DEFLATED),
    "zip without an end": lambda d, m: folder_zip()[:-10],
    "safetensors with a huge header": lambda d, m: struct.pack("<Q", 2**62) + b"{",
    "safetensors cut": lambda d, m: safetensors(
        {"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}, b"\0" * 10
    ),
    "safetensors with overlapping tensors": lambda d, m: safetensors(
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, b"\0" * 8
    ),
    "json as deep as the stack": lambda d, m: deep_json(200_000),
    "executable": lambda d, m: b"\x7fELF" + b"\0" * 1000,
    "nothing": lambda d, m: b"",
}  # fmt: skip
DATASETS = {
    "pickle": lambda m: pickle.dumps(Payload(m)),
    "npz of objects": lambda m: npz(x=npy((1,), "|O", pickle.dumps(Payload(m)))),
    "npy header of terabytes": lambda m: npz(x=npy((2**40,))),
    "npy header of negative size": lambda m: npz(x=npy((-1, 4))),
    "npy header with code": lambda m: npz(
        x=b"\x93NUMPY\x01\x00\x46\x00" + f"__import__('os').mkdir({str(m)!r})".encode().ljust(70)
    ),
    "npz bomb": lambda m: zipped({"x.npy": npy((5_000_000,), "<f8", b"\0" * 40_000_000)},
                                 zipfile.ZIP_DEFLATED),
    "npz with a foreign member": lambda m: zipped({"x.npy": npy((0,)), "evil.py": b"x"}),
    "npz cut": lambda m: npz(x=npy((1000,), data=b"\0" * 4000))[:-100],
    "safetensors cut": lambda m: safetensors(
        {"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}
    ),
    "text": lambda m: b"x,y\n1,2\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        yield client


def assert_refused(answer, marker):
    assert answer.status_code in {413, 422}, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.json()["detail"]) > 20
    assert not marker.exists(), "the upload ran code"


@pytest.mark.parametrize("name", MODELS)
def test_model_is_refused(http, digits_files, tmp_path, name):
    marker = tmp_path / "ran"
    data = MODELS[name](digits_files[0], marker)
    assert_refused(http.put("/v1/models", content=data), marker)


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_is_refused(http, tmp_path, name):
    marker = tmp_path / "ran"
    assert_refused(http.put("/v1/datasets", content=DATASETS[name](marker)), marker)


def test_pickled_sample_inputs_are_never_opened(http, digits_files, tmp_path):
    """Every .pt2 carries such a pickle; torch.export.load would run this one."""
    marker = tmp_path / "ran"
    data = edited_pt2(digits_files[0], sample_inputs(pickle.dumps(Payload(marker))))
    model = http.put("/v1/models", content=data)
    assert model.status_code == 201, model.text
    dataset = http.put("/v1/datasets", content=digits_files[1].read_bytes()).json()["id"]
    request = {"budgets": ["3 bits"], "weight_bits": [2, 4], "samples": 16, "holdout_samples": 16}
    order = {"kind": "plan", "model": model.json()["id"], "dataset": dataset}
    order["request"] = request
    job = http.post("/v1/jobs", json=order).json()["id"]
    while (found := http.get(f"/v1/jobs/{job}").json())["status"] in {"queued", "running"}:
        time.sleep(0.1)
    assert found["status"] == "succeeded", found["error"]
    assert not marker.exists(), "the upload ran code"


def test_honest_job_afterwards(server, digits_files):
    model, calibration = digits_files
    request = PlanRequest(budgets=("3 bits",), weight_bits=(2, 4), samples=16, holdout_samples=16,
        effort="quick")  # fmt: skip
    with server.client() as client:
        job = client.submit(model=model, calibration=calibration, request=request)
        assert job.wait(**PATIENTLY).plan().average_bits <= 3


def test_memory_stays_bounded(server, http, digits_files, tmp_path):
    """Refusing everything above once more costs the server no lasting memory."""

    def resident():
        text = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) * 1024

    before = resident()
    for build in MODELS.values():
        http.put("/v1/models", content=build(digits_files[0], tmp_path / "ran"))
    for build in DATASETS.values():
        http.put("/v1/datasets", content=build(tmp_path / "ran"))
    assert resident() - before < 64 * 2**20
