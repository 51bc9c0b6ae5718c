"""Bring a database to the newest schema with alembic, or one step back, in one transaction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

_LOCK = 7281001
"""Number of the PostgreSQL advisory lock under which servers migrate one after another."""


def configuration(connection: Connection) -> Config:
    """Return an alembic configuration that works on ``connection`` and needs no file."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("file_template", "m%%(rev)s_%%(slug)s")
    config.attributes["connection"] = connection
    return config


def upgrade(connection: Connection) -> None:
    """Run every migration that is missing.

    Raises:
        InvalidInput: A later release has been here, whose form this one does not know.
    """
    _lock(connection)
    config = configuration(connection)
    current = revision(connection)
    known = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        msg = (
            f"the database must have a form that this release knows; it has form {current} of a "
            f"later one, and {max(known)} is the newest known here: start that release, or go "
            "back with its 'bitquota admin downgrade'"
        )
        raise InvalidInput(msg, revision=current)
    command.upgrade(config, "head")


def downgrade(connection: Connection) -> tuple[str, str]:
    """Go back by one form; returns the form before and that after.

    Raises:
        InvalidInput: There is none before this one.
    """
    _lock(connection)
    before = revision(connection)
    config = configuration(connection)
    script = ScriptDirectory.from_config(config)
    step = None if before is None else script.get_revision(before)
    if step is None or not isinstance(step.down_revision, str):
        msg = f"a database can go back to a form before its own; form {before} is the first"
        raise InvalidInput(msg)
    command.downgrade(config, "-1")
    return step.revision, step.down_revision


def revision(connection: Connection) -> str | None:
    """Return the form that a database has, or ``None`` before the first."""
    return MigrationContext.configure(connection).get_current_revision()


def _lock(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
