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


def downgrade() -> None:
    """Go back."""
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("result_bytes")
        batch_op.drop_column("inputs")
