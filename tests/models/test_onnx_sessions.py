"""Sessions of ONNX Runtime: what they share."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from bitquota.models.onnx.sessions import make_session

MIB = 2**20


def chain():
    """A chain whose every value is as large as its input."""
    nodes = [helper.make_node("Relu", [f"v{k}"], [f"v{k + 1}"]) for k in range(3)]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, 4]) for n in ("v0", "v3")]
    graph = helper.make_graph(nodes, "chain", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def resident_bytes():
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def test_twenty_sessions_keep_the_memory_of_one():
    """Each pass takes two values of 16 MiB; arenas of their own would keep 640 MiB."""
    x = np.zeros((MIB, 4), np.float32)
    onnx.checker.check_model(chain())
    sessions = [make_session(chain(), optimize=False) for _ in range(20)]
    before = resident_bytes()
    for session in sessions:
        session.run(None, {"v0": x})
    assert resident_bytes() - before < 200 * MIB


class MallocInfo(ctypes.Structure):
    """What glibc says of its memory, ``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    )  # fmt: skip


def grow_by_a_large_tensor():
    """Return how much of a new tensor lies outside of the heap, and how large it is."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallocInfo
    make_session(chain())
    torch.empty(
        16 * MIB, dtype=torch.uint8
    )  # from here on glibc would take half of it from the heap
    before = libc.mallinfo2().hblkhd
    tensor = torch.empty(8 * MIB, dtype=torch.uint8)
    return libc.mallinfo2().hblkhd - before, len(tensor)


def test_large_tensors_stay_out_of_the_heap():
    """Sessions would break up the places that they leave there.

    In a process of its own: where others left large places in the heap, those are used first.
    """
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("malloc is not that of glibc")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    outside, size = map(int, done.stdout.split())
    assert outside >= size


if __name__ == "__main__":
    sys.stdout.write(" ".join(map(str, grow_by_a_large_tensor())))
