import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from bitquota.context import MemoryLedger
from bitquota.errors import InvalidInput
from bitquota.sensitivity.cache import (
    SqliteLedger,
    export_entries,
    import_entries,
    ledger_key,
)
from refusals import refused


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request, tmp_path):
    if request.param == "memory":
        yield MemoryLedger()
    else:
        with SqliteLedger(tmp_path / "ledger.db") as opened:
            yield opened


class TestLedger:
    def test_returns_what_was_put(self, ledger):
        """Shapes and bits survive, missing keys are None."""
        array = np.random.default_rng(0).normal(size=(3, 4)) * 1e-200

        ledger.put("a", array)

        np.testing.assert_array_equal(ledger.get("a"), array)
        assert ledger.get("b") is None
        assert len(ledger) == 1

    def test_many(self, ledger):
        """More keys than one query takes; absent ones are left out."""
        entries = {f"k{i}": np.array([float(i)]) for i in range(1234)}

        ledger.put_many(entries)
        found = ledger.get_many([*entries, "missing"])

        assert set(found) == set(entries)
        assert found["k777"].tolist() == [777.0]

    def test_first_value_stays(self, ledger):
        """A measurement is never replaced."""
        ledger.put("a", np.array([1.0]))
        ledger.put("a", np.array([2.0]))

        assert ledger.get("a").tolist() == [1.0]

    def test_all_or_nothing(self, ledger):
        """A transaction with a bad entry leaves nothing behind."""
        with refused(InvalidInput, key="b"):
            ledger.put_many({"a": np.array([1.0]), "b": np.array([np.nan])})

        assert len(ledger) == 0


class TestSqliteLedger:
    def test_another_file_is_refused(self, tmp_path):
        """A file that is no SQLite database is not overwritten."""
        path = tmp_path / "x.db"
        path.write_text("not a database at all, but quite long " * 100)
        with pytest.raises(InvalidInput, match="SQLite file"):
            SqliteLedger(path)
        assert path.read_text().startswith("not a database")

    def test_two_connections_write_at_once(self, tmp_path):
        """Writers wait for each other; readers see whole transactions."""
        path = tmp_path / "l.db"
        SqliteLedger(path).close()

        def write(name):
            with SqliteLedger(path) as own:
                for i in range(50):
                    own.put_many({f"{name}{i}{part}": np.ones(8) for part in "xy"})

        threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        with SqliteLedger(path) as reader:
            while any(thread.is_alive() for thread in threads):
                assert len(reader) % 2 == 0
            for thread in threads:
                thread.join()
            assert len(reader) == 200

    def test_survives_kill(self, tmp_path):
        """After SIGKILL in the middle of writing, every committed transaction is whole."""
        path = tmp_path / "l.db"
        script = (
            "import sys, numpy as np\n"
            "from pathlib import Path\n"
            "from bitquota.sensitivity.cache import SqliteLedger\n"
            f"ledger = SqliteLedger(Path({str(path)!r}))\n"
            "for i in range(10**6):\n"
            "    ledger.put_many({f'{i}-{k}': np.full(500, float(i)) for k in range(20)})\n"
            "    print(i, flush=True)\n"
        )
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            for line in process.stdout:
                if int(line) == 25:
                    os.kill(process.pid, signal.SIGKILL)
                    break
            process.wait()
        with SqliteLedger(path) as ledger:
            keys = ledger.keys()
            assert len(keys) >= 26 * 20
            assert len(keys) % 20 == 0
            assert all((ledger.get(f"{i}-19") == float(i)).all() for i in range(26))


class TestLedgerKey:
    def test_depends_on_content_only(self):
        """Key order does not matter, values do."""
        assert ledger_key({"a": 1, "b": [2]}) == ledger_key({"b": [2], "a": 1})
        assert ledger_key({"a": 1}) != ledger_key({"a": 2})


class TestExportEntries:
    def test_round_trip_is_exact_and_byte_stable(self, tmp_path):
        """Two ledgers filled in another order export the same bytes, and import gives them back."""
        arrays = {f"sha256:{k:064x}": np.random.default_rng(k).normal(size=k) for k in range(1, 20)}
        files = []
        for name, keys in (("a", list(arrays)), ("b", list(reversed(arrays)))):
            with SqliteLedger(tmp_path / f"{name}.db") as ledger:
                for key in keys:
                    ledger.put(key, arrays[key])
                assert export_entries(ledger, tmp_path / name) == 19
            files.append((tmp_path / name).read_bytes())
        again = MemoryLedger()

        assert files[0] == files[1]
        assert import_entries(again, tmp_path / "a") == 19
        assert all((again.get(key) == array).all() for key, array in arrays.items())

    def test_what_is_there_stays(self, tmp_path):
        """An import never replaces a measurement."""
        with SqliteLedger(tmp_path / "l.db") as ledger:
            ledger.put("k", np.array([1.0]))
            export_entries(ledger, tmp_path / "out")
        own = MemoryLedger()
        own.put("k", np.array([2.0]))
        import_entries(own, tmp_path / "out")

        assert own.get("k").tolist() == [2.0]

    @pytest.mark.parametrize("damage", ["cut", "text", "other", "missing"])
    def test_a_damaged_archive_adds_nothing(self, tmp_path, damage):
        """All entries or none."""
        path = tmp_path / "out"
        with SqliteLedger(tmp_path / "l.db") as ledger:
            ledger.put_many({f"k{i}": np.ones(100) for i in range(5)})
            export_entries(ledger, path)
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:900])
        elif damage == "text":
            path.write_text("nothing")
        elif damage == "other":
            np.savez(path.with_suffix(".npz"), x=np.zeros(3))
            path.with_suffix(".npz").replace(path)
        else:
            path.unlink()
        own = MemoryLedger()
        with pytest.raises(InvalidInput, match="'bitquota ledger export' writes") as caught:
            import_entries(own, path)
        assert not any(word in str(caught.value) for word in ("entries", "b'", "Error"))
        assert len(own) == 0
