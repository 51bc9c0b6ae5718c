"""That no kernel is left to be compiled within a call."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import bitquota.solver

_INTERPRETED = """
import json, sys
from bitquota.solver.warm_up import compile_kernels
ran = set()

def note(frame, event, arg):
    if event == "call":
        ran.add((frame.f_globals.get("__name__", ""), frame.f_code.co_name))

sys.setprofile(note)
compile_kernels()
sys.setprofile(None)
print(json.dumps([name for name in ran if name[0].startswith("bitquota.solver.")]))
"""


def test_every_kernel_is_reached():
    """Without a compiler: so calls from kernel to kernel are seen, and nothing lies on disk."""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _INTERPRETED],
        env=environment, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    ran = {tuple(name) for name in json.loads(said)}
    folder = Path(next(iter(bitquota.solver.__path__)))
    kernels = {
        (f"bitquota.solver.{source.stem}", kernel)
        for source in folder.glob("*.py")
        for kernel in re.findall(r"^@compiled\ndef (\w+)", source.read_text(), re.MULTILINE)
    }
    assert len(kernels) > 50
    assert kernels <= ran
