"""The trash: adapters that were removed, with everything that puts them back, until their files are freed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "removed_adapters",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("store_key", sa.String(64)),
        sa.Column("entry", sa.JSON(), nullable=False),
        sa.Column("removed_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_removed_adapters"),
    )
    for column in ("name", "sha256", "store_key"):
        op.create_index(f"ix_removed_adapters_{column}", "removed_adapters", [column])


def downgrade() -> None:
    op.drop_table("removed_adapters")
