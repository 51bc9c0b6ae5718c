"""What is wrong with a command is said before torch is loaded or a model is read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FACTORIES = ["trained_digits:model", "trained_digits:calibration"]
MODEL = FACTORIES[0]
BUDGET = ["-b", "3 bits"]

FAULTS = [
    (["plan", *FACTORIES], 2, "at least one budget"),
    (["plan", *FACTORIES, "-b", "lots"], 2, "a budget must read like"),
    (["plan", *FACTORIES, "-b", "3 bits + lots"], 2, "a budget must read like"),
    (["plan", *FACTORIES, *BUDGET, "--target", "gpu"], 2, "ort-cpu"),
    (["plan", *FACTORIES, *BUDGET, "--solver", "cplex"], 2, "cp_sat, brute_force"),
    (["plan", "net.pt2", FACTORIES[1], *BUDGET], 2, "'net.pt2' does not exist"),
    (["plan", MODEL, "samples.npz", *BUDGET], 2, "'samples.npz' does not exist"),
    (["plan", MODEL, "text.txt", *BUDGET], 2, "a text needs a tokenizer"),
    (["plan", *FACTORIES, *BUDGET, "--imatrix", "i.dat"], 2, "--imatrix must name"),
    (["plan", *FACTORIES, *BUDGET, "-o", "folder"], 2, "'folder' is a folder"),
    (["plan", *FACTORIES, *BUDGET, "-o", "text.txt/plan.json"], 2, "is no folder"),
    (["plan", *FACTORIES, *BUDGET, "-o", "text.txt"], 2, "is something else"),
    (["plan", *FACTORIES, *BUDGET, "--report", "folder"], 2, "'folder' is a folder"),
    (["plan", *FACTORIES, *BUDGET, "--matrix", "text.txt"], 2, "is something else"),
    (["plan", *FACTORIES, *BUDGET, "--ledger", "text.txt"], 2, "must be an SQLite file"),
    (["measure", *FACTORIES, "--out", "folder"], 2, "'folder' is a folder"),
    (["measure", *FACTORIES, "--target", "gpu"], 2, "ort-cpu"),
    (["compare", *FACTORIES], 2, "at least one budget"),
    (["compare", *FACTORIES, *BUDGET, "--out", "folder"], 2, "'folder' is a folder"),
    (["evaluate", *FACTORIES, "--plan", "none.json"], 2, "'none.json' does not exist"),
    (["evaluate", *FACTORIES, "--exported", "folder"], 2, "receipt.json"),
    (["evaluate", MODEL, "samples.npz"], 2, "'samples.npz' does not exist"),
    (["inspect", "net.pt2"], 2, "'net.pt2' does not exist"),
    (["inspect", MODEL, "--target", "gpu"], 2, "ort-cpu"),
    (["finetune", MODEL, "none.json", FACTORIES[1]], 2, "'none.json' does not exist"),
    (["learn", *FACTORIES, "-b", "lots"], 2, "a budget must read like"),
    (["learn", *FACTORIES, *BUDGET, "--recipe", "magic"], 2, "stabilised, ellipsoid"),
    (["learn", *FACTORIES, *BUDGET, "--out", "text.txt"], 2, "is no folder"),
    (["quickstart", MODEL, "samples.npz", "--yes"], 2, "'samples.npz' does not exist"),
    (["quickstart", *FACTORIES, "--yes", "-b", "lots"], 2, "a budget must read like"),
    (["check", "none.json", "--model", MODEL], 2, "'none.json' does not exist"),
    (["ledger", "import", "none.zip"], 2, "'none.zip' does not exist"),
]

PROGRAM = """
import contextlib, io, json, sys
from bitquota.cli import main

found = []
for arguments in json.load(sys.stdin):
    sys.argv = ["bitquota", *arguments]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    found.append([code, said.getvalue(), "torch" in sys.modules])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Exit code, message, and whether torch was loaded, of every fault, in one process."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "folder").mkdir()
    (folder / "text.txt").write_text("not a plan")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([arguments for arguments, _, _ in FAULTS]),
        capture_output=True,
        text=True,
        cwd=folder,
        env={"XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "200", "PATH": "/usr/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("k", "code", "text"),
    [(k, code, text) for k, (_, code, text) in enumerate(FAULTS)],
    ids=[" ".join(arguments) for arguments, _, _ in FAULTS],
)
def test_is_said_without_torch(answers, k, code, text):
    """One sentence, the documented exit code; the first fault that loads torch fails here."""
    got, said, torch_loaded = answers[k]
    assert got == code, said
    assert text in said
    assert said.count("\n") == 1
    assert not torch_loaded
