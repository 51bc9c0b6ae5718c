"""What alembic runs; it works on the connection that it is handed."""

from __future__ import annotations

from alembic import context

from bitquota.service.store.database import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
