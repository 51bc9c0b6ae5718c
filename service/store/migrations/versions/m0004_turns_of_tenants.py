"""Tenants take turns, and keys have a highest priority."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Go to this form."""
    with op.batch_alter_table("tenants", schema=None) as batch_op:
        batch_op.add_column(sa.Column("served_at", sa.Float(), nullable=True))
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("max_priority", sa.Integer(), server_default="0", nullable=False)
        )
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.create_index("jobs_by_turn", ["status", "tenant", "priority", "id"], unique=False)
        batch_op.create_index("jobs_by_deadline", ["status", "deadline"], unique=False)
        batch_op.drop_index("jobs_to_claim")
        batch_op.drop_index("jobs_of_tenant_by_status")


def downgrade() -> None:
    """Go back."""
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.create_index("jobs_of_tenant_by_status", ["tenant", "status"], unique=False)
        batch_op.create_index("jobs_to_claim", ["status", "priority", "id"], unique=False)
        batch_op.drop_index("jobs_by_deadline")
        batch_op.drop_index("jobs_by_turn")
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.drop_column("max_priority")
    with op.batch_alter_table("tenants", schema=None) as batch_op:
        batch_op.drop_column("served_at")
