"""Time exported files in their runtime: ``python time_files.py FOLDER``, also without bitquota.

``bitquota profile --files`` writes the folder: files that differ in the bit-widths of their layers,
the input that they are run on, ``files.json`` that names them, and a copy of this script. On the
machine where the model will run, Python, numpy and the runtime are enough; the result,
``times.json``, goes back to ``bitquota profile --times``.

All files are loaded, and run in turn, in another random order each round: after one run that is not
counted, the fastest of three. With one thread the process's own processor time is taken instead of
the time of day, because a run then never waits for anything but the processor, and other processes
do not count. Times are written down in their order, so that what slows the machine down for a while
can be told from what a file takes.

Design: docs/design/latency.md
"""

from __future__ import annotations

import json
import platform
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[[], object]

ROUNDS, RUNS, MORE = 40, 3, 3
MOST_LOADED_BYTES = 2**30
"""Bytes of files up to which all of them stay loaded; else each is loaded anew, in fewer rounds."""


def onnxruntime_run(path: Path, options: dict[str, str], threads: int, inputs: list[Any]) -> Run:
    """Return a function that runs an ONNX file."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    for key, value in options.items():
        settings.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    feed = {given.name: inputs[k] for k, given in enumerate(session.get_inputs())}
    return lambda: session.run(None, feed)


def openvino_run(path: Path, options: dict[str, str], threads: int, inputs: list[Any]) -> Run:
    """Return a function that runs an OpenVINO IR."""
    import openvino as ov

    given = {**options, "INFERENCE_NUM_THREADS": str(threads), "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(str(path), "CPU", given).create_infer_request()
    return lambda: request.infer(inputs)


RUNTIMES = {"onnxruntime": onnxruntime_run, "openvino": openvino_run}


def device_name() -> str:
    """Return what the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def time_files(folder: Path, rounds: int) -> dict[str, Any]:
    """Return ``times.json`` of a folder: numbers of files and nanoseconds of a run, in order."""
    order = json.loads((folder / "files.json").read_text())
    threads = order["threads"]
    with np.load(folder / "inputs.npz") as arrays:
        inputs = [arrays[f"x{k}"] for k in range(len(arrays.files))]
    clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
    paths = [folder / name for name in order["files"]]

    def load(path: Path) -> Run:
        run = RUNTIMES[order["runtime"]](path, order["options"], threads, inputs)
        run()
        return run

    held = sum(f.stat().st_size for path in paths for f in path.parent.iterdir())
    loaded = [load(path) for path in paths] if held <= MOST_LOADED_BYTES else []
    rounds = rounds if loaded else max(4, rounds // 5)
    times = []
    shuffled = random.Random(0)  # noqa: S311  # no secret
    # The last ones show how good predictions are: each by itself, so they are timed more often.
    turns = list(range(len(paths))) + list(range(len(paths) - order["checked"], len(paths))) * MORE
    for _ in range(rounds):
        for k in shuffled.sample(turns, len(turns)):
            run = loaded[k] if loaded else load(paths[k])
            run()
            spent = []
            for _ in range(RUNS):
                start = clock()
                run()
                spent.append(clock() - start)
            times.append([k, min(spent)])
    runtime = __import__(order["runtime"])
    return {
        "schema": "bitquota/times/1",
        "device": device_name(),
        "runtime": {
            "name": order["runtime"],
            "version": runtime.__version__,
            "options": order["options"],
        },
        "threads": threads,
        "clock": "processor" if threads == 1 else "wall",
        "digest": order["digest"],
        "times": times,
    }


def main() -> None:
    """Time the files of the folder that the command line names."""
    if len(sys.argv) not in {2, 3}:
        sys.exit("usage: python time_files.py FOLDER [ROUNDS]")
    folder = Path(sys.argv[1])
    found = time_files(folder, int(sys.argv[2]) if len(sys.argv) > 2 else ROUNDS)
    (folder / "times.json").write_text(json.dumps(found) + "\n")
    sys.stdout.write(f"wrote {folder / 'times.json'}\n")


if __name__ == "__main__":
    main()
