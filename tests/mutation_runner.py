"""Reads mutated files in a process of its own, whose audit hook sees whatever would be executed.

``python tests/mutation_runner.py FOLDER FIRST COUNT`` mutates the valid files of ``FOLDER``
(written by ``write_valid_files``) with the seeds from ``FIRST`` on, inspects each as the service
does, loads it as a job does, runs what could be loaded, and prints a JSON summary. To read 20,000
files: ``python tests/mutation_runner.py --fresh 0 20000``.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

MEMORY_BYTES = 8 * 2**30
"""Address space of the process: what a mutated shape asks for beyond it is a clear refusal."""

_FORBIDDEN = (
    "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile",
    "pty.", "socket.", "ctypes.", "pickle.", "shutil.", "os.remove", "os.rename", "os.mkdir",
    "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.putenv",
    "os.kill", "urllib.", "http.", "ftplib.", "smtplib.", "tempfile.", "mmap.", "code.__new__",
    "function.__new__", "sys.addaudithook", "sys.settrace", "sys.setprofile", "builtins.input",
    "webbrowser.", "sqlite3.", "glob.", "os.listdir", "os.scandir", "os.walk", "fcntl.", "signal.",
)  # fmt: skip
"""Audit events that reading a model never needs."""


class Audit:
    """Collects forbidden events while it is armed. An audit hook can never be removed."""

    def __init__(self) -> None:
        self.armed = False
        self.input = ""
        self.found: list[str] = []
        self._code = tuple({sys.prefix, sys.base_prefix, str(Path(__file__).parent.parent)})
        self._modules = {name.partition(".")[0] for name in sys.modules}
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "open":
            path, mode = str(arguments[0]), str(arguments[1] or "r")
            mine = path == self.input or path.startswith(self._code)  # also modules on first use
            bad = not mine or any(letter in mode for letter in "wax+")
        elif event == "exec":
            bad = not str(getattr(arguments[0], "co_filename", "")).startswith(self._code)
        elif event == "compile":
            # ast.parse and ast.literal_eval compile to a tree, under this name; nothing runs it.
            bad = arguments[1] != "<unknown>" and not str(arguments[1]).startswith(self._code)
        elif event == "import":
            bad = str(arguments[0]).partition(".")[0] not in self._modules
        else:
            bad = event.startswith(_FORBIDDEN)
        if bad:
            self.found.append(f"{event} {arguments!r:.200}")


def write_valid_files(folder: Path) -> None:
    """Write the files that are mutated: images and tokens, in every format."""
    import numpy as np
    import torch
    from safetensors.numpy import save_file

    from format_networks import tiny_net, write_llama, write_pt2
    from onnx_graphs import image_graph, token_graph

    from bitquota.models.huggingface import load_folder_module  # isort: skip

    rng = np.random.default_rng(0)
    image = rng.normal(size=(4, 3, 8, 8)).astype(np.float32)
    ids = rng.integers(0, 32, (4, 9))
    llama = load_folder_module(write_llama(folder / "llama"))
    write_pt2(tiny_net(), (torch.from_numpy(image),), folder / "image.pt2")
    write_pt2(llama, (torch.from_numpy(ids),), folder / "tokens.pt2")
    image_graph(folder / "image.onnx")
    token_graph(folder / "tokens.onnx")
    for name, x in (("image", image), ("tokens", ids)):
        members = {"x": x, "labels": np.arange(4)}
        np.savez(folder / f"{name}.npz", **members)
        save_file(members, folder / f"{name}.safetensors")


def run(folder: Path, first: int, count: int) -> dict[str, Any]:
    """Read mutated files and return what became of them.

    Returns:
        ``counts`` (``KIND refused|loaded|ran`` to number), ``violations`` and ``crashes`` (seed
        and what happened, both empty if all is well), ``worst_s`` and ``worst``, ``peak_mib``.
    """
    import onnx.reference  # noqa: F401  # imported when a constant of a graph is computed

    from mutations import SUFFIXES, mutate

    files = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES)
    valid = {file: file.read_bytes() for file in files}
    samples = {file.stem: _read(file, {}) for file in files if file.suffix == ".npz"}
    for file in files:  # imports whatever reading imports
        _read(file, samples)
    audit = Audit()
    counts: Counter[str] = Counter()
    violations, crashes = [], []
    worst = (0.0, "")
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(first, first + count):
            file = files[seed % len(files)]
            target = Path(scratch) / f"{file.stem}{file.suffix}"
            target.write_bytes(mutate(valid[file], file.suffix, seed))
            sys.stderr.write(f"{seed}\n")  # what was read last if the process dies
            audit.input, audit.found = str(target), []
            start = time.perf_counter()
            audit.armed = True
            try:
                outcome = _outcome(target, samples)
            except Exception:  # noqa: BLE001  # every one of them is a finding
                audit.armed = False
                outcome = "crashed"
                crashes.append((seed, file.name, traceback.format_exc()[-1500:]))
            audit.armed = False
            worst = max(worst, (time.perf_counter() - start, f"{seed} {file.name} {outcome}"))
            counts[f"{file.suffix} {outcome}"] += 1
            if audit.found:
                violations.append((seed, file.name, audit.found[:3]))
    return {
        "counts": dict(sorted(counts.items())),
        "violations": violations,
        "crashes": crashes,
        "worst_s": round(worst[0], 3),
        "worst": worst[1],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _outcome(target: Path, samples: dict[str, Any]) -> str:
    """Return ``refused``, ``loaded`` (but not run) or ``ran``; any other exception is a bug."""
    from bitquota.errors import BitquotaError, InvalidCalibration

    try:
        _read(target, samples)
    except InvalidCalibration:
        return "loaded" if target.suffix in (".pt2", ".onnx") else "refused"
    except BitquotaError:
        return "refused"
    return "ran"


def _read(file: Path, samples: dict[str, Any]) -> Any:  # a calibration set or a model
    """Inspect as the service does, load as a job does, and run a model on two samples."""
    from bitquota.errors import BitquotaError
    from bitquota.models.load import load_model
    from bitquota.models.samples import check_calibration, load_calibration
    from bitquota.service.security.upload_inspection import inspect_dataset, inspect_model

    refusal = None
    try:
        if file.suffix in (".pt2", ".onnx"):
            inspect_model(file, max_ratio=200)
        else:
            inspect_dataset(file, max_ratio=200, max_bytes=2**30)
    except BitquotaError as err:
        refusal = err
    # The command line loads without the service's inspection: each must hold alone.
    if file.suffix in (".npz", ".safetensors"):
        loaded: Any = load_calibration(str(file))
    else:
        loaded = load_model(str(file))
        if file.stem in samples:
            check_calibration(loaded, samples[file.stem])
    if refusal is not None:
        raise refusal
    return loaded


def main() -> None:
    """Run from the command line."""
    sys.path.insert(0, str(Path(__file__).parent))
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    folder, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if folder == "--fresh":
        with tempfile.TemporaryDirectory() as fresh:
            write_valid_files(Path(fresh))
            result = run(Path(fresh), first, count)
    else:
        result = run(Path(folder), first, count)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
