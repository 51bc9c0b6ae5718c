"""Sessions of the pages that were signed out before their end."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Go to this form."""
    op.create_table(
        "ended_sessions",
        sa.Column("nonce", sa.String(length=32), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("nonce"),
    )


def downgrade() -> None:
    """Go back."""
    op.drop_table("ended_sessions")
