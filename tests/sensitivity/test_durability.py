"""A measurement is killed again and again, and ends with the same bits."""

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.pairs import measure_pairs
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of
from waiting import wait_for

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from sensitivity_networks import *
from bitquota.sensitivity.cache import SqliteLedger
from bitquota.context import Context
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.pairs import measure_pairs
from bitquota.sensitivity.runners.make import make_runner

log = open({log!r}, "a", buffering=1)

class Logging(SqliteLedger):
    def put_many(self, entries):
        super().put_many(entries)
        log.write("".join(key + "\\n" for key in entries))
        time.sleep(0.01)  # long enough for a kill to strike in the middle of the measurement

module = build(Residual)
runner = make_runner(module, inventory_of(module), samples(Residual), chunk_size=2, engine="eager")
print("ready", flush=True)
with Logging(Path({ledger!r})) as ledger:
    context = Context(ledger=ledger)
    table = table_of(runner.inventory)
    matrix = measure_pairs(runner, table, loss_by_name("kl"), context=context)
matrix.save(Path({result!r}))
"""


@pytest.mark.slow
class TestKill:
    def test_nothing_committed_is_measured_twice(self, tmp_path):
        """SIGKILL at random moments; the matrix equals that of an undisturbed measurement."""
        module = build(Residual)
        runner = make_runner(
            module, inventory_of(module), samples(Residual), chunk_size=2, engine="eager"
        )
        expected = measure_pairs(runner, table_of(runner.inventory), loss_by_name("kl"))
        files = {name: str(tmp_path / name) for name in ("log", "ledger", "result")}
        script = SCRIPT.format(tests=str(TESTS), **files)
        moments, kills = np.random.default_rng(0), 0

        def logged():
            log = Path(files["log"])
            return log.read_text().split() if log.exists() else []

        for _ in range(12):
            command = [sys.executable, "-c", script]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                assert process.stdout.readline() == b"ready\n"
                if kills < 2:
                    wanted = len(logged()) + int(moments.integers(1, 6))
                    wait_for(
                        lambda n=wanted, p=process: len(logged()) >= n or p.poll() is not None,
                        "a few measurements",
                    )
                    process.kill()
                process.wait()
                kills += process.returncode == -signal.SIGKILL
            if Path(files["result"]).exists():
                break

        measured = Counter(logged())
        assert kills >= 1
        assert Path(files["result"]).read_bytes() == expected.to_bytes()
        # A shard that was committed right before the kill may be missing in the log, never twice.
        assert set(measured.values()) == {1}
