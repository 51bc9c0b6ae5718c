"""Jobs of further kinds: inputs beside model and dataset, and the size of results."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Go to this form."""
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("inputs", sa.Text(), server_default="{}", nullable=False))
        batch_op.add_column(
            sa.Column("result_bytes", sa.BigInteger(), server_default="0", nullable=False)
        )
        batch_op.create_index("jobs_of_tenant_by_end", ["tenant", "finished_at"], unique=False)
        batch_op.create_index(
            "jobs_of_tenant_with_results",
            ["tenant", "result_bytes"],
            unique=False,
            sqlite_where=sa.text("result_bytes > 0"),
            postgresql_where=sa.text("result_bytes > 0"),
        )


def downgrade() -> None:
    """Go back."""
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("jobs_of_tenant_with_results")
        batch_op.drop_index("jobs_of_tenant_by_end")
        batch_op.drop_column("result_bytes")
        batch_op.drop_column("inputs")
