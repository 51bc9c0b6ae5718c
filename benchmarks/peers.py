"""Other tools beside ours, in one run: ``make bench-peers``, or ``python benchmarks/peers.py``.

auto-round, GPTQModel, NVIDIA's Model Optimizer and Model Compression Toolkit get an environment of
their own, ``build/peers``, at the versions of ``benchmarks/peers.txt``; llama.cpp comes with the
extra ``llama-cpp``. Each part is one of the other benchmarks, run as a command of its own:

* ``rounding``: weights of a language model at one width, as each tool rounds them;
* ``widths``: which layer gets how many bits, for a language model, under our rounding;
* ``images``: the same for ResNet-20, with Model Optimizer and Model Compression Toolkit;
* ``files``: GGUF files of equal size by llama.cpp's own quantizer.

Everything is printed, and kept in ``build/peers.md`` with the commands, the tools' versions,
processor seconds and peak memory of each part. Differences are paired over samples, with standard
errors. Needs the networks of ``$BITQUOTA_DATA``; where a part fails, for want of a tool or of data,
it says so, and the exit status is 1. ``--small`` only shows that it runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]
WANTED = ROOT / "benchmarks" / "peers.txt"
FULL = {
    "rounding": "rounding.py --model llama --samples 128 --test-windows 300 --cases "
    "'uniform 2 g64,uniform 3 g64,uniform 4 g128' --roundings "
    "learned,qep,auto-round,auto-round-rtn,gptqmodel --peers PEERS",
    "widths": "language_models.py --budgets '3 bits,4 bits' --efforts quick,normal --peers PEERS",
    "images": "portfolio.py --depth 20 --draws 0 --efforts quick --budgets 2.5 --alone "
    "--peers modelopt,mct --peers-from PEERS",
    "files": "llama_cpp.py",
}
"""Commands of the parts; PEERS stands for the interpreter of the tools' environment."""

SMALL = {
    "rounding": "rounding.py --model llama --samples 8 --length 32 --test-windows 8 --cases "
    "'uniform 3 g64' --roundings qep,auto-round-rtn,gptqmodel --peers PEERS",
    "widths": "language_models.py --budgets '4 bits' --efforts quick --samples 8 --length 32 "
    "--test-windows 4 --peers PEERS",
    "images": "portfolio.py --tiny --efforts quick --budgets 3.0 --alone --peers modelopt "
    "--peers-from PEERS",
    "files": "llama_cpp.py --quantizer-only",
}


def tools() -> list[str]:
    """Return the packages of ``WANTED`` with their versions; what only helps one is indented."""
    return [line for line in WANTED.read_text().splitlines() if line and line[0] != "#"]


def environment(folder: Path) -> Path:
    """Return the interpreter of the environment of tools; installs what is missing."""
    python = folder / "bin" / "python"
    stamp = folder / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != WANTED.read_text():
        print(f"Installing {WANTED.relative_to(ROOT)} into {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        # Some of them build themselves against the torch that is there, and one asks for another.
        wanted = [tool.strip() for tool in tools()]
        torch = next(tool for tool in wanted if tool.startswith("torch=="))
        apart = [tool for tool in wanted if tool.startswith("GPTQModel")]
        others = [tool for tool in wanted if tool not in apart]
        subprocess.run([*install, "setuptools", "wheel", "numpy", torch], check=True)
        subprocess.run([*install, "--no-build-isolation", *others], check=True)
        subprocess.run([*install, "--no-build-isolation", "--no-deps", *apart], check=True)
        stamp.write_text(WANTED.read_text())
    return python


def command(line: str, python: Path) -> list[str]:
    """Return the arguments of a part's command."""
    script, *rest = shlex.split(line)
    given = [str(python) if word == "PEERS" else word for word in rest]
    return [sys.executable, str(ROOT / "benchmarks" / script), *given]


def spent() -> tuple[float, float]:
    """Return processor seconds of all commands so far, and the largest peak in GB."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6


def run(words: list[str], say: Callable[[str], None]) -> bool:
    """Run one part and pass its lines on; returns whether it ended well."""
    before, begun = spent()[0], time.monotonic()
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    ) as process:
        assert process.stdout is not None  # opened with a pipe
        for line in process.stdout:
            say(line.rstrip("\n"))
    seconds, peak = spent()
    say(
        f"exit status {process.returncode}; {seconds - before:.0f} CPU s in "
        f"{time.monotonic() - begun:.0f} s, peak of all parts so far {peak:.2f} GB"
    )
    return process.returncode == 0


def main() -> int:
    """Install, run, keep what was said."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="only shows that it runs")
    parser.add_argument("--only", choices=FULL, nargs="*", help="these parts")
    parser.add_argument("--python", type=Path, help="of an environment that has the tools")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "peers.md")
    asked = parser.parse_args()
    python = asked.python or environment(ROOT / "build" / "peers")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    parts = SMALL if asked.small else FULL
    good = True
    with asked.out.open("w") as file:

        def say(line: str) -> None:
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        try:
            ours = version("bitquota")
        except PackageNotFoundError:
            ours = "of this folder"
        load = os.getloadavg()[0]
        beside = ", ".join(tool for tool in tools() if tool[0] != " ")
        say(f"# bitquota {ours} beside {beside}")
        say(f"\n{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the beginning\n")
        for name in asked.only or parts:
            words = command(parts[name], python)
            say(f"## {name}\n\n    {shlex.join(words)}\n\n```")
            good &= run(words, say)
            say("```\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
