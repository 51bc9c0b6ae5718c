"""A real PostgreSQL of its own for a test run: unix socket only, gone afterwards."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path


def find_program(name: str) -> str | None:
    """Return a PostgreSQL program; Debian keeps them out of PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in versions:
        if (folder / name).exists():
            return str(folder / name)
    return shutil.which(name)


class LivePostgres:
    """A throwaway cluster; ``reason`` says why there can be none."""

    def __init__(self) -> None:
        self.reason = ""
        self.initdb, self.pg_ctl = find_program("initdb"), find_program("pg_ctl")
        if self.initdb is None or self.pg_ctl is None:
            self.reason = "PostgreSQL is not installed"
        # PostgreSQL refuses to run as root.
        self.user = None
        if os.geteuid() == 0:
            try:
                self.user = pwd.getpwnam("postgres").pw_name
            except KeyError:
                self.reason = "running as root and there is no user 'postgres'"

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command, user=self.user, cwd="/", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        """Make the cluster and start it."""
        self.folder = Path(tempfile.mkdtemp(prefix="bq-pg-"))
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        self.data = self.folder / "data"
        self._run(self.initdb, "-D", str(self.data), "-U", "tests", "-A", "trust", "--no-sync")
        self.resume()

    def resume(self) -> None:
        """Start the cluster, also after ``crash``."""
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off -c max_connections=200"
        log = str(self.folder / "log")
        self._run(self.pg_ctl, "-D", str(self.data), "-w", "-l", log, "-o", options, "start")

    def crash(self) -> None:
        """End every process of the cluster at once, as a power cut would."""
        self._run(self.pg_ctl, "-D", str(self.data), "-w", "-m", "immediate", "stop")

    def stop(self) -> None:
        """End it and remove everything."""
        self.crash()
        shutil.rmtree(self.folder, ignore_errors=True)

    def new_database(self) -> str:
        """Return the URL of a new empty database."""
        import psycopg

        name = "t" + secrets.token_hex(6)
        with psycopg.connect(
            host=str(self.folder), user="tests", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://tests@/{name}?host={self.folder}"
