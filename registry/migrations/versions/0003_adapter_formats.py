"""Adds facts about adapters of every kind: the format of the files, the number of tensors, the family of models."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

COLUMNS = ("format", "tensor_count", "family")


def upgrade() -> None:
    op.add_column("adapters", sa.Column("format", sa.String(32)))
    op.add_column("adapters", sa.Column("tensor_count", sa.Integer()))
    op.add_column("adapters", sa.Column("family", sa.String(255)))


def downgrade() -> None:
    with op.batch_alter_table("adapters") as table:
        for name in COLUMNS:
            table.drop_column(name)
