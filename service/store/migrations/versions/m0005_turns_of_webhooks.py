"""Webhooks are delivered in turns of tenants, a few at a time to each host."""

from __future__ import annotations

from urllib.parse import urlsplit

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Go to this form."""
    with op.batch_alter_table("deliveries", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("host", sa.String(length=255), server_default="", nullable=False)
        )
        batch_op.drop_index("deliveries_due")
        batch_op.create_index(
            "deliveries_by_turn",
            ["tenant", "next_at"],
            unique=False,
            sqlite_where=sa.text("next_at IS NOT NULL"),
            postgresql_where=sa.text("next_at IS NOT NULL"),
        )
    connection = op.get_bind()
    rows = connection.execute(
        sa.text("SELECT id, url FROM deliveries WHERE next_at IS NOT NULL")
    ).all()
    for row in rows:
        connection.execute(
            sa.text("UPDATE deliveries SET host = :host WHERE id = :id"),
            {"id": row.id, "host": (urlsplit(row.url).hostname or "").removesuffix(".")[:255]},
        )


def downgrade() -> None:
    """Go back."""
    with op.batch_alter_table("deliveries", schema=None) as batch_op:
        batch_op.drop_index("deliveries_by_turn")
        batch_op.create_index("deliveries_due", ["next_at"], unique=False)
        batch_op.drop_column("host")
